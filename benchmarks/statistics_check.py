"""Do the intervals cover, and does the gate refuse? `python -m benchmarks.statistics_check [--quick] [--save]`.

Outcomes are drawn from a normal threshold model: a unit passes where √rho · cluster + √pair · unit + … + noise lies below the
quantile of its rate; `rho` is the share of variance that units of a cluster have in common, `pair` what two models have in
common on one unit, and where clusters hold six units every model has a cluster effect of its own (.03). A few draws in a row
(`TOGETHER`) share their resamples, as the metrics of an evaluation do. Counted are

- *coverage* of the 95 % interval of a rate (one group, the mean of six groups, the worst of six), of a paired difference and of
  a retained share: the share of draws in which it holds the truth,
- *false accepts*: the share of draws in which a gate rule on the interval's lower end passes though the truth is at the bound
  (one-sided, so 2.5 % is what a 95 % interval promises); `plain` is the percentile interval of the same resamples.

Goals: the least coverage ≥ .93 (a retained share has none: it is defined only in draws whose gain is clear), every false
accept rate ≤ .05. Gates of two rules, and the chance that any of nine models without a difference is accepted, are shown too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, NamedTuple

import click
import numpy as np
from scipy.stats import norm

from benchmarks.common import Goal, finish
from mechmerge.evaluate.assembly import packed, units_of
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.gate import Gate, check_gate
from mechmerge.evaluate.record import EvaluateSettings, Evaluation, ModelResult, SuiteRecord, SuiteResult
from mechmerge.evaluate.resampling import Layout
from mechmerge.evaluate.scoring import metric
from mechmerge.evaluate.statistics import interval, paired, retained
from mechmerge.models.references import ModelId

RESAMPLES = 400
TOGETHER = 20
RATES, CLUSTERS, SHARED = (0.1, 0.5, 0.9, 0.98), (12, 24, 60, 144, 541), (0.0, 0.3, 0.7)
GOALS = {
    "coverage_rate_least": Goal(0.93, at_most=False),
    "coverage_mean_of_groups_least": Goal(0.93, at_most=False),
    "coverage_worst_group_least": Goal(0.93, at_most=False),
    "coverage_difference_least": Goal(0.93, at_most=False),
    "false_accept_difference_most": Goal(0.05),
    "false_accept_margin_most": Goal(0.05),
    "false_accept_retained_most": Goal(0.05),
    "false_accept_gate": Goal(0.05),
    "false_accept_gate_of_a_bound": Goal(0.05),
}


class Setting(NamedTuple):
    """One kind of data."""

    kind: str
    """rate, mean, min, difference, margin or retained."""
    clusters: int
    size: int
    """Units a cluster."""
    rate: float
    rho: float
    pair: float = 0.0
    own: float = 0.0


class Counted(NamedTuple):
    """Shares of draws."""

    setting: Setting
    coverage: float
    accepted: float
    """The lower end lies above the truth."""
    plain: float
    """The same of the plain percentile interval; NaN where it was not made."""
    width: float


def draw(rng: np.random.Generator, setting: Setting, rates: tuple[Any, ...]) -> list[Column]:
    """A column for each model; `rates` are numbers or one number a unit of a cluster."""
    _, n, m, _, rho, pair, own = setting
    common, unit = rng.normal(size=(n, 1)), rng.normal(size=(n, m))
    clusters = [str(i) for i in range(n) for _ in range(m)]
    groups = [f"g{j}" if setting.kind in ("mean", "min") else "all" for _ in range(n) for j in range(m)]
    made = []
    for rate in rates:
        noise, mine = rng.normal(size=(n, m)), rng.normal(size=(n, 1))
        left = max(0.0, 1 - rho - pair - own)
        level = np.sqrt(rho) * common + np.sqrt(pair) * unit + np.sqrt(own) * mine + np.sqrt(left) * noise
        passed = level < norm.ppf(rate)
        over: Literal["min", "mean"] = "min" if setting.kind == "min" else "mean"
        made.append(Column(passed.astype(float).ravel().tolist(), clusters, groups, over))
    return made


def one(setting: Setting, rng: np.random.Generator, seed: int) -> tuple[float, Any, list[Column]]:
    """Truth, interval and columns of one draw."""
    options: dict[str, Any] = {"seed": seed, "resamples": RESAMPLES}
    p = setting.rate
    if setting.kind == "rate":
        (column,) = columns = draw(rng, setting, (p,))
        return p, interval(column, **options), columns
    if setting.kind in ("mean", "min"):
        # Groups that differ, for the mean; groups alike, the hardest case, for the worst.
        apart = np.linspace(-0.08, 0.08, setting.size) if setting.kind == "mean" and 0.1 < p < 0.9 else np.zeros(setting.size)
        (column,) = columns = draw(rng, setting, (p + apart,))
        return p, interval(column, **options), columns
    if setting.kind == "retained":
        columns = draw(rng, setting, (p, p + 0.3, p + 0.8 * 0.3))
        base, expert, merged = columns
        return 0.8, retained(merged, base, expert, **options), columns
    less = 0.05 if setting.kind == "margin" else 0.0
    columns = draw(rng, setting, (p - less, p))
    return -less, paired(*columns, **options), columns


def percentile_low(columns: list[Column], seed: int) -> float:
    """Lower end of the plain percentile interval of a rate or difference."""
    values = np.array(columns[0].values) - (np.array(columns[1].values) if len(columns) == 2 else 0)
    layout = Layout(columns[0])
    return float(np.quantile(layout.bootstrap(values, seed, RESAMPLES, layout.clusters), 0.025))


def count(setting: Setting, draws: int) -> Counted:
    """Draws many times."""
    rng = np.random.default_rng(abs(hash((setting.clusters, setting.size, int(1000 * setting.rate)))) % 2**32)
    covered = accepted = plain = 0
    width, defined = 0.0, 0
    for seed in range(draws):
        truth, found, columns = one(setting, rng, seed // TOGETHER)
        if found is not None:
            defined += 1
            covered += found.low - 1e-9 <= truth <= found.high + 1e-9
            accepted += found.low > truth + 1e-9
            width += found.high - found.low
        plain += len(columns) < 3 and percentile_low(columns, seed // TOGETHER) > truth + 1e-9
    has_plain = setting.kind in ("rate", "mean", "difference", "margin")
    return Counted(
        setting,
        covered / max(1, defined),
        accepted / draws,
        plain / draws if has_plain else float("nan"),
        width / max(1, defined),
    )


def settings_of(quick: bool) -> Iterator[Setting]:
    """All kinds of data."""
    sizes = (12, 60) if quick else CLUSTERS
    for clusters in sizes:
        for rate in RATES:
            for rho in SHARED:
                yield Setting("rate", clusters, 3 if rho else 1, rate, rho)
            for kind in ("mean", "min"):
                yield Setting(kind, clusters, 6, rate, 0.3)
        for kind, rate, pair in ((k, r, s) for k in ("difference", "margin") for r in (0.5, 0.9, 0.98) for s in (0.3, 0.9)):
            yield Setting(kind, clusters, 1, rate, 0.0, pair)
            yield Setting(kind, clusters, 6, rate, 0.05, pair, 0.03)
        for rate in (0.1, 0.5, 0.65):
            yield Setting("retained", clusters, 3, rate, 0.1, 0.5)


def evaluation(columns: dict[str, Column]) -> Evaluation:
    """An evaluation that holds these outcomes, by model."""
    settings = EvaluateSettings(resamples=RESAMPLES)
    first = next(iter(columns.values()))
    suite = SuiteRecord(
        digest="", split="test", prompts=len(first.values), chat_template="none", groups=("all",), units={"s": units_of(first)}
    )
    models = {}
    for name, column in columns.items():
        result = SuiteResult(
            metrics={"s": metric(column, settings)}, outcomes={"s": packed(column)}, errors=0, tokens=0, unfinished=0,
            template="none", answers="",
        )  # fmt: skip
        models[name] = ModelResult(id=ModelId(name=name), suites={"s": result})
    return Evaluation(suites={"s": suite}, models=models, against=(), pairs=(), settings=settings, versions={})


def gates(seed: int) -> tuple[bool, bool, bool, bool]:
    """Whether gates accept models without a difference (24 clusters of 4): a rule, a relative bound, two rules, any of nine."""
    rng = np.random.default_rng(10_000 + seed)
    setting = Setting("difference", 24, 4, 0.6, 0.1, 0.5, 0.03)
    names = ["base", *(f"m{i}" for i in range(9))]
    record = evaluation(dict(zip(names, draw(rng, setting, (0.6,) * 10), strict=True)))
    rule = {"metric": "s", "difference_to": "base", "at_least": 0.001, "use": "low"}
    relative = {"metric": "s", "at_least": {"model": "base", "plus": 0.001}, "use": "low"}
    floor = {"metric": "s", "at_least": 0.6, "use": "low"}

    def passes(model: str, *rules: dict[str, Any]) -> bool:
        return check_gate(record, Gate.model_validate({"model": model, "rules": rules})).passed

    each = [passes(name, rule) for name in names[1:]]
    return each[0], passes("m0", relative), passes("m0", rule, floor), any(each)


def summary(counted: list[Counted], kind: str, pick: Callable[[Counted], float], choose: Callable[..., float]) -> float:
    """The least or the largest of a figure over all settings of one kind."""
    return float(choose(pick(one) for one in counted if one.setting.kind in kind.split("|")))


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--draws", type=click.IntRange(min=50), default=None, help="Draws a setting (default: 2000, quick 100).")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count())
def main(quick: bool, save: bool, draws: int | None, jobs: int) -> None:
    """Simulate coverage and false accepts."""
    draws = draws or (100 if quick else 2000)
    chosen = list(settings_of(quick))
    with ProcessPoolExecutor(jobs) as pool:
        counted = []
        print(
            f"{'kind':12s} clusters × units   rate   rho  pair | coverage  low above truth (plain percentile)  width",
            flush=True,
        )
        for one in pool.map(count, chosen, [draws] * len(chosen)):
            counted.append(one)
            s = one.setting
            print(
                f"{s.kind:12s} {s.clusters:8d} × {s.size}   {s.rate:8.2f}  {s.rho:4.2f}  {s.pair:4.2f} | "
                f"{one.coverage:8.3f}  {one.accepted:.3f} ({one.plain:.3f})  {one.width:.3f}",
                flush=True,
            )
        said = np.array(list(pool.map(gates, range(draws), chunksize=20))).mean(0)
    figures: dict[str, Any] = {"draws": draws, "settings": len(chosen), "resamples": RESAMPLES}
    for name, kind in (
        ("rate", "rate"), ("mean_of_groups", "mean"), ("worst_group", "min"), ("difference", "difference|margin"),
        ("retained", "retained"),
    ):  # fmt: skip
        figures[f"coverage_{name}_least"] = summary(counted, kind, lambda one: one.coverage, min)
    for name, kind in (("difference", "difference"), ("margin", "margin"), ("retained", "retained"), ("worst_group", "min")):
        figures[f"false_accept_{name}_most"] = summary(counted, kind, lambda one: one.accepted, max)
    for name in ("difference", "margin"):
        figures[f"plain percentile: false_accept_{name}_most"] = summary(counted, name, lambda one: one.plain, max)
    keys = (
        "false_accept_gate",
        "false_accept_gate_of_a_bound",
        "false_accept_gate_of_two_rules",
        "any of nine models accepted",
    )
    figures |= dict(zip(keys, map(float, said), strict=True))
    finish("statistics_check", figures, GOALS, save, quick)


if __name__ == "__main__":
    main()
