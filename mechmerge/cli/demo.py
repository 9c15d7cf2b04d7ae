"""`mechmerge demo`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import device_option, format_option, make_progress, quiet_option, set_threads, threads_option
from mechmerge.cli.run import show_result


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/demo"), show_default=True,
              help="The run directory.")  # fmt: skip
@device_option
@threads_option
@quiet_option
@format_option
def command(out: Path, device: str, threads: int | None, quiet: bool, output: str) -> None:
    """Run the whole pipeline on SmolLM2-135M and two experts that wreck each other when summed.

    Takes half an hour or a little more on two cores the first time; a second call reuses what is there. The gate's verdict is
    printed and does not change the exit code, unlike `mechmerge run`.
    """
    from mechmerge.pipeline.demo import demo_folder
    from mechmerge.pipeline.run import run_pipeline

    set_threads(threads)
    show_result(run_pipeline(demo_folder() / "pipeline.yaml", out, make_progress(quiet), device), output)
