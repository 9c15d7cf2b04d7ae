"""The recipe: `recipe.yaml`, and `masks.safetensors` beside it where single heads, KV groups or neurons are treated apart.

    merged = base + Σ over experts of coefficient(expert, component) × (expert − base)

An expert's `default` covers everything that no rule and no mask names, embeddings, norms and head included. A rule names a
component, or many with `*` in the place of a layer or unit (`L*.attention`, `L7.neuron.*`); the most specific rule wins.
A recipe with a `mergekit` block is a baseline: one of mergekit's own methods with its parameters, and no rules, unless it works
`within` the coefficients.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from mechmerge.artifacts import Document, read_arrays, read_document, sha256_file, write_arrays, write_yaml
from mechmerge.errors import SchemaError
from mechmerge.localize.effect_file import Tokens
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.components import OUTSIDE, UNIT_KINDS
from mechmerge.models.pair import PositionRule, VocabularyRule
from mechmerge.models.references import ModelId

Array = np.ndarray
Masks = dict[str, Array]
"""`<expert>.<kind>` → float32 [layers, units], kind in {head, kv, neuron}: a coefficient for every unit."""
Scalar = bool | int | float | str
OutDtype = Literal["float32", "bfloat16", "float16"]
RECIPE_NAME, MASKS_NAME = "recipe.yaml", "masks.safetensors"
FOLDER = "mechmerge"
"""Everything beside the weights lies in this folder of a merged model, of an exported adapter and of a model repository: vLLM
and SGLang take every `*.safetensors` beside a `model.safetensors` without an index for weights, masks too.
"""
KEPT = f"{FOLDER}/{RECIPE_NAME}"
"""The recipe that a merged model or an exported adapter was made by, its masks beside it."""
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
"""Files of a merged model or an exported adapter."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
PATTERN = re.compile(
    r"L(?P<layer>\d+|\*)(?:\.(?P<part>attention\.rest|mlp\.rest|attention|mlp|norms)|\.(?P<kind>head|kv|neuron)\.(?P<unit>\d+|\*))?"
)


class RecipeExpert(Document):
    """One expert of a recipe."""

    model: ModelId
    default: float = 1.0
    """Coefficient of all its components that no rule and no mask names; the weight that a baseline's method is given."""


class Policy(Document):
    """How the coefficients were chosen."""

    name: str
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    seed: int | None = None
    """Seed of what is drawn at random, where anything is."""


class Rule(Document):
    """A coefficient for one component, or for those of a pattern."""

    component: str
    """`L7.head.3`, `L7.attention`, `L7`, `embed`, ... with `*` for any layer or any unit."""
    expert: str
    coefficient: float

    @field_validator("component")
    @classmethod
    def _known(cls, text: str) -> str:
        if text not in OUTSIDE and PATTERN.fullmatch(text) is None:
            raise ValueError(f"{text!r} is not a component or a pattern such as L*.attention or L7.neuron.*")
        return text


class MaskFile(Document):
    """The masks beside the recipe."""

    file: str = Field(pattern=r"^[^/\\]+\.safetensors$")
    """File name, in the recipe's own folder; none of those that weights have: a recipe may lie beside some."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _own(cls, name: str) -> str:
        if WEIGHTS.fullmatch(name):
            raise ValueError(f"{name!r} is the name of a model's weights; call it {MASKS_NAME}")
        return name


class Source(Document):
    """A file that the recipe was made from."""

    file: str
    """Its name without local folders."""
    kind: Literal["scores", "effects", "rounds", "recipe"]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    metric: ScoreSource | None = None
    """What its gains are counted in; None where it tells none."""
    tokens: Tokens = "all"
    """Which tokens of an answer a loss is the mean over."""
    gains: dict[str, float] = Field(default_factory=dict)
    """What each behaviour's own expert gains over the base, as effect and rounds files tell: what a predicted change is a share
    of. Protected behaviours have none, nor has anything in older recipes.
    """


UNWEIGHTED = ("sce", "model_stock")
"""Methods of mergekit that find every expert's weight themselves."""


class MergekitMethod(Document):
    """A baseline: a merge method of mergekit, by its name there."""

    method: Literal["task_arithmetic", "linear", "ties", "dare_ties", "della", "breadcrumbs", "sce", "model_stock"]
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    """Parameters of the whole merge, such as `normalize`."""
    expert_parameters: dict[str, dict[str, Scalar]] = Field(default_factory=dict)
    """Parameters of single experts beside their weight, such as `density`."""
    within: bool = False
    """Whether it works inside the recipe's coefficients alone (merge/within.py), which masks and rules then give: `ties` and
    `dare_ties` with shares, signs and scales of what is inside.
    """

    @property
    def weighted(self) -> bool:
        """Whether the method takes a weight for every expert."""
        return self.method not in UNWEIGHTED


class Recipe(Document):
    """What is merged from whom."""

    schema_version: Literal[1] = 1
    base: ModelId
    experts: dict[str, RecipeExpert] = Field(min_length=1)
    """Experts by name, in the order in which they are summed."""
    policy: Policy
    rules: tuple[Rule, ...] = ()
    masks: MaskFile | None = None
    mergekit: MergekitMethod | None = None
    out_dtype: OutDtype = "bfloat16"
    """Dtype of the merged weights; arithmetic is float32, rounded once."""
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"
    parameters: dict[str, int] | None = None
    """Parameters of one head, KV group and neuron, where what was measured told; None in older recipes."""
    predicted: dict[str, float] | None = None
    """Predicted change of each behaviour against the base, of what `predicted_on` says."""
    predicted_on: ScoreSource = "loss"
    """`loss`: nats per answer token, negative is better; `anchor`: recovery of the state, positive is better."""
    realised: dict[str, float] | None = None
    """The change of loss that was measured at this recipe's coefficients on the calibration answers, where it was."""
    provenance: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name, expert in self.experts.items():
            if not re.fullmatch(NAME, name) or name == "base":
                raise ValueError(f"experts: {name!r} is not a plain name (letters, digits, _ and -; not 'base')")
            _finite(expert.default, f"experts.{name}.default")
        for i, rule in enumerate(self.rules):
            if rule.expert not in self.experts:
                raise ValueError(f"rules.{i}: expert {rule.expert!r} is not among {', '.join(self.experts)}")
            _finite(rule.coefficient, f"rules.{i}.coefficient")
        if self.mergekit is not None:
            if self.mergekit.within and self.mergekit.method not in ("ties", "dare_ties"):
                raise ValueError(f"mergekit.within: only ties and dare_ties work inside a mask, not {self.mergekit.method}")
            if not self.mergekit.within and (self.rules or self.masks):
                raise ValueError("a mergekit block and rules or masks exclude each other")
            for name in self.mergekit.expert_parameters:
                if name not in self.experts:
                    raise ValueError(f"mergekit.expert_parameters: {name!r} is not among {', '.join(self.experts)}")
        return self


def _finite(value: float, where: str) -> None:
    # float32 is what is computed with: 1e300 would become infinite there.
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{where}: {value} is not a finite float32")


class MaskMetadata(Document):
    """The JSON document of a mask file."""

    schema_version: Literal[1] = 1
    kind: Literal["masks"] = "masks"


def check_masks(masks: Masks, recipe: Recipe, where: str) -> None:
    """Names are `<expert>.<kind>`, values finite float32 [layers, units].

    Raises:
        SchemaError: naming the first tensor that is not so.
    """
    for name, array in masks.items():
        expert, _, kind = name.rpartition(".")
        if expert not in recipe.experts or kind not in UNIT_KINDS:
            raise SchemaError(
                where, expected=f"tensors named <expert>.<{'|'.join(UNIT_KINDS)}> of the recipe's experts", found=name
            )
        if array.ndim != 2 or array.dtype != np.float32:
            raise SchemaError(
                f"{where}: {name}", expected="float32 [layers, units]", found=f"{array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise SchemaError(f"{where}: {name}", expected="finite coefficients", found="NaN or an infinite one")


def write_recipe(path: Path, recipe: Recipe, masks: Masks | None = None) -> Recipe:
    """Writes a recipe, its masks beside it first; returns it with the masks' digest filled in.

    Args:
        path: `…/recipe.yaml`; masks go to `masks.safetensors` in the same folder, and those of another NAME.yaml to
            `NAME.masks.safetensors`, so that recipes can share a folder.
        recipe: its `masks` field is set here.
        masks: coefficients of single units, or nothing.
    """
    if masks:
        target = path.with_name(MASKS_NAME if path.name == RECIPE_NAME else f"{path.stem}.{MASKS_NAME}")
        check_masks(masks, recipe, str(target))
        write_arrays(target, masks, MaskMetadata())
        recipe = recipe.model_copy(update={"masks": MaskFile(file=target.name, sha256=sha256_file(target))})
    elif recipe.masks is not None:
        recipe = recipe.model_copy(update={"masks": None})
    write_yaml(path, recipe)
    return recipe


def read_recipe(path: Path) -> tuple[Recipe, Masks]:
    """Reads a recipe with its masks (none: an empty dict).

    Raises:
        InputError: no such file.
        SchemaError: the recipe or its masks break the schema, or the masks are others than those it names.
    """
    recipe = read_document(Recipe, path)
    if recipe.masks is None:
        return recipe, {}
    file = path.with_name(recipe.masks.file)
    masks, _ = read_arrays(file, MaskMetadata)
    found = sha256_file(file)
    if found != recipe.masks.sha256:
        raise SchemaError(str(file), expected=f"sha256 {recipe.masks.sha256[:12]}… as the recipe says", found=f"{found[:12]}…")
    check_masks(masks, recipe, str(file))
    return recipe, masks
