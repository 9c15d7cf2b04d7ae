"""What commands share: options, the progress that is drawn on stderr, and parsing of NAME=VALUE."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.errors import InputError, MissingError, visible
from mechmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.console import Console

    from mechmerge.localize.plan import Plan


SEED = click.IntRange(0, 2**32 - 1)
"""As `artifacts.MOST_SEED` says; importing that takes longer than printing a help text may."""


def check_beside(recipe: str) -> None:
    """Checks that something can be written beside a recipe: not in the Hub's cache, nor in a model that `run` may make anew."""
    from mechmerge.models.hub_files import is_hub_reference
    from mechmerge.recipe.schema import FOLDER

    if is_hub_reference(recipe):
        raise click.UsageError("A recipe on the Hub needs --out.")
    place = Path(recipe).absolute().parent
    if place.name == FOLDER and any((place.parent / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise click.UsageError("A recipe inside a model needs --out.")


def threads_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--threads N` (torch's default otherwise)."""
    return click.option("--threads", type=click.IntRange(1), default=None, help="Threads for computing (default: all cores).")(
        function
    )


def quiet_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--quiet`."""
    return click.option("--quiet", is_flag=True, help="No progress on stderr.")(function)


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--device NAME`."""
    return click.option("--device", default="cpu", show_default=True, help="Torch device, such as cuda.")(function)


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format table|json`, as the parameter `output`."""
    choice = click.Choice(["table", "json"])
    return click.option("--format", "output", type=choice, default="table", show_default=True, help="How results are printed.")(
        function
    )


def pair_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--vocabulary` and `--positions`: what to do where an expert differs from the base there."""
    rule = click.Choice(["same", "base"])
    vocabulary = click.option(
        "--vocabulary",
        type=rule,
        default="same",
        show_default=True,
        help="same: refuse others; base: align rows by token string.",
    )
    positions = click.option(
        "--positions",
        type=rule,
        default="same",
        show_default=True,
        help="same: refuse other RoPE or context; base: keep the base's.",
    )
    return vocabulary(positions(function))


class Finite(click.FloatRange):
    """A range of numbers without NaN, which no comparison finds outside a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number.

        Raises:
            click.BadParameter: it is no number of the range.
        """
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no number.", param, ctx) if number != number else number


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Behaviours with their experts and weights, and how they are measured."""
    options = (
        click.option(
            "--behavior", "behaviors", multiple=True, required=True, metavar="NAME=EXPERT",
            help="A behaviour (name, file, or the group `formats`) and the expert that answers for it; repeat.",
        ),
        click.option("--weight", "weights", multiple=True, metavar="NAME=NUMBER", help="Weight of a behaviour (default 1)."),
        click.option(
            "--protect", multiple=True, metavar="NAME[=W]",
            help="An ability of the base's own to leave as it is: chat, general, or a behaviour; a nat of damage to it weighs "
            "as much as W whole gains of an expert (default 1); repeat.",
        ),
        click.option("--prompts", type=click.IntRange(4), default=48, show_default=True, help="Calibration prompts each."),
        click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Examples a forward pass."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True),
        click.option(
            "--tokens", type=click.Choice(["all", "contested"]),
            help="Tokens of an answer that its loss is the mean over: all alike (so do effects), or by how much the other "
            "models contest them (so do rounds; --solve: as the effects).",
        ),
        click.option("--seed", type=SEED, default=0, show_default=True),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def memory_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--memory SIZE` in bytes, and `--plan`, as the parameter `only_plan`."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
        from mechmerge.localize.plan import parse_size

        return None if value is None else parse_size(value)

    memory = click.option(
        "--memory", metavar="SIZE", default=None, callback=parse,
        help="Memory that may be used, such as 4GB (default: what is free); models beyond it are streamed from disk.",
    )  # fmt: skip
    only_plan = click.option(
        "--plan", "only_plan", is_flag=True, help="Print expected forwards, bytes read, memory and time; measure nothing."
    )
    return memory(only_plan(function))


def show_plan(plan: Plan, output: str) -> None:
    """Prints a plan on stdout: a row a step, and what they take together."""
    from mechmerge.localize.plan import show_size

    rows = [
        {"step": c.name, "forwards": round(c.forwards), "bytes read": round(c.read), "seconds": round(c.seconds, 1)}
        for c in (*plan.costs, plan.total)
    ]
    mode = "streamed" if plan.streamed else "in memory"
    if output == "json":
        facts = {
            "mode": mode,
            "memory": plan.peak,
            "limit": plan.limit,
            "batch": plan.batch,
            "steps": rows[:-1],
            "total": rows[-1],
        }
        click.echo(json.dumps({"plan": facts}, ensure_ascii=False))
        return
    table = [
        {"step": c.name, "forwards": f"{c.forwards:,.0f}", "read": show_size(c.read), "time (estimate)": _duration(c.seconds)}
        for c in (*plan.costs, plan.total)
    ]
    memory = f"about {show_size(plan.peak)} of memory (limit {show_size(plan.limit)})"
    show(table, output, f"plan: the model {mode}, {memory}, {plan.batch} prompts a pass with gradients")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


@contextlib.contextmanager
def memory_guard() -> Iterator[None]:
    """Turns running out of memory into one line that says what to set.

    Raises:
        MissingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        raise MissingError(
            "memory", expected="enough for this model", found="none left",
            fix="set --memory (such as 4GB) to stream the model, or use --dtype bfloat16 or fewer --prompts",
        ) from None  # fmt: skip


class BehaviorCommand(click.Command):
    """A command whose help ends with the names of the built-in behaviours."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from mechmerge.behaviors.schema import builtin_names

        with formatter.section("Built-in behaviours"):
            formatter.write_text(", ".join(builtin_names()))


def wide_console() -> Console:
    """A console on stdout that is at least 100 columns wide where stdout is no terminal."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    return console


def show(rows: list[dict[str, Any]], output: str, title: str) -> None:
    """Prints rows with equal keys on stdout, as JSON or as a table."""
    if output == "json":
        click.echo(json.dumps({title: rows}, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name in rows[0] if rows else ():
        # Nothing is cut away, and what is typed again stays in one line.
        table.add_column(escape(name), overflow="fold", no_wrap=name == "component")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    wide_console().print(table)


def show_all(tables: dict[str, list[dict[str, Any]]], output: str) -> None:
    """Prints several tables by title on stdout, as one JSON object or one below the other; empty ones are left out."""
    if output == "json":
        click.echo(json.dumps(tables, ensure_ascii=False))
        return
    for title, rows in tables.items():
        if rows:
            show(rows, output, title)


def escape(text: str) -> str:
    """Text that rich prints as it is, control characters made visible."""
    from rich.markup import escape as escape_markup

    return escape_markup(lines(text))


def lines(text: str) -> str:
    """Text for a terminal: control characters made visible, line breaks kept."""
    return "\n".join(map(visible, text.split("\n")))


def set_threads(threads: int | None) -> None:
    """Limits torch's threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def named(values: Iterable[str], what: str) -> dict[str, str]:
    """Parses NAME=VALUE options, in order.

    Raises:
        InputError: no `=`, an empty side, or a name twice.
    """
    result: dict[str, str] = {}
    for text in values:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise InputError(what, expected="NAME=VALUE", found=repr(text))
        if name in result:
            raise InputError(what, expected="each name once", found=f"{name} twice")
        result[name] = value
    return result


def named_numbers(values: Iterable[str], what: str) -> dict[str, float]:
    """Parses NAME=NUMBER options.

    Raises:
        InputError: one without a name or a number, or a name twice.
    """
    given = named(values, what)
    try:
        return {name: float(value) for name, value in given.items()}
    except ValueError:
        raise InputError(what, expected="NAME=NUMBER", found=" ".join(values)) from None


class CountOrAuto(click.ParamType[int | str]):
    """A number of at least 0, or the word `auto`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number as an int."""
        if isinstance(value, int):
            return value
        if value == "auto":
            return "auto"
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return int(value)


class LineProgress:
    """Progress as plain lines, for a stderr that is not a terminal: one when a step starts, one when it ends."""

    def __init__(self) -> None:
        self._label, self._total, self._done, self._since, self._said = "", 0, 0, 0.0, 0.0

    def start(self, label: str, total: int) -> None:
        self._label, self._total, self._done = visible(label), total, 0
        self._since = self._said = time.monotonic()
        print(f"  {self._label} …", file=sys.stderr, flush=True)

    def advance(self, units: int = 1) -> None:
        self._done += units
        if time.monotonic() - self._said > 15:
            self._said = time.monotonic()
            print(f"  {self._label}: {self._done} of {self._total}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.exception() is None:
            print(f"  {self._label}: done in {time.monotonic() - self._since:.0f} s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(lines(text), file=sys.stderr, flush=True)


class BarProgress:
    """Progress as a rich bar on a terminal's stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._make: Callable[[], RichProgress] = lambda: RichProgress(*columns, console=self._console)
        self._bars: RichProgress | None = None

    def start(self, label: str, total: int) -> None:
        self._bars = self._make()
        self._bars.start()
        self._task = self._bars.add_task(escape(label), total=total)

    def advance(self, units: int = 1) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, units)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        self._console.print(lines(text), markup=False, highlight=False)


def make_progress(quiet: bool) -> Progress:
    """The progress that suits stderr."""
    if quiet:
        return SILENT
    return BarProgress() if sys.stderr.isatty() else LineProgress()
