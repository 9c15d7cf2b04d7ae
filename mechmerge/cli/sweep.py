"""`mechmerge sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    device_option,
    format_option,
    make_progress,
    quiet_option,
    set_threads,
    show,
    threads_option,
)


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--vary", "varied", multiple=True, required=True, metavar="NAME=VALUE,VALUE…[,NAME=…]",
    help="policy, experts (all, pairs, subsets, A+B), seeds=N or a policy's parameter, such as budget; repeat for more.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The sweep's folder.")
@click.option(
    "--split", type=click.Choice(["develop", "test"]), default="develop", show_default=True,
    help="Prompts of formats, arithmetic and code. Ranking is choosing: the test split is for what was chosen, and develop"
    " refuses ifeval, ifbench and tasks of lm-eval. A file has no splits.",
)  # fmt: skip
@device_option
@threads_option
@quiet_option
@format_option
def command(
    pipeline: Path, varied: tuple[str, ...], out: Path, split: Any, device: str, threads: int | None, quiet: bool, output: str
) -> None:
    """Merge and evaluate every combination of experts, policies and parameters of a PIPELINE, ranked by its gate.

    For example `--vary policy=conflict,ties,density=0.2,0.5 --vary experts=pairs,all`. A parameter is varied for the
    policies that have it (what rounds are measured with is the pipeline's). Localization is made once, equal weights
    share their answers, and a sweep that was interrupted goes on when it is called again.
    """
    from mechmerge.pipeline.sweep import parse_vary, run_sweep

    vary = parse_vary(varied)
    set_threads(threads)
    sweep, _ = run_sweep(pipeline, vary, out, split=split, progress=make_progress(quiet), device=device)
    if output == "json":
        click.echo(sweep.model_dump_json(indent=1))
        return
    rows = [
        {"rank": row.rank, "merge": row.variant.name, "gate": "passed" if row.gate.passed else _short(row)}
        | {name: f"{value:.3f}" for name, value in row.metrics.items()}
        for row in sweep.ranking
    ]
    show(rows, "table", f"{sweep.split} split; recipes under {out}")


def _short(row: Any) -> str:
    missing = sum(rule.short_by or 0.0 for rule in row.gate.failed)
    unchecked = sum(rule.short_by is None for rule in row.gate.failed)
    return f"failed {len(row.gate.failed)}, short by {missing:.3f}" + (f", {unchecked} unchecked" if unchecked else "")
