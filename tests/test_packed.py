"""Packed linear layers: the same products up to rounding, and only where they are said to be used."""

from __future__ import annotations

import pytest
import torch

from mechmerge.models.load import load_model
from mechmerge.models.packed import kernels, load_packed
from tests.tiny import tiny_model

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma3_text"]


def test_kernels_are_torchs_own_elsewhere_than_on_an_x86_processor():
    assert kernels("float32", "cuda") == kernels("float32", "cuda:1") == "torch"
    assert kernels("float16", "cpu") == "torch"
    assert kernels("float32", "cpu") in ("onednn", "torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_the_plain_one_does(family, dtype, tmp_path):
    folder = tiny_model(tmp_path, family, tied=family in ("llama", "qwen2", "gpt2"))
    plain, packed = load_model(folder, dtype), load_packed(folder, dtype)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.inference_mode():
        expected, found = (model(input_ids=ids).logits.float() for model in (plain, packed))
    scale = float(expected.abs().max())
    assert float((expected - found).abs().max()) <= scale * (1e-5 if dtype == "float32" else 3e-2)
    assert packed.dtype == plain.dtype
    assert packed.device == plain.device


@pytest.mark.skipif(kernels("float32", "cpu") == "torch", reason="this processor has no packed kernels")
def test_every_linear_layer_is_packed_and_no_plain_weight_is_kept(tmp_path):
    folder = tiny_model(tmp_path, "llama")
    packed, plain = load_packed(folder), load_model(folder)
    linear = [module for module in plain.modules() if type(module) is torch.nn.Linear]
    assert not [module for module in packed.modules() if type(module) is torch.nn.Linear]
    assert len(linear) == 3 * 7 + 1
    held = sum(parameter.numel() for parameter in packed.parameters())
    tied = plain.get_input_embeddings().weight
    assert held == sum(p.numel() for p in plain.parameters()) - sum(m.weight.numel() for m in linear if m.weight is not tied)
    assert type(load_packed(folder, "float16").lm_head) is torch.nn.Linear
