"""`mechmerge localize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    device_option,
    format_option,
    make_progress,
    pair_options,
    quiet_option,
    set_threads,
    show,
    threads_option,
)


@click.command()
@click.argument("base")
@click.argument("expert")
@click.option(
    "--behavior", "behaviors", multiple=True, required=True, metavar="NAME|FILE", help="A behaviour; repeat for more."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the score files.")
@click.option("--anchor-layer", type=click.IntRange(1), help="Residual stream after this layer (default: chosen by validity).")
@click.option(
    "--verify", type=click.IntRange(0), default=16, show_default=True, help="Best heads, KV groups and neurons (each) to patch."
)
@click.option(
    "--prompts", type=click.IntRange(2), default=12, show_default=True, help="Held-out prompts that scores are measured on."
)
@click.option(
    "--steering-prompts", type=click.IntRange(0), default=8, show_default=True, help="Prompts of the steering check (0: none)."
)
@click.option("--invalid-anchor", type=click.Choice(["refuse", "report"]), default="refuse", show_default=True,
              help="What to do when an anchor fails its validity check.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@pair_options
@device_option
@threads_option
@quiet_option
@format_option
def command(
    base: str, expert: str, behaviors: tuple[str, ...], out: Path, threads: int | None, quiet: bool, output: str, **options: Any
) -> None:
    """Find which components of EXPERT carry a behaviour that BASE lacks.

    BASE and EXPERT are model references: a folder, owner/name[@revision], demo:NAME, each with +ADAPTER if need be.
    Writes OUT/BEHAVIOR.safetensors, a score file, for each behaviour, and the anchors under OUT/anchors.
    """
    from mechmerge.behaviors.schema import load_behavior
    from mechmerge.localize.scores import read_scores
    from mechmerge.localize.stage import LocalizeSettings, localize
    from mechmerge.models.references import resolve

    loaded = [load_behavior(name) for name in behaviors]
    set_threads(threads)
    progress = make_progress(quiet)
    settings = LocalizeSettings(on_invalid=options.pop("invalid_anchor"), **options)
    paths = localize(resolve(base, progress=progress), resolve(expert, progress=progress), loaded, out, settings, progress)
    rows = []
    for path in paths:
        metadata = read_scores(path).metadata
        anchor = metadata.anchor
        rows.append(
            {
                "behavior": metadata.behavior,
                "layer": anchor.layer,
                "anchor": "valid" if anchor.valid else "NOT VALID: " + "; ".join(anchor.reasons),
                "separation": round(anchor.separation, 3),
                "gap": round(anchor.gap, 3),
                "scale": metadata.scale,
                "file": str(path),
            }
        )
    show(rows, output, "anchors")
