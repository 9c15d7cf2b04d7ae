"""`mechmerge export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import check_beside, format_option, make_progress, quiet_option, set_threads, show, threads_option

if TYPE_CHECKING:
    from mechmerge.merge.export import Export


@click.command()
@click.argument("recipe")
@click.option("--as", "form", type=click.Choice(["lora", "expert"]), required=True,
              help="lora: a peft adapter of the base; expert: one masked expert as a full checkpoint.")  # fmt: skip
@click.option("--rank", type=click.IntRange(1), help="lora: the largest rank of a module (each takes what it needs).")
@click.option("--expert", metavar="NAME", help="This expert of the recipe alone (needed for --as expert).")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="The new folder (default: lora-RANK or expert beside the recipe, the expert's name behind it).")  # fmt: skip
@click.option("--model", "models", multiple=True, metavar="NAME=MODEL",
              help="Where a model lies: base, an expert's name or its reference (default: where it last was).")  # fmt: skip
@threads_option
@quiet_option
@format_option
def command(
    recipe: str,
    form: str,
    rank: int | None,
    expert: str | None,
    out: Path | None,
    models: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    output: str,
) -> None:
    """Write RECIPE, or one of its experts, for other tools: as a LoRA adapter, or as a masked expert.

    As an adapter, what is added to a linear layer is exact where it is at most RANK rows or columns (neurons, heads), else
    the nearest of that rank; the error of every tensor is printed and stands in export.json. Norms, biases and
    embeddings that change are carried whole. peft loads it (PeftModel.from_pretrained), and so does mechmerge: BASE+OUT.
    """
    if form == "lora" and rank is None:
        raise click.UsageError("--as lora needs --rank.")
    if form == "expert" and (rank is not None or expert is None):
        raise click.UsageError("--as expert takes --expert NAME and no --rank.")
    if out is None:
        check_beside(recipe)
    from mechmerge.cli.models import open_folders
    from mechmerge.merge.engine import merge
    from mechmerge.merge.export import export_lora
    from mechmerge.models.hub_files import local_file

    folders, progress = open_folders(models), make_progress(quiet)
    set_threads(threads)
    file = local_file(recipe, progress)
    name = "-".join([form, *([str(rank)] if rank is not None else []), *([expert] if expert is not None else [])])
    target = file.with_name(name) if out is None else out
    if rank is not None:
        _show(export_lora(file, target, rank, folders, progress, expert), target, output)
        return
    merge(file, target, folders, progress, expert)
    show([{"model": str(target), "expert": expert}], output, "masked expert")


def _show(export: Export, out: Path, output: str) -> None:
    if output == "json":
        click.echo(export.model_dump_json(indent=1))
        return
    rows: list[dict[str, Any]] = [
        {
            "tensor": tensor.name,
            "shape": "×".join(map(str, tensor.shape)),
            "rank": "" if tensor.rank is None else tensor.rank,
            "how": "carried whole" if tensor.how == "whole" else f"{tensor.how}, exact" if not tensor.error else tensor.how,
            "relative error": "0" if not tensor.error else f"{tensor.error:.3g}",
        }
        for tensor in export.tensors
    ]
    show(rows, output, f"adapter {out}: error of each tensor's change (Frobenius)")
    click.echo(f"all together: relative error {export.error:.3g}, {export.parameters:,} numbers")
    if export.whole:
        click.echo(f"carried whole, since LoRA cannot: {len(export.whole)} tensors (norms, biases or embeddings)")
