"""Carries out a recipe through mergekit 0.1.5's planner and executor (https://github.com/arcee-ai/mergekit), in process.

The YAML that is executed is the one that `recipe/emit.py` emits, for our method and for mergekit's own alike. What mergekit
cannot be trusted with is done here: tensor names come from the checkpoints (its tables ask for buffers that today's
GPT-NeoX checkpoints lack), tokenizer and generation settings are copied and compared, no card with local paths is
written, and the folder appears under its final name only when it has been verified.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from mechmerge.artifacts import atomic_folder, lock, to_yaml
from mechmerge.errors import InputError, PairError
from mechmerge.merge.reference import merged_tensor
from mechmerge.merge.verify import verify
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import quiet
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model, ModelId, find
from mechmerge.progress import SILENT, Progress, track
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.emit import emit_baseline, emit_masked
from mechmerge.recipe.schema import Masks, Recipe, read_recipe, write_recipe

RECIPE_NAME = "recipe.yaml"
SHARD_BYTES = 5_000_000_000
"""Largest shard that is written."""


def merge(
    recipe_file: Path,
    out: Path,
    models: Mapping[str, Path] | None = None,
    progress: Progress = SILENT,
    expert: str | None = None,
) -> None:
    """Merges: writes the model that a recipe describes to `out`, with the recipe and its masks beside the weights.

    Nothing is done where `out` already holds the model of this recipe.

    Args:
        recipe_file: `recipe.yaml`, its masks beside it.
        out: the new model folder; it appears complete or not at all.
        models: folders by `base`, expert name, model name or digest; others are found where they were last resolved.
        progress: told about tensors.
        expert: merge only this expert of the recipe: base + c ⊙ (expert − base), for use with other tools.

    Raises:
        InputError: the recipe does not fit the models, or `out` holds something else.
        PairError: a model cannot be merged with the base.
        MissingError: a model is not on this machine.
    """
    recipe, masks = read_recipe(recipe_file)
    if expert is not None:
        recipe, masks = restrict(recipe, masks, expert)
    if _done(recipe_file, recipe, masks, out, expert is not None):
        progress.note(f"{out} already holds the model of this recipe")
        return
    base, experts = open_models(recipe, models or {})
    found = None if recipe.mergekit is not None else coefficients(recipe, masks, base.arch)
    with lock(out.with_name(f".{out.name}.lock"), f"merged model {out}"):
        if _done(recipe_file, recipe, masks, out, expert is not None):  # by another process, meanwhile
            return
        with atomic_folder(out) as partial:
            watches = [checkpoint.watch() for checkpoint in (base, *experts.values())]
            if expert is not None:
                recipe = write_recipe(partial / RECIPE_NAME, recipe, masks)
            else:
                shutil.copyfile(recipe_file, partial / RECIPE_NAME)
                if recipe.masks is not None:
                    shutil.copyfile(recipe_file.with_name(recipe.masks.file), partial / recipe.masks.file)
            paths = {"base": base.folder} | {name: checkpoint.folder for name, checkpoint in experts.items()}
            text = emit_baseline(recipe, paths) if found is None else emit_masked(recipe, partial / RECIPE_NAME, paths)
            execute(text, base, list(experts.values()), partial, recipe.policy.seed, progress)
            _write_config(base, recipe.out_dtype, partial)
            copy_side_files(base.folder, partial)
            formula = None if found is None else lambda name: merged_tensor(name, base, experts, found)
            verify(partial, base, recipe.out_dtype, formula, progress)
            for watch in watches:
                watch.check()


def restrict(recipe: Recipe, masks: Masks, expert: str) -> tuple[Recipe, Masks]:
    """The recipe of one of its experts alone.

    Raises:
        InputError: no such expert, or a baseline, whose method looks at all experts together.
    """
    if expert not in recipe.experts:
        raise InputError(f"expert {expert!r}", expected=f"one of {', '.join(recipe.experts)}", found="none of them")
    if recipe.mergekit is not None:
        raise InputError(f"expert {expert!r}", expected="a recipe of coefficients", found=f"the baseline {recipe.policy.name}")
    own = {
        "experts": {expert: recipe.experts[expert]},
        "rules": tuple(rule for rule in recipe.rules if rule.expert == expert),
        "masks": None,
        "predicted": None,
        "realised": None,
    }
    return recipe.model_copy(update=own), {name: mask for name, mask in masks.items() if name.rpartition(".")[0] == expert}


def _done(recipe_file: Path, recipe: Recipe, masks: Masks, out: Path, restricted: bool) -> bool:
    """Whether `out` is the finished model of this recipe; something else there is an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = out / RECIPE_NAME
    if there.is_file() and (out / "config.json").is_file():
        if not restricted:
            same = there.read_bytes() == recipe_file.read_bytes()
        else:
            others, other_masks = read_recipe(there)
            same = to_yaml(others.model_copy(update={"masks": None})) == to_yaml(recipe) and (
                {n: m.tobytes() for n, m in other_masks.items()} == {n: m.tobytes() for n, m in masks.items()}
            )
        if same and (recipe.masks is None or (out / recipe.masks.file).is_file()):
            Checkpoint(out).check_complete()
            return True
    raise InputError(
        str(out), expected="a new folder, or the model of this very recipe", found="something else", fix="name another"
    )


def open_models(recipe: Recipe, models: Mapping[str, Path]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Finds, checks and, where the recipe says so, aligns the models."""
    known = {"base", recipe.base.name, recipe.base.digest}
    for name, entry in recipe.experts.items():
        known |= {name, entry.model.name, entry.model.digest}
    if unknown := models.keys() - known:
        expected = f"base, {', '.join(recipe.experts)} or the name of one of their models"
        raise InputError(f"model {sorted(unknown)[0]!r}", expected=expected, found="none of them")
    base = Model(id=recipe.base, path=_find(recipe.base, "base", models))
    opened = base.checkpoint()
    opened.check_complete()
    experts = {}
    for name, entry in recipe.experts.items():
        expert = align(base, Model(id=entry.model, path=_find(entry.model, name, models)), recipe.vocabulary)
        experts[name] = expert.checkpoint()
        experts[name].check_complete()
        if experts[name].folder == opened.folder:
            raise PairError(f"expert {name}", expected="another model than the base", found="the base itself")
        check_pair(opened, experts[name], positions=recipe.positions)
    return opened, experts


def _find(model: ModelId, name: str, models: Mapping[str, Path]) -> Path:
    given = next((models[key] for key in (name, model.name, model.digest) if key in models), None)
    return find(model, {} if given is None else {model.digest: given}).resolve()


def execute(text: str, base: Checkpoint, experts: list[Checkpoint], out: Path, seed: int | None, progress: Progress) -> None:
    """Runs mergekit YAML with mergekit's planner and executor; writes the shards into `out`.

    Args:
        text: the YAML; its models are local folders.
        base: the base, whose tensors are all written and no others.
        experts: the other models.
        out: folder for the shards.
        seed: of torch's generator, for methods that draw at random (tensors are drawn in the order of their names).
        progress: told about tensors.
    """
    with _quiet_mergekit():
        from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
        from mergekit.config import MergeConfiguration
        from mergekit.graph import Executor
        from mergekit.io.tasks import LoaderCache, SaveTensor
        from mergekit.merge import MergeOptions
        from mergekit.plan import MergePlanner

        import mechmerge.merge.method  # noqa: F401 - registers our method

        aliases = {
            name: tuple(sorted({c.stored[name] for c in (base, *experts)} - {name})) or None for name in sorted(base.entries)
        }

        class Tensors(ModuleArchitecture):  # type: ignore[misc]
            """All tensors of the checkpoint, none of them repeated by layer."""

            def pre_weights(self, config: Any) -> list[Any]:
                return [WeightInfo(name=name, aliases=names) for name, names in aliases.items()]

            def post_weights(self, config: Any) -> list[Any]:
                return []

            def layer_weights(self, index: int, config: Any) -> list[Any]:
                return []

            def num_layers(self, config: Any) -> int:
                return 0

        architecture = ModelArchitecture(
            modules={"default": ModuleDefinition(architecture=Tensors())}, architectures=[], model_type=""
        )
        configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
        options = MergeOptions(
            quiet=True, write_model_card=False, copy_tokenizer=False, out_shard_size=SHARD_BYTES, device="cpu"
        )
        # mergekit keeps loaders by path for the life of the process: a folder replaced meanwhile would be read as it was.
        LoaderCache.loaders.clear()
        try:
            LoaderCache().setup(options=options)
            config = configuration.base_model.config(trust_remote_code=False)
            targets = MergePlanner(configuration, architecture, options, config).plan_to_disk(out_path=str(out))
            count = sum(isinstance(target, SaveTensor) for target in targets)
            with torch.random.fork_rng(devices=[]):
                if seed is not None:
                    torch.manual_seed(seed)
                done = Executor(targets, math_device="cpu", storage_device="cpu").run(quiet=True)
                for _ in track((task for task, _ in done if isinstance(task, SaveTensor)), "merging", count, progress):
                    pass
        finally:
            LoaderCache.loaders.clear()


@contextlib.contextmanager
def _quiet_mergekit() -> Iterator[None]:
    """Keeps mergekit's log and the warnings of its imports off the terminal; its errors are exceptions all the same."""
    log = logging.getLogger("mergekit")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(before)


def _write_config(base: Checkpoint, out_dtype: str, folder: Path) -> None:
    """The base's config with the new dtype and without the local path that transformers leaves in it."""
    config = {key: value for key, value in base.config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = out_dtype
    target = folder / "config.json"
    target.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    # safetensors makes its files readable by their owner alone, whatever the umask says.
    for shard in folder.glob("*.safetensors"):
        shard.chmod(target.stat().st_mode)
