"""An evaluation as a table: one row a model, headline metrics with their 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechmerge.evaluate.record import Evaluation, Metric

if TYPE_CHECKING:
    from rich.table import Table


def headlines(evaluation: Evaluation) -> list[str]:
    """Names of the columns: of each suite its headline and worst group, then the headlines on unseen wordings."""
    held = {name for model in evaluation.models for name in evaluation.metrics(model)}
    seen = [name for suite in evaluation.suites for name in (suite, f"{suite}.min")]
    return [name for name in [*seen, *(f"{suite}@unseen" for suite in evaluation.suites)] if name in held]


def prompts_of(evaluation: Evaluation, name: str) -> int:
    """Prompts that a metric is measured on (equal for all models)."""
    return next(metrics[name].n for metrics in map(evaluation.metrics, evaluation.models) if name in metrics)


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table must know, a line each."""
    lines = ["± half the 95 % interval (bootstrap of topics); min: the worst group; unseen: wordings that no training saw."]
    for name, suite in evaluation.suites.items():
        if suite.limited:
            lines.append(f"{name}: only {suite.prompts} of its prompts were asked (--limit).")
        if suite.split == "develop":
            lines.append(f"{name}: prompts of the develop split, not of the test split.")
    for model, result in evaluation.models.items():
        for name, one in result.suites.items():
            if one.errors:
                lines.append(f"{model}: {one.errors} answers to {name} could not be judged and count as not passed.")
    return lines


def _short(metric: Metric) -> str:
    return f"{metric.value:.2f} ±{(metric.high - metric.low) / 2:.2f}"


def _with_interval(metric: Metric) -> str:
    return f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"


def _is_min(name: str) -> bool:
    return name.partition("@")[0].endswith(".min")


def render_table(evaluation: Evaluation) -> Table:
    """The table for a terminal; readable at 100 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    names = headlines(evaluation)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption="\n".join(notes(evaluation)), caption_justify="left"
    )
    table.add_column("model", overflow="fold")
    for name in names:
        suite, _, tier = name.partition("@")
        title = "min" if _is_min(name) else suite
        below = tier if tier else "worst" if _is_min(name) else ""
        table.add_column(
            f"{escape(title)}\n{f'{below} ' if below else ''}n={prompts_of(evaluation, name)}", justify="right", no_wrap=True
        )
    for model in evaluation.models:
        metrics = evaluation.metrics(model)
        cells = [f"{metrics[name].value:.2f}" if _is_min(name) else _short(metrics[name]) for name in names]
        table.add_row(escape(model), *cells)
    return table


def markdown_table(evaluation: Evaluation) -> str:
    """The same table as Markdown, with whole intervals."""
    names = headlines(evaluation)
    titles = [f"{name.replace('@', ', ')} (n = {prompts_of(evaluation, name)})" for name in names]
    lines = [f"| model | {' | '.join(titles)} |", f"|---|{'---:|' * len(names)}"]
    for model in evaluation.models:
        metrics = evaluation.metrics(model)
        lines.append(f"| {model} | {' | '.join(_with_interval(metrics[name]) for name in names)} |")
    lines += ["", "95 % intervals in brackets (bootstrap of topics). " + " ".join(notes(evaluation)[1:])]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown_pairs(evaluation: Evaluation) -> str:
    """The paired tests as Markdown; empty where no model was compared."""
    if not evaluation.pairs:
        return ""
    lines = [
        "| model | against | metric | difference | only it passes | only the other | p (Holm) |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for test in evaluation.pairs:
        difference = f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}]"
        counts = f"{test.better} | {test.worse} | {test.p_holm:.2g}"
        lines.append(f"| {test.model} | {test.against} | {test.metric} | {difference} | {counts} |")
    return "\n".join(lines) + "\n"
