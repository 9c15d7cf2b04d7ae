"""A recipe as a LoRA adapter of its base, for peft (https://github.com/huggingface/peft) and for all that reads its files.

What the recipe adds to a linear layer, Σ c ⊙ (expert − base), becomes the product of two thin matrices (merge/lowrank.py):
exactly where it is at most R rows or columns (neurons, heads), else the nearest of rank R with its error stated. Scales are 1.
LoRA (https://arxiv.org/abs/2106.09685) has no word for the rest, so it is carried whole, as its merged values: norms and
embeddings that change by `modules_to_save`, biases by `bias: all`; an untied head is a linear layer like any other.

OUT/adapter_config.json  adapter_model.safetensors     the adapter, float32
OUT/mechmerge/recipe.yaml [masks]                      what it was made from
OUT/export.json                                        rank and error of every tensor, and what is carried whole
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mechmerge.artifacts import Document, atomic_folder, drop_lock, is_new, lock, read_document, sha256_file, write_json
from mechmerge.errors import InputError, MechmergeError
from mechmerge.merge.arithmetic import one_thread
from mechmerge.merge.delta import summed_delta
from mechmerge.merge.engine import keep_recipe, lock_of, open_models, restrict
from mechmerge.merge.lowrank import How, factorise
from mechmerge.models.adapters import CONFIG, WEIGHTS, adapter_digests
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import quiet
from mechmerge.models.references import ModelId
from mechmerge.progress import SILENT, Progress, track
from mechmerge.recipe.coefficients import Owners, coefficients, owners_of
from mechmerge.recipe.schema import KEPT, Masks, Recipe, read_recipe
from mechmerge.versions import versions

EXPORT_NAME = "export.json"
PREFIX = "base_model.model."
"""What peft puts before a module's name."""


class ExportedTensor(Document):
    """How one tensor's change is carried."""

    name: str
    """The base's name of it."""
    shape: tuple[int, ...]
    how: How | Literal["whole"]
    """`rows` or `columns`: LoRA, exact; `svd`: LoRA, truncated; `whole`: the merged values themselves."""
    rank: int | None = None
    """Rank of the factors; None where it is carried whole."""
    norm: float = Field(ge=0)
    """Frobenius norm of the change."""
    error: float = Field(ge=0)
    """Frobenius norm of what the adapter misses of the change, relative to `norm`: 0 … 1."""


class Export(Document):
    """`export.json`: an adapter and what it leaves out."""

    schema_version: Literal[1] = 1
    recipe: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the recipe that is kept with it."""
    source: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the recipe that it was made from; another one where only one expert was taken."""
    base: ModelId
    experts: dict[str, ModelId]
    rank: int = Field(ge=1)
    """The largest rank that was allowed."""
    tensors: tuple[ExportedTensor, ...]
    """Every tensor that changes; all others are the base's."""
    error: float = Field(ge=0)
    """The same over all tensors together: 0 where every tensor is exact."""
    parameters: int
    """Numbers in the adapter."""
    adapter: dict[str, str]
    """sha256 of the adapter's files."""
    versions: dict[str, str]

    @property
    def whole(self) -> tuple[str, ...]:
        """Tensors that are carried whole."""
        return tuple(tensor.name for tensor in self.tensors if tensor.how == "whole")


@dataclass
class _Adapter:
    """An adapter as it is put together."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """By peft's names."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of every linear module."""
    modules: list[str] = field(default_factory=list)
    """Modules that are saved whole."""
    told: list[ExportedTensor] = field(default_factory=list)


def export_lora(
    recipe_file: Path,
    out: Path,
    rank: int,
    models: Mapping[str, Path] | None = None,
    progress: Progress = SILENT,
    expert: str | None = None,
) -> Export:
    """Writes a recipe as a LoRA adapter of its base to `out`; nothing is done where `out` already holds it.

    Args:
        recipe_file: `recipe.yaml`, its masks beside it.
        out: the adapter's folder; it appears complete or not at all.
        rank: the largest rank of a module.
        models: folders by `base`, expert name, model name or digest; others are found where they were last resolved.
        progress: told about tensors.
        expert: this expert of the recipe alone.

    Raises:
        InputError: the recipe is a baseline or changes no linear layer, it does not fit the models, or `out` holds
            something else.
        PairError: a model cannot be merged with the base.
        MissingError: a model is not on this machine.
    """
    recipe, masks = read_recipe(recipe_file)
    source = sha256_file(recipe_file)
    if recipe.mergekit is not None:
        raise InputError(
            f"recipe {recipe_file}", expected="a recipe of coefficients", found=f"the baseline {recipe.policy.name}",
            fix="merge it: what its method adds is known to mergekit alone",
        )  # fmt: skip
    if expert is not None:
        recipe, masks = restrict(recipe, masks, expert)
    if (there := _done(out, source, tuple(recipe.experts), rank)) is not None:
        drop_lock(lock_of(out))
        progress.note(f"{out} already holds this adapter")
        return there
    base, experts = open_models(recipe, models or {})
    with lock(lock_of(out), f"adapter {out}"):
        if (there := _done(out, source, tuple(recipe.experts), rank)) is not None:  # by another process, meanwhile
            return there
        watches = [checkpoint.watch() for checkpoint in (base, *experts.values())]
        adapter = _put_together(recipe, masks, base, experts, rank, progress)
        if not adapter.ranks:
            raise InputError(
                f"recipe {recipe_file}", expected="a change of at least one linear layer", found="none",
                fix="a LoRA adapter needs one; merge the recipe instead",
            )  # fmt: skip
        with atomic_folder(out) as partial:
            export = _written(adapter, recipe_file, source, recipe, masks, base, rank, partial, restricted=expert is not None)
            for watch in watches:
                watch.check()
    return export


def _written(
    adapter: _Adapter,
    recipe_file: Path,
    source: str,
    recipe: Recipe,
    masks: Masks,
    base: Checkpoint,
    rank: int,
    partial: Path,
    *,
    restricted: bool,
) -> Export:
    """Writes everything into the folder, checks it, and returns its record."""
    recipe = keep_recipe(recipe_file, recipe, masks, partial, restricted=restricted)
    _write(adapter, _config(adapter, recipe, base), partial)
    check_adapter(partial, base)
    export = Export(
        recipe=sha256_file(partial / KEPT),
        source=source,
        base=recipe.base,
        experts={name: entry.model for name, entry in recipe.experts.items()},
        rank=rank,
        tensors=tuple(adapter.told),
        error=_together(adapter.told),
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        adapter=adapter_digests(partial),
        versions=versions(),
    )
    write_json(partial / EXPORT_NAME, export)
    return export


def _done(out: Path, source: str, experts: tuple[str, ...], rank: int) -> Export | None:
    """What `out` holds, if it is the finished adapter of this recipe; something else there is an error."""
    if is_new(out):
        return None
    if (out / EXPORT_NAME).is_file():
        export = read_document(Export, out / EXPORT_NAME)
        same = (export.source, tuple(export.experts), export.rank) == (source, experts, rank)
        kept = out / KEPT
        if same and export.adapter == adapter_digests(out) and kept.is_file() and export.recipe == sha256_file(kept):
            return export
    raise InputError(
        str(out), expected="a new folder, or the adapter of this very recipe", found="something else", fix="name another"
    )


@one_thread()
def _put_together(
    recipe: Recipe, masks: Masks, base: Checkpoint, experts: Mapping[str, Checkpoint], rank: int, progress: Progress
) -> _Adapter:
    found, owners = coefficients(recipe, masks, base.arch), owners_of(base.layout)
    adapter = _Adapter()
    for name in track(sorted(base.entries), "factorising", len(base.entries), progress):
        own = base.tensor(name).float()
        delta = summed_delta(name, own, {e: c.tensor(name).float() for e, c in experts.items()}, owners[name], found)
        norm = float(torch.linalg.norm(delta.double()))
        if not math.isfinite(norm):
            raise InputError(f"recipe: {name}", expected="finite weights", found="NaN or infinite ones")
        if norm == 0:
            continue
        shape = tuple(delta.shape)
        module, _, part = base.arch.family.loaded_name(name).rpartition(".")
        if not is_linear(name, owners[name], base):
            adapter.tensors[f"{PREFIX}{module}.{part}"] = own.add_(delta)
            adapter.modules += [module] if part == "weight" else []
            adapter.told.append(ExportedTensor(name=name, shape=shape, how="whole", norm=norm, error=0.0))
            continue
        factors = factorise(delta.T if _is_transposed(name, base) else delta, rank)
        adapter.tensors[f"{PREFIX}{module}.lora_A.weight"] = factors.a
        adapter.tensors[f"{PREFIX}{module}.lora_B.weight"] = factors.b
        adapter.ranks[module] = factors.rank
        error = factors.residual / norm
        adapter.told.append(ExportedTensor(name=name, shape=shape, how=factors.how, rank=factors.rank, norm=norm, error=error))
    _complete(adapter, base)
    return adapter


def _complete(adapter: _Adapter, base: Checkpoint) -> None:
    """Gives the parts that do not change to modules that are saved whole, a copy of the embeddings to a tied head, and peft's
    names to biases of linear layers.
    """
    family = base.arch.family
    if base.arch.tied and family.embed[0] in adapter.modules:
        # peft ties them again (`ensure_weight_tying`), but asks for both.
        adapter.tensors[f"{PREFIX}{family.loaded_head}.weight"] = adapter.tensors[f"{PREFIX}{family.embed[0]}.weight"].clone()
    for module in adapter.modules:
        if (name := f"{PREFIX}{module}.bias") not in adapter.tensors and f"{module}.bias" in base.entries:
            adapter.tensors[name] = base.tensor(f"{module}.bias").float()
    for name in [name for name in adapter.tensors if name.endswith(".bias")]:
        module = name.removeprefix(PREFIX).removesuffix(".bias")
        if module in adapter.ranks:
            adapter.tensors[f"{PREFIX}{module}.base_layer.bias"] = adapter.tensors.pop(name)


def is_linear(name: str, owners: Owners, base: Checkpoint) -> bool:
    """Whether a tensor is the weight of a linear layer: a matrix that is cut by components, or the head's."""
    whole = all(block.dim is None for _, _, block in owners)
    return name.endswith(".weight") and len(base.shapes[name]) == 2 and (not whole or owners[0][1] == "lm_head")


def _is_transposed(name: str, base: Checkpoint) -> bool:
    """Whether it is a Conv1D's, [in, out]; the head is none."""
    return base.arch.family.transposed and name.startswith(base.arch.family.layers + ".")


def _together(told: list[ExportedTensor]) -> float:
    missed, whole = math.hypot(*(t.error * t.norm for t in told)), math.hypot(*(t.norm for t in told))
    return missed / whole


def _config(adapter: _Adapter, recipe: Recipe, base: Checkpoint) -> dict[str, Any]:
    """adapter_config.json. Every module has the rank that it needs, and alpha = rank, so that scales are 1."""
    from peft import LoraConfig, TaskType

    largest = max(adapter.ranks.values())
    patterns = {module: r for module, r in adapter.ranks.items() if r != largest}
    tied = base.arch.tied and base.arch.family.embed[0] in adapter.modules
    changed = {t.name.rpartition(".")[0] for t in adapter.told if t.how == "whole" and t.name.endswith(".bias")}
    with quiet():
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=recipe.base.name,
            revision=recipe.base.revision,
            inference_mode=True,
            r=largest,
            lora_alpha=largest,
            lora_dropout=0.0,
            target_modules=sorted(adapter.ranks),
            rank_pattern=dict(patterns),
            alpha_pattern=dict(patterns),
            fan_in_fan_out=base.arch.family.transposed,
            bias="all" if changed - set(adapter.modules) else "none",
            modules_to_save=sorted(adapter.modules) or None,
            ensure_weight_tying=tied,
        )
    told: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    # peft keeps some lists as sets, whose order changes from process to process.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in told.items()}


def _write(adapter: _Adapter, config: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: adapter.tensors[name].contiguous() for name in sorted(adapter.tensors)}, folder / WEIGHTS, {"format": "pt"}
    )
    target = folder / CONFIG
    target.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", "utf-8")
    # safetensors makes its files readable by their owner alone, whatever the umask says.
    (folder / WEIGHTS).chmod(target.stat().st_mode)


def check_adapter(folder: Path, base: Checkpoint) -> None:
    """Builds base and adapter without memory for their weights: every tensor has its place there, of its shape, and no place
    is empty.

    Raises:
        MechmergeError: naming what is not right. It is never the user's fault.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from mechmerge.models.checkpoint import read_header

    given = {name: entry["shape"] for name, entry in read_header(folder / WEIGHTS).items()}
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        places = {
            n: tuple(t.shape) for n, t in get_peft_model(model, LoraConfig.from_pretrained(str(folder))).state_dict().items()
        }
    wanted = dict(_places(places, LoraConfig.from_pretrained(str(folder)).bias == "all"))
    for name, shape in given.items():
        if wanted.pop(name, shape if places.get(name) == shape else None) != shape:
            raise MechmergeError(f"adapter {folder}: {name}", expected="a place of its shape", found=str(places.get(name)))
    empty = sorted(name for name in wanted if not name.endswith(".bias"))  # those that stay are the base's
    if empty:
        raise MechmergeError(f"adapter {folder}: {empty[0]}", expected="a tensor", found="none")


def _places(places: Mapping[str, tuple[int, ...]], biases: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where peft wants tensors, by the names that they have in the file."""
    for name, shape in places.items():
        if ".lora_" in name:
            yield name.replace(".default", ""), shape
        elif ".modules_to_save.default." in name:
            yield name.replace(".modules_to_save.default.", "."), shape
        elif biases and name.endswith(".bias") and ".original_module." not in name:
            yield name, shape
