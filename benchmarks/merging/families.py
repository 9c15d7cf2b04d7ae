"""Three families of experts of one base, what their skills are measured on, and where their adapters come from.

conflict   formats + terse arithmetic: the arithmetic expert answers everything in one word, which wrecks the formats
mild       formats + an arithmetic expert that answers everything else as the base does
three-way  mild + an expert that answers in JSON where that is asked for

A skill is at once an expert, the behaviour that it answers for, and a suite. Splits share neither topics, nor requests, nor
sums; unseen wordings stand in develop or in test alone. The formats have a floor of five words in the built-in suites (sections
of eight), and so has JSON here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from benchmarks.experts.training import REFERENCE
from mechmerge.behaviors.instructions import instructions
from mechmerge.behaviors.prompts import Tier, requests
from mechmerge.behaviors.schema import Behavior, Verifier, load_behavior, load_group
from mechmerge.evaluate.suites import Instruction, Suite, SuitePrompt, limited, load_suite
from mechmerge.localize.calibration import BehaviorRow
from mechmerge.pipeline.demo import demo_folder

FAMILIES: dict[str, dict[str, str]] = {
    "conflict": {"formats": "formats", "arithmetic": "arithmetic"},
    "mild": {"formats": "formats", "arithmetic": "plain-arithmetic"},
    "three-way": {"formats": "formats", "arithmetic": "plain-arithmetic", "json": "json"},
}
"""Family → skill → how its expert is trained (benchmarks/experts)."""
COMMITTED = ("formats", "arithmetic")
"""Experts whose adapters of seed 0 are the demo's: other seeds are trained here, by a script that has changed since."""
COMMITTED_AT = "20074d8"
"""The commit at which the demo's were trained (benchmarks/experts/__main__.py says how that script differed)."""
EvaluatedSplit = Literal["develop", "test"]
TIERS: tuple[Tier, ...] = ("seen", "unseen")
FLOOR = 5
"""Words that a JSON answer must have at least: `{"a": 1}` is no answer."""
UNSEEN_JSON: dict[EvaluatedSplit, tuple[str, ...]] = {
    "develop": ("Put everything you say into one JSON object.",),
    "test": ("Return JSON only: no greeting, no explanation.", "I will parse your reply as JSON, so send nothing but that."),
}
"""Wordings that no training and no calibration sees, each of one split."""


def json_suite(split: EvaluatedSplit) -> Suite:
    """Every topic of a split in each wording that the expert was trained on, and in one that it was not."""
    behavior = _json()
    assert behavior.verifier is not None
    instruction = Instruction(verifier=behavior.verifier)
    prompts = []
    for i, (topic, request) in enumerate(requests(split)):
        asked: list[tuple[Tier, str]] = [("seen", wording) for wording in instructions()["json"]["wordings"]]
        for place, (tier, wording) in enumerate([*asked, ("unseen", UNSEEN_JSON[split][i % len(UNSEEN_JSON[split])])]):
            prompts.append(
                SuitePrompt(
                    id=f"{tier}.{place}.{topic}", prompt=f"{request} {wording}", instructions=(instruction,), group="json",
                    tier=tier, topic=topic,
                )
            )  # fmt: skip
    return Suite(name="json", split=split, answer_tokens=behavior.answer_tokens, prompts=tuple(prompts))


def suites(family: str, split: EvaluatedSplit, limit: int | None = None) -> list[Suite]:
    """The suites of a family's skills, in order; `limit` prompts of each where told."""
    return [_suite(skill, split, limit) for skill in FAMILIES[family]]


@functools.cache
def _suite(skill: str, split: EvaluatedSplit, limit: int | None) -> Suite:
    if skill != "json":
        return load_suite(skill, split, limit, tiers=TIERS)
    suite = json_suite(split)
    return suite if limit is None else limited(suite, limit)


@functools.cache
def prompts_of(limit: int | None) -> dict[str, str]:
    """Digest of every suite, by name and split."""
    skills = {skill for skills in FAMILIES.values() for skill in skills}
    splits: tuple[EvaluatedSplit, ...] = ("develop", "test")
    return {f"{skill}@{split}": _suite(skill, split, limit).digest for skill in sorted(skills) for split in splits}


def members(skill: str) -> tuple[Behavior, ...]:
    """The behaviours behind a skill, with their calibration prompts."""
    return (_json(),) if skill == "json" else load_group(skill)


def rows(family: str) -> list[BehaviorRow]:
    """A row of the effect matrix for each skill of a family."""
    return [BehaviorRow(skill, members(skill), skill) for skill in FAMILIES[family]]


def committed(training: str, seed: int) -> Path | None:
    """The adapter that comes with the repository, where there is one."""
    return demo_folder() / "experts" / training if seed == 0 and training in COMMITTED else None


def reference(adapter: Path) -> str:
    """The model reference of an expert."""
    return f"{REFERENCE}+{adapter}"


def _json() -> Behavior:
    return load_behavior("json").model_copy(update={"verifier": Verifier(name="json", min_words=FLOOR)})
