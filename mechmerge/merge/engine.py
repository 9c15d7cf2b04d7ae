"""Carries out a recipe: by the direct writer where it is a sum of masked deltas, by mergekit where it is one of its methods.

What neither is trusted with is done here: tokenizer and generation settings are copied and compared, no card with local paths
is written, and the folder appears under its final name only when it has been verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from mechmerge.artifacts import atomic_folder, drop_lock, is_new, lock, to_yaml
from mechmerge.errors import CheckpointError, InputError, MechmergeError, PairError
from mechmerge.merge.arithmetic import one_thread
from mechmerge.merge.verify import verify
from mechmerge.merge.writer import write_weights
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import delta_norms
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model, ModelId, find
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.coefficients import Coefficients, coefficients
from mechmerge.recipe.emit import emit_baseline, emit_masked
from mechmerge.recipe.schema import KEPT, Array, Masks, Recipe, read_recipe, write_recipe

Engine = Literal["auto", "direct", "mergekit"]
"""`direct`: our writer, for recipes of coefficients; `mergekit`: its executor, for any; `auto`: direct where possible."""


def merge(
    recipe_file: Path,
    out: Path,
    models: Mapping[str, Path] | None = None,
    progress: Progress = SILENT,
    expert: str | None = None,
    *,
    engine: Engine = "auto",
    check: bool = True,
) -> None:
    """Merges: writes the model that a recipe describes to `out`, with the recipe and its masks in the folder `mechmerge` there.

    Nothing is written where `out` already holds the model of this recipe; it is verified there.

    Args:
        recipe_file: `recipe.yaml`, its masks beside it.
        out: the new model folder; it appears complete or not at all.
        models: folders by `base`, expert name, model name or digest; others are found where they were last resolved.
        progress: told about what is written and verified.
        expert: merge only this expert of the recipe: base + c ⊙ (expert − base), for use with other tools.
        engine: who computes.
        check: whether the written model is verified (`merge/verify.py`) before it appears, and one that is there already.

    Raises:
        InputError: the recipe does not fit the models or the engine, or `out` holds something else.
        PairError: a model cannot be merged with the base.
        MissingError: a model, or mergekit, is not on this machine.
        MechmergeError: the written model is not what the recipe says.
    """
    recipe, masks = read_recipe(recipe_file)
    if expert is not None:
        recipe, masks = restrict(recipe, masks, expert)
    direct = _is_direct(recipe, engine)
    there = _done(recipe_file, recipe, masks, out, expert is not None)
    if there and not check:
        drop_lock(lock_of(out))
        progress.note(f"{out} already holds the model of this recipe; it is not verified")
        return
    # The direct writer looks at what it computes, and verification at everything; mergekit looks at nothing.
    base, experts = open_models(recipe, models or {}, finite=not (direct or there))
    found = None if recipe.mergekit is not None else coefficients(recipe, masks, base.arch)
    with lock(lock_of(out), f"merged model {out}"):
        if there or _done(recipe_file, recipe, masks, out, expert is not None):  # by another process, meanwhile
            if check:
                engines = (True, False) if engine == "auto" and direct else (direct,)
                _verify_again(out, base, recipe.out_dtype, experts, found, engines, progress)
            return
        with atomic_folder(out) as partial:
            watches = [checkpoint.watch() for checkpoint in (base, *experts.values())]
            recipe = keep_recipe(recipe_file, recipe, masks, partial, restricted=expert is not None)
            if direct and found is not None:
                write_weights(base, experts, found, recipe.out_dtype, partial, progress)
            else:
                _through_mergekit(recipe, base, experts, partial, progress)
            _write_config(base, recipe.out_dtype, partial)
            copy_side_files(base.folder, partial)
            if check:
                equal, changed = verify(partial, base, recipe.out_dtype, experts, found, direct=direct, progress=progress)
                progress.note(f"{_looked_at(found)}: {changed} tensors changed, {equal} are the base's")
            for watch in watches:
                watch.check()


def _verify_again(
    out: Path,
    base: Checkpoint,
    out_dtype: str,
    experts: Mapping[str, Checkpoint],
    found: Coefficients | None,
    engines: Sequence[bool],
    progress: Progress,
) -> None:
    """Verifies a model that was there before, as one that the direct writer wrote, or mergekit did (`engines`)."""
    failure: MechmergeError | None = None
    for direct in engines:
        try:
            equal, changed = verify(out, base, out_dtype, experts, found, direct=direct, progress=progress)
        except CheckpointError:
            raise  # of a parent, or of files that cannot be read: it names them
        except MechmergeError as error:
            failure = failure or error
        else:
            told = f"{changed} tensors changed, {equal} the base's"
            progress.note(f"{out} already holds the model of this recipe: {_looked_at(found)}, {told}")
            return
    raise InputError(
        str(out), expected="the model of this very recipe", found=f"another one: {failure}", fix="remove it, or name another"
    )


def _looked_at(found: Coefficients | None) -> str:
    """What was done to a model: mergekit's own methods are not computed anew."""
    return "verified" if found is not None else "checked, its values not computed anew"


def lock_of(out: Path) -> Path:
    """The lock of what is made at `out`."""
    return out.with_name(f".{out.name}.lock")


def _is_direct(recipe: Recipe, engine: Engine) -> bool:
    if engine == "direct" and recipe.mergekit is not None:
        raise InputError(
            "engine direct",
            expected="a recipe of coefficients",
            found=f"the baseline {recipe.policy.name}",
            fix="use --engine mergekit",
        )
    return engine != "mergekit" and recipe.mergekit is None


def _through_mergekit(
    recipe: Recipe,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    partial: Path,
    progress: Progress,
) -> None:
    from mechmerge.merge.executor import execute

    paths = paths_for_mergekit(base, experts)
    plain = recipe.mergekit is not None and not recipe.mergekit.within
    text = emit_baseline(recipe, paths) if plain else emit_masked(recipe, partial / KEPT, paths)
    with one_thread():
        execute(text, base, list(experts.values()), partial, recipe.policy.seed, progress)


def paths_for_mergekit(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Folders by name, `base` among them.

    Raises:
        InputError: two experts are one model.
    """
    paths = {"base": base.folder} | {name: checkpoint.folder for name, checkpoint in experts.items()}
    for one, other in combinations(experts, 2):
        if paths[one] == paths[other]:
            raise InputError(f"experts {one} and {other}", expected="each model once, as mergekit wants it",
                             found=f"{paths[one]} twice")  # fmt: skip
    return paths


def keep_recipe(recipe_file: Path, recipe: Recipe, masks: Masks, folder: Path, *, restricted: bool) -> Recipe:
    """Keeps the recipe with what it makes (`KEPT`): the file itself, or, `restricted`, that of one expert."""
    kept = folder / KEPT
    kept.parent.mkdir()
    if restricted:
        return write_recipe(kept, recipe, masks)
    shutil.copyfile(recipe_file, kept)
    if recipe.masks is not None:
        shutil.copyfile(recipe_file.with_name(recipe.masks.file), kept.with_name(recipe.masks.file))
    return recipe


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
    if is_new(out):
        return False
    there = out / KEPT
    if there.is_file() and (out / "config.json").is_file():
        if not restricted:
            same = there.read_bytes() == recipe_file.read_bytes()
        else:
            others, other_masks = read_recipe(there)
            same = to_yaml(others.model_copy(update={"masks": None})) == to_yaml(recipe) and (
                {n: m.tobytes() for n, m in other_masks.items()} == {n: m.tobytes() for n, m in masks.items()}
            )
        if same and (recipe.masks is None or there.with_name(recipe.masks.file).is_file()):
            Checkpoint(out).check_complete()
            return True
    raise InputError(
        str(out), expected="a new folder, or the model of this very recipe", found="something else", fix="name another"
    )


def open_models(recipe: Recipe, models: Mapping[str, Path], *, finite: bool = True) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Finds, checks and, where the recipe says so, aligns the models.

    Args:
        recipe: names them.
        models: folders, as for `merge`.
        finite: whether all their weights are read and must be finite.
    """
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
        check_pair(opened, experts[name], positions=recipe.positions, finite=finite)
    return opened, experts


def norms_of(recipe: Recipe, expert: str, models: Mapping[str, Path]) -> dict[str, Array]:
    """Delta norms of a recipe's expert, `EXPERT.KIND` → float32 [layers, units], from the models themselves.

    Args:
        recipe: names them.
        expert: the expert.
        models: folders, as for `merge`.
    """
    base, experts = open_models(recipe, models)
    return delta_norms(base, experts[expert])


def _find(model: ModelId, name: str, models: Mapping[str, Path]) -> Path:
    given = next((models[key] for key in (name, model.name, model.digest) if key in models), None)
    return find(model, {} if given is None else {model.digest: given}, name).resolve()


def _write_config(base: Checkpoint, out_dtype: str, folder: Path) -> None:
    """The base's config with the new dtype and without the local path that transformers leaves in it."""
    config = {key: value for key, value in base.config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = out_dtype
    target = folder / "config.json"
    target.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    # safetensors makes its files readable by their owner alone, whatever the umask says.
    for shard in folder.glob("*.safetensors"):
        shard.chmod(target.stat().st_mode)
