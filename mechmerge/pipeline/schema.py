"""The pipeline file: models, behaviours, recipes, evaluation and gate of one run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mechmerge.artifacts import MOST_SEED, Document
from mechmerge.behaviors.prompts import Tier
from mechmerge.errors import InputError
from mechmerge.evaluate.gate import Gate
from mechmerge.localize.effect_file import LEAST_MASKS, Origin, Tokens
from mechmerge.localize.rounds_file import CERTAINTY, MOST_CERTAIN
from mechmerge.localize.settings import LocalizePlan, ScoreSource, loss_of_rounds
from mechmerge.models.pair import PositionRule, VocabularyRule
from mechmerge.recipe.compile import check_parameters

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
RECIPE = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Names of recipes are no part of a tensor's name, so they may hold a dot."""


PARAMETERS: dict[str, tuple[str, ...]] = {
    "conflict": ("weight", "weighting", "agreement", "certainty"),
    "rounds": (),
    "solve": ("budget", "limit", "agreement", "unproven"),
    "top": ("budget", "overlap"),
    "weighted": ("budget", "scale", "overlap"),
    "random": ("per_layer", "match_norms"),
    "magnitude": ("per_layer",),
    "task-arithmetic": ("weight",),
    "linear": ("weight",),
    "ties": ("weight", "density", "lambda"),
    "dare-ties": ("weight", "density"),
    "della": ("weight", "density", "epsilon", "lambda"),
    "breadcrumbs": ("weight", "density", "gamma"),
    "sce": ("topk",),
    "model-stock": ("filter_wise",),
}
"""What each policy may be told; `weight.NAME` is a behaviour's weight in `conflict`, `limit.NAME` a limit of its damage in
`solve`. All but sce and model-stock take `strength.EXPERT`, which multiplies an expert's coefficients.
"""


DRAWN = ("random", "dare-ties", "della")
"""Policies that draw at random."""


class BehaviorPlan(Document):
    """A behaviour (or group) of the pipeline."""

    expert: str
    """The expert that answers for it."""
    file: str | None = None
    """A behaviour file, relative to the pipeline's (default: the built-in behaviour or group of this name)."""
    weight: float = Field(default=1.0, gt=0)
    """Its weight against the other behaviours."""


class ProtectPlan(Document):
    """An ability of the base's own that the merge is to leave as it is."""

    file: str | None = None
    """A behaviour file, relative to the pipeline's (default: `chat`, `general` or the built-in behaviour of this name)."""
    weight: float = Field(default=1.0, gt=0)
    """A nat of damage to it counts as much as so many whole gains of an expert."""


class EffectPlan(Document):
    """Settings of the effect matrix; see `EffectSettings`."""

    metric: ScoreSource = "loss"
    """What effects are of: the `loss` of the experts' own answers, or the recovery of their states along the `anchor`."""
    on_invalid: Literal["refuse", "report"] = "refuse"
    """What happens when an anchor fails its validity check: an error, or a file that says so."""
    steering_prompts: int = Field(default=8, ge=0)
    prompts: int = Field(default=48, ge=4)
    tolerance: float = Field(default=0.05, gt=0)
    max_nodes: int = Field(default=10, ge=6)
    origin: Origin = "base"
    """Where the path starts: at the base, leading to the sum; or at the sum, where merges are decided."""
    check: int = Field(default=0, ge=0)
    """Masks on which predictions are held against measured changes, for the policy `solve`; 0: none."""
    tokens: Tokens = "all"
    """Which tokens of an answer its loss is the mean over."""
    batch: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class RoundsPlan(Document):
    """Settings of the rounds, which are run where a recipe has the policy `rounds`; see `RoundSettings`."""

    metric: Annotated[Literal["loss"], BeforeValidator(loss_of_rounds)] = "loss"
    prompts: int = Field(default=48, ge=4)
    max_rounds: int = Field(default=4, ge=1, le=4)
    tokens: Tokens = "contested"
    certainty: float = Field(default=CERTAINTY, ge=0, le=MOST_CERTAIN, allow_inf_nan=False)
    batch: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class RecipePlan(Document):
    """One recipe: a policy and its parameters."""

    policy: Literal[
        "conflict", "rounds", "solve", "top", "weighted", "random", "magnitude", "task-arithmetic", "linear", "ties",
        "dare-ties", "della", "breadcrumbs", "sce", "model-stock",
    ]  # fmt: skip
    like: str | None = None
    """For the controls: the recipe whose shares they copy (an earlier one of this file)."""
    within: str | None = None
    """For `ties` and `dare-ties`: the recipe whose coefficients they work inside (an earlier one of this file)."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the policy, such as budget, overlap, weight or density."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    seeds: int = Field(default=1, ge=1, le=100)
    """Of what is drawn at random: so many recipes, called NAME-SEED, with the seeds from `seed` on."""

    @model_validator(mode="after")
    def _controls(self) -> RecipePlan:
        known = PARAMETERS[self.policy]
        for name in self.parameters:
            if name.partition(".")[0] not in (*known, "strength"):
                raise ValueError(f"parameters: {name!r} is not one of {', '.join(known) or 'none'} (policy {self.policy})")
        if self.seeds > 1 and self.policy not in DRAWN:
            raise ValueError(f"`seeds` belongs to what is drawn at random: {', '.join(DRAWN)}")
        if self.policy == "top" and "budget" not in self.parameters:
            raise ValueError("parameters: the policy top needs a budget")
        try:
            check_parameters(self.policy, self.parameters)
        except InputError as error:
            raise ValueError(f"parameters: {error}") from None
        if self.within is not None and self.policy not in ("ties", "dare-ties"):
            raise ValueError("`within` belongs to the policies ties and dare-ties")
        if (self.policy in ("random", "magnitude")) != (self.like is not None):
            raise ValueError("`like` belongs to the policies random and magnitude, and they need it")
        return self


class EvaluatePlan(Document):
    """What is generated and judged."""

    suites: tuple[str, ...] = Field(min_length=1)
    """Built-in suites, `lm_eval:TASK`, or files, relative to the pipeline's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch: int = Field(default=24, ge=1)
    split: Literal["test", "develop"] = "test"
    """Prompts of formats, arithmetic and code (others have no splits); what is chosen is chosen on `develop`."""
    tiers: tuple[Tier, ...] | None = None
    """Only prompts of these tiers (default: all that a suite has)."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts a suite, for trying out."""
    exact: bool = False
    """float32, and answers that do not depend on the other prompts of their batch."""
    thinking: Literal["keep", "strip"] = "keep"
    """Whether `<think>…</think>` blocks are part of the answer that is judged."""
    ifeval_data: str | None = None
    """The official prompts of the suite `ifeval`, a JSON Lines file relative to the pipeline's (default: from the Hub)."""

    @model_validator(mode="after")
    def _exact(self) -> EvaluatePlan:
        if self.exact and self.dtype != "float32":
            raise ValueError("exact: needs dtype float32")
        return self


class Pipeline(Document):
    """A whole run: localize, effects, recipes, merge, evaluate, gate, report and card."""

    schema_version: Literal[1] = 1
    title: str
    notes: str = ""
    """Said in the report, such as what was never tried."""
    base: str
    """Model reference; relative paths are read from the pipeline file's folder."""
    experts: dict[str, str] = Field(min_length=1)
    """Model references by name, in the order in which recipes sum them."""
    revision: str | None = None
    """Revision of every Hub reference that names none itself; resolved to commits when the pipeline runs."""
    license: str | None = None
    """Licence of the merge, where it cannot be worked out from the parents'."""
    out_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the merged weights."""
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"
    chat_template: str | None = None
    """Stands in for `model` in every behaviour and suite (`none` or a Jinja template), where the base has no template of
    its own."""
    behaviors: dict[str, BehaviorPlan] = Field(min_length=1)
    protect: dict[str, ProtectPlan] = Field(default_factory=dict)
    """The base's own abilities, measured in effects and rounds beside the behaviours."""
    localize: LocalizePlan = LocalizePlan()
    effects: EffectPlan = EffectPlan()
    rounds: RoundsPlan = RoundsPlan()
    recipes: dict[str, RecipePlan] = Field(min_length=1)
    publish: str
    """The recipe that gets a model card, and that rules of the gate judge which name no model (unless `gate.model` does)."""
    evaluate: EvaluatePlan
    gate: Gate
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @model_validator(mode="before")
    @classmethod
    def _several_seeds(cls, value: Any) -> Any:
        """A recipe of several seeds becomes as many recipes; broken values are left to be found by the fields."""
        recipes = value.get("recipes") if isinstance(value, dict) else None
        if not isinstance(recipes, dict):
            return value
        made: dict[Any, Any] = {}
        for name, plan in recipes.items():
            seeds, seed = (plan.get("seeds", 1), plan.get("seed", 0)) if isinstance(plan, dict) else (1, 0)
            drawn = isinstance(plan, dict) and plan.get("policy") in DRAWN
            if not (drawn and type(seeds) is int and type(seed) is int and 1 < seeds <= 100):
                made[name] = plan
                continue
            made |= {f"{name}-{seed + i}": plan | {"seed": seed + i, "seeds": 1} for i in range(seeds)}
        return value | {"recipes": made}

    @model_validator(mode="after")
    def _names(self) -> Pipeline:
        import re

        for name in self.recipes:
            if not re.fullmatch(RECIPE, name):
                raise ValueError(f"{name!r} is not a plain name (letters, digits, _ . and -)")
        for name in self.protect.keys() & self.behaviors.keys():
            raise ValueError(f"protect {name}: the name is taken by a behaviour")
        for name, plan in self.recipes.items():
            if plan.policy == "solve" and self.effects.check < LEAST_MASKS and not plan.parameters.get("unproven"):
                raise ValueError(f"recipe {name}: the policy solve needs effects.check: {LEAST_MASKS}, or unproven: true")
        for name in (*self.experts, *self.behaviors, *self.protect):
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r} is not a plain name (letters, digits, _ and -)")
        taken = {"base", *self.experts}
        for name, plan in self.recipes.items():
            if name in taken:
                raise ValueError(f"recipe {name}: the name is taken by a model or an earlier recipe")
            if plan.like is not None and plan.like not in taken - {"base", *self.experts}:
                raise ValueError(f"recipe {name}: like {plan.like!r} is not an earlier recipe")
            if plan.within is not None and plan.within not in taken - {"base", *self.experts}:
                raise ValueError(f"recipe {name}: within {plan.within!r} is not an earlier recipe")
            taken.add(name)
        for name, behavior in self.behaviors.items():
            if behavior.expert not in self.experts:
                raise ValueError(f"behaviors {name}: expert {behavior.expert!r} is not among {', '.join(self.experts)}")
        self.check_named()
        for rule in self.gate.rules:
            for model in (rule.model, *rule.others, self.gate.model):
                if model is not None and model not in taken:
                    raise ValueError(f"gate: model {model!r} is not the base, an expert or a recipe")
        if self.publish not in self.recipes:
            raise ValueError(f"publish: {self.publish!r} is not among the recipes")
        return self

    def check_named(self) -> None:
        """Checks that parameters such as `weight.NAME` name what there is.

        Raises:
            ValueError: one does not.
        """
        measured = {*self.behaviors, *self.protect}
        known = {"weight": measured, "limit": measured, "strength": {*self.experts}}
        for name, plan in self.recipes.items():
            for parameter in plan.parameters:
                kind, dot, of = parameter.partition(".")
                if dot and of not in known.get(kind, ()):
                    there = ", ".join(sorted(known.get(kind, ()))) or "nothing"
                    raise ValueError(f"recipe {name}: parameters: {parameter!r}: {of!r} is not among {there}")
