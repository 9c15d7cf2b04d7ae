"""Lazy reading of a safetensors checkpoint folder, and everything that can be wrong with one.

Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmerge.artifacts import Watch
from mechmerge.errors import CheckpointError, machine_error
from mechmerge.models.components import Block, Layout
from mechmerge.models.digests import file_digest
from mechmerge.models.families import Architecture, architecture
from mechmerge.models.positions import positions_of

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 100_000_000
"""Largest header that safetensors itself accepts, in bytes."""
FLOATS = {"F64", "F32", "F16", "BF16"}
UNQUANTISED = "name the unquantised model that it was made from: packed weights cannot be patched or added to"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*",
              "additional_chat_templates/*", "generation_config.json")  # fmt: skip
"""Files beside the weights that make a model folder usable."""
_WATCHED: dict[Path, tuple[dict[str, str], Watch]] = {}
"""Folder → digests of its shards, and a watch on its files that began when they were taken."""


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, checked against the file's size (no tensor is read).

    Returns:
        By tensor: `dtype`, `shape`, `data_offsets` as stored, `start` (its first byte's place in the file) and `bytes`.

    Raises:
        CheckpointError: a Git-LFS pointer, a truncated file, or no safetensors file at all.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
            if start.startswith(b"version "):
                raise CheckpointError(
                    where, expected="a safetensors file", found="a Git-LFS pointer", fix="run `git lfs pull` in that folder"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(where, expected="a safetensors file", found=f"{size} bytes without a valid header")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((_whole(entry["data_offsets"][1]) for entry in header.values()), default=0)
        for entry in header.values():
            entry["dtype"], entry["shape"] = str(entry["dtype"]), tuple(_whole(n) for n in entry["shape"])
            entry["start"] = 8 + length + _whole(entry["data_offsets"][0])
            entry["bytes"] = _whole(entry["data_offsets"][1]) - _whole(entry["data_offsets"][0])
    except OSError as error:
        raise CheckpointError(where, expected="a readable file", found=str(error)) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(where, expected="a safetensors file", found="a header that is not valid") from None
    if size != end:
        problem = "truncated" if size < end else "too long"
        raise CheckpointError(where, expected=f"{end} bytes", found=f"{size} ({problem})", fix="download it again")
    return dict(header)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


class Checkpoint:
    """A model folder: config, tensor names, shapes and dtypes at once; tensors on demand.

    Args:
        folder: a folder with `config.json` and `model.safetensors`, or shards with their index.

    Raises:
        CheckpointError: anything is missing, broken, quantised or pickled.
        PairError: the architecture is not in the table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._read_json("config.json")
        if method := quantised(self.config, folder):
            raise CheckpointError(
                str(folder), expected="full-precision weights", found=f"quantised ones ({method})", fix=UNQUANTISED
            )
        self.arch: Architecture = architecture(self.config, str(folder / "config.json"))
        self.files: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        for name in self._shards():
            for tensor, entry in read_header(folder / name).items():
                if tensor in self.files:
                    raise CheckpointError(str(folder / name), expected="each tensor once", found=f"{tensor} again")
                self.files[tensor], self.entries[tensor] = name, entry
        self._check_index()
        for tensor, entry in self.entries.items():
            if entry["dtype"] not in FLOATS:
                raise CheckpointError(
                    f"{folder}: {tensor}",
                    expected="floating-point weights",
                    found=entry["dtype"],
                    fix=UNQUANTISED,
                )
        self._normalise_names()
        self._drop_tied_head()

    # ------------------------------------------------------------------------------------------------------------ opening
    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not self.folder.is_dir():
            raise CheckpointError(str(self.folder), expected="a model folder", found="nothing there")
        try:
            value = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(str(self.folder), expected=f"a model folder with {name}", found="none") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(str(path), expected="valid JSON", found=str(error)) from None
        if not isinstance(value, dict):
            raise CheckpointError(str(path), expected="a JSON object", found=type(value).__name__)
        return value

    def _shards(self) -> list[str]:
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if (self.folder / INDEX).exists():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(str(self.folder / INDEX), expected="a weight_map", found=repr(weight_map)[:60])
            names = sorted({str(name) for name in weight_map.values()})
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        str(self.folder / INDEX), expected="names of safetensors files beside it", found=repr(name)
                    )
                if not (self.folder / name).exists():
                    raise CheckpointError(str(self.folder), expected=f"the shard {name}", found="none", fix="download it again")
            return names
        gguf = sorted(path.name for path in self.folder.glob("*.gguf"))
        if gguf:
            raise CheckpointError(
                str(self.folder), expected=SINGLE, found=f"the quantised file {gguf[0]} (GGUF)", fix=UNQUANTISED
            )
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                str(self.folder),
                expected=SINGLE,
                found=f"the pickle {pickles[0]}",
                fix="pickles can run code and are refused; convert the model to safetensors, or use `mechmerge --allow-pickle`",
            )
        raise CheckpointError(str(self.folder), expected=f"{SINGLE} or {INDEX}", found="neither")

    def _check_index(self) -> None:
        if (self.folder / SINGLE).exists():
            return
        weight_map: dict[str, Any] = self._read_json(INDEX)["weight_map"]
        for tensor, name in weight_map.items():
            if self.files.get(tensor) != name:
                raise CheckpointError(
                    str(self.folder / INDEX), expected=f"{tensor} in {name}", found=str(self.files.get(tensor))
                )
        for tensor in self.files:
            if tensor not in weight_map:
                raise CheckpointError(str(self.folder / INDEX), expected=f"an entry for {tensor}", found="none")

    def _normalise_names(self) -> None:
        """Adds the base-model prefix where a checkpoint lacks it (GPT-2's own: `wte.weight`), and drops mask buffers."""
        prefix = self.arch.family.layers.split(".")[0] + "."
        self.stored: dict[str, str] = {}
        known = (prefix, self.arch.family.head + ".")
        for name in list(self.entries):
            if name.endswith(
                (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
            ):
                del self.entries[name]
                continue
            full = name if name.startswith(known) else prefix + name
            self.stored[full] = name
            self.entries[full] = self.entries.pop(name)

    def _drop_tied_head(self) -> None:
        head = f"{self.arch.family.head}.weight"
        if self.arch.tied and head in self.entries:
            import torch

            embed = f"{self.arch.family.embed[0]}.weight"
            if embed in self.entries and not torch.equal(self.tensor(head), self.tensor(embed)):
                raise CheckpointError(
                    f"{self.folder}: {head}", expected="the embeddings' values (tie_word_embeddings is true)", found="others"
                )
            del self.entries[head]

    # ------------------------------------------------------------------------------------------------------------ reading
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its full name."""
        return {name: entry["shape"] for name, entry in self.entries.items()}

    @functools.cached_property
    def layout(self) -> Layout:
        """Components of this checkpoint."""
        return Layout(self.arch, frozenset(self.entries))

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in its stored dtype."""
        from safetensors import SafetensorError, safe_open

        stored = self.stored[name]
        path = self.folder / self.files[stored]
        try:
            with safe_open(path, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(stored)
        except FileNotFoundError:
            raise CheckpointError(str(path), expected="the file that was there when this began", found="nothing") from None
        except SafetensorError as error:
            if machine_error(error) is not None:
                raise
            raise CheckpointError(f"{path}: {stored}", expected="a tensor that can be read", found=str(error)) from None
        return tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in the order of their names, one at a time."""
        for name in sorted(self.entries):
            yield name, self.tensor(name)

    def digests(self) -> dict[str, str]:
        """sha256 of every shard, by file name."""
        names = sorted(set(self.files.values()))
        watch = _watch(self.folder, names)
        found = {name: file_digest(self.folder / name) for name in names}
        _WATCHED[self.folder] = (found, watch)
        return found

    def watch(self, digests: Mapping[str, str] | None = None) -> Watch:
        """The watch on the model's files that began when its digests were last taken in this process (else it begins now).

        Args:
            digests: what they must have been; where they were others the watch begins now.
        """
        known, watch = _WATCHED.get(self.folder, ({}, None))
        if watch is None or (digests is not None and digests != known):
            return _watch(self.folder, set(self.files.values()))
        return watch

    def check_complete(self) -> None:
        """Every parameter is owned by a component, and every module the family needs is there with the config's sizes.

        Raises:
            CheckpointError: a tensor that no component owns, one that is missing, or one of another size.
        """
        # Before anything is listed by layer: a config may say a billion of them.
        if self.arch.layers > len(self.entries):
            raise CheckpointError(
                f"{self.folder}: config.json", expected=f"no more layers than tensors ({len(self.entries)})",
                found=str(self.arch.layers),
            )  # fmt: skip
        owners = self.layout.owners()
        for name in sorted(self.entries):
            if name not in owners:
                raise CheckpointError(
                    f"{self.folder}: {name}", expected="only tensors of this architecture", found="an extra one"
                )
            self._check_size(name, [block for _, _, block in owners[name]])
        for name in sorted(required_tensors(self.arch)):
            if name not in self.entries:
                raise CheckpointError(f"{self.folder}: {name}", expected="a tensor of this name", found="none")

    def _check_size(self, name: str, blocks: list[Block]) -> None:
        """A cut tensor has a row or column for every unit, and the residual stream's width across; embeddings have all
        tokens.
        """
        shape, arch = self.entries[name]["shape"], self.arch
        cut = next((block.dim for block in blocks if block.dim is not None), None)
        if cut is not None:
            expected = {cut: sum(block.units * block.width for block in blocks)}
            if len(shape) > 1:
                expected[1 - cut] = arch.hidden
        elif name in (f"{arch.family.embed[0]}.weight", f"{arch.family.head}.weight"):
            expected = {0: arch.vocabulary, 1: arch.hidden}
        elif name in (f"{module}.weight" for module in arch.family.embed[1:]):
            expected = {0: positions_of(self.config)["context"], 1: arch.hidden}
        else:
            return
        if len(shape) != len(expected) or any(shape[dim] != size for dim, size in expected.items()):
            wanted = [expected[dim] for dim in sorted(expected)]
            raise CheckpointError(f"{self.folder}: {name}", expected=f"{wanted} as config.json says", found=str(list(shape)))

    def check_finite(self) -> None:
        """No weight is NaN or infinite (reads every tensor once).

        Raises:
            CheckpointError: naming the first tensor with such a value.
        """
        import torch

        for name, tensor in self.tensors():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{self.folder}: {name}", expected="finite weights", found="NaN or infinite values")


def quantised(config: Mapping[str, Any], folder: Path) -> str | None:
    """How a model is quantised: by its config, or the file that AutoGPTQ or AutoAWQ writes beside it; None where it is not."""
    own = config.get("quantization_config") or config.get("compression_config")
    if own:
        found = own if isinstance(own, Mapping) else {"quant_method": own}
        four = "bitsandbytes, 4 bits" if found.get("load_in_4bit") else None
        eight = "bitsandbytes, 8 bits" if found.get("load_in_8bit") else None
        return str(found.get("quant_method") or four or eight or "by an unnamed method")
    beside = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
    return next((method for name, method in beside.items() if (folder / name).is_file()), None)


def is_side_file(name: str) -> bool:
    """Whether a path inside a model folder is that of a file of `SIDE_FILES`."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)


def side_files(folder: Path) -> list[str]:
    """The files of a model folder that are of `SIDE_FILES`, as paths inside it; folders of such a name are none."""
    found = {file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _watch(folder: Path, shards: Iterable[str]) -> Watch:
    sides = [name for name in ("config.json", INDEX) if (folder / name).is_file()]
    return Watch(folder / name for name in (*shards, *sides, *side_files(folder)))


def required_tensors(arch: Architecture) -> Iterator[str]:
    """Weights without which a model of this architecture is not whole."""
    family = arch.family
    attention = (family.fused_qkv,) if family.fused_qkv else (family.query, family.key, family.value)
    gate_up = (family.fused_gate_up,) if family.fused_gate_up else (family.gate, family.up)
    for layer in range(arch.layers):
        for module in (*attention, family.output, *gate_up, family.down, *family.norms, *family.attention_rest):
            if module is not None:
                yield f"{family.layers}.{layer}.{module}.weight"
    for module in (*family.embed, family.final_norm, *(() if arch.tied else (family.head,))):
        yield f"{module}.weight"
