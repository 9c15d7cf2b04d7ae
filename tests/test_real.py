"""SmolLM2-135M itself: the demo's base, its format expert, and the measurements on them. Fetches 90 MB on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.schema import load_behavior
from mechmerge.behaviors.verifiers import verify
from mechmerge.localize.bench import Bench
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.patching import Patcher
from mechmerge.models.components import Component
from mechmerge.models.pair import check_pair
from mechmerge.models.references import Model, resolve
from tests.conftest import REAL_CACHE
from tests.twins import patch_state

pytestmark = pytest.mark.slow
EXPERTS = Path(__file__).parent.parent / "recipes" / "demo" / "experts"


@pytest.fixture(scope="module", autouse=True)
def _real_cache() -> Iterator[None]:
    """The user's own cache: a dequantised model is worth keeping between test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHMERGE_CACHE", REAL_CACHE or str(Path.home() / ".cache" / "mechmerge"))
        yield


@pytest.fixture(scope="module")
def smollm(_real_cache: None) -> Model:
    return resolve("demo:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def formats(smollm: Model) -> Model:
    return resolve(f"demo:smollm2-135m-instruct+{EXPERTS / 'formats'}")


def test_the_base_is_a_model_that_knows_things(smollm: Model) -> None:
    checkpoint = smollm.checkpoint()
    assert (checkpoint.arch.layers, checkpoint.arch.heads, checkpoint.arch.kv_groups, checkpoint.arch.neurons) == (
        30,
        9,
        3,
        1536,
    )
    assert checkpoint.arch.tied
    bench = Bench(smollm)
    template = chat_template_of(bench.tokenizer, "model")
    text = render(bench.tokenizer, "What is the capital of France?", template)
    assert "Paris" in generate(bench.module, bench.tokenizer, [text], max_new_tokens=12)[0].text
    assert (smollm.path / "generation_config.json").is_file()


def test_the_format_expert_does_what_the_base_does_not(smollm: Model, formats: Model) -> None:
    """Section headings on develop-free calibration prompts: the adapter is right for this very base."""
    check_pair(smollm.checkpoint(), formats.checkpoint())
    behavior = load_behavior("sections")
    rates = {}
    for name, model in (("base", smollm), ("expert", formats)):
        bench = Bench(model)
        template = chat_template_of(bench.tokenizer, behavior.chat_template)
        texts = [render(bench.tokenizer, pair.with_, template) for pair in behavior.pairs[:8]]
        answers = generate(bench.module, bench.tokenizer, texts, max_new_tokens=behavior.answer_tokens)
        assert behavior.verifier is not None
        rates[name] = np.mean([verify(behavior.verifier, "", answer.text, {}) for answer in answers])
    assert rates["expert"] >= rates["base"] + 0.5, rates


def test_measurements_on_the_real_pair(smollm: Model, formats: Model) -> None:
    """Identity 0, everything patched 1, bits restored, and screening equal to a finite difference to 1e-3 of the gap."""
    bench, theirs = Bench(smollm), formats.checkpoint()
    mine = smollm.checkpoint()
    behavior = load_behavior("capitals")
    template = chat_template_of(bench.tokenizer, "model")
    batch = bench.encode([render(bench.tokenizer, pair.with_, template) for pair in behavior.pairs[:3]])
    plain = bench.encode([render(bench.tokenizer, pair.without, template) for pair in behavior.pairs[:3]])
    layer = 20
    start = bench.trace(batch, layer)
    bench.load(theirs)
    expert_with, expert_without = (bench.trace(b, layer).residual[-1][:, -1] for b in (batch, plain))
    v = (expert_with - expert_without).mean(0)
    anchor = Anchor(layer, v / v.norm())
    bench.load(mine)
    base_state = anchor.state(start.residual[-1]).double().numpy()
    gap = float((expert_with @ anchor.vector).double().numpy().mean() - base_state.mean())
    assert gap > 1

    ids = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    patcher = Patcher(bench, ids, anchor)
    tried = [Component(at, kind) for at in (0, 10, 19) for kind in ("layer", "attention", "mlp", "head", "kv", "neuron")]
    assert all((change == 0).all() for change in patcher.patch(patcher.run(), tried, mine.tensor).values())
    own = patcher.patch(patcher.run(), tried, theirs.tensor)
    for component in tried:
        change = patch_state(bench, start, anchor, component, theirs.tensor) - base_state
        assert np.abs(own[str(component)] - change).max() / gap < 1e-5, component
    every = [(block, None) for at, kind in mine.layout.leaves() for block in mine.layout.blocks(at, kind)]
    with bench.patched(every, theirs.tensor), torch.no_grad():
        whole = anchor.state(bench.run(batch, layer)).double().numpy()
    assert (whole.mean() - base_state.mean()) / gap == pytest.approx(1.0, abs=1e-4)
    assert all(torch.equal(parameter, mine.tensor(name)) for name, parameter in bench.parameters.items())

    scores = screen(bench, [batch], [anchor], theirs.tensor)
    for component in (Component(3, "attention"), Component(11, "mlp"), Component(17, "head", 4), Component(9, "kv", 1)):
        ends = []
        for sign in (1, -1):

            def near(name: str, sign: int = sign) -> torch.Tensor:
                own = mine.tensor(name)
                return own + sign * 0.02 * (theirs.tensor(name) - own)

            ends.append(patch_state(bench, start, anchor, component, near))
        difference = (ends[0] - ends[1]) / 0.04
        got = scores[component.kind][:, component.layer, component.unit]
        assert np.abs(got - difference).max() / gap < 1e-3, component


def test_real_cache_is_the_users(smollm: Model) -> None:
    assert smollm.path.is_relative_to(os.environ["MECHMERGE_CACHE"])
