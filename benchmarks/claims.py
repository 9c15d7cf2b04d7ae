"""The paper's claims, read off a finished run's score files: `python -m benchmarks.claims [--run RUN] [--save]`.

Which depth holds sources (weight patching), in MLPs or in attention; which depth routes (activation patching); and how far the
maps of the behaviours agree (Spearman's ρ over the same components). Nothing is judged: there is no goal, figures stand as
found. "Weight Patching", arXiv 2604.13694, finds sources mostly in shallow MLP neurons and routers mostly in middle-layer
attention heads (§V). `--quick` changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from benchmarks.common import finish
from mechmerge.localize.roles import THIRDS
from mechmerge.localize.scores import ScoreFile, read_scores

MAPS = (("modules", ("attention", "mlp"), "sufficiency"), ("heads", ("head",), "screen"), ("neurons", ("neuron",), "screen"))
"""(name, kinds, measure) of the maps that are compared."""


def shares(file: ScoreFile, measure: str) -> dict[str, float]:
    """Shares of a measure's positive sum over modules: by kind, and by kind and third of the layers below the anchor."""
    sums: dict[str, float] = {}
    for kind in ("attention", "mlp"):
        values = np.clip(np.nan_to_num(file.arrays[f"{kind}.{measure}"][: file.depth, 0]), 0, None)
        for third, part in zip(THIRDS, np.array_split(values, len(THIRDS)), strict=True):
            sums[f"{kind}, {third} third"] = float(part.sum())
    total = sum(sums.values())
    return {name: value / total if total else 0.0 for name, value in sums.items()}


def agreement(files: Mapping[str, ScoreFile]) -> dict[str, Any]:
    """Spearman's ρ of every pair of behaviours' maps, over components below both anchors: least, median and largest."""
    found: dict[str, Any] = {}
    for name, kinds, measure in MAPS:
        rhos = {}
        for one, other in combinations(files, 2):
            depth = min(files[one].depth, files[other].depth)
            pairs = [
                np.concatenate([files[behavior].arrays[f"{kind}.{measure}"][:depth].ravel() for kind in kinds])
                for behavior in (one, other)
            ]
            rhos[one, other] = float(spearmanr(*pairs).statistic)
        if rhos:
            best, worst = max(rhos, key=rhos.__getitem__), min(rhos, key=rhos.__getitem__)
            found[f"agreement of {name}: median rho"] = float(np.median(list(rhos.values())))
            found[f"agreement of {name}: least"] = f"{rhos[worst]:.2f} ({', '.join(worst)})"
            found[f"agreement of {name}: largest"] = f"{rhos[best]:.2f} ({', '.join(best)})"
    return found


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path("runs/demo"), show_default=True
)
@click.option("--expert", default="formats", show_default=True, help="Folder of the run's scores.")
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
def main(run: Path, expert: str, quick: bool, save: bool) -> None:
    """Read the claims off a run."""
    files = {path.stem: read_scores(path) for path in sorted((run / "scores" / expert).glob("*.safetensors"))}
    if not files:
        raise click.UsageError(f"no score files in {run / 'scores' / expert}")
    figures: dict[str, Any] = {"behaviours": len(files), "with a valid anchor": sum(f.metadata.valid for f in files.values())}
    for measure, what in (("sufficiency", "sources"), ("activation", "routes"), ("necessity", "needed")):
        measured = {name: shares(file, measure) for name, file in files.items() if f"mlp.{measure}" in file.arrays}
        for place in next(iter(measured.values()), {}):
            figures[f"{what}: {place}, mean share"] = float(np.mean([found[place] for found in measured.values()]))
        for name, found in measured.items():
            best = max(found, key=found.__getitem__)
            figures[f"{what} of {name}"] = f"{100 * found[best]:.0f} % in {best}"
    for name, file in files.items():
        meta = file.metadata
        figures[f"{name}: scores"] = f"{meta.where}, {'valid' if meta.valid else '; '.join(meta.reasons)}, {meta.scale}"
        figures[f"{name}: roles"] = "none" if meta.roles is None else str(meta.roles.counts)
        figures[f"{name}: controls"] = "not measured" if meta.curves is None else meta.curves.label
    valid = {name: file for name, file in files.items() if file.metadata.valid and file.metadata.loss is None}
    figures |= {f"all: {name}": value for name, value in agreement(files).items()}
    figures |= {f"valid anchors: {name}": value for name, value in agreement(valid).items()}
    finish("claims", figures, {}, save, quick)


if __name__ == "__main__":
    main()
