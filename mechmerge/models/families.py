"""The table of architecture families: one row a family, no branch anywhere else.

A row says which modules of a decoder layer hold queries, keys, values, outputs and the MLP, how fused projections are laid
out, and where embeddings, final norm and head are. Module names are those of transformers' checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mechmerge.errors import PairError


@dataclass(frozen=True)
class Family:
    """How one architecture family names and lays out its parameters."""

    name: str
    """Name in messages."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    layers: str = "model.layers"
    """Prefix of the list of decoder layers."""
    embed: tuple[str, ...] = ("model.embed_tokens",)
    """Token embeddings first, then positions."""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    loaded_head: str = "lm_head"
    """Name of the head in a loaded transformers model, which renames GPT-NeoX's."""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused_qkv: str | None = None
    """The module that holds queries, keys and values together, if they are fused."""
    qkv_layout: Literal["concat", "interleaved"] = "concat"
    """`concat`: all queries, all keys, all values; `interleaved`: query, key and value of each head in turn."""
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused_gate_up: str | None = None
    """The module that holds gate rows, then up rows, if they are fused."""
    transposed: bool = False
    """True for GPT-2's Conv1D, whose weights are [in, out]."""
    attention_rest: tuple[str, ...] = ()
    """Modules of the attention that no head and no KV group owns."""
    joint_heads: bool = False
    """True where a norm spans the queries (or keys) of all heads, so that a head's weights change what other heads compute."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied_by_default: bool = False
    """What transformers assumes where config.json does not say whether the head is tied."""
    config_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names of config.json for layers, hidden size, heads and MLP width."""

    def loaded_name(self, name: str) -> str:
        """The name that a checkpoint's tensor has in a loaded transformers model."""
        return self.loaded_head + name[len(self.head) :] if name.split(".")[0] == self.head else name


FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("llama", "mistral", "qwen2")),
    Family("Qwen3", ("qwen3",), attention_rest=("self_attn.q_norm", "self_attn.k_norm")),
    Family(
        "Gemma 2",
        ("gemma2",),
        tied_by_default=True,
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        "Gemma 3",
        ("gemma3_text",),
        tied_by_default=True,
        attention_rest=("self_attn.q_norm", "self_attn.k_norm"),
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        "OLMo 2",
        ("olmo2",),
        joint_heads=True,
        attention_rest=("self_attn.q_norm", "self_attn.k_norm"),
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    Family("Phi-3", ("phi3",), fused_qkv="self_attn.qkv_proj", fused_gate_up="mlp.gate_up_proj"),
    Family(
        "GPT-2",
        ("gpt2",),
        layers="transformer.h",
        embed=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        output="attn.c_proj",
        fused_qkv="attn.c_attn",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
        tied_by_default=True,
        norms=("ln_1", "ln_2"),
        config_keys={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
        },
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        layers="gpt_neox.layers",
        embed=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        output="attention.dense",
        fused_qkv="attention.query_key_value",
        qkv_layout="interleaved",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
)


@dataclass(frozen=True)
class Architecture:
    """A family with the sizes of one model."""

    family: Family
    layers: int
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads a layer."""
    kv_groups: int
    """Key/value groups a layer (= heads without grouped-query attention)."""
    head_dim: int
    neurons: int
    """MLP neurons a layer."""
    vocabulary: int
    """Rows of the token embedding."""
    tied: bool
    """Whether the language head is the token embedding."""

    def units(self, kind: str) -> int:
        """Number of components of a kind in one layer."""
        return {"head": self.heads, "kv": self.kv_groups, "neuron": self.neurons}.get(kind, 1)


def family_of(model_type: str, where: str) -> Family:
    """The family of a `model_type`, or `PairError` with the list of those known."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise PairError(
        where, expected=f"a model_type of {known}", found=repr(model_type), fix="this architecture is not supported"
    )


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the sizes that components need from a parsed config.json.

    Raises:
        PairError: the family is not in the table, or a size is missing.
    """
    family = family_of(str(config.get("model_type")), where)

    def size(key: str, default: int | None = None) -> int:
        value = config.get(family.config_keys.get(key, key), config.get(key))
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise PairError(where, expected=f"a positive integer {key!r} in config.json", found=repr(value))
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return Architecture(
        family=family,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_groups=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        neurons=size("intermediate_size", 4 * hidden),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
    )
