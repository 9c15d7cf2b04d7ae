"""Positions as a config.json tells them: RoPE, context and sliding windows, in one form for every spelling.

transformers has renamed and nested these settings over the years (`rope_theta`, `rope_scaling`, `rotary_pct`,
`rope_parameters`), and fills in what a file leaves out. Two models can be merged only where they mean the same by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Positions:
    """How one `model_type` tells positions: names of its keys, and what transformers takes where config.json is silent."""

    context: int
    theta: float | None = 10000.0
    """Base of the rotary frequencies; None without RoPE."""
    theta_key: str = "rope_theta"
    local_theta: float | None = None
    """That of layers with a sliding window, where they have a RoPE of their own."""
    rotary: float | None = 1.0
    """Part of a head that is rotated."""
    rotary_key: str = "partial_rotary_factor"
    original: int | None = None
    """Context before RoPE was stretched; None: the context itself."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names of RoPE types."""
    window: int | None = None
    switch: str | None = None
    """The key without which a window counts for nothing."""
    slides: Callable[[Mapping[str, Any], int], bool] | None = None
    """Whether a layer has the window where `layer_types` is not given; None: all have it, whatever `layer_types` says."""


def _after_max_window_layers(config: Mapping[str, Any], layer: int) -> bool:
    return layer >= _size(config, "max_window_layers", 28, least=0)


def _every_second(_: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0


def _all_but_each_sixth(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % _size(config, "sliding_window_pattern", 6) != 0


POSITIONS: Mapping[str, Positions] = {
    "llama": Positions(2048),
    "mistral": Positions(131072, window=4096),
    "qwen2": Positions(32768, window=4096, switch="use_sliding_window", slides=_after_max_window_layers),
    "qwen3": Positions(32768, window=4096, switch="use_sliding_window", slides=_after_max_window_layers),
    "gemma2": Positions(8192, window=4096, slides=_every_second),
    "gemma3_text": Positions(131072, theta=1e6, local_theta=1e4, window=4096, slides=_all_but_each_sixth),
    "olmo2": Positions(2048),
    "phi3": Positions(4096, original=4096, renamed={"su": "longrope", "yarn": "longrope"}),
    "gpt2": Positions(1024, theta=None, rotary=None),
    "gpt_neox": Positions(2048, theta_key="rotary_emb_base", rotary=0.25, rotary_key="rotary_pct"),
}
"""By `model_type`; tests hold the rows against the config classes of transformers."""
LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""The kinds of layers, as `layer_types` and a nested `rope_parameters` name them."""
STRETCHED = ("llama3", "yarn", "longrope")
"""RoPE types that need the context before they were stretched."""
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
MOST_LAYERS = 10_000
"""Layers looked at: a config may say a billion of them."""


def positions_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The positional settings of a config that parents must share, the same for every spelling that transformers reads alike.

    Returns:
        `rope_theta`, `partial_rotary_factor` and `rope_scaling` (None: not stretched), by kind of layer where kinds differ;
        `context` and `sliding_window` in tokens; `sliding_layers`, those that have the window, or `all`.
    """
    row = POSITIONS.get(str(config.get("model_type")), Positions(2048))
    context = _given(config, "max_position_embeddings", _given(config, "n_positions", row.context))
    ropes = [(kind, _rope(rope, config, row, context, kind)) for kind, rope in _ropes(config, row).items()]
    settings: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        first = ropes[0][1][key]
        same = all(rope[key] == first for _, rope in ropes)
        settings[key] = first if same else {kind: rope[key] for kind, rope in ropes}
    window, layers = _window(config, row)
    return settings | {"context": context, "sliding_window": window, "sliding_layers": layers}


def _ropes(config: Mapping[str, Any], row: Positions) -> dict[str | None, Mapping[str, Any]]:
    """RoPE settings as they stand, by kind of layer (None: all layers)."""
    scaling, parameters = (_mapping(config.get(key)) for key in ("rope_scaling", "rope_parameters"))
    if row.local_theta is not None:
        whole = _mapping(parameters.get(GLOBAL)) or {"rope_type": "default"}
        return {GLOBAL: {**whole, **scaling}, LOCAL: _mapping(parameters.get(LOCAL))}
    rope = scaling or parameters
    nested: dict[str | None, Mapping[str, Any]] = {kind: _mapping(rope[kind]) for kind in (GLOBAL, LOCAL) if kind in rope}
    return nested or {None: rope}


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any], row: Positions, context: Any, kind: str | None) -> dict[str, Any]:
    local = kind == LOCAL and row.local_theta is not None
    theta = _given(config, "rope_local_base_freq", row.local_theta) if local else _given(config, row.theta_key, row.theta)
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    name = row.renamed.get(name, name)
    known = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    scaling = {k: v for k, v in rope.items() if k not in known and v is not None and v != ROPE_DEFAULTS.get(k)}
    if name in STRETCHED:
        before = _given(config, "original_max_position_embeddings", row.original) if kind is None else None
        scaling["original_max_position_embeddings"] = (
            _given(rope, "original_max_position_embeddings", context) if before is None else before
        )
    return {
        "rope_theta": _given(rope, "rope_theta", theta),
        "partial_rotary_factor": _given(rope, "partial_rotary_factor", _given(config, row.rotary_key, row.rotary)),
        "rope_scaling": None if name == "default" else {"rope_type": name, **scaling},
    }


def _window(config: Mapping[str, Any], row: Positions) -> tuple[Any, Any]:
    """Tokens of the sliding window and the layers that have it; twice None where none has."""
    window = config.get("sliding_window", row.window)
    if window is None or (row.switch is not None and not config.get(row.switch)):
        return None, None
    if row.slides is None:
        return window, "all"
    if isinstance(kinds := config.get("layer_types"), list):
        layers = [layer for layer, kind in enumerate(kinds) if kind == LOCAL]
    else:
        count = min(_size(config, "num_hidden_layers", MOST_LAYERS), MOST_LAYERS)
        layers = [layer for layer in range(count) if row.slides(config, layer)]
    return (window, layers) if layers else (None, None)


def _given(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    value = settings.get(key)
    return default if value is None else value


def _mapping(value: Any) -> Mapping[str, Any]:
    """RoPE settings, whatever stands in their place: what is no mapping is a type that nobody knows."""
    return value if isinstance(value, Mapping) else {"rope_type": value} if value else {}


def _size(config: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value >= least else default
