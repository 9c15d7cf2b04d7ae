"""`mechmerge generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import (
    SEED,
    Finite,
    device_option,
    escape,
    format_option,
    lines,
    make_progress,
    memory_guard,
    quiet_option,
    set_threads,
    threads_option,
    wide_console,
)

if TYPE_CHECKING:
    from mechmerge.behaviors.generation import Answer
    from mechmerge.behaviors.trial import Trial
    from mechmerge.progress import Progress


@click.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, metavar="[PROMPT|-]...")
@click.option("--compare", "other", metavar="MODEL", help="Show another model's answers side by side, such as the base's.")
@click.option("--recipe", "name", metavar="NAME", help="Of a run: which merge (default: the one that the pipeline publishes).")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--temperature", type=Finite(0, 10), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--greedy", is_flag=True, help="Greedy answers, whatever --temperature a config file says.")
@click.option("--chat-template", default="model", show_default=True, metavar="model|none|FILE",
              help="The model's own, prompts as they are, or a file with a Jinja template.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of what is drawn at a temperature.")
@device_option
@threads_option
@quiet_option
@format_option
def command(
    model: str,
    prompts: tuple[str, ...],
    other: str | None,
    name: str | None,
    greedy: bool,
    temperature: float,
    chat_template: str,
    dtype: str,
    device: str,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Try a MODEL: answer PROMPTs, one at a time, as the words come.

    MODEL is a model reference, a folder that `mechmerge merge` wrote, or a run directory. A prompt `-` is read from stdin.
    Without any prompt each line that is typed is one, until the end of input (Ctrl-D); every prompt stands alone, without
    what was said before. Control characters in answers are shown, not obeyed.
    """
    from mechmerge.behaviors.trial import Trial
    from mechmerge.models.references import resolve

    set_threads(threads)
    progress = make_progress(quiet)
    options["temperature"] = 0.0 if greedy else temperature
    template = _template(chat_template)
    names = [text for text in (model, other) if text is not None]
    with memory_guard():
        trials = [
            Trial(resolve(_located(text, name), progress=progress).path, chat_template=template, dtype=dtype, device=device)
            for text in names
        ]
        _answer_all(trials, names, _asked(prompts, progress), options, output)


def _answer_all(
    trials: list[Trial], names: list[str], prompts: Iterable[tuple[int, str]], options: dict[str, Any], output: str
) -> None:
    rows: list[dict[str, Any]] = []
    for number, prompt in prompts:
        if output == "json":
            said = [trial.answer(prompt, number=number, **options) for trial in trials]
            rows.append({"prompt": prompt, "answers": [_record(*pair) for pair in zip(names, said, strict=True)]})
        elif len(trials) > 1:
            _side_by_side(prompt, names, [trial.answer(prompt, number=number, **options) for trial in trials])
        else:
            answer = trials[0].answer(prompt, number=number, told=_tell, **options)
            click.echo("" if answer.finished else " […]")
    if output == "json":
        import json

        # In ASCII, so that a terminal obeys nothing that a model says.
        click.echo(json.dumps({"generate": rows}))


def _tell(piece: str) -> None:
    click.echo(lines(piece), nl=False)


def _record(name: str, answer: Answer) -> dict[str, Any]:
    return {"model": name, "text": answer.text, "tokens": answer.tokens, "finished": answer.finished}


def _side_by_side(prompt: str, names: list[str], answers: list[Answer]) -> None:
    from rich.table import Table

    table = Table(*(escape(name) for name in names), title=escape(prompt), title_justify="left", show_lines=True)
    for column in table.columns:
        column.ratio = 1
    table.expand = True
    table.add_row(*(escape(answer.text) + ("" if answer.finished else " […]") for answer in answers))
    wide_console().print(table)


def _asked(prompts: tuple[str, ...], progress: Progress) -> Iterator[tuple[int, str]]:
    """The prompts with their numbers: those given, `-` from stdin, or the lines of stdin where none is given."""
    if prompts:
        if prompts.count("-") > 1:
            raise click.UsageError("- stands for stdin, which can be read once.")
        for number, prompt in enumerate(prompts):
            yield number, sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
        return
    asking = sys.stdin.isatty()
    if asking:
        import readline  # noqa: F401 - gives `input` its line editing

        progress.note("one prompt a line; Ctrl-D ends")
    number = 0
    while True:
        try:
            line = input("> ") if asking else input()
        except EOFError:
            return
        if line.strip():
            yield number, line
            number += 1


def _template(setting: str) -> str:
    from mechmerge.artifacts import read_text

    return setting if setting in ("model", "none") else read_text(Path(setting))


def _located(text: str, recipe: str | None) -> str:
    """The reference of a model: of a run directory the merge that it publishes, or the one named."""
    from mechmerge.errors import InputError

    folder = Path(text).expanduser()
    is_run = folder.is_dir() and not (folder / "config.json").is_file() and (folder / "merged").is_dir()
    if not is_run:
        return text
    if (folder / "merged" / "config.json").is_file():
        return str(folder / "merged")
    from mechmerge.publish.source import chosen_recipe
    from mechmerge.report.files import find_run_files

    merged = folder / "merged" / chosen_recipe(find_run_files(folder), recipe, folder)
    if not merged.is_dir():
        raise InputError(
            str(merged), expected="a merged model", found="none", fix="run the pipeline to its end, or name --recipe"
        )
    return str(merged)
