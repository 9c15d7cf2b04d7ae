"""The weight files of a merged model: the base's own layout where its bytes can stay, else a new one.

The base's layout (shards, order, headers) is kept where every stored tensor has its full name, is used, and has the output
dtype. Otherwise - another dtype, a stored copy of a tied head, buffers of old checkpoints, names without their prefix - files
are laid out anew, tensors in the order of their names.
Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise

from mechmerge.merge.cuts import matrix_shape
from mechmerge.merge.mapped import DTYPES
from mechmerge.models.checkpoint import INDEX, SINGLE, Checkpoint

SHARD_BYTES = 5_000_000_000
"""Largest shard that is laid out anew, in bytes of tensors (a larger tensor has a shard of its own)."""
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""safetensors' names of the output dtypes."""


@dataclass(frozen=True)
class OutFile:
    """One weight file to be written."""

    name: str
    header: bytes | None
    """What stands before the tensors; None: the base's file of this name, byte for byte."""
    tensors: tuple[tuple[str, int], ...]
    """(full name, first byte in the file), in the order of the file; they follow one another without a gap."""


def lay_out(base: Checkpoint, out_dtype: str, shard_bytes: int | None = None) -> tuple[list[OutFile], str | None]:
    """The weight files of a model like `base`.

    Args:
        base: the base.
        out_dtype: `float32`, `bfloat16` or `float16`.
        shard_bytes: `SHARD_BYTES` by default; the base's layout ignores it.

    Returns:
        The files, and the text of the index, None where there is a single file.
    """
    kept = _kept(base, CODES[out_dtype])
    if kept is None:
        return _anew(base, out_dtype, SHARD_BYTES if shard_bytes is None else shard_bytes)
    single = [file.name for file in kept] == [SINGLE]
    return kept, None if single else (base.folder / INDEX).read_text("utf-8")


def _kept(base: Checkpoint, code: str) -> list[OutFile] | None:
    """The base's own layout, or None where it cannot stay."""
    if base.files.keys() != base.entries.keys() or any(full != stored for full, stored in base.stored.items()):
        return None
    found = []
    for file in sorted(set(base.files.values())):
        names = sorted((name for name in base.entries if base.files[name] == file), key=lambda n: base.entries[n]["start"])
        entries = [base.entries[name] for name in names]
        size = (base.folder / file).stat().st_size
        ends = [entry["start"] + entry["bytes"] for entry in entries]
        if any(entry["dtype"] != code for entry in entries) or not ends or ends[-1] != size:
            return None
        if any(end != entry["start"] for end, entry in zip(ends[:-1], entries[1:], strict=True)):
            return None  # a gap or an overlap, which safetensors itself refuses
        found.append(OutFile(file, None, tuple((name, base.entries[name]["start"]) for name in names)))
    return found


def _anew(base: Checkpoint, out_dtype: str, shard_bytes: int) -> tuple[list[OutFile], str | None]:
    code = CODES[out_dtype]
    sizes = {}
    for name in sorted(base.entries):
        rows, columns = matrix_shape(base.entries[name]["shape"])
        sizes[name] = rows * columns * DTYPES[code].itemsize
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    files: list[OutFile] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        starts = [0]
        for name in names:
            starts.append(starts[-1] + sizes[name])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (start, end) in zip(names, pairwise(starts), strict=True):
            header[name] = {"dtype": code, "shape": list(base.entries[name]["shape"]), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        whole = len(text).to_bytes(8, "little") + text
        files.append(OutFile(file, whole, tuple((n, len(whole) + s) for n, s in zip(names, starts, strict=False))))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) == 1:
        return files, None
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return files, json.dumps(index, indent=2, sort_keys=True) + "\n"
