"""`mechmerge gate`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option
from mechmerge.errors import visible


@click.command()
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.argument("gate", type=click.Path(path_type=Path))
@click.option("--model", help="The model judged by rules that name none (default: the gate file's).")
@click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the model to be accepted: an evaluation of other weights is refused.",
)  # fmt: skip
@format_option
def command(evaluation: Path, gate: Path, model: str | None, weights: Path | None, output: str) -> None:
    """Check the rules of GATE, a YAML file, against EVALUATION, the file that `mechmerge evaluate` wrote.

    Exit code 0 when every rule passes, 3 when one fails or cannot be checked.
    """
    from mechmerge.artifacts import read_document, sha256_file
    from mechmerge.errors import GateRefused, InputError
    from mechmerge.evaluate.gate import Gate, check_asked, check_gate
    from mechmerge.evaluate.record import Evaluation
    from mechmerge.models.references import resolve

    rules = read_document(Gate, gate)
    bound = None
    if weights is not None:
        name = model or rules.model
        if name is None:
            raise InputError(
                "--weights", expected="a judged model", found="none", fix="pass --model, or name it in the gate file"
            )
        check_asked("--weights", [name], rules, model)
        bound = {name: resolve(str(weights)).id}
    result = check_gate(read_document(Evaluation, evaluation), rules, model, weights=bound)
    result = result.model_copy(update={"evaluation": sha256_file(evaluation)})
    if output == "json":
        click.echo(result.model_dump_json(indent=1))
    else:
        for rule in result.rules:
            click.echo(visible(rule.line))
    if not result.passed:
        worst = result.failed[0]
        short = worst.problem or f"{worst.found:.3f}, short by {worst.short_by:.3f}"
        raise GateRefused(
            f"gate {gate}: {len(result.failed)} of {len(result.rules)} rules failed", expected=worst.rule, found=short
        )
