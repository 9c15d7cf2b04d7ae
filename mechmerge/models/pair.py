"""Whether two checkpoints can be compared and merged, and the one adjustment that is offered: extra vocabulary rows.

Rule for vocabularies (`align`): rows are matched by token string; the base's rows keep their places, an expert's row for the
same token is used, tokens that only the expert has are dropped, and tokens that only the base has keep the base's row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mechmerge.artifacts import atomic_folder, digest, make_once
from mechmerge.errors import CheckpointError, PairError
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.positions import positions_of
from mechmerge.models.references import Model, ModelId, unchanged

VocabularyRule = Literal["same", "base"]
"""`same`: other vocabularies are refused; `base`: aligned to the base's by token string."""
PositionRule = Literal["same", "base"]
"""`same`: other RoPE or context settings are refused; `base`: allowed, and the base's config is kept."""
ALIGNED_VERSION = 2
"""Raised when aligned copies are written otherwise, so that those in the cache are not used."""


ALIGN = (
    "use --vocabulary base in measuring and compiling (`vocabulary: base` in pipelines and recipes) to align the rows by token"
)
KEEP = "use --positions base in measuring and compiling (`positions: base` in pipelines and recipes) to keep the base's config"


def check_pair(base: Checkpoint, expert: Checkpoint, *, positions: PositionRule = "same", finite: bool = True) -> None:
    """Both have the same architecture, tensors, shapes, vocabulary and positions, and finite weights.

    Raises:
        PairError: naming the first difference.
        CheckpointError: a NaN or infinite weight.
    """
    where = f"{expert.folder} against {base.folder}"
    if base.arch.family.name != expert.arch.family.name or base.config.get("model_type") != expert.config.get("model_type"):
        raise PairError(
            where, expected=f"the architecture {base.config.get('model_type')}", found=str(expert.config.get("model_type"))
        )
    if base.arch.layers != expert.arch.layers:
        raise PairError(where, expected=f"{base.arch.layers} layers", found=str(expert.arch.layers))
    if base.arch.vocabulary != expert.arch.vocabulary:
        raise PairError(
            where,
            expected=f"a vocabulary of {base.arch.vocabulary}",
            found=str(expert.arch.vocabulary),
            fix=ALIGN,
        )
    for field in ("heads", "kv_groups", "head_dim", "neurons", "tied"):
        if getattr(base.arch, field) != getattr(expert.arch, field):
            raise PairError(where, expected=f"{field} = {getattr(base.arch, field)}", found=str(getattr(expert.arch, field)))
    shapes, others = base.shapes, expert.shapes
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            described = [f"{name} {list(s)}" if s is not None else f"no {name}" for s in (shapes.get(name), others.get(name))]
            raise PairError(where, expected=described[0], found=described[1])
    _check_tokens(base.folder, expert.folder, where)
    mine, theirs = positions_of(base.config), positions_of(expert.config)
    if positions == "same" and mine != theirs:
        key = next(k for k in mine if mine[k] != theirs[k])
        raise PairError(where, expected=f"{key} = {mine[key]}", found=str(theirs[key]), fix=KEEP)
    if finite:
        base.check_finite()
        expert.check_finite()


def vocabulary_file(folder: Path) -> Path | None:
    """Where `token_ids` finds a model's tokens; None where it has no such file."""
    return next((path for name in ("tokenizer.json", "vocab.json") if (path := folder / name).exists()), None)


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token string → id (added tokens included) from tokenizer.json, or else from vocab.json and the added tokens beside it;
    None where there is neither (SentencePiece's `tokenizer.model` alone is not read).
    """
    path = vocabulary_file(folder)
    if path is None:
        return None
    if path.name == "tokenizer.json":
        return _numbers(path, _of_tokenizers)
    ids = _numbers(path, dict)
    # As transformers reads them: where the settings tell of added tokens, the older file of them is not looked at.
    for name, read in (("tokenizer_config.json", _of_settings), ("added_tokens.json", dict)):
        if (folder / name).exists() and (added := _numbers(folder / name, read)):
            return ids | added
    return ids


def _numbers(path: Path, read: Callable[[Any], dict[str, int]]) -> dict[str, int]:
    """The numbers of tokens that `read` finds in a JSON file.

    Raises:
        CheckpointError: the file is not what it should be.
    """
    try:
        ids = read(json.loads(path.read_text("utf-8")))
        if odd := [token for token, number in ids.items() if not isinstance(token, str) or type(number) is not int]:
            raise ValueError(f"{odd[0]!r} has no number")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(str(path), expected="a tokenizers file with a vocabulary", found=repr(error)) from None
    return ids


def _of_tokenizers(parsed: Any) -> dict[str, int]:
    vocabulary = parsed["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in parsed.get("added_tokens", [])}


def _of_settings(parsed: Any) -> dict[str, int]:
    return {token["content"]: int(number) for number, token in (parsed.get("added_tokens_decoder") or {}).items()}


def _check_tokens(base: Path, expert: Path, where: str) -> None:
    mine, theirs = token_ids(base), token_ids(expert)
    if mine is None or theirs is None or mine == theirs:
        return
    token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=str)
    raise PairError(
        where,
        expected=f"token {token!r} at {mine.get(token, 'no row')}",
        found=str(theirs.get(token, "no row")),
        fix=ALIGN,
    )


def align(base: Model, expert: Model, rule: VocabularyRule) -> Model:
    """The expert with its vocabulary rows in the base's order (a new folder in the cache), or as it is where that is right.

    Raises:
        PairError: rows are to be aligned and a model has no vocabulary that can be read, so tokens cannot be matched,
            whatever the sizes.
    """
    if rule == "same":
        return expert
    mine, theirs = token_ids(base.path), token_ids(expert.path)
    if mine is None or theirs is None:
        raise PairError(
            str(base.path if mine is None else expert.path),
            expected="tokenizer.json or vocab.json in both models to align their rows",
            found="none",
            fix="save the model's tokenizer there, or use --vocabulary same if row by row both have the same tokens",
        )
    one, other = base.checkpoint(), expert.checkpoint()
    if one.arch.vocabulary == other.arch.vocabulary and mine == theirs:
        return expert
    parts = {"base": base.id.shards, "sides": base.sides, "expert": expert.id.shards, "own": expert.sides}
    key = digest(parts | {"version": ALIGNED_VERSION})[:32]
    folder = cache_folder() / "aligned" / key
    hold(folder)
    rows, check = {mine[t]: theirs[t] for t in mine.keys() & theirs.keys()}, unchanged(base, expert)
    make_once(folder, f"cache entry {folder.name}", lambda: _write_aligned(one, other, rows, folder, check))
    return Model(id=ModelId(name=expert.id.name, revision=expert.id.revision, shards=Checkpoint(folder).digests()), path=folder)


def _write_aligned(base: Checkpoint, expert: Checkpoint, rows: dict[int, int], folder: Path, check: Callable[[], None]) -> None:
    import torch
    from safetensors.torch import save_file

    family = base.arch.family
    by_token = {f"{family.embed[0]}.weight", f"{family.head}.weight", f"{family.head}.bias"}
    pairs = [(b, e) for b, e in sorted(rows.items()) if b < base.arch.vocabulary and e < expert.arch.vocabulary]
    to, source = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    tensors = {}
    for name, tensor in expert.tensors():
        if name in by_token and name in base.entries:
            kept = base.tensor(name)
            # In the wider dtype: a base row rounded to the expert's would come out as a change.
            mine = kept.to(torch.promote_types(kept.dtype, tensor.dtype), copy=True)
            mine[to] = tensor[source].to(mine.dtype)
            tensor = mine
        tensors[expert.stored[name]] = tensor
    config = dict(expert.config) | {"vocab_size": base.arch.vocabulary}
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        copy_side_files(base.folder, partial)
        check()
