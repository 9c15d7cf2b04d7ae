"""An evaluation as tables: models by headline metrics, paired tests, and groups or types with regressions marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mechmerge.evaluate.record import Evaluation, Metric, PairTest

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

COLUMNS = 7
"""Metrics that stand side by side in 100 columns."""
CELL = 8
"""Widest cell of a breakdown."""
MARKS = "▼ worse beyond chance (p after Holm < .05 and interval below 0), ▲ better."


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


def render_table(evaluation: Evaluation) -> Group:
    """The table for a terminal, readable at 100 columns: a block for each suite where there are many metrics."""
    from rich.console import Group
    from rich.markup import escape

    names = headlines(evaluation)
    blocks = [names] if len(names) <= COLUMNS else [list(part) for suite in _by_suite(evaluation) for part in _chunks(suite)]
    tables = []
    for block in blocks:
        table = _plain_table("\n".join(notes(evaluation)) if block is blocks[-1] else "")
        table.add_column("model", overflow="fold", min_width=8)
        for name in block:
            head, _, tier = name.partition("@")
            suite, _, part = head.partition(".")
            above = "min" if _is_min(name) else suite
            below = [text for text in (part.replace("min", "worst").replace("loose-", "loose "), tier) if text]
            title = [above, *" ".join(below).split(), f"n={prompts_of(evaluation, name)}"]
            table.add_column("\n".join(map(escape, title)), justify="right", no_wrap=True)
        for model in evaluation.models:
            metrics = evaluation.metrics(model)
            cells = [f"{metrics[name].value:.2f}" if _is_min(name) else _short(metrics[name]) for name in block]
            table.add_row(escape(model), *cells)
        tables.append(table)
    return Group(*tables)


def _plain_table(caption: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption=caption or None, caption_justify="left")


def _by_suite(evaluation: Evaluation) -> list[list[str]]:
    """The headline metrics of each suite."""
    of, shown = _suites_of(evaluation), headlines(evaluation)
    return [[name for name in shown if of[name] == suite] for suite in evaluation.suites]


def _suites_of(evaluation: Evaluation) -> dict[str, str]:
    """Metric → suite."""
    return {name: suite for model in evaluation.models.values() for suite, one in model.suites.items() for name in one.metrics}


def _chunks(names: list[str], size: int = COLUMNS) -> list[list[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


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
    """Every metric of every model as CSV, once for each model that it is compared with (once without where there is none)."""
    import csv
    import io

    fields = ("against", "difference", "low", "high", "better", "worse", "p", "p_holm", "test", "regression")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    own = ["model", "suite", "metric", "value", "low", "high", "n", "clusters"]
    writer.writerow([*own, *(f"difference_{field}" if field in ("low", "high") else field for field in fields)])
    for model, result in evaluation.models.items():
        for suite, one in result.suites.items():
            for name, m in one.metrics.items():
                tests: list[PairTest | None] = [p for p in evaluation.pairs if (p.model, p.metric) == (model, name)]
                for test in tests or [None]:
                    compared = ["" if test is None else getattr(test, field) for field in fields]
                    writer.writerow([model, suite, name, m.value, m.low, m.high, m.n, m.clusters, *compared])
    return text.getvalue()


def mark(pair: PairTest) -> str:
    """▼ worse beyond chance (a regression), ▲ better beyond chance, else nothing."""
    return "▼" if pair.regression else "▲" if pair.low > 0 and pair.p_holm < 0.05 else ""


def shown_pairs(evaluation: Evaluation) -> list[PairTest]:
    """The tests that a reader should see: all of headline metrics, and of groups and types those that changed beyond chance."""
    return [pair for pair in evaluation.pairs if pair.headline or pair.p_holm < 0.05]


def render_pairs(evaluation: Evaluation) -> Table:
    """The paired tests of headline metrics for a terminal, a section for each pair of models."""
    from rich.markup import escape

    caption = "Differences with 95 % intervals. won, lost: what only this model passes, only the other; p: after Holm."
    table = _plain_table(f"{caption}\n{MARKS}")
    table.add_column("", overflow="fold")
    for name in ("difference", "won", "lost", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    heads = [pair for pair in evaluation.pairs if pair.headline]
    for model, against in dict.fromkeys((pair.model, pair.against) for pair in heads):
        table.add_row(f"[bold]{escape(model)} − {escape(against)}[/bold]")
        for pair in heads:
            if (pair.model, pair.against) == (model, against):
                difference = f"{mark(pair)} {pair.difference:+.2f} \\[{pair.low:+.2f}, {pair.high:+.2f}]"
                table.add_row(f"  {escape(pair.metric)}", difference, str(pair.better), str(pair.worse), f"{pair.p_holm:.2g}")
        table.add_section()
    return table


class Breakdown(NamedTuple):
    """Groups or types of instructions of one suite by model, against one reference."""

    against: str
    header: list[str]
    """The suite, `n`, the reference, and the models."""
    rows: list[list[str]]


def breakdowns(evaluation: Evaluation, width: int | None = None) -> list[Breakdown]:
    """Differences in every group or type, with regressions marked: a table for each reference and suite.

    Args:
        evaluation: what was compared.
        width: characters that a table may take; models that do not fit stand in a table of their own.
    """
    of = _suites_of(evaluation)
    parts = [pair for pair in evaluation.pairs if not pair.headline]
    found = []
    for against, suite in dict.fromkeys((pair.against, of[pair.metric]) for pair in parts):
        tests = {(pair.model, pair.metric): pair for pair in parts if (pair.against, of[pair.metric]) == (against, suite)}
        metrics = {metric: metric.removeprefix(f"{suite}.") for _, metric in tests}
        models = list(dict.fromkeys(model for model, _ in tests))
        room = None if width is None else width - 2 - max(map(len, metrics.values())) - (CELL + 2) - 7
        for names in [models] if room is None else _chunks(models, max(1, room // (CELL + 2))):
            rows = []
            for metric, label in metrics.items():
                held = evaluation.metric(against, metric)
                pairs = [tests.get((name, metric)) for name in names]
                cells = ["" if pair is None else f"{mark(pair)} {pair.difference:+.2f}".strip() for pair in pairs]
                rows.append([label, str(held.n), f"{held.value:.2f}", *cells])
            found.append(Breakdown(against, [suite, "n", against, *names], rows))
    return found


def render_breakdown(evaluation: Evaluation) -> Group:
    """`breakdowns` for a terminal, readable at 100 columns."""
    from rich.console import Group
    from rich.markup import escape

    said = f"The reference's value, and each model's difference to it.\n{MARKS}"
    tables = []
    for breakdown in (parts := breakdowns(evaluation, 100)):
        table = _plain_table(said if breakdown is parts[-1] else "")
        table.add_column(escape(breakdown.header[0]), no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        for name in breakdown.header[2:]:
            table.add_column(escape(name), justify="right", overflow="fold", min_width=CELL - 1, max_width=CELL)
        for row in breakdown.rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return Group(*tables)


def markdown_breakdown(evaluation: Evaluation) -> str:
    """`breakdowns` as Markdown; empty where no model was compared."""
    lines: list[str] = []
    for breakdown in breakdowns(evaluation):
        names = [*breakdown.header[:3], *(f"{name} − {breakdown.against}" for name in breakdown.header[3:])]
        lines += [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in breakdown.rows] + [""]
    return "\n".join([*lines, MARKS]) + "\n" if lines else ""
