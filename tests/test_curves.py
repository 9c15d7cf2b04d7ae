"""Set curves: equal sizes, equal to whole models on disk, undone to the bit, and honest about scores that mean nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from mechmerge.artifacts import Units
from mechmerge.behaviors.schema import Behavior, Pair, Verifier
from mechmerge.errors import SchemaError
from mechmerge.localize import outputs
from mechmerge.localize.asked import Asked, ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.curve_bench import CurveBench, MakeReadout, Point
from mechmerge.localize.curve_record import MIN_TOPICS, SetCurves
from mechmerge.localize.curve_sets import OUTPUT_SHARES, SHARES, Sets, advantage, area, counts, set_orders
from mechmerge.localize.curves import fresh_prompts, measure_curves
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.outputs import Answers, discard_answers
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.localize.stage import LocalizeSettings, localize
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.deltas import delta_norms
from mechmerge.models.load import load_model
from mechmerge.models.references import Model, resolve
from mechmerge.progress import SILENT
from tests.tiny import tiny_expert, tiny_model

TOPICS = ["tea", "rain", "a river", "the moon", "a forest", "bread", "chess", "a boat", "snow", "a cat", "a train", "honey",
          "the sea", "a clock", "salt", "a lamp", "wool", "a hill"]  # fmt: skip
SETTINGS = LocalizeSettings(
    anchor_layer=2, verify=3, prompts=6, steering_prompts=0, on_invalid="report", curve_seeds=2, curve_pass_prompts=3
)


def behavior(count: int = len(TOPICS), name: str = "loud") -> Behavior:
    pairs = tuple(
        Pair(**{"with": f"Describe {topic}. Use capital letters only.", "without": f"Describe {topic}."}, topic=topic)
        for topic in TOPICS[:count]
    )
    # A random model's answers hold no number or some: either verdict occurs.
    return Behavior(name=name, pairs=pairs, verifier=Verifier(name="punctuation:no_comma"), answer_tokens=5)


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = localize(base, expert, [behavior()], tmp_path_factory.mktemp("curves"), SETTINGS)
    return path


@pytest.fixture(scope="module")
def file(measured: Path) -> ScoreFile:
    return read_scores(measured)


@pytest.fixture(scope="module")
def curves(file: ScoreFile) -> SetCurves:
    assert file.metadata.curves is not None
    return file.metadata.curves


@pytest.fixture(scope="module")
def bench(base: Model) -> Bench:
    return Bench(base)


def curve_bench_of(bench: Bench, base: Model, expert: Model, anchor: Anchor, folder: Path, asked: Asked) -> CurveBench:
    return CurveBench(bench, base.checkpoint(), expert.checkpoint(), on(anchor), asked, 3, Units(folder, {}), "curve-3")


def on(anchor: Anchor) -> MakeReadout:
    """Recovery is measured on the anchor's state."""
    return lambda bench, asked, answers: (asked.prompts(bench), anchor)


def anchor_of(measured: Path) -> Anchor:
    from safetensors.torch import load_file

    return Anchor(2, load_file(measured.parent / "anchors" / "loud.safetensors")["vector"])


# --------------------------------------------------------------------------------------------------------------------- sets
def test_the_controls_have_the_score_sets_counts_and_parameters(file: ScoreFile) -> None:
    orders = set_orders(file, (0, 1, 2))
    assert list(orders) == [("score", None), ("random", 0), ("random", 1), ("random", 2), ("magnitude", None)]
    best = orders["score", None]
    total = sum(first.size for first in best.values())
    assert {kind: first.shape for kind, first in best.items()} == {"head": (2, 4), "kv": (2, 2), "neuron": (2, 48)}
    for order, sets in orders.items():
        assert counts(sets, file.arrays) == counts(best, file.arrays), order
        for point in range(len(SHARES) + 1):
            for kind in UNIT_KINDS:
                assert (sets[kind] <= point).sum() == (best[kind] <= point).sum(), (order, point, kind)
    sizes = [components for components, _ in counts(best, file.arrays)]
    assert sizes == [0, *(max(1, round(share * total)) for share in SHARES)]
    width = 32  # of the residual stream; a head has 8 query rows and 8 output columns, a KV group 16 rows, a neuron 3 vectors
    for point, (_, parameters) in enumerate(counts(best, file.arrays)):
        taken = {kind: int((first <= point).sum()) for kind, first in best.items()}
        assert parameters == width * (16 * taken["head"] + 16 * taken["kv"] + 3 * taken["neuron"])
    drawn = [np.concatenate([orders["random", seed][kind].ravel() for kind in UNIT_KINDS]) for seed in (0, 1)]
    assert (drawn[0] != drawn[1]).any()


def test_sets_hold_the_best_and_the_largest(file: ScoreFile) -> None:
    orders = set_orders(file, (0,))
    for point in range(1, len(SHARES)):
        inside = [file.score(kind)[:2][orders["score", None][kind] <= point] for kind in UNIT_KINDS]
        outside = [file.score(kind)[:2][orders["score", None][kind] > point] for kind in UNIT_KINDS]
        assert np.concatenate(inside).min() >= np.concatenate(outside).max()
        for kind in UNIT_KINDS:
            norms, first = file.arrays[f"{kind}.delta_norm"][:2], orders["magnitude", None][kind]
            if (first <= point).any() and (first > point).any():
                assert norms[first <= point].min() >= norms[first > point].max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"])
def test_patching_many_units_is_patching_each_and_is_undone_to_the_bit(family: str, tmp_path: Path) -> None:
    model = resolve(str(tiny_model(tmp_path / "base", family=family, layers=2)))
    theirs = resolve(str(tiny_expert(model.path, tmp_path / "expert"))).checkpoint()
    bench = Bench(model)
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    layout = bench.checkpoint.layout
    chosen = [(layer, kind, [0, bench.checkpoint.arch.units(kind) - 1]) for layer in (0, 1) for kind in UNIT_KINDS]
    each = [(block, u) for layer, kind, units in chosen for u in units for block in layout.blocks(layer, kind)]
    with bench.patched(each, theirs.tensor):
        one_by_one = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    with bench.patched_units(chosen, theirs.tensor):
        assert any(not torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
        assert all(torch.equal(one_by_one[name], parameter) for name, parameter in bench.parameters.items())
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    with pytest.raises(RuntimeError, match="interrupted"), bench.patched_units(chosen, theirs.tensor):
        raise RuntimeError("interrupted")
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())


# --------------------------------------------------------------------------------------------------------------------- twin
def written_model(base: Model, expert: Model, sets: Sets, point: int, folder: Path) -> Path:
    """The whole model with the sets' slices copied one unit at a time, written to disk."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    layout, theirs = base.checkpoint().layout, expert.checkpoint()
    for kind, first in sets.items():
        for layer, unit in np.argwhere(first <= point).tolist():
            for block in layout.blocks(layer, kind):
                where: list[Any] = [slice(None)] * tensors[block.tensor].dim()
                where[block.dim or 0] = block.indices(unit)
                tensors[block.tensor][tuple(where)] = theirs.tensor(block.tensor)[tuple(where)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def plain(path: Path, tokenizer: Any, texts: tuple[str, ...], vector: torch.Tensor) -> tuple[np.ndarray, Any]:
    """State of each prompt after two layers with the model at `path`, one prompt at a time, and the model."""
    model = load_model(path, "float32", "cpu")
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found.append(float(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1] @ vector))
    return np.array(found), model


def test_every_point_equals_the_whole_model_written_to_disk(
    base: Model, expert: Model, bench: Bench, measured: Path, file: ScoreFile, curves: SetCurves, tmp_path: Path
) -> None:
    """Recovery, KL and verdicts of each point against a model made by copying slices into a file and loading it."""
    vector = anchor_of(measured).vector
    asked = ask(bench, behavior(), behavior().pairs[12:18])
    assert curves.unseen
    assert (curves.prompts, curves.topics) == (6, 6)
    start, _ = plain(base.path, bench.tokenizer, asked.texts, vector)
    end, expert_model = plain(expert.path, bench.tokenizer, asked.texts, vector)
    scale = (end - start).mean() if curves.scale == "recovery" else 1.0
    answers = asked.answers(Bench(expert))
    ids = [[*a.ids, *([] if a.end is None else [a.end])] for a in answers]

    @torch.no_grad()
    def divergence(model: Any) -> float:
        total = 0.0
        for prompt, answer in zip(asked.prompts(bench), ids, strict=True):
            rows = torch.tensor([[*prompt, *answer]])
            both = [m(input_ids=rows).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (expert_model, model)]
            total += float(torch.nn.functional.kl_div(both[1], both[0], log_target=True, reduction="sum"))
        return total / sum(map(len, ids))

    orders = set_orders(file, (0, 1))
    for number, (curve, sets) in enumerate(zip(curves.curves, orders.values(), strict=True)):
        for point in curve.points:
            place = (0.0, *SHARES).index(point.share)
            folder = written_model(base, expert, sets, place, tmp_path / f"{number}-{place}")
            state, model = plain(folder, bench.tokenizer, asked.texts, vector)
            assert point.recovery == pytest.approx((state - start).mean() / scale, abs=1e-5), (curve.order, point.share)
            if point.kl is not None:
                assert point.kl == pytest.approx(divergence(model), abs=1e-5), (curve.order, point.share)
            if point.pass_rate is not None:
                first = asked.first(3)
                verdicts = first.verdicts(first.answers(Bench(resolve(str(folder)))))
                assert point.pass_rate == pytest.approx(sum(verdicts) / 3), (curve.order, point.share)
    verdicts = asked.verdicts(answers)[:3]
    assert curves.expert_pass_rate == pytest.approx(sum(verdicts) / 3)


def test_what_is_measured_where(curves: SetCurves) -> None:
    by_order = {(curve.order, curve.seed): curve.points for curve in curves.curves}
    for (order, seed), points in by_order.items():
        assert [point.share for point in points] == [0.0, *SHARES]
        assert all(point.recovery is not None for point in points)
        with_kl = {point.share for point in points if point.kl is not None}
        with_answers = {point.share for point in points if point.pass_rate is not None}
        ends = {0.0, 1.0}  # the base and the largest set are the same for all
        assert with_kl == ends | set(OUTPUT_SHARES), (order, seed)
        assert with_answers == (ends | set(OUTPUT_SHARES) if order == "score" or seed == 0 else ends), (order, seed)
    assert len({points[-1] for points in by_order.values()}) == 1, "moving everything is the same for all orders"
    assert len({points[0] for points in by_order.values()}) == 1
    start = by_order["score", None][0]
    assert (start.recovery, start.components, start.parameters) == (0.0, 0, 0)
    assert start.kl == curves.base_kl
    assert start.pass_rate == curves.base_pass_rate
    assert curves.base_kl is not None
    assert curves.base_kl > 0


def test_the_base_moved_into_itself_changes_nothing(
    base: Model, bench: Bench, measured: Path, file: ScoreFile, tmp_path: Path
) -> None:
    asked = ask(bench, behavior(), behavior().pairs[12:15])
    own = curve_bench_of(bench, base, base, anchor_of(measured), tmp_path, asked)
    start = own.point("base", kl=True, answers=True, reach=lambda: None)
    assert start.kl is not None
    assert abs(start.kl).max() < 2e-6, "the expert's own passes are batched in another way"
    points = own.walk("score", set_orders(file, ())["score", None], [(True, True)] * len(SHARES), lambda: None)
    for point in points:
        assert (point.state == start.state).all()
        assert point.kl is not None
        assert (point.kl == start.kl).all()
        assert point.passed == start.passed


def test_the_bench_holds_the_base_again(
    base: Model, expert: Model, bench: Bench, measured: Path, file: ScoreFile, tmp_path: Path
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    asked = ask(bench, behavior(), behavior().pairs[12:15])
    curves = curve_bench_of(bench, base, expert, anchor_of(measured), tmp_path, asked)
    assert len(curves.expert.answers) == 3
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    curves.walk("random-0", set_orders(file, (0,))["random", 0], [(True, False)] * len(SHARES), lambda: None)
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())


def test_few_logits_at_a_time_give_the_same_divergence(
    base: Model, expert: Model, bench: Bench, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(bench, behavior(), behavior().pairs[12:18])
    whole = curve_bench_of(bench, base, expert, anchor_of(measured), tmp_path / "whole", asked).divergence()
    monkeypatch.setattr(outputs, "LOGITS_BYTES", 1)
    most: list[int] = []
    logits = Bench.logits

    def watched(self: Bench, residual: torch.Tensor) -> torch.Tensor:
        most.append(len(residual))
        return logits(self, residual)

    monkeypatch.setattr(Bench, "logits", watched)
    rows = curve_bench_of(bench, base, expert, anchor_of(measured), tmp_path / "rows", asked)
    assert np.allclose(rows.divergence(), whole, atol=1e-6)
    assert max(most) == 1
    assert whole.min() > 0


# ------------------------------------------------------------------------------------------------------------------ verdict
def curves_of(
    arrays: dict[str, np.ndarray], file: ScoreFile, bench: CurveBench, seeds: tuple[int, ...] = (0, 1, 2)
) -> SetCurves:
    # The anchor of these tests is not the file's, so neither is its gap.
    metadata = file.metadata.model_copy(update={"scale": "recovery"})
    return measure_curves(bench, ScoreFile(metadata, file.arrays | arrays), seeds, OUTPUT_SHARES, True, 0, SILENT)


class Planted(NamedTuple):
    """An expert with a planted cause, and what screening says of it."""

    expert: Model
    anchor: Anchor
    arrays: dict[str, np.ndarray]
    """Screens and delta norms, no sufficiency."""


@pytest.fixture(scope="module")
def planted(base: Model, bench: Bench, file: ScoreFile, models: Path) -> Planted:
    """All neurons of two layers move equally far, one in six along the anchor and the others across it."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(3)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    anchor, names = Anchor(2, vector), [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    scoring = [bench.encode(ask(bench, behavior(), behavior().pairs[6:12]).texts)]

    def along(name: str) -> torch.Tensor:
        own = bench.checkpoint.tensor(name)
        return own + 0.05 * vector[:, None] if name in names else own

    pushes = screen(bench, scoring, [anchor], along)["neuron"].mean(0)
    shutil.copytree(base.path, models / "planted")
    tensors = load_file(base.path / "model.safetensors")
    for layer, name in enumerate(names):
        across = torch.randn(32, 48, generator=generator)
        moved = torch.nn.functional.normalize(across - vector[:, None] * (vector @ across), dim=0)
        moved[:, ::6] = vector[:, None] * torch.from_numpy(np.sign(pushes[layer])).float()[::6]
        tensors[name] += 0.05 * moved
    save_file(tensors, models / "planted" / "model.safetensors", {"format": "pt"})
    expert = resolve(str(models / "planted"))
    found = screen(bench, scoring, [anchor], expert.checkpoint().tensor)
    norms = delta_norms(base.checkpoint(), expert.checkpoint())
    arrays = {f"{kind}.screen": found[kind].mean(0) for kind in UNIT_KINDS}
    arrays |= {f"{kind}.delta_norm": norms[kind] for kind in UNIT_KINDS}
    arrays |= {f"{kind}.sufficiency": np.full_like(file.arrays[f"{kind}.sufficiency"], np.nan) for kind in UNIT_KINDS}
    return Planted(expert, anchor, arrays)


def test_a_score_that_finds_what_was_planted_is_above_its_controls(
    base: Model, bench: Bench, file: ScoreFile, planted: Planted, tmp_path: Path
) -> None:
    asked = ask(bench, behavior(), behavior().pairs[12:18])
    assert np.allclose(planted.arrays["neuron.delta_norm"][:2], 0.05)
    found = curves_of(planted.arrays, file, curve_bench_of(bench, base, planted.expert, planted.anchor, tmp_path, asked))
    assert found.above_controls
    assert found.verdict.startswith(f"{found.label}: lift")
    assert found.scale == "recovery"
    assert 0.1 < found.lift_low < found.lift < found.lift_high
    assert 0.1 < found.magnitude_lift_low < found.magnitude_lift < found.magnitude_lift_high
    # The planted sixth is inside the best fifth: all of the recovery there is.
    recovery = {point.share: point.recovery for point in found.curves[0].points}
    assert recovery[0.2] > 0.9 * recovery[1.0]  # type: ignore[operator]


def test_shuffled_scores_are_not_above_their_controls(
    base: Model, bench: Bench, file: ScoreFile, planted: Planted, tmp_path: Path
) -> None:
    """Scores that mean nothing, where there is something to find: one in forty may pass (three of the first 120 draws do)."""
    asked = ask(bench, behavior(), behavior().pairs[12:18])
    passed = []
    for draw in range(30, 40):
        generator = np.random.default_rng(100 + draw)
        arrays = dict(planted.arrays)
        for kind in UNIT_KINDS:
            shuffled = generator.permutation(arrays[f"{kind}.screen"][:2].ravel()).reshape(2, -1)
            arrays[f"{kind}.screen"] = np.vstack([shuffled, arrays[f"{kind}.screen"][2:]])
        theirs = planted.expert.checkpoint()
        own = CurveBench(bench, base.checkpoint(), theirs, on(planted.anchor), asked, 0, Units(tmp_path, {}), f"curve-{draw}")
        found = curves_of(arrays, file, own, (3 * draw, 3 * draw + 1, 3 * draw + 2))
        assert found.scale == "recovery"
        assert found.verdict.startswith("above its controls" if found.above_controls else "NOT ABOVE ITS CONTROLS: lift")
        passed.append(found.above_controls)
    assert sum(passed) <= 1


def test_an_advantage_has_both_its_uncertainties() -> None:
    x = np.array([0.0, *SHARES])
    assert area(np.repeat(x[:, None], 3, 1)) == pytest.approx(np.full(3, 0.5))
    assert area(np.stack([np.ones((8, 3)), np.zeros((8, 3))])).shape == (2, 3)

    def parts(differences: Any, weights: Any = None, topics: Any = None) -> tuple[float, float, float]:
        differences = np.array(differences, float)
        n = differences.shape[1]
        found = advantage(differences, np.ones(n) if weights is None else weights, topics or [str(i) for i in range(n)], 0)
        return found.value, found.low, found.high

    assert parts([[0.5] * 8]) == pytest.approx((0.5, 0.5, 0.5))
    # Two control orders that differ by chance alone: a t interval with one degree of freedom is wide.
    luck = 12.706 * (0.2 / np.sqrt(2)) * np.sqrt(1.5)
    assert parts([[0.4] * 8, [0.6] * 8]) == pytest.approx((0.5, 0.5 - luck, 0.5 + luck), abs=1e-3)
    # Prompts that disagree widen it, and more so where they are of few topics.
    mixed = [[0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5]]
    wide, wider = parts(mixed), parts(mixed, topics=["a"] * 4 + ["b"] * 4)
    assert wide[0] == wider[0] == pytest.approx(1.0)
    assert 0.5 < wide[1] < 1.0 < wide[2] < 1.5
    assert wider[1:] == pytest.approx((1 - 12.706 / 2, 1 + 12.706 / 2), abs=1e-3), "two topics: t with one degree of freedom"
    # Few topics: at the levels for so few.
    six = np.array([0.1, 0.9, 0.3, 0.4, 0.8, 0.5])
    drawn = six[np.random.default_rng(0).integers(0, 6, (2000, 6))].mean(1)
    below, half = norm.cdf(np.sqrt(6 / 5) * t.ppf(0.025, 5)), t.ppf(0.975, 5) * six.std(ddof=1) / np.sqrt(6)
    low, high = np.quantile(drawn, [below, 1 - below])
    assert parts([six]) == pytest.approx((0.5, min(low, 0.5 - half), max(high, 0.5 + half)))
    # One topic bounds nothing.
    assert parts([[0.4, 0.6]], topics=["a", "a"]) == pytest.approx((0.5, 0.0, 0.5))
    # Weighted: 8 nats over 4 tokens.
    assert parts([[2.0, 6.0]], weights=np.array([1.0, 3.0]))[0] == pytest.approx(2.0)


def test_recovery_past_the_expert_earns_no_lift(
    base: Model, expert: Model, bench: Bench, measured: Path, file: ScoreFile, tmp_path: Path
) -> None:
    """States are planted: the score order overshoots by far, the controls stop at the expert."""
    asked = ask(bench, behavior(), behavior().pairs[12:18])

    class Faked(CurveBench):
        def state(self) -> np.ndarray:
            return np.zeros(6)

        def point(self, name: str, kl: bool, answers: bool, reach: Any) -> Point:
            at = 0.0 if name == "base" else 1.0 if name.endswith(str(len(SHARES))) else 5.0 if name.startswith("score") else 1.0
            return Point(np.full(6, at), np.full(6, 1.0 if name.startswith("score") else 2.0) if kl else None, [])

    faked = Faked(
        bench, base.checkpoint(), expert.checkpoint(), on(anchor_of(measured)), asked, 0, Units(tmp_path, {}), "curve-0"
    )
    faked.expert = Answers([], [[3], [3, 4], [3], [3], [3], [3]], [], lambda _: np.zeros((1, 2), np.float32))
    faked.expert_state = np.ones(6)
    found = curves_of({}, file, faked)
    assert [point.recovery for point in found.curves[0].points] == [0.0, *[5.0] * 6, 1.0]
    assert (found.lift, found.magnitude_lift) == (0.0, 0.0)
    assert not found.above_controls
    assert "passes the expert's state by 4.00" in found.verdict
    assert found.kl_lift is not None
    assert found.kl_lift.value == pytest.approx(6 / 7), "one nat for each of six prompts, over their seven tokens"
    assert found.verdict.endswith("; output nearer to the expert's as well")


def test_without_a_gap_the_curves_are_raw_and_claim_nothing(
    base: Model, expert: Model, bench: Bench, measured: Path, file: ScoreFile, tmp_path: Path
) -> None:
    asked = ask(bench, behavior(), behavior().pairs[12:18])
    own = CurveBench(
        bench, base.checkpoint(), expert.checkpoint(), on(anchor_of(measured)), asked, 0, Units(tmp_path, {}), "curve-0"
    )
    raw = ScoreFile(file.metadata.model_copy(update={"scale": "difference"}), file.arrays)
    found = measure_curves(own, raw, (0, 1), (1.0,), True, 0, SILENT)
    assert found.scale == "difference"
    assert not found.above_controls
    assert "NOT ABOVE ITS CONTROLS (no gap between expert and base to recover): lift" in found.verdict
    assert found.kl_lift is None
    assert found.magnitude_kl_lift is None
    last = found.curves[0].points[-1]
    assert last.recovery == pytest.approx(float((own.point("score-7", True, False, lambda: None).state - own.point(
        "base", True, False, lambda: None).state).mean()))  # fmt: skip


def test_shares_that_are_not_measured_are_refused() -> None:
    from pydantic import ValidationError

    from mechmerge.pipeline.schema import LocalizePlan

    for kind in (LocalizePlan, LocalizeSettings):
        assert kind().curve_output_shares == OUTPUT_SHARES
        with pytest.raises(ValidationError, match=r"0\.3 is not one of 0\.01, 0\.02"):
            kind(curve_output_shares=(0.3,))


def test_curves_use_prompts_that_no_score_has_seen_where_there_are_enough() -> None:
    topics = [topic for topic in "abcdefghijklmnopqrst" for _ in range(2)]
    assert fresh_prompts(topics, 10, 8) == list(range(20, 36))
    assert fresh_prompts(topics, 14, 8) == list(range(28, 40)), "six topics are enough"
    assert fresh_prompts(topics, 16, 8) == []
    assert fresh_prompts(topics, 16, 3) == list(range(32, 38)), "as many as were asked for are enough"


def test_few_topics_give_no_verdict_and_seen_prompts_are_said(base: Model, expert: Model, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"prompts": 4, "curve_pass_prompts": 0})
    (path,) = localize(base, expert, [behavior(8)], tmp_path, settings)
    curves = read_scores(path).metadata.curves
    assert curves is not None
    assert not curves.unseen
    assert curves.topics == 4 < MIN_TOPICS
    assert not curves.above_controls
    assert "(only 4 topics, 6 are needed): lift" in curves.verdict
    assert "over the largest deltas, on the prompts that ordered the components" in curves.verdict
    assert curves.base_pass_rate is None
    assert all(p.pass_rate is None for c in curves.curves for p in c.points)


# ------------------------------------------------------------------------------------------------------------------- resume
def test_an_interrupted_call_goes_on_at_the_point_where_it_stopped(
    base: Model, expert: Model, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    state = CurveBench.state

    def stops(self: CurveBench) -> np.ndarray:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return state(self)

    monkeypatch.setattr(CurveBench, "state", stops)
    with pytest.raises(KeyboardInterrupt):
        localize(base, expert, [behavior()], tmp_path, SETTINGS)
    (path,) = localize(base, expert, [behavior()], tmp_path, SETTINGS)
    # The expert, the base, 7 points of the score order and 6 of each of three controls; one was begun twice.
    assert len(calls) == 2 + len(SHARES) + 3 * (len(SHARES) - 1) + 1
    assert path.read_bytes() == measured.read_bytes()
    assert not (tmp_path / ".units").exists()


def test_other_curve_settings_keep_what_is_measured(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption, leaving the curves out must not measure the scores again."""
    from mechmerge.localize import curve_bench
    from mechmerge.localize.scoring import Scorer

    keep = Scorer._patch

    def stops(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curve_bench, "ask_expert", stops)
        with pytest.raises(KeyboardInterrupt):
            localize(base, expert, [behavior()], tmp_path, SETTINGS)
    monkeypatch.setattr(Scorer, "_patch", stops)
    settings = SETTINGS.model_copy(update={"curve_output_shares": (0.5,), "curve_pass_prompts": 2})
    with monkeypatch.context() as patch:
        patch.setattr(CurveBench, "walk", stops)  # after the base's point
        with pytest.raises(KeyboardInterrupt):
            localize(base, expert, [behavior()], tmp_path, settings)
    (path,) = localize(base, expert, [behavior()], tmp_path, settings)
    curves = read_scores(path).metadata.curves
    assert curves is not None
    assert [point.share for point in curves.curves[0].points if point.kl is not None] == [0.0, 0.5]
    assert curves.base_pass_rate in (0.0, 0.5, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_patch", keep)
        patch.setattr(curve_bench, "ask_expert", stops)
        with pytest.raises(KeyboardInterrupt):
            localize(base, expert, [behavior()], tmp_path, SETTINGS)
    (path,) = localize(base, expert, [behavior()], tmp_path, SETTINGS.model_copy(update={"curves": False}))
    assert read_scores(path).metadata.curves is None


def test_the_experts_log_probabilities_do_not_stay(tmp_path: Path) -> None:
    units = Units(tmp_path, {})
    units.json("curve-expert", dict)
    units.arrays("curve-logp-0", lambda: {"logp": np.zeros((1, 2), np.float32)})
    units.json("curve-3-all", dict)
    discard_answers(units, "curve")
    assert [path.name for path in units.folder.iterdir()] == ["curve-3-all.json"]


# --------------------------------------------------------------------------------------------------------------------- file
def test_score_files_without_curves_are_still_read(file: ScoreFile, tmp_path: Path) -> None:
    from mechmerge.artifacts import Document, write_arrays

    class Old(Document):
        model_config: ClassVar[Any] = {**Document.model_config, "extra": "allow"}

    old = file.metadata.model_dump(mode="json")
    del old["curves"]
    write_arrays(tmp_path / "old.safetensors", file.arrays, Old(**old))
    assert read_scores(tmp_path / "old.safetensors").metadata == file.metadata.model_copy(update={"curves": None})
    old["curves"] = {"lift": 1.0}
    write_arrays(tmp_path / "bad.safetensors", file.arrays, Old(**old))
    with pytest.raises(SchemaError, match="curves"):
        read_scores(tmp_path / "bad.safetensors")


# ------------------------------------------------------------------------------------------------------------------ command
def test_the_command_shows_label_and_curves(base: Model, expert: Model, tmp_path: Path) -> None:
    import json

    from click.testing import CliRunner

    from mechmerge.artifacts import write_text
    from mechmerge.cli.localize import command

    write_text(tmp_path / "loud.yaml", json.dumps(behavior().model_dump(mode="json", by_alias=True, exclude={"builtin"})))
    arguments = [str(base.path), str(expert.path), "--behavior", str(tmp_path / "loud.yaml"), "--out", str(tmp_path / "out"),
                 "--anchor-layer", "2", "--verify", "1", "--prompts", "6", "--steering-prompts", "0", "--curve-seeds", "2",
                 "--curve-pass-prompts", "0", "--curve-output-share", "0.05",
                 "--invalid-anchor", "report", "--quiet"]  # fmt: skip
    shown = CliRunner().invoke(command, [*arguments, "--format", "json"], catch_exceptions=False)
    (row,) = json.loads(shown.stdout)["anchors"]
    curves = read_scores(tmp_path / "out" / "loud.safetensors").metadata.curves
    assert curves is not None
    assert row["curves"] == curves.model_dump(mode="json")
    assert row["stability"] == round(read_scores(tmp_path / "out" / "loud.safetensors").metadata.anchor.stability or 0, 3)
    assert (row["localization"], row["verdict"]) == (curves.label, curves.verdict)
    measured_at = [point.share for point in curves.curves[0].points if point.kl is not None]
    assert measured_at == [0.0, 0.05]
    table = CliRunner().invoke(command, arguments, catch_exceptions=False).stdout
    assert " ".join(table.split()).count("set curves of loud: ") == 1
    assert "largest" in table
    assert [line.split("│")[1].strip() for line in table.splitlines() if "%" in line and line.startswith("│")] == [
        "0 %", *(f"{100 * share:g} %" for share in SHARES)]  # fmt: skip
    plain = CliRunner().invoke(command, [*arguments, "--no-curves"], catch_exceptions=False).stdout
    assert "set curves" not in plain
    assert "compared" in plain


def test_the_commands_shares_are_those_that_are_measured() -> None:
    from mechmerge.cli.localize import command

    (option,) = [option for option in command.params if option.name == "curve_output_shares"]
    assert tuple(option.type.choices) == SHARES  # type: ignore[attr-defined]
    assert option.default == OUTPUT_SHARES
