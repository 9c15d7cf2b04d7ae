"""Pickled checkpoints: refused, since a pickle can run any code, unless the user allows them.

Then they are read by torch's weights-only unpickler, which builds tensors and nothing else
(https://docs.pytorch.org/docs/stable/generated/torch.load.html), and written once as safetensors into the cache, named by the
digests of what they were made from. Adapters and optimizer states are not among them.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmerge.artifacts import Watch, atomic_folder, digest, lock, parse_json, read_text, sha256_file
from mechmerge.errors import CheckpointError, MissingError, machine_error
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.cache import cache_folder
from mechmerge.models.checkpoint import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

ALLOWED: ContextVar[bool] = ContextVar("allow_pickle", default=False)
"""Whether pickled checkpoints are converted (`mechmerge --allow-pickle …`) rather than refused."""
PICKLE, PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"


def converted(folder: Path) -> Path:
    """The folder itself, or its copy in safetensors where it holds a pickled checkpoint alone and such are allowed.

    Raises:
        CheckpointError: a pickle that is no plain mapping of names to tensors.
    """
    if not ALLOWED.get() or any((folder / name).exists() for name in (SINGLE, INDEX)):
        return folder
    files = [folder / name for name in _shards(folder)]
    if not files:
        return folder
    watch = Watch([*files, folder / "config.json"])
    key = digest({file.name: sha256_file(file) for file in (*files, folder / "config.json")})[:32]
    target = cache_folder() / "unpickled" / key
    if not target.exists():
        with lock(target.with_suffix(".lock"), f"cache entry {target.name}"):
            if not target.exists():
                _convert(folder, files, target, watch)
    return target


def _shards(folder: Path) -> list[str]:
    """Names of the pickles, in order; none where there are none (or no config, which is said elsewhere)."""
    if not (folder / "config.json").is_file():
        return []
    if (folder / PICKLE).is_file():
        return [PICKLE]
    path = folder / PICKLES
    if not path.is_file():
        return []
    index = parse_json(read_text(path), str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in names or [""]:
        if Path(name).name != name or not name.endswith(".bin") or not (folder / name).is_file():
            raise CheckpointError(str(path), expected="names of .bin files beside it", found=repr(name))
    return names


def _convert(folder: Path, files: list[Path], target: Path, watch: Watch) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    with atomic_folder(target) as partial:
        for number, file in enumerate(files, 1):
            name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            tensors = _tensors(file)
            if twice := sorted(weight_map.keys() & tensors.keys()):
                raise CheckpointError(str(file), expected="each tensor once", found=f"{twice[0]} again")
            # Tied tensors share their memory in a pickle, which safetensors refuses.
            save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, partial / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True))
        (partial / "config.json").write_bytes((folder / "config.json").read_bytes())
        copy_side_files(folder, partial)
        watch.check()


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        value: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(machine_error(error), MissingError):
            raise
        # torch's own message ends with advice to switch the protection off.
        found = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            str(file), expected="a pickle of tensors alone", found=f"{type(error).__name__}: {found}",
            fix="it is not read; find the model as safetensors",
        ) from None  # fmt: skip
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()):
        raise CheckpointError(str(file), expected="a mapping of names to tensors", found=type(value).__name__)
    return value
