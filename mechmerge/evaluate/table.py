"""An evaluation as a table: one row a model, headline metrics with their 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechmerge.evaluate.record import Evaluation, Metric, PairTest

if TYPE_CHECKING:
    from rich.table import Table


def headlines(evaluation: Evaluation) -> list[str]:
    """Names of the columns: of each suite its headlines and worst group, then the headlines of its other tiers."""
    held = {name for model in evaluation.models for name in evaluation.metrics(model)}
    heads = [name for suite in evaluation.suites.values() for name in suite.headlines]
    plain = [name for head in heads if "@" not in head for name in (head, f"{head}.min")]
    return [name for name in [*plain, *(head for head in heads if "@" in head)] if name in held]


def prompts_of(evaluation: Evaluation, name: str) -> int:
    """Prompts that a metric is measured on (equal for all models)."""
    return next(metrics[name].n for metrics in map(evaluation.metrics, evaluation.models) if name in metrics)


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table must know, a line each."""
    said = {
        ".min": "min: the worst group",
        "@unseen": "unseen: wordings that no training saw",
        "@hard": "hard: more than was trained",
        ".loose": "loose: IFEval's loose reading",
    }
    shown = "".join(f"; {text}" for part, text in said.items() if any(part in name for name in headlines(evaluation)))
    lines = [f"± half the 95 % interval (bootstrap of topics){shown}."]
    for name, suite in evaluation.suites.items():
        if suite.limited:
            lines.append(f"{name}: only {suite.prompts} of its prompts were asked (--limit).")
        if suite.split == "develop":
            lines.append(f"{name}: prompts of the develop split, not of the test split.")
    for model, result in evaluation.models.items():
        for name, one in result.suites.items():
            if one.missing:
                lines.append(f"{model}: {one.missing} prompts of {name} have no answer and count as not passed.")
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
        head, _, tier = name.partition("@")
        suite, _, part = head.partition(".")
        title = "min" if _is_min(name) else suite
        below = " ".join(text for text in (part.replace("min", "worst"), tier) if text)
        table.add_column(
            f"{escape(title)}\n{f'{escape(below)}{chr(10)}' if below else ''}n={prompts_of(evaluation, name)}",
            justify="right",
            no_wrap=True,
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
    for test in shown_pairs(evaluation):
        difference = f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}]" + (" ▼" if test.regression else "")
        counts = f"{test.better} | {test.worse} | {test.p_holm:.2g}"
        lines.append(f"| {test.model} | {test.against} | {test.metric} | {difference} | {counts} |")
    return "\n".join(lines) + "\n"


def csv_table(evaluation: Evaluation) -> str:
    """Every metric of every model as CSV: model, suite, metric, value, low, high, n, clusters."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "suite", "metric", "value", "low", "high", "n", "clusters"])
    for model, result in evaluation.models.items():
        for suite, one in result.suites.items():
            for name, m in one.metrics.items():
                writer.writerow([model, suite, name, m.value, m.low, m.high, m.n, m.clusters])
    return text.getvalue()


def shown_pairs(evaluation: Evaluation) -> list[PairTest]:
    """The tests that a reader should see: all of headline metrics, and of groups and types those that changed beyond chance."""
    return [pair for pair in evaluation.pairs if pair.headline or pair.p_holm < 0.05]


def render_pairs(evaluation: Evaluation) -> Table:
    """The paired tests for a terminal: headlines, and groups or types that changed beyond chance; regressions are marked."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    left = sum(not pair.headline for pair in evaluation.pairs) - sum(not p.headline for p in shown_pairs(evaluation))
    caption = "95 % intervals in brackets; p corrected by Holm's method; ▼ worse beyond chance, ▲ better."
    caption += f" {left} groups or types without a change beyond chance are left out." if left else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption=caption, caption_justify="left")
    for name in ("model", "against", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("difference", "only it", "only other", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in shown_pairs(evaluation):
        mark = "▼ " if pair.regression else "▲ " if pair.low > 0 and pair.p_holm < 0.05 else ""
        table.add_row(
            escape(pair.model),
            escape(pair.against),
            escape(pair.metric),
            f"{mark}{pair.difference:+.2f} \\[{pair.low:+.2f}, {pair.high:+.2f}]",
            str(pair.better),
            str(pair.worse),
            f"{pair.p_holm:.2g}",
        )
    return table
