"""Rounds on tiny models: changes are measured where they are made, never kept when they do not help, and written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from mechmerge.behaviors.schema import Behavior, Pair
from mechmerge.cli.main import cli
from mechmerge.errors import InputError, LocalizeError, SchemaError
from mechmerge.localize.bench import Bench
from mechmerge.localize.calibration import BehaviorRow, Calibration, Point
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.rounds_file import CERTAINTY, RoundsFile, RoundsMetadata, read_rounds
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import Model
from mechmerge.pipeline.schema import RecipePlan, RoundsPlan
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.schema import read_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.report.summary import rounds_said

SETTINGS = RoundSettings(prompts=8, dtype="float32", batch=8)


def behavior(name: str) -> Behavior:
    topics = ["tea", "rain", "a river", "the moon", "bread", "a boat", "chess", "snow"]
    pairs = tuple(Pair(**{"with": f"{name}: {t}", "without": f"Say {t}.", "topic": t}) for t in topics)
    return Behavior(name=name, pairs=pairs, answer_tokens=6)


def rows() -> list[BehaviorRow]:
    return [BehaviorRow("first", (behavior("one"),), "a"), BehaviorRow("second", (behavior("two"),), "b", weight=2.0)]


@pytest.fixture(scope="module")
def settled(base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounds") / "rounds.safetensors"
    settle(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    return out


def calibration(base: Model, expert: Model, second: Model, folder: Path) -> Calibration:
    return Calibration(base, {"a": expert, "b": second}, rows(), folder / "units", SETTINGS)


def test_the_gain_never_falls_and_is_what_the_coefficients_give(
    settled: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    file = read_rounds(settled)
    metadata = file.metadata
    per_nat = {b.name: b.weight / (b.loss_base - b.loss_expert) for b in metadata.behaviors}
    start = sum(per_nat[b.name] * (b.loss_base - b.loss_sum) for b in metadata.behaviors)
    end = sum(per_nat[b.name] * (b.loss_base - b.loss_merge) for b in metadata.behaviors)
    gains = [start, *(r.gain for r in metadata.rounds if r.accepted)]
    assert gains == sorted(gains)
    assert end == pytest.approx(gains[-1], abs=1e-6)
    assert end > start, "something was there to be settled"
    # The losses anew, at the coefficients of the file.
    measured = calibration(base, expert, second_expert, tmp_path)
    units = {kind: file.arrays[f"{kind}.coefficient"] for kind in UNIT_KINDS}
    found = measured.weights() @ measured.losses(Point((1.0, 1.0), units), "the merge")
    assert found == pytest.approx([b.loss_merge for b in metadata.behaviors], abs=1e-5)


def test_a_round_that_does_not_help_is_taken_back(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Calibration.losses

    def worse(self: Calibration, point: Point, label: str) -> np.ndarray:
        return losses(self, point, label) + (10 if label.startswith("the merge after") else 0)

    monkeypatch.setattr(Calibration, "losses", worse)
    file = settle(base, {"a": expert, "b": second_expert}, rows(), tmp_path / "r.safetensors", SETTINGS)
    (only,) = file.metadata.rounds
    assert not only.accepted
    assert only.changed > 0
    assert all((array == 1).all() for array in file.arrays.values()), "the coefficients are those of the sum again"
    assert all(b.loss_merge == b.loss_sum for b in file.metadata.behaviors)
    compiled = compile_recipe("rounds", read_sources([tmp_path / "r.safetensors"]))
    assert compiled.notes == ("no round raised the weighted gain: this is the sum of the experts",)


def test_predictions_are_for_what_was_changed(settled: Path) -> None:
    first = read_rounds(settled).metadata.rounds[0]
    assert 0 < first.changed <= first.proposed
    for name, predicted in first.predicted.items():
        assert abs(predicted - first.realised[name]) < 0.5 * max(abs(first.realised[name]), 0.05)


def test_points_set_the_weights_that_the_formula_says(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    """base + Σ c ∘ δ against the plain formula of the merge layer."""
    from mechmerge.merge.reference import merged_tensor
    from mechmerge.recipe.coefficients import coefficients
    from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert

    generator = np.random.default_rng(0)
    arch = base.checkpoint().arch
    units = {k: generator.uniform(size=(2, arch.layers, arch.units(k))).astype(np.float32) for k in UNIT_KINDS}
    measured = calibration(base, expert, second_expert, tmp_path)
    measured._move(Point((0.5, 1.0), units))
    recipe = Recipe(
        base=base.id,
        experts={
            "a": RecipeExpert(model=expert.id, default=0.5),
            "b": RecipeExpert(model=second_expert.id, default=1.0),
        },
        policy=Policy(name="test"),
        out_dtype="float32",
    )
    masks = {f"{name}.{kind}": units[kind][i] for i, name in enumerate(("a", "b")) for kind in UNIT_KINDS}
    found = coefficients(recipe, masks, arch)
    checkpoints = {"a": expert.checkpoint(), "b": second_expert.checkpoint()}
    for name, parameter in measured.bench.parameters.items():
        expected = merged_tensor(name, base.checkpoint(), checkpoints, found)
        assert np.allclose(parameter.detach().numpy(), expected.float().numpy(), atol=1e-6), name


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(
    settled: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Bench.answer_losses, []

    def stops(self: Bench, *batch: Any) -> object:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return loss(self, *batch)

    monkeypatch.setattr(Bench, "answer_losses", stops)
    out = tmp_path / "rounds.safetensors"
    with pytest.raises(KeyboardInterrupt):
        settle(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    assert not out.exists()
    settle(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    assert out.read_bytes() == settled.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["rounds.safetensors"]


def test_the_recipe_records_predicted_and_realised(settled: Path) -> None:
    compiled = compile_recipe("rounds", read_sources([settled]))
    metadata = read_rounds(settled).metadata
    for b in metadata.behaviors:
        assert compiled.recipe.realised is not None
        assert compiled.recipe.realised[b.name] == pytest.approx(b.loss_merge - b.loss_base, abs=1e-5)
    assert compiled.recipe.predicted is not None
    assert set(compiled.masks) == {f"{e}.{k}" for e in ("a", "b") for k in UNIT_KINDS}
    assert all(expert.default == 1.0 for expert in compiled.recipe.experts.values())
    assert compiled.recipe.provenance[0].kind == "rounds"


def test_wrong_input(settled: Path, base: Model, expert: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an expert of a; found b"):
        settle(base, {"a": expert}, [BehaviorRow("x", (behavior("one"),), "b")], tmp_path / "r.safetensors", SETTINGS)
    with pytest.raises(LocalizeError, match="expected its expert a to lower its loss"):
        settle(base, {"a": base}, [BehaviorRow("x", (behavior("one"),), "a")], tmp_path / "r.safetensors", SETTINGS)
    with pytest.raises(InputError, match=r"expected a rounds file; found none; make one with `mechmerge rounds`"):
        compile_recipe("rounds", read_sources([_effects(tmp_path)]))
    file = read_rounds(settled)
    with pytest.raises(SchemaError, match=r"head.coefficient, kv.coefficient, neuron.coefficient"):
        RoundsFile(file.metadata, {}).write(tmp_path / "bad.safetensors")
    bad = file.arrays | {"head.coefficient": file.arrays["head.coefficient"][:1]}
    with pytest.raises(SchemaError, match="float32"):
        RoundsFile(file.metadata, bad).write(tmp_path / "bad.safetensors")


def _effects(folder: Path) -> Path:
    from tests.measured import effect_file

    effect_file().write(folder / "effects.safetensors")
    return folder / "effects.safetensors"


# ---------------------------------------------------------------------------------------------------------------- certainty
def test_two_standard_errors_are_the_default() -> None:
    assert RoundSettings().certainty == RoundsPlan().certainty == CERTAINTY == 2.0
    assert RoundSettings(**RoundsPlan(certainty=0.5).model_dump()).certainty == 0.5
    for wrong in (-0.1, 100.5, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            RoundSettings(certainty=wrong)
        with pytest.raises(ValidationError):
            RoundsPlan(certainty=wrong)


def test_files_from_before_certainty_had_none(settled: Path, tmp_path: Path) -> None:
    file = read_rounds(settled)
    assert file.metadata.certainty == 2.0
    told = file.metadata.model_dump(mode="json")
    del told["certainty"]
    assert RoundsMetadata.model_validate(told).certainty == 0.0
    assert "and by 2 standard errors on all of them" in rounds_said(file.metadata)
    assert "standard errors" not in rounds_said(RoundsMetadata.model_validate(told))


def test_the_command_asks_for_certainty_and_says_where_nothing_is_sure(base: Model, expert: Model, tmp_path: Path) -> None:
    path, out = tmp_path / "one.yaml", tmp_path / "rounds.safetensors"
    path.write_text(yaml.safe_dump(behavior("one").model_dump(mode="json", by_alias=True)))
    command = ["rounds", str(base.path), f"a={expert.path}", "--behavior", f"{path}=a", "--prompts", "8", "--dtype", "float32"]
    done = CliRunner().invoke(cli, [*command, "--out", str(out), "--certainty", "100"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "round 1: no change helps on both halves of the prompts, by 100 standard errors" in done.stderr
    metadata = read_rounds(out).metadata
    assert (metadata.certainty, metadata.rounds) == (100.0, ())
    for wrong in ("nan", "inf", "-1", "101", "high"):
        done = CliRunner().invoke(cli, [*command, "--out", str(out), "--certainty", wrong])
        assert (done.exit_code, "--certainty" in done.stderr) == (2, True), done.output


def test_certainty_of_conflict_is_a_number(tmp_path: Path) -> None:
    effects, out = _effects(tmp_path), tmp_path / "made" / "recipe.yaml"
    for wrong in (float("nan"), float("inf"), -1, 10**400, "high", True, None):
        with pytest.raises(InputError, match="policy conflict: certainty"):
            compile_recipe("conflict", read_sources([effects]), parameters={"certainty": wrong})
        with pytest.raises(ValidationError, match="certainty"):
            RecipePlan(policy="conflict", parameters={"certainty": wrong})
    RecipePlan(policy="conflict", parameters={"certainty": 2})
    done = CliRunner().invoke(cli, ["recipe", str(effects), "--policy", "conflict", "--certainty", "1.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert read_recipe(out)[0].policy.parameters == {"certainty": 1.5}
