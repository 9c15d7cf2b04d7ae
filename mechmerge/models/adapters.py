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

from mechmerge.artifacts import Watch, atomic_folder, digest, make_once, sha256_file
from mechmerge.errors import CheckpointError, MechmergeError, MissingError, PairError, machine_error
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.checkpoint import Checkpoint, read_header, side_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MERGED_AS = 2
"""Goes up when a pair may come out differently: what older versions left in the cache is not taken then."""
UNTIE = "merge it into a base whose head is a tensor of its own (tie_word_embeddings: false)"


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
    key = digest({"how": MERGED_AS, "base": base_digests, "sides": side_digest(base), "adapter": own})[:32]
    folder = cache_folder() / "materialised" / key
    hold(folder)
    make_once(folder, f"cache entry {folder.name}", lambda: _merge(base, adapter, folder, watches))
    return folder


def _merge(base: Path, adapter: Path, folder: Path, watches: list[Watch]) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from mechmerge.models.load import load_model, quiet

    checkpoint = Checkpoint(base)
    try:
        with quiet():
            model = PeftModel.from_pretrained(load_model(base), adapter, torch_device="cpu")
            # peft passes over what it has no place for, and leaves at its first values what the file lacks.
            expected, given = get_peft_model_state_dict(model, save_embedding_layers=False), read_header(adapter / WEIGHTS)
            if unplaced := sorted(given.keys() - expected.keys() - model.state_dict().keys()):
                raise PairError(str(adapter), expected=f"an adapter for {base.name}", found=f"other modules ({unplaced[0]})")
            lacking = sorted(expected.keys() - given.keys())
            # Biases (`bias: all`) that it lacks are the base's.
            if lacking := [name for name in lacking if "lora_" in name or not name.endswith(".bias")]:
                raise PairError(str(adapter), expected=f"{lacking[0]} for {base.name}", found="no such tensor in the adapter")
            _check_tied(model.get_base_model(), checkpoint, adapter)
            merged = model.merge_and_unload(safe_merge=False)
    except MechmergeError:
        raise
    except Exception as error:
        # peft raises whatever its configuration makes it do; errors of the machine pass.
        if isinstance(machine_error(error), MissingError):
            raise
        raise PairError(str(adapter), expected=f"a peft adapter that merges into {base}", found=str(error)) from None
    state = merged.state_dict()
    if checkpoint.arch.tied and not torch.equal(*(state[f"{module}.weight"] for module in _ends(checkpoint))):
        raise PairError(
            str(adapter), expected="one matrix for the head and the embeddings, as the base has", found="two", fix=UNTIE
        )
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


def _ends(checkpoint: Checkpoint) -> tuple[str, str]:
    """The modules of embeddings and head, as transformers names them."""
    family = checkpoint.arch.family
    return family.embed[0], family.loaded_head


def _check_tied(model: Any, checkpoint: Checkpoint, adapter: Path) -> None:
    """Where head and embeddings are one matrix, merging what is added to one of them would change the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not checkpoint.arch.tied:
        return
    for module in _ends(checkpoint):
        if isinstance(model.get_submodule(module), BaseTunerLayer):
            raise PairError(
                str(adapter), expected="head and embeddings left as they are, since the base has one matrix for both",
                found=f"something that is added to {module} alone", fix=UNTIE,
            )  # fmt: skip


def side_digest(folder: Path) -> str:
    """One sha256 over a model folder's config and side files."""
    names = [name for name in ("config.json", *side_files(folder)) if (folder / name).is_file()]
    return digest({name: sha256_file(folder / name) for name in names})


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings from one model folder to another."""
    for name in side_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
