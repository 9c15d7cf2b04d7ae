"""Several prompts a topic: the bound that licenses recovery, and standard errors, take topics for what is independent."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from mechmerge.behaviors.schema import Behavior
from mechmerge.localize.anchor import best_layers, halves, judge, mean_low, standard_error
from mechmerge.localize.curves import _Said
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.localize.scoring import score_arrays
from mechmerge.localize.stage import LocalizeSettings, localize
from mechmerge.models.references import Model
from tests.test_anchor import synthetic
from tests.test_curves import behavior


def low_level(topics: int) -> float:
    """The lower level of a 95 % interval of so many topics: the normal's at t's quantile, with n/(n − 1)."""
    return float(norm.cdf(np.sqrt(topics / (topics - 1)) * t.ppf(0.025, topics - 1)))


NAMES = ["tea", "rain", "tea", "a boat", "rain", "tea", "moon", "a boat"]
"""Topics of eight prompts, in no order: three, two, two and one."""


# ---------------------------------------------------------------------------------------------------------- the lower bound
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 7, 24])
def test_one_prompt_a_topic_is_the_plain_bootstrap(n: int, dtype: type) -> None:
    """At the level for so few; topics are not in the order of the alphabet."""
    values = np.random.default_rng(n).normal(0.3, 1, n).astype(dtype)
    picks = np.random.default_rng(5).integers(0, n, (2000, n))
    plain = float(np.quantile(values[picks].mean(1), low_level(n)))
    student = values.mean() - t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    assert mean_low(values, None, 5) == pytest.approx(min(plain, student), abs=1e-5)
    assert mean_low(values, [f"topic {97 * i % 31}" for i in range(n)], 5) == mean_low(values, None, 5)


def test_topics_are_drawn_with_all_their_prompts() -> None:
    """The bootstrap written out: prompts are copied as often as their topic is drawn."""
    values = np.random.default_rng(1).normal(size=len(NAMES))
    names = ["tea", "rain", "a boat", "moon"]
    rng, means = np.random.default_rng(9), []
    for row in rng.integers(0, 4, (2000, 4)):
        copied = [values[i] for k in row for i in range(len(NAMES)) if NAMES[i] == names[k]]
        means.append(sum(copied) / len(copied))
    plain = np.quantile(means, low_level(4))
    student = values.mean() - t.ppf(0.975, 3) * float(standard_error(values, NAMES))
    assert mean_low(values, NAMES, 9) == pytest.approx(min(plain, student), abs=1e-12)
    assert mean_low(values, NAMES, 9) != mean_low(values, None, 9)


def test_copies_of_a_prompt_license_nothing() -> None:
    """Six values whose bound is below 0, each told five times: only as prompts of their own are they many."""
    values = np.array([1.2, -0.5, 0.9, -0.3, 0.8, 0.2])
    copies, topics = np.repeat(values, 5), [str(i // 5) for i in range(30)]
    assert mean_low(values, None, 0) < 0 < mean_low(copies, None, 0)
    assert mean_low(copies, topics, 0) == pytest.approx(mean_low(values, None, 0), abs=1e-12)


@pytest.mark.parametrize("number", [2, 3, 5, 24])
def test_a_bound_holds_as_often_as_it_says(number: int) -> None:
    """A gap of nothing whose topics differ: by prompts one in seven would be called one above 0, by topics one in forty.

    The plain quantile of five topics would call one in twelve so.
    """
    rng, n = np.random.default_rng(3), 4 * number
    topics = [str(i // 4) for i in range(n)]
    found = [np.repeat(rng.normal(size=number), 4) + rng.normal(size=n) for _ in range(1500)]
    by_topic, by_prompt = (np.mean([mean_low(v, told, 0, 500) > 0 for v in found]) for told in (topics, None))
    assert by_topic < 0.035
    assert by_prompt > 0.1
    if number == 5:
        means = np.array([v.reshape(number, 4).mean(1) for v in found])
        picks = np.random.default_rng(0).integers(0, number, (500, number))
        assert np.mean(np.quantile(means[:, picks].mean(2), 0.025, axis=1) > 0) > 0.06


@pytest.mark.parametrize("values", [[2.0, 2.1, 1.9], [-1.0, 3.0], [5.0]])
def test_one_topic_bounds_nothing(values: list[float]) -> None:
    assert mean_low(np.array(values), ["tea"] * len(values), 0) == min(0.0, *values)
    assert np.isnan(standard_error(np.array(values), ["tea"] * len(values)))


def test_an_anchor_whose_gap_rests_on_few_topics_is_refused() -> None:
    """Topics that disagree about the expert, four prompts each: the same states as prompts of their own pass."""
    states = synthetic(3.0, 0.2, prompts=64)
    topics = [str(i // 4) for i in range(64)]
    made, held_out = halves(topics)
    # In five of the eight held-out topics the base has it already, and a little more.
    for i in held_out:
        if int(topics[i]) not in (1, 3, 5):
            states.base_with[5, i, 0] += 3.6
    apart = judge(states, 5, made, held_out, None, 0)
    together = judge(states, 5, made, held_out, None, 0, topics)
    assert apart.gap == together.gap > 0
    assert apart.gap_low > 0 > together.gap_low
    assert any(reason.startswith("expert − base gap") for reason in together.reasons)
    assert not any(reason.startswith("expert − base gap") for reason in apart.reasons)


# ---------------------------------------------------------------------------------------------------------- standard errors
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_prompt_a_topic_has_the_usual_standard_error_to_the_bit(dtype: type) -> None:
    values = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(dtype)
    plain = values.std(0, ddof=1) / np.sqrt(7)
    for topics in (None, [f"topic {97 * i % 31}" for i in range(7)]):
        assert standard_error(values, topics).dtype == plain.dtype
        assert (standard_error(values, topics) == plain).all()


def test_standard_errors_are_those_of_topics() -> None:
    """Written out; and of equal sizes, what the topics' means alone have."""
    values = np.random.default_rng(1).normal(size=(8, 2))
    for u in range(2):
        mean, squares = sum(values[:, u]) / 8, 0.0
        for name in ("tea", "rain", "a boat", "moon"):
            squares += sum(values[i, u] - mean for i in range(8) if NAMES[i] == name) ** 2
        assert standard_error(values, NAMES)[u] == pytest.approx(np.sqrt(4 / 3 * squares) / 8, rel=1e-12)
    spread = np.random.default_rng(2).normal(size=(20, 3))
    means = spread.reshape(5, 4, 3).mean(1)
    found = standard_error(spread.astype(np.float32), [str(i // 4) for i in range(20)])
    assert found == pytest.approx(means.std(0, ddof=1) / np.sqrt(5), rel=1e-5)


def test_score_files_hold_the_standard_errors_of_topics() -> None:
    """One in units of the scale for every screen and every component replaced."""
    rng = np.random.default_rng(4)
    screened = {"head": rng.normal(size=(8, 2, 3)).astype(np.float32)}
    measured = {"sufficiency": {"L1.head.2": rng.normal(size=8)}, "necessity": {"L0.head.1": rng.normal(size=8)}}
    arrays = score_arrays(screened, measured, -2.0, 2, NAMES)  # type: ignore[arg-type]
    assert arrays["head.screen.stderr"] == pytest.approx(standard_error(screened["head"], NAMES) / 2, rel=1e-6)
    for measure, name, place in (("sufficiency", "L1.head.2", (1, 2)), ("necessity", "L0.head.1", (0, 1))):
        change = measured[measure][name]
        assert arrays[f"head.{measure}"][place] == pytest.approx(change.mean() / -2)
        assert arrays[f"head.{measure}.stderr"][place] == pytest.approx(standard_error(change, NAMES) / 2, rel=1e-6)
        assert standard_error(change, NAMES) != pytest.approx(standard_error(change, None), rel=0.01)
    plain = score_arrays(screened, measured, -2.0, 2)  # type: ignore[arg-type]
    expected = (screened["head"].std(0, ddof=1) / np.sqrt(8) / 2).astype(np.float32)
    assert (plain["head.screen.stderr"] == expected).all()


def test_a_layer_is_chosen_by_the_error_of_its_topics() -> None:
    """Gaps that differ between topics at layer 5, and a little more within them at layer 6, which topics make sure of."""
    states = synthetic(3.0, 0.1, prompts=64)
    topics = [str(i // 4) for i in range(64)]
    within = np.tile([-1.2, 1.2], 32)
    # Topics take turns in the halves: in each, half of them differ one way.
    between = np.repeat(np.tile([-1.0, -1.0, 1.0, 1.0], 4), 4)
    for layer in range(11):
        states.base_with[layer, :, 0] = {5: 1 + between, 6: 1 + within}.get(layer, 2.9)
    assert 6 in best_layers(states, range(64), topics)
    assert 5 in best_layers(states, range(64))


# ------------------------------------------------------------------------------------------------------------- whole stage
SETTINGS = LocalizeSettings(
    anchor_layer=2, verify=3, prompts=6, steering_prompts=0, output_prompts=12, on_invalid="report", sources=("anchor", "loss"),
    curve_seeds=2, curve_pass_prompts=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(base: Model, expert: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], ScoreFile]:
    """Score files of a behaviour with each prompt once and twice, by (how often, source)."""
    found = {}
    for often in (1, 2):
        once: Behavior = behavior().model_copy(update={"verifier": None})
        told = once.model_copy(update={"pairs": tuple(pair for pair in once.pairs for _ in range(often))})
        settings = SETTINGS.model_copy(update={"output_prompts": 6 * often})
        for path in localize(base, expert, [told], tmp_path_factory.mktemp("asked"), settings):
            file = read_scores(path)
            found[often, file.metadata.source] = file
    return found


@pytest.mark.parametrize("source", ["anchor", "loss"])
def test_asking_everything_twice_is_no_evidence(files: dict[tuple[int, str], ScoreFile], source: str) -> None:
    """The bound, and the error of every component, stay what they are: of the anchor, of the loss, and after the anchor."""
    once, twice = files[1, source], files[2, source]
    assert twice.metadata.record.measured_on == 2 * once.metadata.record.measured_on == 12
    assert twice.metadata.scale == once.metadata.scale
    assert twice.metadata.record.gap == pytest.approx(once.metadata.record.gap, abs=1e-5)
    assert twice.metadata.record.gap_low == pytest.approx(once.metadata.record.gap_low, abs=1e-5)
    errors = [name for name in once.arrays if name.endswith(".stderr")]
    assert {name.split(".")[1] for name in errors} >= {"screen", "sufficiency"} | ({"output"} if source == "anchor" else set())
    for name in errors:
        both = np.isfinite(once.arrays[name]) & np.isfinite(twice.arrays[name])
        assert both.any(), name
        assert np.allclose(twice.arrays[name][both], once.arrays[name][both], rtol=1e-3, atol=1e-6), name
        assert once.arrays[name][both].max() > 1e-5, name


def test_curves_recover_only_where_their_topics_allow_it(
    files: dict[tuple[int, str], ScoreFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap of the curves' prompts, six topics told five times."""
    gaps = np.repeat([1.2, -0.5, 0.9, -0.3, 0.8, 0.2], 5)

    class Asked:
        topics: tuple[str, ...] = ()

    class Known:
        """A bench with a gap."""

        class expert:
            tokens = np.ones(30)

        asked, expert_state = Asked(), gaps

    class Start:
        state = np.zeros(30)

    file = files[1, "anchor"]
    file = ScoreFile(file.metadata.model_copy(update={"scale": "recovery"}), file.arrays)
    for topics, recovers in ((tuple(str(i) for i in range(30)), True), (tuple(str(i // 5) for i in range(30)), False)):
        Known.asked.topics = topics
        said = _Said(file, Known(), {}, {("score", None): [Start()]}, 0)  # type: ignore[arg-type, list-item]
        assert said.recovers is recovers
        assert said.unit == (pytest.approx(gaps.mean()) if recovers else 1.0)
