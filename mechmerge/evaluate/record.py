"""`evaluation.json`: what models scored, with what certainty, and how they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mechmerge.artifacts import Document, write_text
from mechmerge.errors import InputError
from mechmerge.models.references import ModelId


class EvaluateSettings(Document):
    """How answers are generated and judged."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights while generating."""
    batch: int = Field(default=24, ge=1)
    """Prompts a batch; part of the result, since in bf16 an answer depends on its batch."""
    device: str = "cpu"
    """Torch device."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap. Generation is greedy and has none."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of topics."""


class Metric(Document):
    """A share of prompts whose answer passes; a mean over groups where a suite has several."""

    value: float = Field(ge=0, le=1)
    n: int = Field(ge=1)
    """Prompts."""
    clusters: int = Field(ge=1)
    """Topics that the prompts belong to: what is resampled."""
    low: float = Field(ge=0, le=1)
    """Lower end of the 95 % interval."""
    high: float = Field(ge=0, le=1)
    """Upper end of the 95 % interval."""


class SuiteRecord(Document):
    """A suite as it was asked."""

    digest: str
    """sha256 of the suite with its prompts written out."""
    split: str
    """`test`, `develop`, or `file` for a user's own."""
    prompts: int
    answer_tokens: int
    """Longest answer, in tokens."""
    chat_template: str
    """The suite's setting: `model`, `none` or a Jinja template."""
    groups: tuple[str, ...]
    """Kinds of prompts, such as the six formats."""
    limited: bool = False
    """Whether only some of its prompts were asked."""


class SuiteResult(Document):
    """What one model did in one suite."""

    metrics: dict[str, Metric]
    """By flat name: `formats` (mean over groups), `formats.min` (worst group), `formats.capitals`, each also `…@unseen`."""
    errors: int
    """Answers whose verifier failed to run; they count as not passed."""
    tokens: int
    """Generated tokens."""
    unfinished: int
    """Answers cut off at `answer_tokens`."""
    template: str
    """sha256 of the chat template that was used, or `none`."""
    answers: str
    """Key of the answers: weights, prompt tokens and decoding settings."""


class ModelResult(Document):
    """What one model did."""

    id: ModelId
    suites: dict[str, SuiteResult]


class PairTest(Document):
    """Two models on the same prompts."""

    model: str
    against: str
    metric: str
    """A headline metric: a suite, or a suite's tier."""
    difference: float
    """Value of `model` minus value of `against`."""
    low: float
    """Lower end of the difference's 95 % interval (paired bootstrap of topics)."""
    high: float
    better: int
    """Prompts that only `model` passes."""
    worse: int
    """Prompts that only `against` passes."""
    p: float = Field(ge=0, le=1)
    """Exact McNemar test, two-sided. It takes prompts as independent; the interval does not."""
    p_holm: float = Field(ge=0, le=1)
    """The same, corrected by Holm's method for all tests of this file."""


class Evaluation(Document):
    """`evaluation.json`."""

    schema_version: Literal[1] = 1
    suites: dict[str, SuiteRecord]
    models: dict[str, ModelResult]
    """By name, in the order in which they were given."""
    against: tuple[str, ...]
    """Models that the others are compared with."""
    pairs: tuple[PairTest, ...]
    settings: EvaluateSettings
    decoding: Literal["greedy"] = "greedy"
    versions: dict[str, str]

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

    def pair(self, model: str, against: str, metric: str) -> PairTest | None:
        """The paired test of two models, if it was made."""
        return next((p for p in self.pairs if (p.model, p.against, p.metric) == (model, against, metric)), None)
