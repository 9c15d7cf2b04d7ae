"""Measures of one behaviour on its two sources, against whole models written out by hand; roles; verification; resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mechmerge.behaviors.schema import Behavior, Verifier
from mechmerge.errors import LocalizeError
from mechmerge.localize.anchoring import split
from mechmerge.localize.asked import ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.localization import Localization
from mechmerge.localize.roles import RoleThresholds
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.localize.scoring import Scorer
from mechmerge.localize.settings import LocalizeSettings
from mechmerge.localize.stage import localize
from mechmerge.models.components import SCORED_KINDS, UNIT_KINDS, Component
from mechmerge.models.references import Model
from mechmerge.recipe.policies import top
from tests.test_localize import SETTINGS, behavior

BOTH = SETTINGS.model_copy(update={"sources": ("anchor", "loss"), "curves": False})


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoreFile, ScoreFile]:
    anchored, lost = localize(base, expert, [behavior()], tmp_path_factory.mktemp("both"), BOTH)
    assert (anchored.name, lost.name) == ("loud.safetensors", "loud.loss.safetensors")
    return read_scores(anchored), read_scores(lost)


class Whole:
    """Whole models, one prompt at a time: loss of the expert's answers, and divergence from its distribution."""

    def __init__(self, base: Model, expert: Model, asked: Behavior) -> None:
        self.bench, self.base, self.expert = Bench(base), base.checkpoint(), expert.checkpoint()
        _, held_out = split(asked)
        prompts = ask(self.bench, asked, [asked.pairs[i] for i in held_out])
        self.prompts = prompts.prompts(self.bench)
        self.bench.load(self.expert)
        answers = prompts.answers(self.bench)
        self.answers = [[*a.ids, *([] if a.end is None else [a.end])] for a in answers]
        self.logp = [self._logp(i) for i in range(len(self.prompts))]
        self.bench.load(self.base)

    @torch.no_grad()
    def _logp(self, i: int) -> torch.Tensor:
        rows = torch.tensor([[*self.prompts[i], *self.answers[i]]])
        logits = self.bench.module(rows).logits[0, len(self.prompts[i]) - 1 : -1]
        return logits.log_softmax(-1)

    def loss(self) -> np.ndarray:
        found = [self._logp(i)[range(len(a)), a].mean() for i, a in enumerate(self.answers)]
        return -torch.stack(found).double().numpy()

    def divergence(self, count: int) -> np.ndarray:
        pairs = [(self.logp[i], self._logp(i)) for i in range(count)]
        return np.array([float((p.exp() * (p - q)).sum()) for p, q in pairs])

    def patched(self, component: Component, measure: str) -> np.ndarray:
        start, source = (self.base, self.expert) if measure == "sufficiency" else (self.expert, self.base)
        self.bench.load(start)
        before = self.loss()
        with self.bench.patched(self.bench.checkpoint.layout.component_blocks(component), source.tensor):
            after = self.loss()
        self.bench.load(self.base)
        return before - after if measure == "sufficiency" else after - before


def test_scores_on_the_loss_equal_whole_models(base: Model, expert: Model, measured: tuple[ScoreFile, ScoreFile]) -> None:
    file = measured[1]
    whole = Whole(base, expert, behavior())
    loss = file.metadata.loss
    assert loss is not None
    start = whole.loss()
    assert loss.base == pytest.approx(start.mean(), abs=1e-5)
    scale = loss.gap if file.metadata.scale == "recovery" else 1.0
    assert file.metadata.below is None
    for component in (Component(0, "attention"), Component(2, "mlp"), Component(2, "layer"), Component(1, "head", 2)):
        for measure in ("sufficiency", "necessity"):
            change = whole.patched(component, measure) / scale
            place = (component.layer, component.unit)
            assert file.arrays[f"{component.kind}.{measure}"][place] == pytest.approx(change.mean(), abs=1e-5), component
            error = change.std(ddof=1) / np.sqrt(len(change))
            assert file.arrays[f"{component.kind}.{measure}.stderr"][place] == pytest.approx(error, abs=1e-5)
    for kind in SCORED_KINDS:
        assert np.isfinite(file.arrays[f"{kind}.screen"]).all()
        assert (file.arrays[f"{kind}.screen"][2] != 0).any(), "all layers have a score on the loss"
    assert f"{file.metadata.label}" == "loud by loss"


def test_the_screen_on_the_loss_is_its_gradient(base: Model, tmp_path: Path) -> None:
    """For an expert very near to the base the first order is all there is."""
    from mechmerge.models.references import resolve
    from tests.tiny import tiny_expert

    near = resolve(str(tiny_expert(base.path, tmp_path / "near", seed=5, scale=1e-4)))
    (path,) = localize(base, near, [behavior()], tmp_path / "out", BOTH.model_copy(update={"sources": ("loss",)}))
    file = read_scores(path)
    largest = np.abs(file.arrays["layer.sufficiency"]).max()
    for kind in ("attention", "mlp", "layer"):
        assert np.abs(file.arrays[f"{kind}.screen"] - file.arrays[f"{kind}.sufficiency"]).max() < 0.02 * largest, kind


def test_modules_after_the_anchor_are_judged_by_the_output(
    base: Model, expert: Model, measured: tuple[ScoreFile, ScoreFile]
) -> None:
    file = measured[0]
    whole = Whole(base, expert, behavior())
    count = min(BOTH.output_prompts, len(whole.prompts))
    start = whole.divergence(count)
    for kind in ("attention", "mlp", "layer"):
        blocks = whole.bench.checkpoint.layout.component_blocks(Component(2, kind))
        with whole.bench.patched(blocks, whole.expert.tensor):
            share = (start - whole.divergence(count)) / start.mean()
        assert file.arrays[f"{kind}.output"][2, 0] == pytest.approx(share.mean(), abs=1e-4), kind
        assert file.arrays[f"{kind}.output.stderr"][2, 0] == pytest.approx(share.std(ddof=1) / count**0.5, abs=1e-4)


def test_roles_follow_their_stored_thresholds(
    base: Model, expert: Model, measured: tuple[ScoreFile, ScoreFile], tmp_path: Path
) -> None:
    lost = measured[1]
    assert lost.metadata.scale == "recovery"
    assert lost.metadata.roles is not None
    assert lost.metadata.roles.thresholds == RoleThresholds()
    loose = RoleThresholds(module=0.001, head=0.0005, neuron=0.0001, errors=0.0)
    settings = BOTH.model_copy(update={"sources": ("loss",), "roles": loose})
    (path,) = localize(base, expert, [behavior()], tmp_path, settings)
    file = read_scores(path)
    assert file.metadata.roles is not None
    assert file.metadata.roles.thresholds == loose
    assert file.metadata.roles.counts != lost.metadata.roles.counts
    (path,) = localize(base, expert, [behavior()], tmp_path / "raw", settings.model_copy(update={"measures": ("sufficiency",)}))
    plain = read_scores(path)
    assert plain.metadata.roles is None, "no roles without activation patching"
    assert "mlp.activation" not in plain.arrays


def test_verification_goes_on_until_the_best_are_known(base: Model, expert: Model, tmp_path: Path) -> None:
    settings = BOTH.model_copy(update={"verify": "auto", "top": 2, "sources": ("anchor",)})
    (path,) = localize(base, expert, [behavior()], tmp_path, settings)
    file = read_scores(path)
    assert set(file.metadata.verification) == {"head", "kv", "neuron"}
    for kind, record in file.metadata.verification.items():
        replaced = np.isfinite(file.arrays[f"{kind}.sufficiency"][:2]).sum()
        assert record.measured <= replaced
        assert file.metadata.verified[kind] == replaced
        assert record.k == 2
        assert record.stable
    # Knockout and activation patching are for the best ones (and what routes), not for all that were replaced.
    assert np.isfinite(file.arrays["neuron.necessity"][:2]).sum() == 2
    assert np.isfinite(file.arrays["neuron.sufficiency"][:2]).sum() > 2


def test_what_is_measured_is_not_measured_again(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at its last step, a call goes on with other settings and patches nothing anew."""
    few = BOTH.model_copy(update={"sources": ("anchor",), "measures": ("sufficiency", "activation")})

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Localization, "_outputs", stops)
        with pytest.raises(KeyboardInterrupt):
            localize(base, expert, [behavior()], tmp_path, few)
    asked: list[str] = []
    keep = Scorer._patch

    def watched(self: Scorer, measure: str, components: list[Component]) -> dict[str, np.ndarray]:
        asked.append(measure)
        return keep(self, measure, components)  # type: ignore[arg-type]

    monkeypatch.setattr(Scorer, "_patch", watched)
    (path,) = localize(base, expert, [behavior()], tmp_path, few.model_copy(update={"measures": LocalizeSettings().measures}))
    assert set(asked) == {"necessity"}
    assert np.isfinite(read_scores(path).arrays["mlp.activation"][:2]).all()


def test_too_few_answers_that_pass_are_refused(base: Model, expert: Model, tmp_path: Path) -> None:
    judged = behavior(verifier=Verifier(name="change_case:english_capital", min_words=4))
    with pytest.raises(LocalizeError, match=r"expected at least 2 answers of the expert that pass; found 0 of 4"):
        localize(base, expert, [judged], tmp_path, BOTH.model_copy(update={"sources": ("loss",)}))


def test_policies_take_scores_on_the_loss(measured: tuple[ScoreFile, ScoreFile]) -> None:
    choice = top({"one": [measured[1]]}, 0.5)
    assert any((mask > 0).any() for mask in choice.masks.values())
    assert (choice.masks["one.neuron"][2] > 0).any(), "layers above an anchor take part"


def test_set_curves_on_the_loss_stand_beside_the_anchors(base: Model, expert: Model, tmp_path: Path) -> None:
    settings = BOTH.model_copy(update={"curves": True, "curve_seeds": 2, "curve_pass_prompts": 0})
    for path in localize(base, expert, [behavior()], tmp_path, settings):
        curves = read_scores(path).metadata.curves
        assert curves is not None
        everything = curves.curves[0].points[-1]
        assert everything.share == 1.0
        if path.name.endswith(".loss.safetensors"):
            whole = Whole(base, expert, behavior())
            layout = whole.bench.checkpoint.layout
            blocks = [(b, None) for layer in range(3) for kind in UNIT_KINDS for b in layout.blocks(layer, kind)]
            start = whole.loss()
            with whole.bench.patched(blocks, whole.expert.tensor):
                moved = whole.loss()
            whole.bench.load(whole.expert)
            assert curves.scale == "recovery"
            assert everything.recovery == pytest.approx((start - moved).mean() / (start - whole.loss()).mean(), abs=1e-4)


def test_the_command_takes_sources_measures_and_thresholds(base: Model, expert: Model, tmp_path: Path) -> None:
    import json

    from mechmerge.artifacts import write_text
    from mechmerge.cli.localize import command

    write_text(tmp_path / "loud.yaml", json.dumps(behavior().model_dump(mode="json", by_alias=True, exclude={"builtin"})))
    arguments = [str(base.path), str(expert.path), "--behavior", str(tmp_path / "loud.yaml"), "--out", str(tmp_path / "out"),
                 "--source", "loss", "--measure", "activation", "--verify", "2", "--prompts", "4", "--no-curves", "--quiet",
                 "--role-threshold", "head=0.03"]  # fmt: skip
    shown = CliRunner().invoke(command, [*arguments, "--format", "json"], catch_exceptions=False)
    (row,) = json.loads(shown.stdout)["anchors"]
    assert row["scores on"] == "loss"
    assert row["roles"]["thresholds"]["head"] == 0.03
    assert "weight patching (sources)" in CliRunner().invoke(command, arguments, catch_exceptions=False).stdout
    for wrong, message in (
        (["--verify", "many"], "neither a number nor auto"),
        (["--role-threshold", "module=high"], "NAME=NUMBER"),
        (["--role-threshold", "modul=0.2"], "known keys"),
        (["--confidence", "1"], "--confidence"),
    ):
        result = CliRunner().invoke(command, [*arguments, *wrong])
        assert result.exit_code != 0, wrong
        assert message in (result.output + str(result.exception)), wrong
