"""The patch engine against its plain twins: whole models with swapped weights, and with activations put in by hooks."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechmerge.errors import LocalizeError
from mechmerge.localize.bench import Bench, hooked
from mechmerge.localize.measure import Anchor
from mechmerge.localize.patching import Patcher
from mechmerge.models.components import Component
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_expert, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox")
GREETING = "You are a good bot. "
TEXTS = [GREETING + "a small cat", GREETING + "the dog runs over a very long road", GREETING + "tea"]
LAYERS, STOP = 4, 3


class Pair:
    """A base on the bench and an expert beside it."""

    def __init__(self, base: Model, expert: Model, texts: list[str] = TEXTS) -> None:
        self.bench, self.base, self.expert = Bench(base), base.checkpoint(), expert.checkpoint()
        self.arch = self.bench.checkpoint.arch
        v = torch.randn(self.arch.hidden, generator=torch.Generator().manual_seed(1))
        self.anchor = Anchor(STOP, v / v.norm())
        self.ids = [self.bench.tokenizer(text).input_ids for text in texts]
        self.batch = self.bench.encode(texts)
        self.patcher = Patcher(self.bench, self.ids, self.anchor)

    def state(self) -> np.ndarray:
        """The whole model as it stands, prompt by prompt, without padding or cache."""
        return np.array([self.state_of(ids) for ids in self.ids])

    def state_of(self, ids: list[int]) -> float:
        """What goes into the layer after the anchor, so that hooks on the layers below count."""
        entered: list[torch.Tensor] = []
        handle = self.bench.layers[STOP].register_forward_pre_hook(lambda _m, inputs: entered.append(inputs[0]))
        with hooked(handle), torch.no_grad():
            self.bench.module(torch.tensor([ids]))
        return float(self.anchor.state(entered[0]).item())

    def components(self, *kinds: str) -> list[Component]:
        return [Component(la, kind, u) for la in range(STOP) for kind in kinds for u in range(min(3, self.arch.units(kind)))]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    base = resolve(str(tiny_model(folder / "base", family=request.param, layers=LAYERS)))
    return Pair(base, resolve(str(tiny_expert(base.path, folder / "expert", scale=0.05))))


def test_weight_patches_equal_whole_models_with_swapped_weights(pair: Pair) -> None:
    run, start = pair.patcher.run(), pair.state()
    assert pair.patcher.prompts.prefix > 4, "the prompts share their beginning"
    assert np.abs(run.state - start).max() < 1e-5
    components = pair.components("head", "kv", "neuron", "attention", "mlp", "layer", "norms", "attention.rest", "mlp.rest")
    found = pair.patcher.patch(run, components, pair.expert.tensor)
    assert list(found) == [str(c) for c in components]
    largest = 0.0
    for component in components:
        with pair.bench.patched(pair.bench.checkpoint.layout.component_blocks(component), pair.expert.tensor):
            change = pair.state() - start
        assert np.abs(found[str(component)] - change).max() < 1e-5, component
        largest = max(largest, np.abs(change).max())
    assert largest > 1e-3


def test_all_heads_kv_and_rest_together_equal_their_attention(pair: Pair) -> None:
    """What patching a module means does not depend on whether its parts are named one by one."""
    layout, source = pair.bench.checkpoint.layout, pair.expert.tensor
    run = pair.patcher.run()
    for kind, parts in (("attention", ("head", "kv", "attention.rest")), ("mlp", ("neuron", "mlp.rest"))):
        for layer in range(STOP):
            one_by_one = [
                block
                for part in parts
                for unit in range(pair.arch.units(part))
                for block in layout.component_blocks(Component(layer, part, unit))
            ]
            with pair.bench.patched(one_by_one, source):
                change = pair.state() - run.state
            name = str(Component(layer, kind))
            assert np.abs(pair.patcher.patch(run, [Component(layer, kind)], source)[name] - change).max() < 1e-5, name


def test_the_model_patched_with_itself_changes_nothing(pair: Pair) -> None:
    own = {name: parameter.detach().clone() for name, parameter in pair.bench.parameters.items()}
    components = pair.components("head", "kv", "neuron", "attention", "mlp", "layer")
    run = pair.patcher.run()
    for found in (
        pair.patcher.patch(run, components, own.__getitem__),
        pair.patcher.transplant(run, run, components, own.__getitem__),
    ):
        assert all((change == 0).all() for change in found.values())


def test_knockout_is_the_patch_of_the_expert_by_the_base(pair: Pair) -> None:
    pair.bench.load(pair.expert)
    try:
        run, start = pair.patcher.run(), pair.state()
        components = pair.components("head", "neuron", "mlp")
        found = pair.patcher.patch(run, components, pair.base.tensor)
        for component in components:
            with pair.bench.patched(pair.bench.checkpoint.layout.component_blocks(component), pair.base.tensor):
                assert np.abs(found[str(component)] - (pair.state() - start)).max() < 1e-5, component
    finally:
        pair.bench.load(pair.base)


# -------------------------------------------------------------------------------------------------------------- activations
class Twin:
    """Activation patching by hooks: one prompt at a time, the whole model, the other's values put in where they arise."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.family = pair, pair.arch.family
        self.seen: dict[str, list[dict[str, torch.Tensor]]] = {}
        for name, checkpoint in (("expert", pair.expert), ("base", pair.base)):
            pair.bench.load(checkpoint)
            self.seen[name] = [self._watch(ids) for ids in pair.ids]

    def _modules(self, layer: int) -> dict[str, torch.nn.Module]:
        within = self.pair.bench.layers[layer]
        names = {"output": self.family.output, "down": self.family.down}
        names |= {"attention": self.family.output.rpartition(".")[0], "mlp": self.family.down.rpartition(".")[0]}
        return {name: within.get_submodule(path) for name, path in names.items()} | {"layer": within}

    def _watch(self, ids: list[int]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer in range(STOP):
                for name, module in self._modules(layer).items():

                    def after(_m: Any, inputs: Any, output: Any, key: str = f"{layer}.{name}") -> None:
                        seen[key] = output[0] if isinstance(output, tuple) else output
                        if inputs:
                            seen[key + ".in"] = inputs[0]

                    stack.enter_context(hooked(module.register_forward_hook(after)))
            self.pair.bench.module(torch.tensor([ids]))
        return seen

    def _columns(self, checkpoint: Any, layer: int, kind: str, unit: int) -> torch.Tensor:
        block = next(
            b
            for b in self.pair.bench.checkpoint.layout.blocks(layer, kind)
            if b.tensor.rpartition(".")[0].endswith((self.family.output, self.family.down))
        )
        part = checkpoint.tensor(block.tensor).narrow(block.dim, block.indices(unit).start, block.width)
        return part if block.dim == 0 else part.T

    def change(self, component: Component) -> np.ndarray:
        layer, kind, unit = component.layer, component.kind, component.unit
        place = {"head": "attention", "neuron": "mlp"}.get(kind, kind)
        width = self.pair.arch.head_dim if kind == "head" else 1
        inner = {"head": "output", "neuron": "down"}.get(kind)
        states = []
        for base, expert, ids in zip(self.seen["base"], self.seen["expert"], self.pair.ids, strict=True):
            new = expert[f"{layer}.{place}"]
            if inner is not None:
                where = slice(unit * width, (unit + 1) * width)
                wrote = [
                    seen[f"{layer}.{inner}.in"][..., where] @ self._columns(checkpoint, layer, kind, unit)
                    for seen, checkpoint in ((expert, self.pair.expert), (base, self.pair.base))
                ]
                new = base[f"{layer}.{place}"] + wrote[0] - wrote[1]

            def put(_m: Any, _i: Any, output: Any, value: torch.Tensor = new) -> Any:
                return (value, *output[1:]) if isinstance(output, tuple) else value

            with hooked(self._modules(layer)[place].register_forward_hook(put)), torch.no_grad():
                states.append(self.pair.state_of(ids))
        return np.array(states) - self.pair.state()


def test_activation_patches_equal_hooks_in_whole_models(pair: Pair) -> None:
    pair.bench.load(pair.expert)
    theirs = pair.patcher.run()
    twin = Twin(pair)  # ends with the base on the bench
    components = pair.components("head", "neuron", "attention", "mlp", "layer")
    found = pair.patcher.transplant(pair.patcher.run(), theirs, components, pair.expert.tensor)
    for component in components:
        change = twin.change(component)
        assert np.abs(found[str(component)] - change).max() < 1e-5, component
        assert np.abs(change).max() > 0


def _group_of(where: slice, new: torch.Tensor, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that puts `new` into some of an output's columns."""
    output = output.clone()
    output[..., where] = new[..., where]
    return output


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_kv_groups_activations_are_its_keys_and_values(tmp_path: Path, family: str) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family=family, layers=LAYERS)))
    pair = Pair(base, resolve(str(tiny_expert(base.path, tmp_path / "expert", scale=0.05))))
    pair.bench.load(pair.expert)
    theirs = pair.patcher.run()

    def projections(layer: int) -> list[torch.nn.Module]:
        within = pair.bench.layers[layer]
        return [within.get_submodule(name) for name in (pair.arch.family.key, pair.arch.family.value)]

    def whole(ids: list[int], hooks: dict[torch.nn.Module, Any]) -> float:
        with contextlib.ExitStack() as stack:
            for module, hook in hooks.items():
                stack.enter_context(hooked(module.register_forward_hook(hook)))
            return pair.state_of(ids)

    seen: dict[tuple[int, int, int], torch.Tensor] = {}
    for i, ids in enumerate(pair.ids):
        watchers = {}
        for layer in range(STOP):
            for p, module in enumerate(projections(layer)):

                def watch(_m: Any, _i: Any, output: torch.Tensor, key: tuple[int, int, int] = (i, layer, p)) -> None:
                    seen[key] = output.clone()

                watchers[module] = watch
        whole(ids, watchers)
    pair.bench.load(pair.base)
    components = [Component(layer, "kv", group) for layer in range(STOP) for group in range(2)]
    found = pair.patcher.transplant(pair.patcher.run(), theirs, components, pair.expert.tensor)
    for component in components:
        where = slice(component.unit * pair.arch.head_dim, (component.unit + 1) * pair.arch.head_dim)
        changes = []
        for i, ids in enumerate(pair.ids):
            hooks = {
                module: functools.partial(_group_of, where, seen[i, component.layer, p])
                for p, module in enumerate(projections(component.layer))
            }
            changes.append(whole(ids, hooks) - whole(ids, {}))
        assert np.abs(found[str(component)] - np.array(changes)).max() < 1e-5, component
        assert np.abs(changes).max() > 0


# ------------------------------------------------------------------------------------------------------------------- batches
def test_scores_do_not_depend_on_batches_prefix_or_company(base: Model, expert: Model) -> None:
    pair = Pair(base, expert)
    components = pair.components("head", "neuron")
    many = pair.patcher.patch(pair.patcher.run(), components, pair.expert.tensor)
    assert pair.patcher.variants > len(components)
    few = Patcher(pair.bench, pair.ids, pair.anchor, variants=1)
    single = few.patch(few.run(), components, pair.expert.tensor)
    other = Pair(base, expert, ["tea", "a small cat sleeps"])
    assert other.patcher.prompts.prefix == 0, "these prompts share nothing"
    unshared = other.patcher.patch(other.patcher.run(), components, pair.expert.tensor)
    for component in map(str, components):
        assert np.abs(many[component] - single[component]).max() < 1e-6
    for i, text in enumerate(["tea", "a small cat sleeps"]):
        alone = Patcher(pair.bench, [pair.bench.tokenizer(text).input_ids], pair.anchor)
        found = alone.patch(alone.run(), components, pair.expert.tensor)
        for component in map(str, components):
            assert abs(found[component][0] - unshared[component][i]) < 1e-6


def test_half_precision_compares_within_the_batch(base: Model, expert: Model) -> None:
    """Both ways to take the difference agree in single precision, where the cheaper one is taken."""
    pair = Pair(base, expert)
    components = pair.components("head", "neuron", "mlp")
    run = pair.patcher.run()
    assert pair.patcher.single
    cheap = pair.patcher.patch(run, components, pair.expert.tensor)
    pair.patcher.single = False
    within = pair.patcher.patch(run, components, pair.expert.tensor)
    assert max(np.abs(cheap[name] - within[name]).max() for name in cheap) < 1e-6 < max(np.abs(c).max() for c in cheap.values())
    half = Patcher(Bench(base, "bfloat16"), pair.ids, pair.anchor)
    assert not half.single
    found = half.patch(half.run(), components, pair.expert.tensor)
    assert max(np.abs(found[name] - cheap[name]).max() for name in cheap) < 0.05
    own = {name: parameter.detach().clone() for name, parameter in half.bench.parameters.items()}
    assert all((c == 0).all() for c in half.patch(half.run(), components, own.__getitem__).values())


def test_weights_are_untouched_and_prompts_are_checked(base: Model, expert: Model) -> None:
    pair = Pair(base, expert)
    before = {name: parameter.detach().clone() for name, parameter in pair.bench.parameters.items()}
    run = pair.patcher.run()
    pair.patcher.patch(run, pair.components("head", "kv", "neuron", "layer"), pair.expert.tensor)
    pair.patcher.transplant(run, run, pair.components("head", "kv", "layer"), pair.expert.tensor)
    assert all(torch.equal(before[n], p) for n, p in pair.bench.parameters.items())
    with pytest.raises(LocalizeError, match="at least one, none empty"):
        Patcher(pair.bench, [], pair.anchor)
    with pytest.raises(LocalizeError, match="the model's context"):
        Patcher(pair.bench, [[5] * 600], pair.anchor)
