"""Caches that grow in place hold what transformers' own hold, and rows that leave leave no trace."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, MambaConfig
from transformers.cache_utils import DynamicLayer

from mechmerge.behaviors.kv_cache import RoomyLayer, closing_up, new_cache, shareable
from tests.tiny import tiny_model


@given(st.sets(st.integers(0, 12)))
def test_rows_close_up(stay):
    order = closing_up(sorted(stay))
    assert sorted(order) == sorted(stay)
    assert all(source >= row for row, source in enumerate(order)), "no row is needed after it was overwritten"
    assert all(order[row] == row for row in stay if row < len(stay)), "who can keep its place does"


def test_a_roomy_layer_holds_what_a_dynamic_layer_does():
    generator = torch.Generator().manual_seed(0)
    roomy, plain = RoomyLayer(room=9), DynamicLayer()
    rows = 5
    for new, stay in ((4, [0, 2, 3, 4]), (1, [1, 3]), (3, [0, 1]), (1, [1])):
        states = [torch.randn(rows, 2, new, 3, generator=generator) for _ in range(2)]
        found, expected = roomy.update(*states), plain.update(*states)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
        order = torch.tensor(closing_up(stay))
        roomy.batch_select_indices(order)
        plain.batch_select_indices(order)
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        rows = len(stay)
    assert roomy.keys.shape[-2] == 9


def config_of(folder, family, **changes):
    path = tiny_model(folder, family) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("gpt2", None), ("gemma2", 16), ("gemma3_text", 16)])
def test_a_prefix_is_shared_where_every_layer_sees_every_slot(family, window, tmp_path):
    changes = {} if window is None else {"sliding_window": window}
    config = config_of(tmp_path, family, **changes)
    assert shareable(config, 16)
    assert shareable(config, 17) == (window is None)
    layers = new_cache(config, 20).layers
    assert all(type(layer) is RoomyLayer for layer in layers if not layer.is_sliding)
    assert any(layer.is_sliding for layer in layers) == (window is not None)


def test_state_spaces_share_nothing():
    assert not shareable(MambaConfig(num_hidden_layers=2, hidden_size=8), 8)
