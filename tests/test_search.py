"""What orders the trials of a search, and what ends one of them."""

from __future__ import annotations

import pytest

from mechmerge.localize.effect_file import EffectFile
from mechmerge.pipeline.search import kept_gain
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.policies import predicted_change
from mechmerge.recipe.sources import Sources
from tests.measured import effect_file


def protected(weight: float) -> EffectFile:
    """The second behaviour is one of the base's own."""
    file = effect_file()
    first, second = file.metadata.behaviors
    own = second.model_copy(update={"expert": "base", "loss_expert": second.loss_start, "weight": weight})
    return EffectFile(file.metadata.model_copy(update={"behaviors": (first, own)}), file.arrays)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_predicted_damage_to_what_is_protected_counts(weight: float) -> None:
    file = protected(weight)
    sources = Sources(file.metadata.base, dict(file.metadata.experts), effects=file)
    seen = set()
    for strength in (0.3, -0.5, 1.0):
        made = compile_recipe("task-arithmetic", sources, parameters={"weight": strength})
        change = predicted_change(file, dict.fromkeys(file.metadata.experts, strength), {})
        first, own = file.metadata.behaviors
        expected = min(-change[first.name] / first.own_gain, 1.0) - weight * max(change[own.name], 0.0)
        assert kept_gain(file, made) == pytest.approx(expected)
        seen.add(change[own.name] > 0)
    assert seen == {True, False}
