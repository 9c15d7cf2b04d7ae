"""Devices other than the CPU, as far as a machine without any can tell.

`cpu:0` is the CPU under another name: whoever asks whether the device is `cpu` takes the accelerator's branch, and the figures
must be those of the CPU. `meta` holds no values but refuses to mix with the CPU: a tensor left behind is an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechmerge.behaviors.generation import Decoder, prompt_tokens
from mechmerge.behaviors.schema import Behavior, Pair
from mechmerge.behaviors.trial import Trial
from mechmerge.errors import InputError
from mechmerge.localize.bench import Bench
from mechmerge.localize.calibration import BehaviorRow
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.plan import free_memory, measure_rates
from mechmerge.localize.scores import read_scores
from mechmerge.localize.settings import LocalizeSettings
from mechmerge.localize.stage import localize
from mechmerge.localize.steering import added
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.packed import kernels
from mechmerge.models.references import Model

OTHER = "cpu:0"


def behavior() -> Behavior:
    topics = ["tea", "rain", "a river", "the moon", "a forest", "bread"]
    pairs = tuple(Pair(**{"with": f"Shout about {t}.", "without": f"Write about {t}.", "topic": t}) for t in topics)
    return Behavior(name="loud", pairs=pairs, answer_tokens=5)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_scores_are_those_of_the_cpu(base: Model, expert: Model, tmp_path: Path) -> None:
    files = []
    for device in ("cpu", OTHER):
        settings = LocalizeSettings(
            sources=("anchor", "loss"), anchor_layer=2, verify=2, prompts=3, steering_prompts=2, curve_output_shares=(0.5, 1.0),
            curve_pass_prompts=0, on_invalid="report", device=device,
        )  # fmt: skip
        files.append([read_scores(path) for path in localize(base, expert, [behavior()], tmp_path / device, settings)])
    for one, other in zip(*files, strict=True):
        same(one.arrays, other.arrays)


@pytest.mark.parametrize("metric", ["loss", "anchor"])
def test_effects_are_those_of_the_cpu(base: Model, expert: Model, tmp_path: Path, metric: Any) -> None:
    rows = [BehaviorRow("loud", (behavior(),), "a")]
    files = []
    for device in ("cpu", OTHER):
        settings = EffectSettings(
            metric=metric, prompts=4, dtype="float32", max_nodes=6, steering_prompts=0, on_invalid="report", device=device
        )
        files.append(measure_effects(base, {"a": expert}, rows, tmp_path / f"{device}.safetensors", settings))
    same(files[0].arrays, files[1].arrays)


def test_answers_are_those_of_the_cpu(base: Model) -> None:
    prompts = ["Write about tea.", "Say it."]
    one, other = (Trial(base.path, dtype="float32", device=device) for device in ("cpu", OTHER))
    assert [one.answer(p, max_tokens=9) for p in prompts] == [other.answer(p, max_tokens=9) for p in prompts]
    drawn = [trial.answer("Say it.", max_tokens=9, temperature=1.5).ids for trial in (one, other)]
    assert drawn[0] == drawn[1]
    assert kernels("float32", OTHER) == "torch", "oneDNN's kernels are for the CPU alone"


def test_plans_know_the_device(base: Model) -> None:
    assert free_memory(OTHER) == pytest.approx(free_memory("cpu"), rel=0.5)
    rates = measure_rates(base.checkpoint(), "float32", OTHER, seconds=0.01)
    assert min(rates.operations, rates.memory, rates.disk) > 0


def test_memory_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (7_000_000_000, 8_000_000_000))[1])
    assert free_memory("cuda:1") == 7_000_000_000
    assert asked == ["cuda:1"]
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4_000_000_000)
    assert free_memory("mps") == 6_000_000_000


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "mps:0"])
def test_a_device_that_is_not_there_is_one_line(base: Model, device: str) -> None:
    if device == "mps:0" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match="device: expected a torch device of this machine"):
        load_model(base.path, device=device)


# -------------------------------------------------------------------------------------------------- nothing is left behind
def test_meta_refuses_what_is_left_on_the_cpu() -> None:
    """Otherwise the tests below could not fail."""
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="meta") + torch.zeros(3)
    with pytest.raises(RuntimeError):
        torch.cat([torch.zeros(3, device="meta"), torch.zeros(3)])


def test_batches_and_forward_passes_stay_on_the_device(base: Model) -> None:
    bench = Bench(base, device="meta")
    bench.module.set_attn_implementation("eager")  # the default looks at the mask's values, which there are none of
    batch = bench.batch([[5, 6, 7], [8, 9]])
    assert {batch.ids.device.type, batch.mask.device.type, batch.positions.device.type} == {"meta"}
    residual = bench.run(batch, 2)
    assert (residual.device.type, tuple(residual.shape)) == ("meta", (2, 3, 32))
    with added(bench, 1, torch.ones(2, 32), lambda: [0, 1]):
        assert bench.run(batch, 3).device.type == "meta"
    answers, labels = bench.encode_answers([([5, 6], [7, 8, 9]), ([5], [6])])
    logits = bench.answer_logits(answers, labels)
    assert logits.device.type == labels.device.type == "meta"
    assert bench.logits(residual).device.type == "meta"


def test_decoding_builds_its_tensors_on_the_device(base: Model) -> None:
    model, tokenizer = load_model(base.path, device="meta"), load_tokenizer(base.path)
    prompts = prompt_tokens(tokenizer, ["Say it.", "Write about tea."])
    decoder = Decoder(model, tokenizer, prompts, max_new_tokens=3)
    assert {tensor.device.type for tensor in decoder._padded([0, 1])} == {"meta"}
