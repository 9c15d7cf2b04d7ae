"""`evaluation.json`: what models scored, with what certainty, and how they compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mechmerge.artifacts import Document, Migration, write_text
from mechmerge.errors import InputError
from mechmerge.evaluate.columns import Column
from mechmerge.models.references import ModelId

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""What a model may be called in an evaluation."""
PLAIN = r"[^\s|<>`*~&\\\[\]]+"
"""What suites and metrics may be called: nothing that Markdown or HTML reads as more than a name."""


class EvaluateSettings(Document):
    """How answers are generated and judged."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights while generating."""
    batch: int = Field(default=24, ge=1)
    """Prompts a batch; part of the result, since in bf16 an answer depends on its batch."""
    exact: bool = False
    """float32, and answers that do not depend on the other prompts of their batch (behaviors/generation.py says how)."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What generates; vllm runs through lm-eval and needs the extra of that name."""
    thinking: Literal["keep", "strip"] = "keep"
    """Whether `<think>…</think>` blocks count as part of the answer that is judged; samples hold them in either case."""
    device: str = "cpu"
    """Torch device."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap. Generation is greedy and has none."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of clusters."""

    @model_validator(mode="after")
    def _exact(self) -> EvaluateSettings:
        if self.exact and self.dtype != "float32":
            raise ValueError("exact: needs dtype float32")
        return self


class Metric(Document):
    """A share of units (prompts, or instructions) that pass; a mean over groups where a suite has several."""

    value: float = Field(ge=0, le=1)
    n: int = Field(ge=1)
    """Prompts or, in metrics by instruction, instructions."""
    clusters: int = Field(ge=1)
    """Topics or prompts that the units belong to: what is resampled."""
    low: float = Field(ge=0, le=1)
    """Lower end of the 95 % interval."""
    high: float = Field(ge=0, le=1)
    """Upper end of the 95 % interval."""


class Units(Document):
    """The units of one metric, in the order of its outcomes; the same for every model."""

    cluster: tuple[int, ...]
    """Number of each unit's cluster."""
    groups: tuple[str, ...]
    """Names of the groups."""
    group: tuple[int, ...]
    """Place of each unit's group among them."""
    over: Literal["mean", "min"] = "mean"
    """How groups are combined."""
    headline: bool = False
    """Whether tables show the metric among the first."""


class SuiteRecord(Document):
    """A suite as it was asked."""

    digest: str
    """sha256 of the suite with its prompts written out."""
    split: str
    """`test`, `develop`, `file` for prompts without splits, or `lm-eval` for a task of lm-eval."""
    prompts: int
    answer_tokens: int | None = None
    """Longest answer, in tokens; None where a task of lm-eval sets it."""
    chat_template: str
    """The suite's setting: `model`, `none` or a Jinja template."""
    groups: tuple[str, ...]
    """Kinds of prompts, such as the six formats, or types of instructions."""
    units: dict[str, Units]
    """By flat name of the metric."""
    readings: tuple[str, ...] = ("strict",)
    """How answers were read."""
    limited: bool = False
    """Whether only some of its prompts were asked."""

    @property
    def headlines(self) -> tuple[str, ...]:
        """Flat names of the metrics that tables show first."""
        return tuple(name for name, units in self.units.items() if units.headline)


class SuiteResult(Document):
    """What one model did in one suite."""

    metrics: dict[str, Metric]
    """By flat name: `formats` (mean over groups), `formats.min` (worst group), `formats.capitals`, each also `…@unseen`."""
    outcomes: dict[str, str | tuple[float, ...]]
    """By flat name, one outcome a unit: a string of 1 (passed) and 0, or numbers 0 … 1."""
    errors: int
    """Answers whose verifier failed to run; they count as not passed."""
    missing: int = 0
    """Prompts that answers made elsewhere hold nothing for; they count as not passed."""
    tokens: int
    """Generated tokens (0 where answers were made elsewhere)."""
    unfinished: int
    """Answers cut off at `answer_tokens`."""
    template: str
    """sha256 of the chat template that was used, or `none`."""
    answers: str
    """Key of the answers: weights, prompt tokens and decoding settings, or the sha256 of the file that they came in."""


class ResponsesId(Document):
    """A file of answers that were made elsewhere, in the place of a model."""

    name: str
    """The file's name."""
    sha256: str
    rows: int
    """Its rows."""
    unmatched: int
    """Rows that belong to no prompt of the suite; they are reported and count for nothing."""
    joined: Literal["key", "prompt", "loose"]
    """How rows found their prompts; `loose` pairs what is left in order of likeness."""


class ModelResult(Document):
    """What one model did."""

    id: ModelId | ResponsesId
    """The model's weights, or the answers that stand in their place."""
    suites: dict[str, SuiteResult]


class PairTest(Document):
    """Two models on the same prompts."""

    model: str
    against: str
    metric: str
    """Flat name."""
    headline: bool = True
    """Whether it is a headline metric of its suite; the others are groups or types of instructions."""
    difference: float
    """Value of `model` minus value of `against`."""
    low: float
    """Lower end of the difference's 95 % interval (paired bootstrap of clusters)."""
    high: float
    better: int
    """Units (prompts or instructions) in which `model` does better."""
    worse: int
    """Units in which `against` does better."""
    p: float = Field(ge=0, le=1)
    """Two-sided; of the exact McNemar test, or of a sign-flip test of clusters where outcomes are not pass or fail or where
    clusters hold several units."""
    test: Literal["mcnemar", "sign-flip"] = "mcnemar"
    """McNemar takes units as independent; the interval and the sign-flip test do not."""
    p_holm: float = Field(ge=0, le=1)
    """The same, corrected by Holm's method: headlines for all headline tests of this file, the others for all others."""

    @property
    def regression(self) -> bool:
        """Whether `model` is worse by more than chance: the corrected p is below .05 and the interval below 0."""
        return self.high < 0 and self.p_holm < 0.05


def _with_units(old: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 held no outcomes of single prompts: metrics and tests stay, and what would be computed from outcomes is refused.

    The headlines of version 1 were a suite's own metric and its tiers'.
    """
    for name, suite in old["suites"].items():
        results = [model["suites"][name] for model in old["models"].values() if name in model["suites"]]
        flats = list(dict.fromkeys(flat for result in results for flat in result["metrics"]))
        suite["units"] = {
            flat: {"cluster": [], "groups": [], "group": [], "headline": flat.partition("@")[0] == name} for flat in flats
        }
        for result in results:
            result["outcomes"] = dict.fromkeys(result["metrics"], "")
    return old


class Evaluation(Document):
    """`evaluation.json`."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {1: _with_units}

    schema_version: Literal[2] = 2
    suites: dict[str, SuiteRecord]
    models: dict[str, ModelResult]
    """By name, in the order in which they were given."""
    against: tuple[str, ...]
    """Models that the others are compared with."""
    pairs: tuple[PairTest, ...]
    settings: EvaluateSettings
    decoding: Literal["greedy"] = "greedy"
    versions: dict[str, str]

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        # Names go into tables, pages and file names: a file from elsewhere may hold no others than we write. So Markdown needs
        # no escapes, and what is read in a table is the name.
        for model, result in self.models.items():
            if not re.fullmatch(NAME, model):
                raise ValueError(f"model name {model!r}: expected letters, digits, _ . -")
            for name in (name for suite, held in result.suites.items() for name in (suite, *held.metrics)):
                if not re.fullmatch(PLAIN, name):
                    raise ValueError(f"metric name {name!r}: expected one without spaces and markup")
        for test in self.pairs:
            for name in (test.model, test.against):
                if name not in self.models:
                    raise ValueError(f"pairs: {name!r} is not among the models")
        return self

    def write(self, path: Path) -> None:
        """Writes the file atomically; unlike our other JSON files it keeps the order of models, suites and metrics."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @property
    def errors(self) -> int:
        """Answers of all models whose verifier failed to run."""
        return sum(result.errors for model in self.models.values() for result in model.suites.values())

    def metrics(self, model: str) -> dict[str, Metric]:
        """All metrics of a model by flat name.

        Raises:
            InputError: no such model in the file.
        """
        if model not in self.models:
            raise InputError(
                f"model {model!r}", expected=f"one of {', '.join(self.models)}", found="no such model in the evaluation"
            )
        return {name: metric for suite in self.models[model].suites.values() for name, metric in suite.metrics.items()}

    def metric(self, model: str, name: str) -> Metric:
        """One metric of a model.

        Raises:
            InputError: no such model or metric in the file.
        """
        known = self.metrics(model)
        if name not in known:
            raise InputError(f"metric {name!r} of {model}", expected=f"one of {', '.join(known)}", found="no such metric")
        return known[name]

    def column(self, model: str, name: str) -> Column:
        """The outcomes behind one metric of a model: what differences, shares and intervals are computed from.

        Raises:
            InputError: no such model or metric in the file.
        """
        self.metric(model, name)
        suite = next(suite for suite, result in self.models[model].suites.items() if name in result.metrics)
        units, held = self.suites[suite].units[name], self.models[model].suites[suite].outcomes[name]
        if not held:
            raise InputError(
                f"metric {name!r} of {model}", expected="outcomes of single prompts", found="none, as in files of schema 1",
                fix="evaluate again",
            )  # fmt: skip
        return Column(
            values=[float(value) for value in held],
            clusters=[str(number) for number in units.cluster],
            groups=[units.groups[place] for place in units.group],
            over=units.over,
            headline=units.headline,
        )

    def pair(self, model: str, against: str, metric: str) -> PairTest | None:
        """The paired test of two models, if it was made."""
        return next((p for p in self.pairs if (p.model, p.against, p.metric) == (model, against, metric)), None)
