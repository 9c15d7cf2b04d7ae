"""The streamed bench against its plain twin in memory: the same scores, states, patches and losses, with one layer resident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mechmerge.behaviors.generation import generate
from mechmerge.localize.bench import Bench
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.patching import Patcher
from mechmerge.localize.stream import StreamedBench
from mechmerge.models.components import Component
from mechmerge.models.load import empty_model, load_model
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_expert, tiny_model
from tests.twins import patch_state

MODELS = [
    ("llama", True),
    ("llama", False),
    ("qwen3", True),
    ("gemma2", True),
    ("gemma3_text", True),
    ("olmo2", False),
    ("phi3", False),
    ("gpt2", True),
    ("gpt_neox", False),
]
TEXTS = ["a small cat", "the dog runs over a very long road", "tea"]
LAYERS = 4


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{'tied' if m[1] else 'untied'}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    family, tied = request.param
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_model(folder / "base", family=family, layers=LAYERS, tied=tied, dtype="bfloat16", shard_size="50KB")
    return resolve(str(base)), resolve(str(tiny_expert(base, folder / "expert", scale=0.05)))


def anchor_of(bench: Bench, layer: int) -> Anchor:
    v = torch.randn(bench.checkpoint.arch.hidden, generator=torch.Generator().manual_seed(1))
    return Anchor(layer, v / v.norm())


def test_screening_equals_the_one_in_memory(pair: tuple[Model, Model]) -> None:
    """Several batches, layer inputs in memory and on disk; never more than one layer is resident."""
    base, expert = pair
    source = expert.checkpoint().tensor
    plain = Bench(base)
    batches = [plain.encode(TEXTS[:2]), plain.encode(TEXTS[2:])]
    wanted = screen(plain, batches, [anchor_of(plain, 3)] * len(batches), source)
    for kept in (0, 1_000_000):
        bench = StreamedBench(base, kept=kept)
        found = screen(bench, batches, [anchor_of(bench, 3)] * len(batches), source)
        for kind, values in wanted.items():
            assert np.abs(values).max() > 0
            assert np.abs(values - found[kind]).max() <= 1e-6, kind
        assert bench.most == 1


def test_forward_passes_equal_those_in_memory(pair: tuple[Model, Model]) -> None:
    base, expert = pair
    for dtype in ("float32", "bfloat16"):
        plain, bench = Bench(base, dtype), StreamedBench(base, dtype)
        for weights in (base.checkpoint(), lambda name: expert.checkpoint().tensor(name).float() * 0.5):
            plain.load(weights)
            bench.load(weights)
            batch = plain.encode(TEXTS)
            with torch.no_grad():
                assert torch.equal(plain.run(batch, 2), bench.run(batch, 2))
                whole = plain.run(batch, LAYERS)
                (swept,) = bench.residuals([batch], LAYERS)
                assert torch.equal(whole, swept)
                labels = torch.tensor([[5, 6], [7, -100], [8, 9]])
                logits = plain.answer_logits(batch, labels)
                assert logits.shape == (3, 2, bench.checkpoint.arch.vocabulary)
                assert torch.equal(logits, bench.answer_logits(batch, labels))
                assert torch.equal(logits, plain.answer_logits(batch, labels, whole))
                assert torch.equal(logits, bench.answer_logits(batch, labels, whole))
            one, other = plain.trace(batch, 3), bench.trace(batch, 3)
            assert len(one.residual) == len(other.residual) == 4
            assert all(torch.equal(a, b) for a, b in zip(one.residual, other.residual, strict=True))
            for start in range(3):
                assert torch.equal(plain.resume(one, start), bench.resume(other, start))
        assert bench.most == 1


def test_patches_equal_those_in_memory_and_are_undone(pair: tuple[Model, Model]) -> None:
    base, expert = pair
    theirs = expert.checkpoint()
    plain, bench = Bench(base), StreamedBench(base, kept=0)
    anchor, arch = anchor_of(plain, 3), plain.checkpoint.arch
    batch = plain.encode(TEXTS)
    one, other = plain.trace(batch, 3), bench.trace(batch, 3)
    for kind in ("head", "kv", "neuron", "attention", "mlp", "norms", "layer"):
        component = Component(1, kind, arch.units(kind) - 1)
        wanted = patch_state(plain, one, anchor, component, theirs.tensor)
        assert (wanted == patch_state(bench, other, anchor, component, theirs.tensor)).all(), kind
        assert torch.equal(bench.resume(other, 1), one.residual[-1]), kind
    sets = [(0, "head", [0, 2]), (0, "neuron", [5, 1]), (2, "kv", [1])]
    labels = torch.tensor([[5, 6], [7, -100], [8, 9]])
    with plain.patched_units(sets, theirs.tensor), bench.patched_units(sets, theirs.tensor), torch.no_grad():
        assert torch.equal(plain.answer_logits(batch, labels), bench.answer_logits(batch, labels))
    outside = [(block, None) for name in ("embed", "final_norm") for block in plain.checkpoint.layout.blocks(-1, name)]
    with torch.no_grad():
        before = plain.answer_logits(batch, labels)
        with plain.patched(outside, theirs.tensor), bench.patched(outside, theirs.tensor):
            moved = plain.answer_logits(batch, labels)
            assert not torch.equal(moved, before)
            assert torch.equal(moved, bench.answer_logits(batch, labels))
        assert torch.equal(before, bench.answer_logits(batch, labels))
    for name in plain.parameters:
        assert torch.equal(plain.weight(name), bench.weight(name)), name
    assert bench.most == 1


def test_the_patch_engine_gives_what_it_gives_in_memory(pair: tuple[Model, Model]) -> None:
    base, expert = pair
    theirs, arch = expert.checkpoint(), base.checkpoint().arch
    texts = [f"You are a good bot. {text}" for text in TEXTS]
    components = [
        Component(layer, kind, unit)
        for layer in range(3)
        for kind in ("head", "kv", "neuron", "attention", "mlp", "layer")
        for unit in range(min(2, arch.units(kind)))
    ]
    found = []
    for bench in (Bench(base), StreamedBench(base)):
        patcher = Patcher(bench, [bench.tokenizer(text).input_ids for text in texts], anchor_of(bench, 3))
        bench.load(theirs)
        other = patcher.run()
        bench.load(base.checkpoint())
        run = patcher.run()
        moved = patcher.transplant(run, other, components, theirs.tensor)
        found.append({"own": run.state, "other": other.state} | patcher.patch(run, components, theirs.tensor))
        found[-1] |= {f"transplant {name}": change for name, change in moved.items()}
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert np.abs(values - found[1][name]).max() <= 1e-6, name
    assert max(np.abs(found[1][str(component)]).max() for component in components) > 1e-3


def test_an_empty_model_has_everything_but_weights(pair: tuple[Model, Model]) -> None:
    folder = pair[0].path
    for dtype in ("float32", "bfloat16"):
        whole, empty = load_model(folder, dtype), empty_model(folder, dtype)
        for kind in ("named_parameters", "named_buffers"):
            ours = dict(getattr(empty, kind)(remove_duplicate=False))
            for name, value in getattr(whole, kind)(remove_duplicate=False):
                assert (ours[name].shape, ours[name].dtype, ours[name].device) == (value.shape, value.dtype, value.device)
                assert kind == "named_parameters" or torch.equal(ours.pop(name), value), name
        tied = empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
        assert tied == pair[0].checkpoint().arch.tied
        assert empty.generation_config.to_dict() == whole.generation_config.to_dict()


def test_losses_and_their_gradients_equal_those_in_memory(pair: tuple[Model, Model]) -> None:
    """As calibration takes them: all layers, final norm, head and embeddings scored, and rows of a gradient's own batch."""
    base, expert = pair
    theirs, own = expert.checkpoint(), base.checkpoint()
    found = []
    for bench in (Bench(base), StreamedBench(base, kept=0)):
        examples = [[((5, 6, 7), (8, 9)), ((4, 3), (2,))], [((9, 9, 30, 31), (7, 7, 7))]]
        encoded = [bench.encode_answers(batch) for batch in examples]

        def loss(i: int, residual: torch.Tensor, bench: Bench = bench, encoded: list = encoded) -> torch.Tensor:  # type: ignore[type-arg]
            logits = bench.answer_logits(*encoded[i], residual)
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), encoded[i][1], reduction="none").sum(1)

        deltas = lambda name: [theirs.tensor(name).float() - own.tensor(name).float()]  # noqa: E731
        with DeltaProbe(bench, deltas, 1, below=LAYERS) as probe:
            bench.backward([batch for batch, _ in encoded], LAYERS, loss, probe.turn)
            found.append([probe.take(i) for i in range(2)])
    for plain, streamed in zip(*found, strict=True):
        assert plain.keys() == streamed.keys()
        assert {(-1, "embed"), (-1, "final_norm")} <= plain.keys()
        assert ((-1, "lm_head") in plain) == (not own.arch.tied)
        for key, values in plain.items():
            assert torch.allclose(values, streamed[key], rtol=1e-5, atol=1e-6), key


def test_answers_equal_those_in_memory(pair: tuple[Model, Model]) -> None:
    plain, bench = (kind(pair[0]) for kind in (Bench, StreamedBench))
    answers = [generate(b.module, b.tokenizer, TEXTS, max_new_tokens=4) for b in (plain, bench)]
    assert answers[0] == answers[1]


def test_a_graph_over_several_layers_is_refused(base: Model) -> None:
    bench = StreamedBench(base)
    trace = bench.trace(bench.encode(TEXTS), 2)
    x = trace.residual[0].clone().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"use Bench\.backward"):
        bench.step(0, x, trace.arguments[0])


def test_a_weight_that_was_not_read_is_nan(base: Model) -> None:
    """An empty parameter can never pass for a weight."""
    bench = StreamedBench(base)
    assert all(parameter.isnan().all() for parameter in bench.parameters.values())


def test_layer_inputs_go_to_disk_only_beyond_the_limit(base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    StreamedBench(base, kept=1_000_000).trace(StreamedBench(base).encode(TEXTS), 2)
    with pytest.raises(FileNotFoundError):
        StreamedBench(base, kept=0).trace(StreamedBench(base).encode(TEXTS), 2)
