"""The recipe builder: a policy and its settings, and what they come to by the run's own measurements.

`recipe/compile.py` decides; nothing is computed in the browser. The same address answers with a page and with JSON, which the
page's script asks for while a slider moves.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlencode

import yaml
from fastapi import Depends, Request, Response
from fastapi.responses import JSONResponse

from mechmerge.errors import InputError, MechmergeError
from mechmerge.models.components import UNIT_KINDS
from mechmerge.pipeline.schema import DRAWN
from mechmerge.recipe.compile import CONTROLS, POLICIES, WITHIN, Compiled, compile_recipe, expected_change
from mechmerge.recipe.explain import shares
from mechmerge.recipe.schema import Masks, Recipe, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources
from mechmerge.report.pack import clean
from mechmerge.report.page_data import recipe_data
from mechmerge.report.recipes import kept_of
from mechmerge.report.style import signed
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id
from mechmerge.service.pages.components import Table
from mechmerge.service.pages.jobs import heading
from mechmerge.service.pages.reading import results_of, sources_of
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import page_router
from mechmerge.service.pages.settings import SETTINGS, STRENGTHENED, read_settings
from mechmerge.service.problems import problem_of
from mechmerge.service.service import Service

router = page_router()
OTHERS = {"like": CONTROLS, "within": WITHIN}
"""Policies that begin from another recipe."""
SCORED = ("top", "weighted")
"""Policies that choose by scores."""
BUILT = "built"
"""What the recipe is called in tables and pipelines."""


class Asked(NamedTuple):
    """A policy and its settings, as a form sends them."""

    policy: str
    """Empty where none was asked for."""
    parameters: dict[str, Any]
    like: str | None
    within: str | None
    seed: int

    def plan(self) -> dict[str, Any]:
        """The recipe as a pipeline names it."""
        plan: dict[str, Any] = {"policy": self.policy}
        plan |= {name: value for name, value in (("like", self.like), ("within", self.within)) if value is not None}
        if self.parameters:
            plan["parameters"] = self.parameters
        return plan | ({"seed": self.seed} if self.seed else {})

    def query(self) -> str:
        """The form's fields again."""
        fields: dict[str, Any] = {"policy": self.policy, **self.parameters}
        fields = {name: ("yes" if value else "no") if isinstance(value, bool) else value for name, value in fields.items()}
        more = {"like": self.like, "within": self.within, "seed": self.seed if self.policy in DRAWN else None}
        more = {name: value for name, value in more.items() if value is not None}
        return urlencode(fields | more)


class Built(NamedTuple):
    """What the settings come to."""

    compiled: Compiled
    said: str
    """In one line."""
    tables: list[Table]
    recipe: dict[str, Any]
    """What its charts are drawn from."""


def asked(request: Request) -> Asked:
    """What the address asks for: only what belongs to its policy.

    Raises:
        InputError: a value of another kind.
    """
    fields = request.query_params
    policy = fields.get("policy", "")
    if policy and policy not in POLICIES:
        raise InputError("policy", expected=f"one of {', '.join(POLICIES)}", found=repr(policy[:100]))
    seed = fields.get("seed", "0") if policy in DRAWN else "0"
    if not seed.isdecimal() or len(seed) > 9:
        raise InputError("seed", expected="a whole number from 0", found=repr(seed[:100]))
    like, within = ((fields.get(name) or None) if policy in known else None for name, known in OTHERS.items())
    return Asked(policy, read_settings(policy, fields) if policy else {}, like, within, int(seed))


Wanted = Annotated[Asked, Depends(asked)]


def choices(service: Service, id: str, sources: Sources) -> dict[str, str | None]:
    """The policies, each with what it lacks in this run (None: nothing)."""
    found: dict[str, str | None] = dict.fromkeys(POLICIES)
    if sources.effects is None:
        found["conflict"] = "needs effects"
        found["solve"] = "needs effects"
    if sources.rounds is None:
        found["rounds"] = "needs rounds"
    elif sources.rounds.metadata.method == "solve":
        # A measured solution has settings of its own, and is the run's recipe already.
        found["solve"] = "the run's rounds hold it"
    scored = [file for files in sources.scores.values() for file in files]
    if sources.experts.keys() - sources.scores.keys():
        found |= dict.fromkeys(SCORED, "needs scores of every expert")
    elif any(f"{kind}.parameters" not in file.arrays for file in scored for kind in UNIT_KINDS):
        found |= dict.fromkeys(SCORED, "needs score files with parameter counts")
    if not masked(service, id):
        found |= dict.fromkeys(CONTROLS, "needs a recipe of components to be like")
    return found


def masked(service: Service, id: str) -> dict[str, tuple[Recipe, Masks]]:
    """The recipes of a run that choose components."""
    found = {name: read_recipe(path) for name, path in results_of(service, id).run.recipes.items()}
    return {name: pair for name, pair in found.items() if pair[1]}


def build(service: Service, id: str, wanted: Asked) -> Built:
    """Compiles what is asked for, beside what the run's own recipes take and are expected to do.

    Raises:
        InputError: a setting out of range, or a policy without the measurements that it needs.
    """
    sources, results = sources_of(service, id), results_of(service, id)
    others = masked(service, id)
    for what, name in (("like", wanted.like), ("within", wanted.within)):
        if name is not None and name not in others:
            raise InputError(what, expected=f"one of {', '.join(others) or 'none'}", found=repr(name[:100]))
    like, within = others.get(wanted.like or ""), others.get(wanted.within or "")
    compiled = compile_recipe(wanted.policy, sources, parameters=wanted.parameters, seed=wanted.seed, like=like, within=within)
    recipe, masks = compiled.recipe, compiled.masks
    taken = shares(recipe, masks, sources.unit_parameters())
    expected = {BUILT: _expected(sources, recipe, masks)}
    expected |= {name: _expected(sources, *pair) for name, pair in others.items()}
    tables = [Table("What it takes of each expert", list(taken[0]), [tuple(row.values()) for row in taken])]
    changes = _changes(sources, expected)
    tables += [changes] if changes.rows else []
    # A share of each is what the budget counts: heads, KV groups and neurons by their parameters.
    parts = [f"{row['head + kv + neuron']} of {row['expert']}" for row in taken] if masks else []
    mine = expected[BUILT]
    said = f"{wanted.policy}: takes {', '.join(parts)}" if parts else f"{wanted.policy}: decides by weight, not by component"
    if mine:
        said += "; expected change " + ", ".join(f"{name} {signed(value)}" for name, value in mine.items())
    return Built(compiled, f"{said}.", tables, recipe_data(BUILT, kept_of(recipe, masks, results.run), published=False))


def _expected(sources: Sources, recipe: Recipe, masks: Masks) -> dict[str, float] | None:
    # Linear in coefficients: what a method of mergekit does beyond them is not foreseen.
    if recipe.mergekit is not None and recipe.mergekit.method != "task_arithmetic":
        return None
    return expected_change(sources, recipe, masks)


def _changes(sources: Sources, expected: Mapping[str, dict[str, float] | None]) -> Table:
    """Expected changes by recipe and behaviour."""
    if sources.effects is None:
        return Table("", [], [])
    meta = sources.effects.metadata
    names = [behavior.name for behavior in meta.behaviors]
    better = "negative is better" if meta.metric == "loss" else "positive is better"
    rows: list[tuple[object, ...]] = [
        (name, *("–" if found is None else signed(found[behavior]) for behavior in names)) for name, found in expected.items()
    ]
    return Table(f"Expected change against the base, {meta.unit.partition(':')[0]}; {better}", ["recipe", *names], rows)


@router.get("/runs/{id}/builder")
def builder(request: Request, id: Id, identity: Reader, service: The) -> Response:
    """The builder."""
    sources = sources_of(service, id)
    policies = choices(service, id, sources)
    problem, built = None, None
    first = next(policy for policy in ("top", *POLICIES) if policies[policy] is None)
    wanted = Asked(first, {}, None, None, 0)
    try:
        wanted = asked(request)
        if not wanted.policy:
            wanted = asked(_with_policy(request, first))
        built = build(service, id, wanted)
    except MechmergeError as error:
        problem = problem_of(error)
    behaviors = [] if sources.effects is None else [behavior.name for behavior in sources.effects.metadata.behaviors]
    return render(
        request,
        "builder.html",
        identity,
        **heading(service, id, "builder"),
        policies=policies,
        wanted=wanted,
        settings=SETTINGS,
        strengthened=STRENGTHENED,
        values={setting.name: setting.default for setting in SETTINGS} | wanted.parameters,
        likes=list(masked(service, id)),
        others=OTHERS,
        drawn=DRAWN,
        behaviors=behaviors,
        experts=list(sources.experts),
        built=built,
        problem=problem,
        snippet=snippet(wanted),
    )


def _with_policy(request: Request, policy: str) -> Request:
    return Request({**request.scope, "query_string": urlencode({"policy": policy}).encode()})


def snippet(wanted: Asked) -> str:
    """The recipe as a pipeline file names it."""
    return yaml.safe_dump({"recipes": {BUILT: wanted.plan()}}, sort_keys=False, allow_unicode=True)


@router.get("/runs/{id}/builder.json")
def builder_json(id: Id, identity: Reader, service: The, wanted: Wanted) -> Response:
    """The same for the page's script; a problem is an answer like any other."""
    try:
        built = build(service, id, wanted)
    except MechmergeError as error:
        return JSONResponse(clean({"problem": str(error)}))
    return JSONResponse(
        clean(
            {
                "problem": None,
                "said": built.said,
                "notes": list(built.compiled.notes),
                "tables": [table._asdict() for table in built.tables],
                "recipe": built.recipe,
                "query": wanted.query(),
            }
        )
        # A text of several lines: `clean` would make it one.
        | {"snippet": snippet(wanted)}
    )


@router.get("/runs/{id}/builder/recipe.zip")
def download(id: Id, identity: Reader, service: The, wanted: Wanted) -> Response:
    """The recipe with its masks, as `mechmerge merge` takes them."""
    compiled = build(service, id, wanted).compiled
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        write_recipe(Path(name) / "recipe.yaml", compiled.recipe, compiled.masks)
        for path in sorted(Path(name).iterdir()):
            archive.write(path, path.name)
    headers = {"Content-Disposition": 'attachment; filename="recipe.zip"'}
    return Response(packed.getvalue(), media_type="application/zip", headers=headers)
