"""Suites: prompts with the instructions that judge their answers.

Built in are `formats` (every topic of the split in all six IFEval formats), `arithmetic` and `code`, each with tiers that are
reported apart, and `ifeval` and `ifbench`, the official prompts of IFEval and IFBench (evaluate/ifeval.py and ifbench.py say
where they come from). A user's own suite is a file (evaluate/suite_files.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mechmerge.artifacts import Document, digest
from mechmerge.behaviors.prompts import TIERS, Tier
from mechmerge.behaviors.schema import Verifier
from mechmerge.errors import InputError

Reading = Literal["strict", "loose"]
BUILTIN = ("formats", "arithmetic", "code", "ifeval", "ifbench")
PUBLISHED = ("ifeval", "ifbench")
"""Those whose prompts are a published file, which `--data` may name."""

TASK = "lm_eval:"
"""What names of lm-eval's tasks begin with where suites are named."""


def is_task(name: str) -> bool:
    """Whether a suite's name is that of a task of lm-eval (evaluate/harness.py)."""
    return name.startswith(TASK)


class Instruction(Document):
    """One thing that an answer must do, and how that is checked."""

    verifier: Verifier
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the verifier for this prompt alone."""


class SuitePrompt(Document):
    """One prompt and how its answer is judged: it passes when every instruction does.

    A prompt of one instruction may give `verifier` and `arguments` in the place of `instructions`.
    """

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    instructions: tuple[Instruction, ...] = Field(min_length=1)
    group: str = Field(default="all", pattern=r"^[A-Za-z0-9][A-Za-z0-9_:-]*$")
    """Kind of the prompt, such as one of the six formats; a suite's headline is the mean over its groups."""
    tier: Tier = "seen"
    """Prompts of the tiers `unseen` and `hard` are reported apart."""
    topic: str | None = None
    """Prompts of one topic are one cluster in statistics; each its own by default."""

    @model_validator(mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        if isinstance(value, dict) and "instructions" not in value and "verifier" in value:
            one = {key: value[key] for key in ("verifier", "arguments") if key in value}
            return {key: entry for key, entry in value.items() if key not in one} | {"instructions": (one,)}
        return value

    @model_validator(mode="after")
    def _reserved(self) -> SuitePrompt:
        if self.group in RESERVED:
            raise ValueError(f"the group name `{self.group}` is taken: {RESERVED[self.group]}")
        return self

    @property
    def cluster(self) -> str:
        """What is resampled in statistics: the topic, or a name that no topic has."""
        return self.topic or f"\0{self.id}"


RESERVED = {
    "min": "the worst group",
    "instruction": "the share of instructions that pass",
    "loose": "the loose reading",
    "loose-instruction": "the loose reading, by instruction",
}
"""Names that metrics of a suite have, and no group may."""


class Suite(Document):
    """A suite with its prompts written out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    split: str
    """`test`, `develop`, or `file` for prompts that have no splits."""
    answer_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens."""
    chat_template: str = "model"
    """`model`: each model's own; `none`: the prompts as they are; anything else: a Jinja template."""
    readings: tuple[Reading, ...] = ("strict",)
    """`loose` also judges the answer without its first or last line and without asterisks, as IFEval does."""
    breakdown: Literal["group", "instruction"] = "group"
    """What the suite is reported by: groups of prompts, or types of instructions (then groups are not averaged)."""
    prompts: tuple[SuitePrompt, ...] = Field(min_length=1)
    limited: bool = False
    """Whether prompts were left out by a limit."""

    @model_validator(mode="after")
    def _unique(self) -> Suite:
        twice = [name for name, count in Counter(p.id for p in self.prompts).items() if count > 1]
        if twice:
            raise ValueError(f"prompt id {twice[0]!r} stands twice")
        if self.readings[:1] != ("strict",) or len(set(self.readings)) < len(self.readings):
            raise ValueError("readings: expected [strict] or [strict, loose]")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the suite with its prompts."""
        return digest(self.model_dump(mode="json"))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, or of the types of instructions, in order of appearance."""
        if self.breakdown == "group":
            return tuple(dict.fromkeys(p.group for p in self.prompts))
        return tuple(sorted({i.verifier.name for p in self.prompts for i in p.instructions}))


def load_suite(
    name: str | Path,
    split: Literal["test", "develop"] = "test",
    limit: int | None = None,
    *,
    tiers: Sequence[Tier] | None = None,
    data: Path | None = None,
) -> Suite:
    """A suite by the name of a built-in one or the path of a YAML or JSON Lines file.

    Args:
        name: a built-in suite's name, or a path.
        split: of a built-in suite: `test` is what is reported, `develop` is for choosing settings. A file has no splits.
        limit: at most this many prompts, the same share of every group and tier.
        tiers: only prompts of these (default: all that there are).
        data: the prompts of `ifeval` or `ifbench`, a JSON Lines file (default: the official ones, by their digest).

    Raises:
        InputError: neither a built-in name nor a file; an unknown verifier or argument.
        SchemaError: the file breaks the schema, a prompt is missing, or an id stands twice.
        MissingError: a verifier or the suite needs data that is not on this machine.
    """
    from mechmerge.evaluate import builtin_suites, ifbench, ifeval, suite_files

    if data is not None and str(name) not in PUBLISHED:
        wanted = f"the suite {' or '.join(PUBLISHED)}"
        raise InputError("--data", expected=wanted, found=str(name), fix="a file of your own is a suite itself")
    if str(name) in builtin_suites.SUITES:
        suite = builtin_suites.SUITES[str(name)](split)
    elif str(name) == "ifeval":
        suite = ifeval.load(data)
    elif str(name) == "ifbench":
        suite = ifbench.load(data)
    elif Path(name).is_file():
        suite = suite_files.load(Path(name))
    else:
        raise InputError(f"suite {name!s}", expected=f"a file, or one of {', '.join(BUILTIN)}", found="neither")
    if tiers is not None and not {prompt.tier for prompt in suite.prompts} <= set(tiers):
        kept = tuple(prompt for prompt in suite.prompts if prompt.tier in tiers)
        if not kept:
            raise InputError(f"suite {name!s}", expected=f"prompts of the tiers {', '.join(tiers)}", found="none")
        suite = suite.model_copy(update={"prompts": kept})
    return suite if limit is None or limit >= len(suite.prompts) else limited(suite, limit)


def limited(suite: Suite, limit: int) -> Suite:
    """Takes prompts from every group and tier in turn; the order of those taken stays."""
    if limit < 1:
        raise InputError("limit", expected="at least 1", found=str(limit))
    kept = sorted(dealt(suite)[:limit])
    return part_of(suite, kept)


def dealt(suite: Suite) -> list[int]:
    """All places of a suite's prompts, taken from every group and tier in turn: a beginning of them is a fair part of all."""
    cells: dict[tuple[Tier, str], list[int]] = defaultdict(list)
    for i, prompt in enumerate(suite.prompts):
        cells[prompt.tier, prompt.group].append(i)
    ordered = [members for _, members in sorted(cells.items(), key=lambda cell: TIERS.index(cell[0][0]))]
    return [i for _, _, i in sorted((turn, c, i) for c, members in enumerate(ordered) for turn, i in enumerate(members))]


def part_of(suite: Suite, places: Sequence[int]) -> Suite:
    """The suite of some of its prompts, in the order that is told."""
    return suite.model_copy(update={"prompts": tuple(suite.prompts[i] for i in places), "limited": True})
