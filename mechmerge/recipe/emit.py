"""Recipes as mergekit YAML (https://github.com/arcee-ai/mergekit, 0.1.5).

*stock*: any mergekit 0.1.5 runs it unchanged; for recipes in which every tensor of an expert has one coefficient.
*masked*: names our merge method `mechmerge_masked`, which reads the recipe and its masks; our CLI registers it.
*baseline*: one of mergekit's own methods.

A `filter` of mergekit is a substring test and the first that hits wins, so ours are whole tensor names or prefixes of them that
end with a dot, and every tensor's value is resolved once more as mergekit would before the text is returned. Layer
gradients are never used (they are inexact), nor `normalize` where the sum is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mechmerge.errors import InputError
from mechmerge.models.components import Layout
from mechmerge.recipe.coefficients import Coefficients, owners_of, tensor_coefficient
from mechmerge.recipe.schema import Recipe

METHOD = "mechmerge_masked"
"""Name of our merge method in mergekit's registry."""
WITHIN = "mechmerge_within"
"""Name of the one that is TIES or DARE-TIES inside a mask."""
Paths = Mapping[str, Path | str]
"""`base` and every expert's name → a checkpoint folder, or what else mergekit takes for a model."""
Shapes = Mapping[str, tuple[int, ...]]


def emit_stock(recipe: Recipe, found: Coefficients, layout: Layout, shapes: Shapes, paths: Paths) -> str:
    """The recipe as YAML for any mergekit 0.1.5 (`merge_method: task_arithmetic`).

    Args:
        recipe: a recipe of coefficients.
        found: its resolved coefficients.
        layout: components of the base.
        shapes: shape of every tensor of the base.
        paths: where the models are.

    Raises:
        InputError: a tensor would have to be cut, or the recipe is a baseline.
    """
    if recipe.mergekit is not None:
        raise InputError("recipe", expected="a recipe of coefficients", found=f"the baseline {recipe.mergekit.method}")
    owners = owners_of(layout)
    models = []
    for name, expert in recipe.experts.items():
        values: dict[str, float] = {}
        for tensor, parts in owners.items():
            shape = shapes.get(tensor, shapes[parts[0][2].tensor])
            dim, values_of = tensor_coefficient(tensor, shape, parts, found, name)
            if dim is not None:
                raise InputError(
                    f"recipe: {name}, {tensor}",
                    expected="one coefficient for the whole tensor in a stock recipe",
                    found="several (a rule or mask cuts it)",
                    fix="write it masked: `recipe --emit masked`, `recipe emit --as masked`",
                )
            values[tensor] = float(values_of[0])
        filters = _filters(values, expert.default, layout.arch.family.layers + ".")
        _check(filters, values, name)
        weight: Any = filters if len(filters) > 1 else filters[0]["value"]
        models.append({"model": model_entry(paths[name]), "parameters": {"weight": weight}})
    return _dump(recipe, "task_arithmetic", models, paths, {"normalize": False})


def emit_masked(recipe: Recipe, recipe_file: Path | str, paths: Paths) -> str:
    """The recipe as YAML for mergekit with our method registered (`mechmerge merge` does; `import mechmerge.merge.method`).

    Args:
        recipe: a recipe of coefficients.
        recipe_file: where the method finds `recipe.yaml`, its masks beside it.
        paths: where the models are.

    Raises:
        InputError: the recipe is a baseline that does not work within coefficients.
    """
    if recipe.mergekit is not None and not recipe.mergekit.within:
        raise InputError("recipe", expected="a recipe of coefficients", found=f"the baseline {recipe.mergekit.method}")
    models = [{"model": model_entry(paths[name]), "parameters": {"expert": name}} for name in recipe.experts]
    method = METHOD if recipe.mergekit is None else WITHIN
    return _dump(recipe, method, models, paths, {"recipe": str(recipe_file)})


def emit_baseline(recipe: Recipe, paths: Paths) -> str:
    """A baseline as YAML for any mergekit 0.1.5; an expert's default coefficient is its weight.

    Raises:
        InputError: the recipe has no mergekit block, or one that needs our method.
    """
    if recipe.mergekit is None:
        raise InputError("recipe", expected="a baseline", found=f"the policy {recipe.policy.name}")
    if recipe.mergekit.within:
        raise InputError(
            "recipe", expected="one of mergekit's own methods", found=f"{recipe.policy.name}, which cuts tensors",
            fix="write it masked: `recipe --emit masked`, `recipe emit --as masked`",
        )  # fmt: skip
    models = []
    for name, expert in recipe.experts.items():
        weight = {"weight": expert.default} if recipe.mergekit.weighted else {}
        parameters = {**weight, **recipe.mergekit.expert_parameters.get(name, {})}
        models.append({"model": model_entry(paths[name])} | ({"parameters": parameters} if parameters else {}))
    if recipe.mergekit.method == "linear":
        if sum(expert.default for expert in recipe.experts.values()) == 0:
            raise InputError("recipe", expected="weights whose sum is not 0, since linear divides by it", found="0")
        # linear weighs the base like any other input; without an entry mergekit finds no weight for it.
        models.append({"model": model_entry(paths["base"]), "parameters": {"weight": 0.0}})
    return _dump(recipe, recipe.mergekit.method, models, paths, dict(recipe.mergekit.parameters))


def model_entry(path: Path | str) -> Any:
    """A model as mergekit's YAML names it: the text, or a mapping where `+` or `@` in a path would be read as syntax."""
    text = str(path)
    return {"model": {"path": text}} if isinstance(path, Path) and any(c in text for c in "+@") else text


def _dump(recipe: Recipe, method: str, models: list[dict[str, Any]], paths: Paths, parameters: dict[str, Any]) -> str:
    document = {
        "merge_method": method,
        "base_model": model_entry(paths["base"]),
        "dtype": "float32",
        "out_dtype": recipe.out_dtype,
        "models": models,
        "parameters": parameters,
    }
    if not parameters:
        del document["parameters"]
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=160)
    drawn = recipe.mergekit is not None and recipe.policy.seed is not None
    return text if not drawn else f"# mergekit draws anew unless told: --random-seed {recipe.policy.seed}\n{text}"


def _filters(values: Mapping[str, float], default: float, layers: str) -> list[dict[str, Any]]:
    """Filters with a catch-all at the end: the shortest prefix (a layer, a module, a tensor) whose tensors all agree."""
    default = float(np.float32(default))
    filters: list[dict[str, Any]] = []
    done: set[str] = set()
    for tensor, value in values.items():
        if tensor in done or value == default:
            continue
        chosen = tensor
        if tensor.startswith(layers):
            pieces = tensor.removeprefix(layers).split(".")
            for end in range(1, len(pieces)):
                prefix = layers + ".".join(pieces[:end]) + "."
                if all(other == value for name, other in values.items() if prefix in name):
                    chosen = prefix
                    break
        done.update(name for name in values if chosen in name)
        filters.append({"filter": chosen, "value": value})
    return [*filters, {"value": default}]


def _check(filters: Sequence[Mapping[str, Any]], values: Mapping[str, float], expert: str) -> None:
    """Resolves every tensor's value as mergekit does: the first filter that is a substring of its name."""
    for tensor, value in values.items():
        hit = next(entry["value"] for entry in filters if entry.get("filter", "") in tensor)
        if hit != value:
            raise InputError(
                f"recipe: {expert}, {tensor}",
                expected=f"filters that give {value:g}",
                found=f"{hit:g}",
                fix="write it masked: `recipe --emit masked`, `recipe emit --as masked`",
            )
