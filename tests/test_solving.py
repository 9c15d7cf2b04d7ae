"""Solving on tiny models: linearity and damage are measured, solutions too, and the better one is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.schema import Behavior, Pair, load_protected, protected_names
from mechmerge.cli.main import cli
from mechmerge.errors import InputError, LocalizeError
from mechmerge.evaluate.suites import load_suite
from mechmerge.localize.calibration import BASE, BehaviorRow, Calibration, Point
from mechmerge.localize.effect_file import LEAST_MASKS, EffectFile, Line, Linearity, read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.linearity import line, masks_of, shuffled
from mechmerge.localize.proposal import everything
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.localize.solving import SolveSettings, settle_solution
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.report.inspection import inspect_file

COMMON: dict[str, Any] = {"prompts": 8, "dtype": "float32", "batch": 8}
TOPICS = ["tea", "rain", "a river", "the moon", "bread", "a boat", "chess", "snow"]


def behavior(name: str) -> Behavior:
    pairs = tuple(Pair(**{"with": f"{name}: {t}", "without": f"Say {t}.", "topic": t}) for t in TOPICS)
    return Behavior(name=name, pairs=pairs, answer_tokens=6)


def rows() -> list[BehaviorRow]:
    chat = load_protected("chat").model_copy(update={"answer_tokens": 6})
    return [
        BehaviorRow("first", (behavior("one"),), "a"),
        BehaviorRow("second", (behavior("two"),), "b", weight=2.0),
        BehaviorRow("chat", (chat,), BASE, weight=0.5),
    ]


@pytest.fixture(scope="module")
def effects(base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("effects") / "effects.safetensors"
    settings = EffectSettings(**COMMON, origin="sum", check=8)
    measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, settings)
    return out


def test_an_expert_that_gains_nothing_is_refused(base: Model, tmp_path: Path) -> None:
    """Its behaviour would otherwise count with a turned sign, or without bound."""
    row = BehaviorRow("first", (behavior("one"),), "a")
    for settings in (EffectSettings(**COMMON, origin="sum"), EffectSettings(**COMMON, check=8)):
        with pytest.raises(LocalizeError, match=r"behaviour first: expected its expert a to lower its loss; found a gain of"):
            measure_effects(base, {"a": base}, [row], tmp_path / "effects.safetensors", settings)


def proven(path: Path) -> EffectFile:
    file = read_effects(path)
    lines = {b.name: Line(slope=1.0, r2=1.0, largest=1.0) for b in file.metadata.behaviors}
    return EffectFile(file.metadata.model_copy(update={"linearity": Linearity(masks=LEAST_MASKS, lines=lines)}), file.arrays)


@pytest.fixture(scope="module")
def solved(
    effects: Path, base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory
) -> RoundsFile:
    out = tmp_path_factory.mktemp("solved") / "solved.safetensors"
    settings = SolveSettings(**COMMON, budget=0.6, limits={"chat": 0.5}, tolerance=1e-6)
    return settle_solution(base, {"a": expert, "b": second_expert}, rows(), proven(effects), out, settings)


def calibration(base: Model, expert: Model, second: Model, folder: Path) -> Calibration:
    return Calibration(base, {"a": expert, "b": second}, rows(), folder / "units", SolveSettings(**COMMON))


# --------------------------------------------------------------------------------------------------------------- protection
def test_protected_prompts_are_asked_by_no_suite() -> None:
    asked = {p.prompt for name in ("formats", "arithmetic", "code") for p in load_suite(name).prompts}
    for name in protected_names():
        found = load_protected(name)
        assert len(found.pairs) >= 48
        assert len({pair.with_ for pair in found.pairs}) == len(found.pairs)
        assert found.verifier is None
        assert not asked & {pair.with_ for pair in found.pairs}
    assert load_protected("title").verifier is None, "the base's own answers, right or wrong"
    with pytest.raises(InputError, match="chat, general"):
        load_protected("nothing")


def test_a_protected_behaviour_is_the_loss_of_the_bases_own_answers(effects: Path, base: Model) -> None:
    *_, chat = read_effects(effects).metadata.behaviors
    assert (chat.name, chat.expert, chat.weight) == ("chat", "base", 0.5)
    assert chat.protected
    assert chat.own_gain == 0
    assert chat.loss_base == chat.loss_expert
    assert chat.answers == chat.prompts == 8, "none of its answers is judged"
    # The loss anew, answer by answer, with transformers alone.
    tokenizer, model, values = load_tokenizer(base.path), load_model(base.path), []
    template = chat_template_of(tokenizer, "model")
    texts = [render(tokenizer, pair.with_, template) for pair in load_protected("chat").pairs[:8]]
    for text, answer in zip(texts, generate(model, tokenizer, texts, max_new_tokens=6), strict=True):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        tokens = [*answer.ids, *([] if answer.end is None else [answer.end])]
        labels = torch.tensor([[-100] * len(prompt) + tokens])
        with torch.no_grad():
            values.append(model(input_ids=torch.tensor([prompt + tokens]), labels=labels).loss.item())
    assert chat.loss_base == pytest.approx(np.mean(values), abs=1e-4)


def test_rounds_count_damage_by_the_nat(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    settings = RoundSettings(**COMMON, max_rounds=1)
    file = settle(base, {"a": expert, "b": second_expert}, rows(), tmp_path / "r.safetensors", settings)
    first, second, chat = file.metadata.behaviors
    (only,) = file.metadata.rounds
    at = {b.name: b.loss_sum + only.realised[b.name] for b in file.metadata.behaviors}
    expected = sum(b.weight * (b.loss_base - at[b.name]) / (b.loss_base - b.loss_expert) for b in (first, second))
    expected += 0.5 * (chat.loss_base - at["chat"])
    assert only.gain == pytest.approx(expected, abs=1e-5)


def test_what_protection_needs(base: Model, expert: Model, tmp_path: Path) -> None:
    out = tmp_path / "e.safetensors"
    with pytest.raises(InputError, match="metric loss"):
        measure_effects(base, {"a": expert}, [rows()[2]], out, EffectSettings(**COMMON, metric="anchor"))
    with pytest.raises(InputError, match="another name than 'base'"):
        measure_effects(base, {"base": expert}, [rows()[2]], out, EffectSettings(**COMMON))


# ---------------------------------------------------------------------------------------------------------------- linearity
def test_linearity_is_that_of_measured_masks(
    effects: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    """The stored lines anew: predicted from the file's effects, measured one by one at the masks."""
    file, measured = read_effects(effects), calibration(base, expert, second_expert, tmp_path)
    assert file.metadata.linearity is not None
    assert file.metadata.path == "sum→proposal"
    start = everything(measured)
    from mechmerge.localize.proposal import per_nat, propose

    counts = per_nat(measured, np.array([b.own_gain for b in file.metadata.behaviors]))
    along = propose(measured, start, counts, "the sum", 0.0).along
    masks = masks_of(measured, along, counts, start, 8)
    assert len(masks) == file.metadata.linearity.masks == 8
    assert any(mask.rest != start.rest for mask in masks), "what has no component of its own is lowered too"
    at = measured.weights() @ measured.losses(start, "the sum")
    found = [measured.weights() @ measured.losses(mask, "m") - at for mask in masks]
    for r, b in enumerate(file.metadata.behaviors):
        predicted = []
        for mask in masks:
            units = mask.units or {}
            out = sum(float((file.arrays[f"{k}.effect"][r].astype(np.float64) * (1 - units[k])).sum()) for k in UNIT_KINDS)
            others = [name for name in file.arrays if name.endswith(".effect") and name[:-7] not in UNIT_KINDS]
            out += sum(float(file.arrays[name][r, e].sum()) * (1 - mask.rest[e]) for name in others for e in range(2))
            predicted.append(out)
        slope, r2 = np.polyfit(predicted, [f[r] for f in found], 1)[0], np.corrcoef(predicted, [f[r] for f in found])[0, 1] ** 2
        stored = file.metadata.linearity.lines[b.name]
        assert (stored.slope, stored.r2) == pytest.approx((slope, r2), abs=1e-3)


@pytest.mark.parametrize("number", [4, 5, 8, 99, 100, 130])
@pytest.mark.parametrize("experts", [1, 2])
def test_as_many_masks_as_are_asked_for(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, number: int, experts: int
) -> None:
    """A file is called linear only over a hundred masks, which every number of experts and behaviours can have."""
    models = {"a": expert, "b": second_expert} if experts == 2 else {"a": expert}
    measured = Calibration(base, models, rows()[:experts], tmp_path / "units", SolveSettings(**COMMON))
    start = everything(measured)
    values = {kind: np.random.default_rng(0).normal(size=(experts, len(measured.examples), *array.shape[1:]))
              for kind, array in (start.units or {}).items()}  # fmt: skip
    masks = masks_of(measured, values, np.ones(experts), start, number)
    assert len(masks) == number
    for kind in UNIT_KINDS:
        assert any((mask.units or {})[kind].min() == 0 for mask in masks) or number < 100


def test_few_masks_prove_nothing() -> None:
    lines = {"a": Line(slope=1.0, r2=1.0, largest=1.0)}
    assert Linearity(masks=LEAST_MASKS, lines=lines).holds
    few = Linearity(masks=LEAST_MASKS - 1, lines=lines)
    assert not few.holds
    assert few.failing == "99 masks of 100"


def test_lines_and_shuffles() -> None:
    x = np.arange(10.0)
    assert line(x, 2 * x + 1) == pytest.approx((2.0, 1.0))
    assert line(np.zeros(10), x) == (0.0, 0.0)
    inside = {"neuron": np.ones((2, 3, 8), np.float32)}
    inside["neuron"][0, 0, 4:] = 0
    mask = {"neuron": inside["neuron"].copy()}
    mask["neuron"][:, :, :2] = 0
    other = shuffled(mask, inside, 1)["neuron"]
    assert np.array_equal(other.sum(-1), mask["neuron"].sum(-1)), "counts of each layer and expert stay"
    assert not other[0, 0, 4:].any(), "what is out stays out"
    assert not np.array_equal(other, mask["neuron"])


# ------------------------------------------------------------------------------------------------------------------ solving
def test_the_solution_is_measured_where_it_is(
    solved: RoundsFile, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    metadata = solved.metadata
    assert metadata.solve is not None
    measured = calibration(base, expert, second_expert, tmp_path)
    units = {kind: solved.arrays[f"{kind}.coefficient"] for kind in UNIT_KINDS}
    found = measured.weights() @ measured.losses(Point((metadata.rest["a"], metadata.rest["b"]), units), "it")
    assert found == pytest.approx([b.loss_merge for b in metadata.behaviors], abs=1e-5)
    kept = [(b.loss_base - b.loss_merge) / (b.loss_base - b.loss_expert) for b in metadata.behaviors if b.expert != "base"]
    assert metadata.solve.worst_realised == pytest.approx(min(kept), abs=1e-5)
    for e in range(2):
        taken = sum(float(units[k][e].sum(dtype=np.float64)) * metadata.parameters[k] for k in UNIT_KINDS)
        assert taken <= 0.6 * sum(units[k][e].size * metadata.parameters[k] for k in UNIT_KINDS) + 1e-2


def test_it_is_measured_once_more_where_it_is_off(solved: RoundsFile) -> None:
    records = solved.metadata.rounds
    assert len(records) == 2, "a tolerance of one millionth is never met"
    assert sum(record.accepted for record in records) == 1
    own = {b.name: b.loss_base - b.loss_expert for b in solved.metadata.behaviors}
    start = {b.name: b.loss_base - b.loss_sum for b in solved.metadata.behaviors}
    worst = [min((start[n] - r.realised[n]) / own[n] for n in ("first", "second")) for r in records]
    damage = [r.realised["chat"] - start["chat"] for r in records]
    assert max(damage) <= 0.5, "both keep the limit, so the worst-off behaviour decides"
    assert worst[0] != worst[1]
    assert records[int(np.argmax(worst))].accepted


def test_the_recipe_of_a_measured_solution(solved: RoundsFile, tmp_path: Path) -> None:
    solved.write(tmp_path / "solved.safetensors")
    sources = read_sources([tmp_path / "solved.safetensors"])
    compiled = compile_recipe("solve", sources, parameters={"budget": 0.6})
    assert compiled.recipe.policy.parameters == {"budget": 0.6, "limit.chat": 0.5}
    realised = {b.name: b.loss_merge - b.loss_base for b in solved.metadata.behaviors}
    assert compiled.recipe.realised == pytest.approx(realised, abs=1e-5)
    accepted = next(r for r in solved.metadata.rounds if r.accepted)
    assert compiled.recipe.predicted == pytest.approx(
        {b.name: b.loss_sum - b.loss_base + accepted.predicted[b.name] for b in solved.metadata.behaviors}, abs=1e-5
    )
    assert {name: e.default for name, e in compiled.recipe.experts.items()} == solved.metadata.rest
    with pytest.raises(InputError, match=r"0\.6, as the rounds file was made"):
        compile_recipe("solve", sources, parameters={"budget": 0.5})
    with pytest.raises(InputError, match="method rounds; found solve"):
        compile_recipe("rounds", sources)


def test_a_prediction_that_holds_is_not_measured_again(
    effects: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    settings = SolveSettings(**COMMON, limits={"chat": 100.0}, tolerance=100.0)
    file = settle_solution(
        base, {"a": expert, "b": second_expert}, rows(), proven(effects), tmp_path / "s.safetensors", settings
    )
    (only,) = file.metadata.rounds
    assert only.accepted
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_what_solving_refuses(effects: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    out, experts = tmp_path / "s.safetensors", {"a": expert, "b": second_expert}
    bare = EffectFile(read_effects(effects).metadata.model_copy(update={"linearity": None}), read_effects(effects).arrays)
    with pytest.raises(InputError, match="not measured"):
        settle_solution(base, experts, rows(), bare, out, SolveSettings(**COMMON))
    with pytest.raises(InputError, match="expected the behaviours first, second in this order"):
        settle_solution(base, experts, rows()[:2], proven(effects), out, SolveSettings(**COMMON))
    swapped = {"a": second_expert, "b": expert}
    with pytest.raises(InputError, match="effects of base, a, b"):
        settle_solution(base, swapped, rows(), proven(effects), out, SolveSettings(**COMMON))
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------- CLI
def call(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(cli, [*map(str, arguments), "--format", "json", "--quiet"], standalone_mode=False)
    assert done.exception is None, done.exception
    return {key: value for text in done.stdout.splitlines() for key, value in json.loads(text).items()}


def test_limits_are_looked_at_before_anything_is_measured(
    effects: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("an answer was asked for")

    monkeypatch.setattr("mechmerge.localize.solving.references", measured)
    settings = SolveSettings(**COMMON, limits={"nothing": 0.1})
    with pytest.raises(InputError, match=r"limits: expected behaviours among .*; found nothing"):
        settle_solution(base, {"a": expert, "b": second_expert}, rows(), proven(effects), tmp_path / "r.safetensors", settings)


def test_the_commands(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    for name in ("one", "two"):
        document = behavior(name).model_dump(mode="json", by_alias=True)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    models = (base.path, f"a={expert.path}", f"b={second_expert.path}")
    asked = ["--behavior", f"{tmp_path}/one.yaml=a", "--behavior", f"{tmp_path}/two.yaml=b", "--protect", "general=2"]
    asked += ["--prompts", "4", "--dtype", "float32"]
    effects, solved = tmp_path / "effects.safetensors", tmp_path / "solved.safetensors"
    said = call("effects", *models, *asked, "--from", "sum", "--check", 4, "--out", effects)
    assert [row["expert"] for row in said["effects"]] == ["a", "b", "base"]
    assert "loss sum" in said["effects"][0]
    assert "loss proposal" in said["effects"][0]
    shown = inspect_file(effects)
    assert {"field": "protected", "value": "general"} in shown.tables["effects"]
    assert len(shown.tables["predictions around the sum, 4 masks"]) == 3
    (checked,) = (rows for title, rows in said.items() if "4 masks" in title)
    assert [row["behavior"] for row in checked] == ["one", "two", "general"]
    limits = ["--budget", "0.5", "--limit", "general=5", "--unproven"]
    said = call("rounds", *models, *asked, "--solve", effects, *limits, "--out", solved)
    assert said["solve"][0]["solution"] == 1
    facts = {row["field"]: row["value"] for row in inspect_file(solved).tables["rounds file"]}
    assert (facts["method"], facts["budget"], facts["limits"], facts["predictions proven"]) == (
        "solve",
        "0.5",
        "general 5",
        "NO",
    )
    made = tmp_path / "recipe.yaml"
    call("recipe", solved, "--policy", "solve", "--out", made)
    assert yaml.safe_load(made.read_text())["policy"]["parameters"]["budget"] == 0.5
    call("recipe", effects, "--policy", "solve", *limits, "--out", tmp_path / "pure" / "recipe.yaml")
    call("recipe", effects, "--policy", "conflict", "--protect", "general=9", "--out", tmp_path / "c" / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "c" / "recipe.yaml").read_text())["policy"]["parameters"] == {"weight.general": 9.0}
    for wrong in (
        ["recipe", str(effects), "--policy", "conflict", "--protect", "one=2", "--out", str(tmp_path / "d.yaml")],
        ["rounds", *map(str, models), *asked, "--budget", "0.5", "--out", str(solved)],
    ):
        done = CliRunner().invoke(cli, wrong, standalone_mode=False)
        assert isinstance(done.exception, InputError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solve", "E", "--plan"], "rounds --solve: expected what belongs to a solution.*found --plan"),
        (["--solve", "E", "--max-rounds", "2"], "found --max-rounds"),
        (["--solve", "E", "--certainty", "1"], "found --certainty"),
        (["--tolerance", "0.2"], r"expected --solve EFFECTS with what belongs to it \(tolerance\)"),
        (["--no-agreement", "--budget", "0.3"], r"\(budget, agreement\)"),
    ],
)
def test_options_that_do_not_belong_together(options: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["rounds", "base", "a=expert", "--behavior", "title=a", "--out", str(tmp_path / "r.safetensors"), *options]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert re.search(message, str(done.exception)), done.exception
