"""`mechmerge compare`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import make_progress, quiet_option
from mechmerge.cli.evaluate import plain_name, print_evaluation, table_options


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="A.json B.json…", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--against", multiple=True, metavar="NAME", help="Compare the others with this model; repeat (default: every pair)."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the comparison as an evaluation file.")
@quiet_option
@table_options
def command(
    files: tuple[Path, ...], against: tuple[str, ...], out: Path | None, quiet: bool, output: str, chart: Path | None
) -> None:
    """Compare models of one or more evaluation files, paired on the same prompts.

    Refused where a suite's prompts or decoding settings differ; suites that not every file has are left out, and said. A model
    that several files hold alike stands once; another one of its name is FILE.MODEL.
    """
    from mechmerge.artifacts import read_document
    from mechmerge.errors import InputError
    from mechmerge.evaluate.compare import compare
    from mechmerge.evaluate.record import Evaluation

    loaded: dict[str, Evaluation] = {}
    for path in files:
        name = plain_name(path.parent.name if path.stem == "evaluation" and path.parent.name else path.stem)
        if name in loaded:
            raise InputError(str(path), expected="files of different names", found=f"a second {name}")
        loaded[name] = read_document(Evaluation, path)
    result = compare(loaded, against, make_progress(quiet))
    if out is not None:
        result.write(out)
    print_evaluation(result, output, chart)
