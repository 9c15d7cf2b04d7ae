"""What a recipe is made from: score, effect and rounds files of one base, grouped by expert."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechmerge.artifacts import METADATA_KEY, parse_json, sha256_file
from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import EffectFile, Tokens, read_effects
from mechmerge.localize.rounds_file import RoundsFile, read_rounds
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId
from mechmerge.recipe.schema import Array, Masks, Recipe, Source

Measured = Literal["scores", "effects", "rounds"]


@dataclass(frozen=True)
class Sources:
    """The files of one recipe."""

    base: ModelId
    experts: dict[str, ModelId]
    """By name, in the order in which a recipe sums them."""
    effects: EffectFile | None = None
    rounds: RoundsFile | None = None
    scores: dict[str, list[ScoreFile]] = field(default_factory=dict)
    """Score files by expert name."""
    provenance: tuple[Source, ...] = ()

    def unit_parameters(self) -> dict[str, int]:
        """Parameters of one head, KV group and neuron, where a file tells."""
        for file in (self.effects, self.rounds):
            if file is not None:
                return dict(file.metadata.parameters)
        for files in self.scores.values():
            return {kind: int(files[0].arrays[f"{kind}.parameters"][0]) for kind in UNIT_KINDS}
        return {}

    def delta_norms(self) -> dict[str, Array]:
        """`<expert>.<kind>` → norms of expert − base [layers, units], as far as score files hold them."""
        return {
            f"{expert}.{kind}": files[0].arrays[f"{kind}.delta_norm"]
            for expert, files in self.scores.items()
            for kind in UNIT_KINDS
            if f"{kind}.delta_norm" in files[0].arrays
        }


def expert_name(model: ModelId) -> str:
    """A plain name for an expert, from its reference: the last part of the path, or the adapter's."""
    last = re.split(r"[/+:]", model.name)[-1]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_") or "expert"


def read_sources(files: Sequence[Path], experts: Mapping[str, ModelId] | None = None) -> Sources:
    """Reads score, effect and rounds files.

    Args:
        files: score files and at most one effect file, in any order.
        experts: names and order of the experts; otherwise those of the effect file, else made from the models' names.

    Raises:
        InputError: no file, two effect files, files of different bases, or a file of an unknown expert.
        SchemaError: a file that is neither a score file nor an effect file, or a broken one.
    """
    if not files:
        raise InputError("recipe", expected="score files or an effect file", found="none")
    effects: EffectFile | None = None
    settled: RoundsFile | None = None
    scored: list[ScoreFile] = []
    provenance = []
    bases: dict[str, ModelId] = {}
    for path in files:
        kind = _kind(path)
        if kind == "effects":
            if effects is not None:
                raise InputError(str(path), expected="one effect file", found="a second one")
            effects = read_effects(path)
            base = effects.metadata.base
            provenance.append(_source(path, "effects", effects.metadata.metric, effect_gains(effects), effects.metadata.tokens))
        elif kind == "rounds":
            if settled is not None:
                raise InputError(str(path), expected="one rounds file", found="a second one")
            settled = read_rounds(path)
            base = settled.metadata.base
            provenance.append(_source(path, "rounds", "loss", round_gains(settled), settled.metadata.tokens))
        else:
            file = read_scores(path)
            scored.append(file)
            base = file.metadata.base
            provenance.append(_source(path, "scores"))
        bases.setdefault(base.digest, base)
        if len(bases) > 1:
            first, other = (f"{model.name} ({model.digest[:12]})" for model in bases.values())
            raise InputError(str(path), expected=f"the base {first}", found=other, fix="measure all files against one base")
    measured = effects.metadata.experts if effects is not None else settled.metadata.experts if settled is not None else None
    named = dict(experts) if experts is not None else dict(measured) if measured is not None else _names(scored)
    if effects is not None:
        effects = _renamed(effects, named)
    if settled is not None:
        names = {model.digest: name for name, model in named.items()}
        for name, model in settled.metadata.experts.items():
            if names.get(model.digest) != name:
                raise InputError("rounds file", expected=f"experts named {', '.join(named)}", found=name)
    scores: dict[str, list[ScoreFile]] = {}
    for name, model in named.items():
        mine = [file for file in scored if file.metadata.expert.digest == model.digest]
        if mine:
            scores[name] = mine
    known = {model.digest for model in named.values()}
    for file in scored:
        if file.metadata.expert.digest not in known:
            raise InputError(
                f"score file of {file.metadata.behavior}",
                expected=f"an expert among {', '.join(named)}",
                found=file.metadata.expert.name,
            )
    return Sources(
        next(iter(bases.values())),
        named,
        effects,
        settled,
        scores,
        tuple(sorted(provenance, key=lambda s: (s.kind, s.file, s.sha256))),
    )


def effect_gains(effects: EffectFile) -> dict[str, float]:
    """What each behaviour's own expert gains over the base, in the file's metric; without those that are protected."""
    return {b.name: round(b.own_gain, 6) for b in effects.metadata.behaviors if not b.protected}


def round_gains(rounds: RoundsFile) -> dict[str, float]:
    """The same of a rounds file, nats per answer token."""
    return {b.name: round(b.loss_base - b.loss_expert, 6) for b in rounds.metadata.behaviors if b.expert != "base"}


def _source(
    path: Path,
    kind: Measured,
    metric: ScoreSource | None = None,
    gains: Mapping[str, float] | None = None,
    tokens: Tokens = "all",
) -> Source:
    return Source(file=path.name, kind=kind, sha256=sha256_file(path), metric=metric, gains=dict(gains or {}), tokens=tokens)


# ------------------------------------------------------------------------------------------------------------ a recipe's files
def read_again(
    recipe: Recipe, masks: Masks, effects: Path | None = None, rounds: Path | None = None, scores: Sequence[Path] = ()
) -> tuple[Sources, tuple[str, ...]]:
    """The files that a recipe was made from, or others of its very models, with the recipe's names of the experts.

    Returns:
        The files, and what is to be said of those that the recipe was not made from.

    Raises:
        InputError: a file of another base, of other experts or of other sizes, or an expert without score files.
        SchemaError: a file that is not of the kind it is given as, or a broken one.
    """
    ours = {name: expert.model for name, expert in recipe.experts.items()}
    measured = None if effects is None else read_effects(effects)
    settled = None if rounds is None else read_rounds(rounds)
    scored = [read_scores(path) for path in scores]
    notes = []
    if effects is not None and measured is not None:
        notes += _check(recipe, masks, effects, "effects", measured.metadata.experts, measured)
        measured = _renamed(measured, ours)
    if rounds is not None and settled is not None:
        notes += _check(recipe, masks, rounds, "rounds", settled.metadata.experts, settled)
    for path, file in zip(scores, scored, strict=True):
        notes += _check(recipe, masks, path, "scores", {expert_name(file.metadata.expert): file.metadata.expert}, file)
    grouped = {name: [file for file in scored if file.metadata.expert.digest == model.digest] for name, model in ours.items()}
    if scored and (missing := [name for name, files in grouped.items() if not files]):
        raise InputError("score files", expected=f"those of {', '.join(ours)}", found=f"none of {', '.join(missing)}")
    return Sources(recipe.base, ours, measured, settled, grouped if scored else {}), tuple(notes)


def _check(
    recipe: Recipe,
    masks: Masks,
    path: Path,
    kind: Measured,
    theirs: Mapping[str, ModelId],
    file: EffectFile | RoundsFile | ScoreFile,
) -> list[str]:
    """What is to be said of a file of a recipe's models.

    Raises:
        InputError: it is of other models.
    """
    made_from = {source.sha256: f"{source.file} (sha256 {source.sha256[:12]})" for source in recipe.provenance
                 if source.kind == kind}  # fmt: skip
    named = ", ".join(made_from.values())
    fix = f"give what it was made from: {named}" if named else f"give {kind} of these models"
    base, ours = file.metadata.base, {name: expert.model for name, expert in recipe.experts.items()}
    if base.digest != recipe.base.digest:
        expected = f"the recipe's base {_said(recipe.base.name, recipe.base)}"
        raise InputError(str(path), expected=expected, found=_said(base.name, base), fix=fix)
    known, given = (sorted(model.digest for model in models.values()) for models in (ours, theirs))
    if not (set(given) <= set(known) if kind == "scores" else given == known):
        expected, found = (", ".join(_said(*item) for item in models.items()) for models in (ours, theirs))
        raise InputError(str(path), expected=f"the recipe's experts {expected}", found=found, fix=fix)
    measure = {"effects": "effect", "rounds": "coefficient", "scores": "screen"}[kind]
    for name, mask in masks.items():
        unit = name.rpartition(".")[2]
        array = file.arrays.get(f"{unit}.{measure}")
        if array is not None and array.shape[-2:] != mask.shape:
            expected, found = (f"{layers} layers × {units}" for layers, units in (mask.shape, array.shape[-2:]))
            raise InputError(f"{path}: {unit}", expected=f"{expected}, as the recipe's masks have", found=found, fix=fix)
    if sha256_file(path) in made_from or (kind == "effects" and not made_from):  # effects predict for any recipe
        return []
    return [f"{path.name}: of the recipe's models, but not among the {kind} that it was made from: {named or 'none'}"]


def effects_of(recipe: Recipe, effects: EffectFile) -> EffectFile | None:
    """Effects under a recipe's names of the experts; None where they are of others."""
    ours = {name: expert.model for name, expert in recipe.experts.items()}
    known, given = (sorted(model.digest for model in models.values()) for models in (ours, effects.metadata.experts))
    return _renamed(effects, ours) if known == given else None


def _said(name: str, model: ModelId) -> str:
    return f"{name} ({model.digest[:12]})"


def _kind(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise InputError(str(path), expected="a file", found="nothing there") from None
    except (SafetensorError, OSError) as error:
        raise SchemaError(str(path), expected="a score or effect file", found=str(error)) from None
    document = parse_json(text, str(path)) if text is not None else None
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in ("scores", "effects", "rounds"):
        raise SchemaError(str(path), expected="a score, effect or rounds file", found=f"kind {kind!r}")
    return str(kind)


def _names(scored: Sequence[ScoreFile]) -> dict[str, ModelId]:
    named: dict[str, ModelId] = {}
    for model in {file.metadata.expert.digest: file.metadata.expert for file in scored}.values():
        name = expert_name(model)
        if name in named or name == "base":
            name = f"{name}-{model.digest[:8]}"
        named[name] = model
    return named


def _renamed(effects: EffectFile, named: Mapping[str, ModelId]) -> EffectFile:
    """The effect file with its experts under the given names; the order of its tensors stays."""
    old = effects.metadata.experts
    if all(name in named and named[name].digest == model.digest for name, model in old.items()):
        return effects
    names = {model.digest: name for name, model in named.items()}
    for name, model in old.items():
        if model.digest not in names:
            raise InputError("effect file", expected=f"experts among {', '.join(named)}", found=name)
    behaviors = tuple(
        b.model_copy(update={"expert": names[old[b.expert].digest]}) if b.expert in old else b
        for b in effects.metadata.behaviors
    )
    experts = {names[model.digest]: model for model in old.values()}
    return EffectFile(effects.metadata.model_copy(update={"experts": experts, "behaviors": behaviors}), effects.arrays)
