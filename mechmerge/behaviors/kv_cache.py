"""Key-value caches that start from a shared prefix, grow in place, and let rows leave without moving those that stay.

transformers' `DynamicLayer` (transformers/cache_utils.py) concatenates the whole cache for every token and copies it for every
row that leaves: a quarter of the time of a small model's decoding. `RoomyLayer` holds the same numbers in a buffer of the final
length. Other kinds of layers, such as sliding windows, stay what they are.

    slots of a row:  [ shared prefix ][ padding ][ rest of its prompt ][ answer ... ]

The padding stands behind the prefix, which is right only where attention asks for positions and not for distances between
slots: `shareable` says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A `DynamicLayer` whose keys and values are views of a buffer with room for `room` slots a row."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.used = room, 0
        self._stores: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """Appends keys and values [rows, heads, new, width] and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = tuple(
                new.new_empty(new.shape[0], new.shape[1], self.room, new.shape[3]) for new in (key_states, value_states)
            )
        start, self.used = self.used, self.used + key_states.shape[-2]
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[: new.shape[0], :, start : self.used] = new
        return self._view(key_states.shape[0])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes row indices[i]. No row may be needed after it was overwritten: indices[i] >= i (see `closing_up`)."""
        for i, source in enumerate(indices.tolist()):
            if i != source:
                for store in self._stores:
                    store[i, :, : self.used] = store[source, :, : self.used]
        self._view(len(indices))

    def _view(self, rows: int) -> tuple[torch.Tensor, ...]:
        self.keys, self.values = (store[:rows, :, : self.used] for store in self._stores)
        return self.keys, self.values


def new_cache(config: Any, room: int) -> Any:
    """An empty cache of a model for at most `room` slots a row."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def closing_up(stay: Sequence[int]) -> list[int]:
    """Where the rows `stay` (ascending) come from once they close up: those that can keep their place do, others fill holes."""
    kept = set(stay)
    tail = iter(row for row in stay if row >= len(stay))
    return [row if row in kept else next(tail) for row in range(len(stay))]


# ------------------------------------------------------------------------------------------------------------------ prefix
def shareable(config: Any, length: int) -> bool:
    """Whether a model's cache may start from a prefix for texts of up to `length` slots.

    True where every layer attends to all slots: it is a plain `DynamicLayer`, or a sliding window that `length` does not
    exceed. A longer text would count the padding behind the prefix as distance; state-space layers have no slots at all.
    """
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and length <= layer.sliding_window)
        for layer in DynamicCache(config=config).layers
    )


def prefix_states(model: Any, ids: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, heads, tokens, width] of every layer for a text's first tokens."""
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([list(ids)], device=model.device)
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def begin(cache: Any, states: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
    """Fills an empty cache of `rows` rows with the states of a shared prefix."""
    for layer, pair in zip(cache.layers, states, strict=True):
        layer.update(*(part.expand(rows, -1, -1, -1) for part in pair))
