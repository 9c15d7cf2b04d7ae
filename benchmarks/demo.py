"""The demo as a benchmark: `python -m benchmarks.demo [--out DIR] [--quick] [--save]`.

Runs the demo's pipeline (or takes a finished run up again), then calls it a second time. Figures: minutes that the stages
took, seconds of the second call, every model's pass rates, retained gains. Goals: 30 minutes for everything but the
installation, one minute for the second call. `--save` also keeps the report, its figures and the evaluation beside the
dated file. `--quick` only takes up a finished run.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import click

from benchmarks.common import RESULTS, Goal, finish
from mechmerge.cli.common import LineProgress
from mechmerge.evaluate.record import Evaluation
from mechmerge.pipeline.demo import demo_folder
from mechmerge.pipeline.run import run_pipeline


def retained(evaluation: Evaluation, model: str, metric: str, expert: str) -> float:
    """(merged − base) / (expert − base) of one metric."""
    base, merged, best = (evaluation.metric(name, metric).value for name in ("base", model, expert))
    return (merged - base) / (best - base)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/demo"), show_default=True)
@click.option("--quick", is_flag=True, help="Only take up a finished run.")
@click.option("--save", is_flag=True)
@click.option(
    "--wall", type=float, help="Minutes that `make demo` took from nothing, installation included, by a clock outside."
)
@click.option("--ran-at", help="Commit of the run that is taken up, where it is not this one.")
def main(out: Path, quick: bool, save: bool, wall: float | None, ran_at: str | None) -> None:
    """Run the demo, twice."""
    pipeline = demo_folder() / "pipeline.yaml"
    if quick and not (out / "evaluation.json").exists():
        raise click.UsageError(f"--quick takes up a finished run; there is none in {out}")
    run_pipeline(pipeline, out, LineProgress())
    start = time.monotonic()
    again = run_pipeline(pipeline, out, LineProgress())
    second = time.monotonic() - start
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    stages = {t["stage"]: t["seconds"] for t in timings if " " not in t["stage"]}
    outside: dict[str, object] = {} if wall is None else {"minutes of make demo from nothing": wall}
    figures: dict[str, object] = outside | ({} if ran_at is None else {"run at commit": ran_at})
    figures |= {
        "minutes of all stages": sum(stages.values()) / 60,
        "seconds of a second call": second,
        "stages that worked in the second call": len(again.worked),
    }
    figures |= {f"minutes of {name}": round(seconds / 60, 2) for name, seconds in stages.items() if seconds > 30}
    evaluation = again.evaluation
    for name in evaluation.models:
        for metric in ("formats", "formats.min", "arithmetic", "formats@unseen", "arithmetic@unseen"):
            value = evaluation.metric(name, metric)
            figures[f"{name}: {metric}"] = f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}] n={value.n}"
        if name not in ("base", "formats", "arithmetic"):
            for metric in ("formats", "arithmetic"):
                figures[f"{name}: retained gain, {metric}"] = round(retained(evaluation, name, metric, metric), 3)
    figures["gate"] = "passed" if again.gate.passed else "refused"
    if save:
        folder = RESULTS / f"demo-{time.strftime('%Y-%m-%d')}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out / "figures", folder / "figures")
        for name in ("report.md", "evaluation.json", "gate.json", "timings.jsonl"):
            shutil.copyfile(out / name, folder / name)
    goals = {} if wall is None else {"minutes of make demo from nothing": Goal(30)}
    goals |= {
        "minutes of all stages": Goal(30),
        "seconds of a second call": Goal(60),
        "stages that worked in the second call": Goal(0),
    }
    finish("demo", figures, goals, save, quick)


if __name__ == "__main__":
    main()
