"""The localize stage on tiny models: its contracts, its refusals, and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mechmerge.artifacts import Units
from mechmerge.behaviors.schema import Behavior, Pair, Verifier
from mechmerge.errors import LocalizeError, PairError
from mechmerge.localize import anchoring
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.localize.scoring import Scorer
from mechmerge.localize.stage import LocalizeSettings, localize
from mechmerge.models.components import SCORED_KINDS
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_expert, tiny_model

SETTINGS = LocalizeSettings(anchor_layer=2, verify=3, prompts=4, steering_prompts=2, on_invalid="report")


def behavior(name: str = "loud", verifier: Verifier | None = None) -> Behavior:
    topics = ["tea", "rain", "a river", "the moon", "a forest", "bread", "chess", "a boat"]
    pairs = tuple(
        Pair(**{"with": f"Describe {topic}. Use capital letters only.", "without": f"Describe {topic}."}, topic=topic)
        for topic in topics
    )
    return Behavior(name=name, pairs=pairs, verifier=verifier, answer_tokens=6)


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    (path,) = localize(base, expert, [behavior(verifier=Verifier(name="change_case:english_capital"))], out, SETTINGS)
    return path


def test_score_file_holds_what_design_says(measured: Path, base: Model, expert: Model) -> None:
    file = read_scores(measured)
    arch = base.checkpoint().arch
    for kind in SCORED_KINDS:
        assert file.arrays[f"{kind}.screen"].shape == (arch.layers, arch.units(kind))
        assert file.arrays[f"{kind}.screen.stderr"].shape == (arch.layers, arch.units(kind))
        assert (file.arrays[f"{kind}.screen"][2:] == 0).all(), "components above the anchor score exactly 0"
        assert (file.arrays[f"{kind}.sufficiency"][2:] == 0).all()
        assert file.arrays[f"{kind}.delta_norm"].min() > 0
    for kind in ("attention", "mlp", "layer"):
        assert np.isfinite(file.arrays[f"{kind}.sufficiency"][:2]).all(), "all modules are really patched"
        assert np.isfinite(file.arrays[f"{kind}.output"][2:]).all(), "modules after the anchor are judged by the output"
        assert np.isnan(file.arrays[f"{kind}.output"][:2]).all()
    for measure in ("sufficiency", "necessity", "activation"):
        # The best three neurons; all heads and KV groups, since both attentions are among the four that pass on most.
        found = {kind: int(np.isfinite(file.arrays[f"{kind}.{measure}"][:2]).sum()) for kind in ("head", "kv", "neuron")}
        assert found == {"head": 2 * arch.heads, "kv": 2 * arch.kv_groups, "neuron": 3}, measure
    metadata = file.metadata
    assert (metadata.base, metadata.expert) == (base.id, expert.id)
    assert metadata.identity_control == 0.0
    assert metadata.anchor.layer == 2
    assert metadata.anchor.prompts == metadata.anchor.held_out == 4
    assert metadata.behavior_digest == behavior(verifier=Verifier(name="change_case:english_capital")).digest
    assert str(base.path) not in measured.read_bytes().decode("latin1"), "a score file is shared: no local paths"


def test_patching_everything_below_the_anchor_gives_recovery_one(base: Model, expert: Model, tmp_path: Path) -> None:
    """With the anchor after the first layer, that layer and the embeddings are all there is below it."""
    twin = tmp_path / "twin"
    shutil.copytree(expert.path, twin)
    from safetensors.torch import load_file, save_file

    tensors = load_file(twin / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = base.checkpoint().tensor(name)
    tensors.pop("lm_head.weight", None)
    if not base.checkpoint().arch.tied:
        tensors["lm_head.weight"] = base.checkpoint().tensor("lm_head.weight")
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    settings = SETTINGS.model_copy(update={"anchor_layer": 1})
    (path,) = localize(base, resolve(str(twin)), [behavior()], tmp_path / "out", settings)
    file = read_scores(path)
    patched = float(file.arrays["layer.sufficiency"][0, 0])
    scale = file.metadata.anchor.gap if file.metadata.scale == "difference" else 1.0
    assert patched / scale == pytest.approx(1.0, abs=1e-4)


def test_screening_predicts_small_changes(base: Model, tmp_path: Path) -> None:
    """For an expert very near to the base the first order is all there is: screen = sufficiency."""
    near = resolve(str(tiny_expert(base.path, tmp_path / "near", seed=5, scale=1e-4)))
    (path,) = localize(base, near, [behavior()], tmp_path / "out", SETTINGS)
    file = read_scores(path)
    largest = np.abs(file.arrays["layer.sufficiency"][:2]).max()
    for kind in ("attention", "mlp", "layer"):
        screen, exact = (file.arrays[f"{kind}.{m}"][:2] for m in ("screen", "sufficiency"))
        assert np.abs(screen - exact).max() < 0.01 * largest, kind


def test_an_integrated_screen_is_recorded_and_changes_nothing_else(
    measured: Path, base: Model, expert: Model, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"integrate": 2, "verify": 0, "curves": False})
    judged = behavior(verifier=Verifier(name="change_case:english_capital"))
    (path,) = localize(base, expert, [judged], tmp_path, settings)
    plain, along = read_scores(measured), read_scores(path)
    assert (plain.metadata.integrate, along.metadata.integrate) == (0, 2)
    for kind in SCORED_KINDS:
        assert not np.array_equal(plain.arrays[f"{kind}.screen"], along.arrays[f"{kind}.screen"])
    for kind in ("attention", "mlp", "layer"):
        assert np.array_equal(plain.arrays[f"{kind}.sufficiency"], along.arrays[f"{kind}.sufficiency"]), "the base is put back"


def test_score_files_from_before_a_field_still_read(measured: Path) -> None:
    metadata = read_scores(measured).metadata
    known = metadata.model_dump(mode="json")
    del known["integrate"]
    kept = {key: value for key, value in known["anchor"].items() if not key.startswith("stability")}
    assert type(metadata).model_validate(known | {"anchor": kept}).record.stability is None
    assert type(metadata).model_validate(known) == metadata


def test_the_base_as_its_own_expert_is_refused(base: Model, tmp_path: Path) -> None:
    with pytest.raises(PairError, match="expected another model than the base; found equal weights"):
        localize(base, base, [behavior()], tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_an_invalid_anchor_is_refused_and_nothing_is_written(base: Model, expert: Model, tmp_path: Path) -> None:
    """A random model's answers never become capitals, so steering cannot raise the pass rate."""
    judged = behavior(verifier=Verifier(name="change_case:english_capital", min_words=3))
    with pytest.raises(LocalizeError, match=r"not valid.*steering.*--invalid-anchor report"):
        localize(base, expert, [judged], tmp_path / "out", SETTINGS.model_copy(update={"on_invalid": "refuse"}))
    written = [p for p in (tmp_path / "out").rglob("*.safetensors") if ".units" not in p.parts]
    assert not written


def test_an_unstable_anchor_is_refused_with_its_reason(base: Model, expert: Model, tmp_path: Path) -> None:
    """Prompts that ask for something else each: their differences have no common direction."""
    asked = ["zq! 7", "What is 23 plus 45?", "aaaa aaaa", "(((", "the river", "Use capital letters", "% & %", "mountain 99"]
    pairs = tuple(
        Pair(**{"with": f"Tell {i}{i}{i}. {ask}", "without": f"{ask[::-1]} tell {i}."}) for i, ask in enumerate(asked)
    )
    settings = SETTINGS.model_copy(update={"on_invalid": "refuse"})
    with pytest.raises(LocalizeError, match=r"not valid.*unstable: .*--invalid-anchor report"):
        localize(base, expert, [Behavior(name="scattered", pairs=pairs)], tmp_path / "out", settings)
    (path,) = localize(base, expert, [Behavior(name="scattered", pairs=pairs)], tmp_path / "told", SETTINGS)
    anchor = read_scores(path).metadata.anchor
    assert anchor is not None
    assert not anchor.valid
    assert anchor.stability is not None
    assert any(reason.startswith("unstable") for reason in anchor.reasons)


def test_a_gap_that_is_not_above_zero_gives_raw_differences(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = resolve(str(tiny_expert(base.path, tmp_path / "near", seed=6, scale=1e-3)))
    (usual,) = localize(base, near, [behavior()], tmp_path / "usual", SETTINGS)
    before = read_scores(usual)
    scale = before.metadata.anchor.gap if before.metadata.scale == "recovery" else 1.0
    judge = anchoring.judge

    def closed(*arguments, **keywords):  # type: ignore[no-untyped-def]
        return judge(*arguments, **keywords).model_copy(update={"gap_low": -1.0, "valid": False, "reasons": ("no gap",)})

    monkeypatch.setattr(anchoring, "judge", closed)
    (path,) = localize(base, near, [behavior()], tmp_path / "out", SETTINGS)
    file = read_scores(path)
    assert file.metadata.scale == "difference"
    assert not file.metadata.anchor.valid
    assert np.allclose(file.arrays["layer.sufficiency"], before.arrays["layer.sufficiency"] * scale, atol=1e-9)


def test_behaviours_with_too_few_topics_are_refused(base: Model, expert: Model, tmp_path: Path) -> None:
    pairs = behavior().pairs
    for topics in (["tea"], ["tea", "rain", "bread"]):  # several prompts of one topic are no more topics
        few = tuple(pair.model_copy(update={"topic": topics[i % len(topics)]}) for i, pair in enumerate(pairs))
        with pytest.raises(LocalizeError, match=f"at least 4 topics; found {len(topics)}"):
            localize(base, expert, [behavior().model_copy(update={"pairs": few})], tmp_path, SETTINGS)


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = localize(base, expert, [behavior("one"), behavior("two")], tmp_path / "whole", SETTINGS)
    calls = 0
    patch = Scorer._patch

    def stops(*arguments):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return patch(*arguments)

    monkeypatch.setattr(Scorer, "_patch", stops)
    with pytest.raises(KeyboardInterrupt):
        localize(base, expert, [behavior("one"), behavior("two")], tmp_path / "cut", SETTINGS)
    before = calls
    again = localize(base, expert, [behavior("one"), behavior("two")], tmp_path / "cut", SETTINGS)
    # Two behaviours, two layers; activation patching of modules and of units, weight patching, knockout.
    assert (before, calls) == (4, 4 + 2 * 2 * 4 - 3)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in whole]
    assert not (tmp_path / "cut" / ".units").exists()


@pytest.mark.parametrize("kept", [0, 1])
def test_units_that_are_removed_in_part_are_made_again(
    kept: int, base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call can be killed while it removes its units: no unit may rely on another."""
    asked = [behavior(verifier=Verifier(name="change_case:english_capital"))]
    (whole,) = localize(base, expert, asked, tmp_path / "whole", SETTINGS)

    def stops(units: Units) -> None:
        files = sorted(path for path in units.folder.rglob("*") if path.is_file())
        assert len(files) > 8
        for path in files[kept::2]:
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Units, "discard", stops)
        with pytest.raises(KeyboardInterrupt):
            localize(base, expert, asked, tmp_path / "cut", SETTINGS)
    (again,) = localize(base, expert, asked, tmp_path / "cut", SETTINGS)
    assert again.read_bytes() == whole.read_bytes()


def test_broken_score_files_are_refused(measured: Path, tmp_path: Path) -> None:
    from mechmerge.errors import InputError, SchemaError

    file = read_scores(measured)
    for change, message in (
        ({"head.screen": np.full((3, 4), np.inf, np.float32)}, "an infinite one"),
        ({"head.screen": np.zeros((3, 4))}, "float32"),
        ({"head.guess": np.zeros((3, 4), np.float32)}, "named <kind>.<measure>"),
        ({"head.screen": np.zeros((9, 4), np.float32)}, "one number of layers"),
    ):
        with pytest.raises(SchemaError, match=message):
            ScoreFile(file.metadata, file.arrays | change).write(tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(measured.read_bytes()[:100])
    with pytest.raises(SchemaError, match="a safetensors file"):
        read_scores(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="nothing there"):
        read_scores(tmp_path / "none.safetensors")


def test_other_architectures_are_refused(base: Model, tmp_path: Path) -> None:
    other = resolve(str(tiny_model(tmp_path / "qwen", family="qwen2", layers=3)))
    with pytest.raises(PairError, match="expected the architecture llama; found qwen2"):
        localize(base, other, [behavior()], tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
