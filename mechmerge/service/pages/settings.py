"""The settings of every policy as a form shows them: one row of a table each, by the names that pipelines know.

`pipeline/schema.py` says which policy takes which; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mechmerge.errors import InputError
from mechmerge.pipeline.schema import PARAMETERS
from mechmerge.recipe.compile import BASELINES, CHOICES, OF_BASELINES, POLICIES
from mechmerge.recipe.schema import UNWEIGHTED


class Setting(NamedTuple):
    """A setting."""

    name: str
    label: str
    kind: Literal["slider", "choice", "flag"]
    default: Any
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    percent: bool = False

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies that take it."""
        return tuple(policy for policy, names in PARAMETERS.items() if self.name in names and not is_family(policy, self.name))

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """What a choice is among, with words."""
        if self.kind == "flag":
            return (("yes", "yes"), ("no", "no"))
        return tuple((value, f"{value}: {WORDS[value]}" if value in WORDS else value) for value in CHOICES[self.name])


WORDS = {
    "sum": "1 for each",
    "share": "1/k for each",
    "winner": "the best score alone",
    "own-gain": "by what the behaviour had to win",
    "equal": "as it is",
}
SETTINGS = (
    Setting("budget", "Budget, of each expert's head, KV and neuron parameters", "slider", 0.3, 0.01, percent=True),
    Setting("overlap", "A component chosen for k experts gets", "choice", "sum"),
    Setting("scale", "Strength of what is chosen", "choice", CHOICES["scale"][0]),
    Setting("weighting", "An effect counts", "choice", "own-gain"),
    Setting("agreement", "Judged on both halves of the prompts", "flag", True),
    Setting("certainty", "Standard errors by which it must harm to be dropped", "slider", 0.0, 0.0, 4.0, 0.5),
    Setting("unproven", "Solve where effects are not known to predict", "flag", False),
    Setting("per_layer", "Counts are kept in each layer", "flag", False),
    Setting("match_norms", "The norm of the change is kept", "flag", False),
    Setting("weight", "Weight of each expert", "slider", 1.0, 0.0, 2.0, 0.05),
    Setting("density", "Density", "slider", 0.5, 0.05, 1.0, 0.05, percent=True),
    Setting("lambda", "Times what is added to the base", "slider", 1.0, 0.0, 2.0, 0.05),
    Setting("epsilon", "Epsilon", "slider", 0.15, 0.01, 0.5),
    Setting("gamma", "Gamma", "slider", 0.01, 0.0, 0.5),
    Setting("topk", "Share of elements kept", "slider", 1.0, 0.05, 1.0, 0.05, percent=True),
    Setting("filter_wise", "Place of each row, not of each tensor", "flag", False),
)
FAMILIES = {("conflict", "weight"), ("solve", "limit")}
"""Settings with one value a behaviour, `weight.NAME` and `limit.NAME`."""
STRENGTHENED = tuple(policy for policy in POLICIES if BASELINES.get(policy) not in UNWEIGHTED)
"""Policies whose experts take a strength, `strength.NAME`."""


def is_family(policy: str, name: str) -> bool:
    """Whether a policy takes a setting once for each behaviour."""
    return (policy, name) in FAMILIES


def read_settings(policy: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """What a form's fields say of a policy's settings; others are passed over.

    Raises:
        InputError: not a number where one is needed.
    """
    by_name = {setting.name: setting for setting in SETTINGS}
    found: dict[str, Any] = {}
    for name in PARAMETERS[policy]:
        if is_family(policy, name):
            found |= _family(name, fields, neutral=1.0 if name == "weight" else None)
            continue
        setting = by_name[name]
        default = OF_BASELINES.get(policy, {}).get(name, setting.default)
        given = fields.get(name)
        if given is None:
            found[name] = default
        else:
            found[name] = {"slider": number(name, given) if setting.kind == "slider" else 0, "choice": given,
                           "flag": given == "yes"}[setting.kind]  # fmt: skip
    return found | (_family("strength", fields, neutral=1.0) if policy in STRENGTHENED else {})


def _family(name: str, fields: Mapping[str, str], neutral: float | None) -> dict[str, float]:
    """`NAME.member` → value, without those that change nothing: a recipe says only what it was told."""
    given = {key: number(key, text) for key, text in fields.items() if key.startswith(f"{name}.") and text}
    return {key: value for key, value in given.items() if value != neutral}


def number(name: str, text: str) -> float:
    """A finite number.

    Raises:
        InputError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(name, expected="a number", found=repr(text[:100]))
    return value
