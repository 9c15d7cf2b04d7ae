"""Trains one of the experts as a LoRA adapter and saves it with its log.

    python -m benchmarks.experts formats    --out recipes/demo/experts/formats
    python -m benchmarks.experts arithmetic --out recipes/demo/experts/arithmetic

About five to ten minutes each on two cores. The committed adapters and their logs were made with this script at commit
20074d8, which had checkers of its own and answered in other batches (bf16 answers depend on those). `plain-arithmetic` and
`json` are experts of benchmarks/merging, which trains them itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.experts.training import RECIPES, REFERENCE, train
from mechmerge.cli.common import set_threads
from mechmerge.models.references import resolve


@click.command()
@click.argument("which", type=click.Choice(sorted(RECIPES)))
@click.option("--base", type=click.Path(path_type=Path), help=f"Folder of the base model (default: {REFERENCE}).")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--log", type=click.Path(path_type=Path), help="Where the log goes (default: NAME.log.json beside this script).")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=int)
@click.option("--rate", type=float)
@click.option("--threads", default=2, show_default=True)
def main(
    which: str, base: Path | None, out: Path, log: Path | None, seed: int, steps: int | None, rate: float | None, threads: int
) -> None:
    """Train the expert WHICH and save it as a bf16 LoRA adapter."""
    set_threads(threads)
    record = train(which, base or resolve(REFERENCE).path, out, seed, steps, rate)
    log = log or Path(__file__).parent / f"{which}.log.json"
    log.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
