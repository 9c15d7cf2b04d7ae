"""LoRA adapters become full checkpoints: fp32 arithmetic by peft, one rounding to the base's dtype, content-addressed.

The materialised checkpoint is named by the digests of the base's shards and of the adapter's files, so the same pair is
made once and a changed adapter is another folder (mergekit keys its own cache by path).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechmerge.artifacts import Watch, atomic_folder, digest, lock, sha256_file
from mechmerge.errors import CheckpointError, MechmergeError, MissingError, PairError, machine_error
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.checkpoint import SIDE_FILES as SIDE_FILES
from mechmerge.models.checkpoint import Checkpoint, read_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter rather than a model."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def adapter_digests(adapter: Path) -> dict[str, str]:
    """sha256 of the adapter's config and weights.

    Raises:
        CheckpointError: not an adapter, a pickle, or broken weights.
    """
    if not (adapter / CONFIG).exists():
        raise CheckpointError(str(adapter), expected=f"a peft adapter with {CONFIG}", found="none")
    if not (adapter / WEIGHTS).exists():
        found = "the pickle adapter_model.bin" if (adapter / "adapter_model.bin").exists() else "none"
        raise CheckpointError(str(adapter), expected=WEIGHTS, found=found, fix="save the adapter as safetensors")
    _check_config(adapter, read_header(adapter / WEIGHTS))
    return {name: sha256_file(adapter / name) for name in (CONFIG, WEIGHTS)}


def _check_config(adapter: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    """The adapter's config says what its weights are: nothing is made by its word that they do not hold."""
    path = adapter / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), expected="valid JSON", found=str(error)) from None
    if not isinstance(config, dict):
        raise CheckpointError(str(path), expected="a JSON object", found=type(config).__name__)
    if config.get("peft_type", "LORA") != "LORA":
        return  # peft says whether it can merge it
    if config.get("layer_replication"):
        raise CheckpointError(
            str(path),
            expected="an adapter of the base's own layers",
            found="layer_replication",
            fix="merge it with its own tool",
        )
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    largest = max((max(entry["shape"], default=0) for name, entry in header.items() if "lora_" in name), default=0)
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= largest:
            raise CheckpointError(str(path), expected=f"a rank of 1 … {largest}, as its weights have", found=repr(rank))


def materialise(base: Path, base_digests: dict[str, str], adapter: Path) -> Path:
    """The folder of `base` with `adapter` merged into it (LoRA, rsLoRA and DoRA alike), made on first use.

    Raises:
        CheckpointError: the adapter cannot be read.
        PairError: the adapter is not for this base, or is of a kind that peft cannot merge.
    """
    own = adapter_digests(adapter)
    watches = [Checkpoint(base).watch(base_digests), Watch(adapter / name for name in own)]
    key = digest({"base": base_digests, "sides": side_digest(base), "adapter": own})[:32]
    folder = cache_folder() / "materialised" / key
    hold(folder)
    if folder.exists():
        return folder
    with lock(folder.with_suffix(".lock"), f"cache entry {folder.name}"):
        if not folder.exists():
            _merge(base, adapter, folder, watches)
    return folder


def _merge(base: Path, adapter: Path, folder: Path, watches: list[Watch]) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from mechmerge.models.load import load_model, quiet

    checkpoint = Checkpoint(base)
    try:
        with quiet():
            model = PeftModel.from_pretrained(load_model(base), adapter, torch_device="cpu")
            expected = {name for name in get_peft_model_state_dict(model) if "lora_" in name}
            given = set(read_header(adapter / WEIGHTS))
            missing = sorted(n for n in given - expected if "lora_" in n) + sorted(expected - given)
            if missing:
                raise PairError(str(adapter), expected=f"an adapter for {base.name}", found=f"other modules ({missing[0]})")
            merged = model.merge_and_unload(safe_merge=False)
    except MechmergeError:
        raise
    except Exception as error:
        # peft raises whatever its configuration makes it do; errors of the machine pass.
        if isinstance(machine_error(error), MissingError):
            raise
        raise PairError(str(adapter), expected=f"a peft adapter that merges into {base}", found=str(error)) from None
    state = merged.state_dict()
    with atomic_folder(folder) as partial:
        tensors = {}
        for name in sorted(checkpoint.entries):
            stored, loaded = checkpoint.tensor(name), checkpoint.arch.family.loaded_name(name)
            if loaded not in state or state[loaded].shape != stored.shape:
                raise PairError(str(adapter), expected=f"{name} of shape {tuple(stored.shape)}", found="none after merging")
            tensors[checkpoint.stored[name]] = state[loaded].to(stored.dtype).contiguous()
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=1, sort_keys=True) + "\n")
        copy_side_files(base, partial)
        for watch in watches:
            watch.check()


def side_digest(folder: Path) -> str:
    """One sha256 over a model folder's config and side files."""
    files = {file.name: sha256_file(file) for pattern in ("config.json", *SIDE_FILES) for file in folder.glob(pattern)}
    return digest(files)


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings from one model folder to another."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
