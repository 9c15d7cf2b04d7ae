"""Effects on anchors: they add up to the change of recovery, stop at the anchor, and cost what is said."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.schema import Behavior, Pair, Verifier, load_group
from mechmerge.errors import InputError, LocalizeError
from mechmerge.evaluate.suites import load_suite
from mechmerge.localize.anchor import halves
from mechmerge.localize.anchor_calibration import AnchorCalibration, members_of
from mechmerge.localize.bench import Bench
from mechmerge.localize.calibration import BehaviorRow, Calibration, Point
from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile, read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects, plan_matrix
from mechmerge.localize.integrals import gauss_legendre
from mechmerge.localize.plan_steps import plan_anchor_effects
from mechmerge.models.components import LEAF_KINDS, Component
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_expert, tiny_model

LAYERS = 6
TOPICS = ("tea", "rain", "a river", "the moon", "a forest", "bread", "chess", "a boat")
ASKS = {
    "loud": "Use capital letters only.",
    "title": "Write a title and a short text.",
    "number": "Answer with the number 23 plus 45.",
}
SETTINGS = EffectSettings(metric="anchor", prompts=8, dtype="float32", batch=3)


def behavior(name: str) -> Behavior:
    pairs = tuple(
        Pair(**{"with": f"Describe {topic}. {ASKS[name]}", "without": f"Describe {topic}.", "topic": topic}) for topic in TOPICS
    )
    return Behavior(name=name, pairs=pairs, answer_tokens=5)


def rows() -> list[BehaviorRow]:
    """A group of two, whose anchors are at different layers, and a behaviour of another expert."""
    return [
        BehaviorRow("forms", (behavior("title"), behavior("number")), "a"),
        BehaviorRow("loud", (behavior("loud"),), "b", weight=2.0),
    ]


@pytest.fixture(scope="module")
def deep(models: Path) -> Model:
    return resolve(str(tiny_model(models / "deep", layers=LAYERS)))


@pytest.fixture(scope="module")
def experts(deep: Model, models: Path) -> dict[str, Model]:
    """Two that answer for behaviours, and one that answers for none and changes what the others do."""
    made = {name: tiny_expert(deep.path, models / f"deep-{name}", seed, 0.05) for name, seed in (("a", 3), ("b", 4), ("c", 5))}
    return {name: resolve(str(path)) for name, path in made.items()}


@pytest.fixture(scope="module")
def measured(deep: Model, experts: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("effects") / "effects.safetensors"
    measure_effects(deep, experts, rows(), out, SETTINGS)
    return out


@pytest.fixture
def calibration(deep: Model, experts: dict[str, Model], tmp_path: Path) -> AnchorCalibration:
    return AnchorCalibration(deep, experts, rows(), tmp_path / "units", SETTINGS)


def halves_of(one: Behavior) -> tuple[list[str], list[str]]:
    """Prompts, with and without the instruction, that make the vector; and those that are measured."""
    made, held_out = halves(list(TOPICS))
    return [text for i in made for text in (one.pairs[i].with_, one.pairs[i].without)], [one.pairs[i].with_ for i in held_out]


def states(folder: Path, texts: list[str], layer: int) -> np.ndarray:
    """Residual streams at the last token, [n, D], with transformers alone, prompt by prompt."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    template, found = chat_template_of(tokenizer, "model"), []
    for text in texts:
        ids = tokenizer(render(tokenizer, text, template), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, -1].numpy())
    return np.stack(found)


def total(file: EffectFile, row: int) -> float:
    return sum(float(file.arrays[f"{kind}.effect"][row].sum()) for kind in EFFECT_KINDS if f"{kind}.effect" in file.arrays)


# -------------------------------------------------------------------------------------------------------------------- values
def test_effects_add_up_to_the_change_of_recovery(measured: Path) -> None:
    file = read_effects(measured)
    assert file.metadata.metric == "anchor"
    for r, record in enumerate(file.metadata.behaviors):
        change = record.loss_start - record.loss_end
        assert abs(total(file, r) - change) / max(abs(change), 0.05) == pytest.approx(record.completeness_error, abs=1e-4)
        assert record.completeness_error <= SETTINGS.tolerance
        assert abs(change) > 0.1, "a change of nothing would prove nothing"


def test_values_are_states_of_prompts_that_made_no_vector(
    measured: Path, deep: Model, experts: dict[str, Model], tmp_path: Path
) -> None:
    """−s/gap at base, sum and expert against a plain computation: vector from one half, states of the other."""
    file = read_effects(measured)
    record = file.metadata.behaviors[1]
    anchor = record.anchors["loud"]
    made, held_out = halves_of(behavior("loud"))
    own = experts["b"].path
    v = (states(own, made[::2], anchor.layer) - states(own, made[1::2], anchor.layer)).mean(0)
    v /= np.linalg.norm(v)
    base, expert = (states(folder, held_out, anchor.layer) @ v for folder in (deep.path, own))
    gap = float((expert - base).mean())
    assert anchor.gap == pytest.approx(gap, rel=1e-3)
    assert record.loss_start == pytest.approx(-base.mean() / gap, rel=1e-4)
    assert record.loss_expert == pytest.approx(-expert.mean() / gap, rel=1e-4)
    assert record.own_gain == pytest.approx(1, abs=1e-3)
    assert (record.prompts, record.answers) == (8, 4)
    merged = load_model(deep.path)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            start = parameter.clone()
            for model in experts.values():
                parameter.add_(model.checkpoint().tensor(name) - start)
    merged.save_pretrained(tmp_path / "sum")
    load_tokenizer(deep.path).save_pretrained(tmp_path / "sum")
    assert record.loss_end == pytest.approx(-(states(tmp_path / "sum", held_out, anchor.layer) @ v).mean() / gap, rel=1e-4)


def test_the_vectors_prompts_are_never_measured(calibration: AnchorCalibration) -> None:
    tokenizer = calibration.bench.tokenizer
    for (r, m), member in calibration.members.items():
        texts = [tokenizer.decode(e.prompt) for e in calibration.examples if (e.row, e.member) == (r, m)]
        made, held_out = halves_of(rows()[r].members[m])
        assert len(texts) == len(member.measured) == 4
        assert all(any(prompt in text for prompt in held_out) for text in texts)
        assert not any(prompt in text for prompt in made for text in texts)


def test_each_member_has_its_own_anchor_and_batches_stop_there(measured: Path, calibration: AnchorCalibration) -> None:
    anchors = read_effects(measured).metadata.behaviors[0].anchors
    assert {name: record.layer for name, record in anchors.items()} == {"title": 2, "number": 5}
    seen = []
    for part in calibration.passes():
        for numbers in part.examples:
            members = {(calibration.examples[i].row, calibration.examples[i].member) for i in numbers}
            assert len(members) == 1, "prompts of one anchor each"
            assert calibration.anchors[members.pop()].record.layer == part.stop
            seen += numbers
    assert sorted(seen) == list(range(len(calibration.examples)))


def test_components_after_the_anchor_have_exactly_none(measured: Path) -> None:
    arrays = read_effects(measured).arrays
    for kind in LEAF_KINDS:
        if not arrays[f"{kind}.effect"].any():
            assert kind in ("attention.rest", "mlp.rest"), "a Llama has no biases, and everything else an effect"
            continue
        for measure in ("effect", "stderr"):
            values = arrays[f"{kind}.{measure}"]  # [R, E, layers, units]
            assert (values[:, :, 5:] == 0).all()
            assert (values[:, :, :5] != 0).any(axis=(0, 1, 3)).all(), kind
    assert (arrays["final_norm.effect"] == 0).all()
    assert (arrays["embed.effect"] != 0).all()
    assert "lm_head.effect" not in arrays


def test_gradients_equal_finite_differences(calibration: AnchorCalibration) -> None:
    """One head, KV group, neuron, norm and the embeddings of an expert, half-way, against moving their weights."""
    half = Point((0.5,) * 3)
    found = calibration.gradients(half, "half-way")
    bench, step = calibration.bench, 0.05
    moved = {name: bench.weight(name).clone() for name in bench.parameters}
    theirs, origin = calibration.opened["b"], calibration.checkpoint

    def values() -> np.ndarray:
        told = np.zeros(len(calibration.examples))
        for part in calibration.passes():
            for i, batch in enumerate(part.batches):
                with torch.no_grad():
                    told[part.examples[i]] = part.value(i, bench.run(batch, part.stop)).numpy()
        return told

    units = [(1, "head", 2), (0, "kv", 1), (1, "neuron", 7), (3, "neuron", 7), (1, "norms", 0)]
    parts = [(kind, layer, unit, Component(layer, kind, unit if kind != "norms" else None)) for layer, kind, unit in units]
    for kind, layer, unit, component in [*parts, ("embed", 0, 0, Component(-1, "embed"))]:
        blocks, ends = list(origin.layout.component_blocks(component)), []
        for sign in (1, -1):
            with bench.patched(
                blocks, lambda name, sign=sign: moved[name] + sign * step * (theirs.tensor(name) - origin.tensor(name))
            ):
                ends.append(values())
        difference = -(ends[0] - ends[1]) / (2 * step)
        assert np.abs(difference).max() > 1e-4
        assert np.allclose(found[kind][1, :, layer, unit], difference, atol=2e-2 * np.abs(difference).max() + 1e-4), kind


def test_standard_errors_equal_a_plain_computation(deep: Model, experts: dict[str, Model], tmp_path: Path) -> None:
    row, settings = rows()[1:], SETTINGS.model_copy(update={"tolerance": 10.0})  # no interval is halved
    file = measure_effects(deep, experts, row, tmp_path / "e.safetensors", settings)
    calibration = AnchorCalibration(deep, experts, row, tmp_path / "units", SETTINGS)
    ends = (0.0, 0.0625, 0.25, 1.0)
    assert sorted(file.metadata.nodes) == sorted(t for a, b in itertools.pairwise(ends) for t in gauss_legendre(a, b))
    each = 0.0
    for a, b in itertools.pairwise(ends):
        for t in gauss_legendre(a, b):
            each = each + (b - a) / 2 * calibration.gradients(Point((t,) * 3), "a node")["head"].astype(np.float64)
    n = each.shape[1]
    assert n == 4
    assert np.allclose(file.arrays["head.effect"][0], each.mean(1), atol=1e-6)
    assert np.allclose(file.arrays["head.stderr"][0], each.std(1, ddof=1) / np.sqrt(n), atol=1e-6)
    assert file.arrays["head.stderr"].max() > 1e-3


# ------------------------------------------------------------------------------------------------------------------- experts
def test_an_expert_that_answers_for_none_has_effects_and_one_that_changes_nothing_has_none(
    measured: Path, deep: Model, experts: dict[str, Model], tmp_path: Path
) -> None:
    assert read_effects(measured).arrays["head.effect"][:, 2].any(axis=(1, 2)).all()
    idle = {"a": experts["a"], "idle": deep}
    file = measure_effects(deep, idle, rows()[:1], tmp_path / "e.safetensors", SETTINGS)
    assert all((array[..., 1, :, :] == 0).all() for name, array in file.arrays.items() if name.endswith(".effect"))
    assert total(file, 0) == pytest.approx(1, abs=0.06), "an expert alone recovers its own state"


def test_streamed_effects_equal_those_in_memory(measured: Path, deep: Model, experts: dict[str, Model], tmp_path: Path) -> None:
    members = list(members_of(rows(), SETTINGS.prompts).values())
    peak = plan_anchor_effects(deep.checkpoint(), len(experts), members, SETTINGS).peak
    small = SETTINGS.model_copy(update={"memory": peak - 1})
    assert plan_anchor_effects(deep.checkpoint(), len(experts), members, small).streamed
    other, one = measure_effects(deep, experts, rows(), tmp_path / "e.safetensors", small), read_effects(measured)
    assert one.arrays.keys() == other.arrays.keys()
    for name, values in one.arrays.items():
        assert np.abs(values - other.arrays[name]).max() <= 1e-5 * max(1, np.abs(values).max()), name
    assert [b.loss_end for b in one.metadata.behaviors] == pytest.approx([b.loss_end for b in other.metadata.behaviors])


class Stopped(Exception):
    pass


class StopsAfter:
    """A progress that raises once it was told of so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def start(self, label: str, total: int) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Stopped(label)

    def advance(self, units: int = 1) -> None: ...

    def end(self) -> None: ...

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("steps", [3, 9, 14])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(
    steps: int, measured: Path, deep: Model, experts: dict[str, Model], tmp_path: Path
) -> None:
    out = tmp_path / "effects.safetensors"
    with pytest.raises(Stopped):
        measure_effects(deep, experts, rows(), out, SETTINGS, StopsAfter(steps))
    assert not out.exists()
    assert list((tmp_path / ".effects.units").rglob("*.safetensors")), "units done are kept"
    measure_effects(deep, experts, rows(), out, SETTINGS)
    assert out.read_bytes() == measured.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["effects.safetensors"], "no leftovers"


# ------------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("metric", ["loss", "anchor"])
def test_prompts_are_of_the_calibrate_split(metric: str, deep: Model, experts: dict[str, Model], tmp_path: Path) -> None:
    """Of the built-in behaviours that suites ask for: nothing that is answered, makes a vector or is measured is in a suite."""
    groups = [load_group(name) for name in ("formats", "arithmetic", "code")]
    groups = [tuple(one.model_copy(update={"verifier": None, "answer_tokens": 1}) for one in group) for group in groups]
    built_in = [BehaviorRow(name, group, "a") for name, group in zip(("formats", "arithmetic", "code"), groups, strict=True)]
    if metric == "loss":
        settings = SETTINGS.model_copy(update={"metric": "loss", "prompts": 24, "batch": 64})
        calibration = Calibration(deep, experts, built_in, tmp_path / "units", settings)
        tokenizer = calibration.bench.tokenizer
        asked = [tokenizer.decode(example.prompt) for example in calibration.examples]
        assert len(asked) == sum(calibration.asked.values()) == 24 * 3
    else:
        members = members_of(built_in, 24).values()
        asked = [text for one in members for pair in one.behavior.pairs for text in (pair.with_, pair.without)]
        assert len(asked) > 24 * 3
    own = {text for group in groups for one in group for pair in one.pairs for text in (pair.with_, pair.without)}
    assert all(any(prompt in text for prompt in own) for text in asked)
    for split in ("develop", "test"):
        for name in ("formats", "arithmetic", "code"):
            for prompt in load_suite(name, split).prompts:
                assert not any(prompt.prompt in text for text in asked)


# ---------------------------------------------------------------------------------------------------------------------- cost
@contextmanager
def counted(bench: Bench, experts: int) -> Iterator[list[float]]:
    """Tokens through layers: once a forward pass, and where there is a gradient once more for the backward pass and for the
    products with each expert's deltas.
    """
    found: list[float] = []

    def after(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        if "forward" in vars(module):
            return  # `Bench.passing`: the layer hands on what it gets
        found.append(inputs[0].shape[0] * inputs[0].shape[1] * (2 + experts if torch.is_grad_enabled() else 1))

    handles = [layer.register_forward_hook(after) for layer in bench.layers]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("metric", ["anchor", "loss"])
def test_cost_is_at_most_three_forwards_a_node_behaviour_and_expert(
    metric: str, count: int, deep: Model, experts: dict[str, Model], tmp_path: Path
) -> None:
    """One forward-equivalent: all layers, over the (padded) texts of all behaviours; so it is the same for any number of them.

    Counted from the values at the ends of intervals to the last node; texts and anchors are there before.
    """
    given = dict(list(experts.items())[:count])
    settings = SETTINGS.model_copy(update={"metric": metric})
    row = rows()[: 2 if count > 1 else 1]
    kind = AnchorCalibration if metric == "anchor" else Calibration
    calibration = kind(deep, given, row, tmp_path / "units", settings)
    forward = LAYERS * sum(batch.ids.numel() for part in calibration.passes() for batch in part.batches)
    zero, one = calibration.point(0.0), calibration.point(1.0)
    ends, nodes = (0.0, 0.0625, 0.25, 1.0), 0
    with counted(calibration.bench, count) as tokens:
        for a, b in itertools.pairwise(ends):
            for t in gauss_legendre(a, b):
                calibration.gradients(zero.between(one, t), "a node")
                nodes += 1
        at_nodes = sum(tokens) / forward
        for t in ends:
            calibration.losses(zero.between(one, t), "an end")
        for name in {row.expert for row in row}:
            calibration.losses(calibration.point(1.0, name), "an expert")
        everything = sum(tokens) / forward
    assert 0 < at_nodes <= nodes * (2 + count) <= nodes * 3 * count
    if metric == "anchor" or count > 1:
        assert everything <= nodes * 3 * count
    else:
        assert at_nodes == nodes * 3, "on the loss of one expert the bound is met by the nodes alone"
    if metric == "anchor":
        layers = {found.record.layer for found in calibration.anchors.values()}
        assert at_nodes < nodes * (2 + count), f"layers above {layers} did not run"


def test_the_plan_counts_at_least_what_nodes_take(deep: Model, experts: dict[str, Model]) -> None:
    settings = SETTINGS.model_copy(update={"anchor_layer": 2, "max_nodes": 6})
    plan = plan_matrix(deep.checkpoint(), 3, rows(), settings)
    costs = {cost.name: cost.forwards for cost in plan.costs}
    assert not plan.streamed
    assert costs["effects at 6 nodes"] == pytest.approx(12 * 6 * (2 + 3) * 2 / LAYERS), "12 prompts, 2 of 6 layers"
    assert costs["title of a: states of base and expert"] > 0
    assert not any("steering" in name for name in costs)
    judged = behavior("loud").model_copy(update={"verifier": Verifier(name="change_case:english_capital")})
    steered = plan_matrix(deep.checkpoint(), 1, [BehaviorRow("loud", (judged,), "a")], settings)
    assert any(cost.name == "loud of a: steering check" and cost.forwards > 0 for cost in steered.costs)
    assert plan_matrix(deep.checkpoint(), 3, rows(), settings.model_copy(update={"metric": "loss"})).costs != plan.costs


# ------------------------------------------------------------------------------------------------------------------ refusals
def test_an_anchor_that_is_not_valid_is_refused_or_labelled(deep: Model, models: Path, tmp_path: Path) -> None:
    expert = resolve(str(tiny_expert(deep.path, models / "deep-unstable", seed=2, scale=0.15)))
    row, out = [BehaviorRow("loud", (behavior("loud"),), "a")], tmp_path / "e.safetensors"
    with pytest.raises(LocalizeError, match="expected valid anchors; found loud: the anchor at layer 4 is not valid: unstable"):
        measure_effects(deep, {"a": expert}, row, out, SETTINGS)
    assert not out.exists()
    notes: list[str] = []
    progress = StopsAfter(1000)
    progress.note = notes.append  # type: ignore[method-assign]
    file = measure_effects(deep, {"a": expert}, row, out, SETTINGS.model_copy(update={"on_invalid": "report"}), progress)
    assert any("the anchor at layer 4 is not valid: unstable" in note for note in notes)
    assert file.metadata.caveats["loud"].startswith("anchor not valid: loud (unstable: passes in 0.")
    assert read_effects(out).metadata.behaviors[0].anchors["loud"].valid is False


def test_a_gap_that_may_be_none_is_never_divided_by(deep: Model, experts: dict[str, Model], tmp_path: Path) -> None:
    row = [BehaviorRow("loud", (behavior("loud"),), "a")]
    settings = SETTINGS.model_copy(update={"on_invalid": "report"})
    with pytest.raises(LocalizeError, match=r"expert and base apart along the anchor; found loud: .* not above 0"):
        measure_effects(deep, experts, row, tmp_path / "e.safetensors", settings)
    with pytest.raises(LocalizeError, match="expert and base apart"):
        measure_effects(deep, {"a": deep}, row, tmp_path / "e.safetensors", settings)


def test_two_behaviours_of_one_name_are_told_apart(deep: Model, experts: dict[str, Model], tmp_path: Path) -> None:
    other = behavior("loud").model_copy(update={"pairs": behavior("title").pairs})
    twice = [BehaviorRow("one", (behavior("loud"),), "a"), BehaviorRow("two", (other,), "a")]
    with pytest.raises(InputError, match="behaviours of a: expected each name once; found loud twice"):
        measure_effects(deep, experts, twice, tmp_path / "e.safetensors", SETTINGS)
    with pytest.raises(LocalizeError, match="anchor layer: expected 1 … 6; found 7"):
        measure_effects(
            deep, experts, rows(), tmp_path / "e.safetensors", SETTINGS.model_copy(update={"anchor_layer": LAYERS + 1})
        )
