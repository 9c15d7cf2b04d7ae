"""Verification of a written model: every tensor is accounted for, and nothing is believed (mergekit logs some failures and goes
on).

It reads the written weights and the parents'. Every element is held against a recipe of coefficients (the values of mergekit's
own methods are known to mergekit alone: they are finite, and that is all): what no expert touches is the base's,
what one expert alone gives is that expert's where the direct writer wrote it, everything else is what the formula gives; to the
bit where the direct writer wrote it, which is stronger than equal digests. Which coefficient belongs to which row or column is
read once more, element by element and component after component, by the formula's plain twin (merge/reference.py), which is
slow: in the first and the last layer and the final norm.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mechmerge.errors import CheckpointError, MechmergeError
from mechmerge.merge.arithmetic import BITS, Index, along, as_run, is_finite, take
from mechmerge.merge.cuts import BASE, Cut, copied_from, cut_of
from mechmerge.merge.mapped import Mapped
from mechmerge.merge.reference import direct_tensor, merged_tensor
from mechmerge.models.checkpoint import Checkpoint, side_files
from mechmerge.models.load import empty_model, quiet, torch_dtype
from mechmerge.models.pair import token_ids, vocabulary_file
from mechmerge.models.positions import positions_of
from mechmerge.progress import SILENT, Progress, track
from mechmerge.recipe.coefficients import Coefficients

STEP = 1 << 22
"""Elements that are looked at at a time."""


class Accounted(NamedTuple):
    """What verification found: tensors that are the base's, value for value (as the output dtype holds it), and others."""

    equal: int
    changed: int


def verify(
    folder: Path,
    base: Checkpoint,
    out_dtype: str,
    experts: Mapping[str, Checkpoint] | None = None,
    found: Coefficients | None = None,
    *,
    direct: bool = False,
    progress: Progress = SILENT,
) -> Accounted:
    """Checks a merged model against its base and its recipe.

    Every tensor of the base is there with its shape, in the output dtype and finite, and no other; the tied head is not a
    second tensor; what no expert enters is the base's, and everything else what the formula gives; tokenizer, chat template
    and generation settings are the base's, byte for byte, and every token has a row; positions (RoPE, context) are the
    base's; transformers builds the model, finds all its parameters, and generates.

    Args:
        folder: the written model.
        base: the base that it must look like.
        out_dtype: `float32`, `bfloat16` or `float16`.
        experts: in the recipe's order.
        found: the recipe's coefficients (None for a baseline of mergekit's own).
        direct: whether the direct writer wrote it, which copies where mergekit computes.
        progress: told about tensors.

    Raises:
        MechmergeError: naming what is not right. It is never the user's fault, but for a coefficient that is too large.
        CheckpointError: a parent's weights are not finite, or its tokenizer has tokens without a row.
    """
    merged = Checkpoint(folder)
    merged.check_complete()
    if merged.shapes != base.shapes:
        odd = sorted(set(merged.shapes.items()) ^ set(base.shapes.items()))
        raise MechmergeError(
            f"merged model {folder}", expected="the base's tensors and shapes", found=f"a difference in {odd[0][0]}"
        )
    given, sample, equal = dict(experts or {}), _sample(base), 0
    with Mapped(merged) as ours, Mapped(base) as one:
        others = {name: Mapped(expert) for name, expert in given.items()}
        for name in track(sorted(merged.entries), "verifying the merged model", len(merged.entries), progress):
            where = f"merged model {folder}: {name}"
            if ours.dtype(name) != torch_dtype(out_dtype):
                raise MechmergeError(where, expected=out_dtype, found=str(ours.dtype(name)))
            _check_finite(name, ours, [one, *others.values()], where)
            if found is not None:
                _account(name, ours, one, others, found, direct, where)
            equal += all(torch.equal(a, b) for a, b in _steps(ours.matrix(name), one.matrix(name)))
            if found is not None and name in sample:
                expected = (
                    direct_tensor(name, base, given, found, torch_dtype(out_dtype))
                    if direct
                    else merged_tensor(name, base, given, found).to(torch_dtype(out_dtype))
                )
                if not torch.equal(merged.tensor(name), expected):
                    raise MechmergeError(where, expected="what the recipe's formula gives", found="other values")
        for other in others.values():
            other.__exit__(None, None, None)
    _check_sides(merged, base)
    check_loads(merged)
    check_generates(merged)
    return Accounted(equal, len(merged.entries) - equal)


def _steps(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of some matrices, a few at a time, in the first one's dtype."""
    rows, columns = tensors[0].shape
    step, dtype = max(1, STEP // max(columns, 1)), tensors[0].dtype
    for first in range(0, rows, step):
        yield tuple(_as(tensor[first : first + step], dtype) for tensor in tensors)


def _as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in a dtype, through float32, as everything is rounded."""
    return values if values.dtype == dtype else values.float().to(dtype)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = BITS[one.dtype]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def _check_finite(name: str, ours: Mapped, parents: list[Mapped], where: str) -> None:
    if is_finite(ours.matrix(name)):
        return
    for parent in parents:
        if not is_finite(parent.matrix(name)):
            raise CheckpointError(
                f"{parent.checkpoint.folder}: {name}", expected="finite weights", found="NaN or infinite values"
            )
    raise MechmergeError(
        where, expected="finite weights", found="NaN or infinite ones", fix="a coefficient may be too large for the dtype"
    )


def _account(
    name: str, ours: Mapped, one: Mapped, others: Mapping[str, Mapped], found: Coefficients, direct: bool, where: str
) -> None:
    """Holds every element of a tensor against the recipe."""
    base = one.checkpoint
    cut = cut_of(name, base.shapes[name], base.layout.owners()[name], found, list(others))
    mine, start, parents = ours.matrix(name), one.matrix(name), [expert.matrix(name) for expert in others.values()]
    who, same = copied_from(cut.values), _same_bits if direct else torch.equal
    if not direct:  # mergekit copies nothing; of what no expert enters it may change the sign of a zero
        who = np.where(who == BASE, BASE, BASE - 1)
    step = max(1, STEP // max(cut.columns if cut.dim == 0 else cut.rows, 1))
    for k in np.unique(who):
        index = np.flatnonzero(who == k)
        for first in range(0, index.size, step):
            part = as_run(index[first : first + step])
            if k >= BASE:
                whose = "the base's" if k == BASE else f"expert {list(others)[k]}'s"
                expected = take(start if k == BASE else parents[k], part, cut.dim)
            else:
                whose, expected = "", _formula(start, parents, cut, part, direct)
            if not same(take(mine, part, cut.dim), _as(expected, mine.dtype)):
                what = f"{whose} values where the recipe takes them" if whose else "what the recipe's formula gives"
                raise MechmergeError(where, expected=what, found="other values")


def _formula(start: torch.Tensor, parents: Sequence[torch.Tensor], cut: Cut, part: Index, direct: bool) -> torch.Tensor:
    """base + Σ c × (expert − base) of some rows or columns in float32; the direct writer leaves out experts whose c is 0."""
    base = take(start, part, cut.dim).float()
    terms = []
    for values, parent in zip(cut.values, parents, strict=True):
        share = along(values[part], cut.dim)
        term = share * (take(parent, part, cut.dim).float() - base)
        # −0.0 is what can be added without changing a bit: not even +0.0 is.
        terms.append(torch.where(share != 0, term, -0.0) if direct else term)
    return base + functools.reduce(torch.add, terms)


def _sample(base: Checkpoint) -> set[str]:
    layout = base.layout
    layers = {0, base.arch.layers - 1}
    return {
        block.tensor
        for layer, kind in layout.leaves()
        if layer in layers or kind == "final_norm"
        for block in layout.blocks(layer, kind)
    }


def _check_sides(merged: Checkpoint, base: Checkpoint) -> None:
    folder = merged.folder
    for name in side_files(base.folder):
        copy = folder / name
        if not copy.is_file() or copy.read_bytes() != (base.folder / name).read_bytes():
            raise MechmergeError(f"merged model {folder}", expected=f"the base's {name}", found="none or another")
    mine, theirs = positions_of(merged.config), positions_of(base.config)
    if mine != theirs:
        key = next(k for k in theirs if mine[k] != theirs[k])
        raise MechmergeError(f"merged model {folder}", expected=f"{key} = {theirs[key]}", found=str(mine[key]))
    tokens = token_ids(folder)
    last = max(tokens.values(), default=0) if tokens else 0
    if last >= merged.arch.vocabulary:
        told = vocabulary_file(base.folder)
        raise CheckpointError(
            f"{base.folder}: {told.name if told else 'vocabulary'}",
            expected=f"ids below the {merged.arch.vocabulary} rows",
            found=str(last),
        )


def check_loads(merged: Checkpoint) -> None:
    """Builds the model without memory for its weights, and compares its parameters with what was written."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(merged.folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    written = {merged.arch.family.loaded_name(name): shape for name, shape in merged.shapes.items()}
    if merged.arch.tied:
        # Whether the head still counts as a parameter of its own differs between transformers' versions.
        wanted.pop(f"{merged.arch.family.loaded_head}.weight", None)
    if wanted != written:
        odd = sorted(set(wanted.items()) ^ set(written.items()))
        raise MechmergeError(
            f"merged model {merged.folder}",
            expected="the parameters that transformers builds",
            found=f"a difference in {odd[0][0]}",
        )
    if json.loads((merged.folder / "config.json").read_text("utf-8")).get("model_type") != config.model_type:
        raise MechmergeError(f"merged model {merged.folder}", expected="its config to load", found=str(config.model_type))


def check_generates(merged: Checkpoint, tokens: int = 2) -> None:
    """Lets transformers generate a few tokens from the written weights, mapped: they take no memory of their own.

    Greedily, whatever the base's generation settings are: those are copied, and may ask for what is not at hand here (a
    tokenizer, another cache, several answers).

    Raises:
        MechmergeError: it does not, or the scores are not finite.
    """
    from transformers import GenerationConfig

    model = empty_model(merged.folder, str(merged.config["dtype"]))
    model.generation_config = GenerationConfig()
    family = merged.arch.family
    with Mapped(merged) as weights, torch.no_grad():
        for name in merged.entries:
            module, _, own = name.rpartition(".")
            holder = model.get_submodule(module if hasattr(model, module.split(".")[0]) else family.loaded_head)
            values = weights.matrix(name).reshape(merged.shapes[name])
            getattr(holder, own).data = values
        prompt = torch.tensor([[min(1, merged.arch.vocabulary - 1)] * 2])
        with quiet():
            scores = model(prompt).logits
            answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                    min_new_tokens=tokens, max_new_tokens=tokens)  # fmt: skip
    if not bool(torch.isfinite(scores).all()) or answer.shape != (1, 2 + tokens):
        raise MechmergeError(
            f"merged model {merged.folder}", expected=f"{tokens} generated tokens from finite scores", found="others"
        )
