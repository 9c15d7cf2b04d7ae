"""`mechmerge recipe diff` and `mechmerge recipe explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import format_option, make_progress, show_all

if TYPE_CHECKING:
    from mechmerge.recipe.conflicts import Shapes


@click.command()
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@format_option
def diff(one: str, other: str, output: str) -> None:
    """Print how two recipes A and B differ: settings, components by expert and kind, predicted changes.

    A and B are paths, or files on the Hub. Exit code 0 whether they differ or not.
    """
    from mechmerge.models.components import UNIT_KINDS
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.differences import are_same, difference_rows, differing_fields, differing_sizes, predicted_difference
    from mechmerge.recipe.explain import mask_shapes, resolved
    from mechmerge.recipe.schema import read_recipe

    progress = make_progress(quiet=False)
    (a, a_masks), (b, b_masks) = (read_recipe(local_file(file, progress)) for file in (one, other))
    tables: dict[str, list[dict[str, Any]]] = {"what differs": differing_fields(a, b)}
    if all(recipe.mergekit is None or recipe.mergekit.within for recipe in (a, b)):
        shapes = mask_shapes(b_masks) | mask_shapes(a_masks)
        if sizes := differing_sizes(a_masks, b_masks):
            tables["what differs"] += sizes
        elif set(UNIT_KINDS) <= shapes.keys():
            first, second = (resolved(recipe, masks, shapes) for recipe, masks in ((a, a_masks), (b, b_masks)))
            shared = {name: (first, second) for name in a.experts if name in b.experts}
            tables["components"] = difference_rows(shared)
    if a.predicted or b.predicted:
        tables["against the base"] = predicted_difference(a, b)
    if output == "table" and are_same(a, a_masks, b, b_masks):
        click.echo("A and B are the same recipe")
        return
    if output == "table" and not tables["what differs"] and not any(row["differ"] for row in tables.get("components", [])):
        click.echo("A and B make the same merge; what they record of it differs")
    show_all(tables, output)


@click.command()
@click.argument("recipe")
@click.option("--component", metavar="NAME", help="One component, such as L7.head.3, L7.attention or embed.")
@click.option("--effects", metavar="FILE", help="The effect file that it was made from: adds what is expected and contested.")
@click.option("--rounds", metavar="FILE", help="The rounds file that it was made from: adds what each round did.")
@click.option("--scores", multiple=True, metavar="FILE",
              help="top, weighted: the score files that it was made from: adds what each expert wanted.")  # fmt: skip
@click.option("--all-conflicts", is_flag=True, help="Name every conflict, not the ten strongest.")
@format_option
def explain(
    recipe: str,
    component: str | None,
    effects: str | None,
    rounds: str | None,
    scores: tuple[str, ...],
    all_conflicts: bool,
    output: str,
) -> None:
    """Print what RECIPE takes from whom, or what it does with one component and why.

    Without --component: shares and parameters by expert, kind and depth, components that several experts put in, and the
    expected change and recovery of each behaviour; with what it was made from also what was contested, and how each conflict
    was resolved.

    With --component: its coefficient from each expert, what decides it, and with --effects what it does to each behaviour and
    the sums that decide. What cannot be told is named, with what would tell it.
    """
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.conflicts import STRONGEST
    from mechmerge.recipe.schema import read_recipe
    from mechmerge.recipe.sources import read_again

    progress = make_progress(quiet=False)

    def local(file: str | None) -> Any:
        return None if file is None else local_file(file, progress)

    made, masks = read_recipe(local(recipe))
    sources, notes = read_again(made, masks, local(effects), local(rounds), [local(file) for file in scores])
    for note in notes:
        progress.note(note)
    measured, told = (sources.effects, sources.rounds, sources.scores), _sizes_of(made)
    if component is not None:
        show_all(of_component(made, masks, component, *measured, told=told), output)
        return
    most = None if all_conflicts else STRONGEST
    show_all(
        summary(made, masks, sources.effects, rounds=sources.rounds, scores=sources.scores, strongest=most, told=told), output
    )


def _sizes_of(recipe: Any) -> Shapes:
    """[layers, units] of the recipe's base by kind, where it is still found; rules alone do not tell."""
    from mechmerge.errors import MechmergeError
    from mechmerge.models.checkpoint import Checkpoint
    from mechmerge.models.components import UNIT_KINDS
    from mechmerge.models.references import find

    if not recipe.rules and recipe.masks is not None:
        return {}
    try:
        arch = Checkpoint(find(recipe.base)).arch
    except MechmergeError:
        return {}
    return {kind: (arch.layers, arch.units(kind)) for kind in UNIT_KINDS}


def of_component(
    recipe: Any,
    masks: Any,
    component: str,
    effects: Any = None,
    rounds: Any = None,
    scores: Any = None,
    told: Shapes | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The tables of one component, by title; `told` are sizes for where neither masks nor effects tell them."""
    from mechmerge.recipe.conflicts import counts_of, effect_shapes, weight_rows
    from mechmerge.recipe.explain import mask_shapes, plain_architecture, resolved, undecided_rows
    from mechmerge.recipe.one_component import component_effects, component_rows, score_rows, weighted_rows

    shapes = {**(told or {}), **effect_shapes(effects), **mask_shapes(masks)}
    found = resolved(recipe, masks, shapes)
    tables = {component: component_rows(recipe, masks, found, component)}
    if scores and recipe.policy.name in ("top", "weighted"):
        tables[f"scores of {component}"] = score_rows(recipe, found, scores, component)
    if effects is not None:
        title = f"effects of {component}, {effects.metadata.unit} (positive helps)"
        tables[title] = component_effects(effects, component, plain_architecture(shapes, tied=False))
        counts = counts_of(recipe, effects, rounds)
        if not isinstance(counts, str):
            tables["what an effect counts"] = weight_rows(recipe, effects, counts)
            title = f"weighted effects of {component} (effect × what it counts)"
            tables[title] = weighted_rows(recipe, found, effects, counts, component)
    if unknown := undecided_rows(recipe, effects, rounds, scores):
        tables["not known"] = unknown
    return tables


def summary(
    recipe: Any,
    masks: Any,
    effects: Any = None,
    sizes: dict[str, int] | None = None,
    *,
    rounds: Any = None,
    scores: Any = None,
    strongest: int | None = 10,
    told: Shapes | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The tables of a whole recipe, by title; those that cannot be made are left out, and what nobody can tell is named.

    Args:
        recipe: the recipe.
        masks: its masks.
        effects: the effect file that it was made from, where there is one.
        sizes: parameters of a unit by kind, where the recipe does not tell.
        rounds: the rounds file that it was made from.
        scores: the score files that it was made from, by expert.
        strongest: how many conflicts are named; None: all.
        told: [layers, units] by kind, for where neither masks nor effects tell them.
    """
    from mechmerge.models.components import UNIT_KINDS
    from mechmerge.recipe.conflicts import effect_shapes
    from mechmerge.recipe.explain import (
        contested_rows,
        counted_in,
        depth_rows,
        expected_rows,
        has_coefficients,
        mask_shapes,
        overlap_rows,
        own_gains,
        parameters_of,
        predicted_by,
        resolved,
        round_rows,
        rule_rows,
        shares,
        undecided_rows,
        unexpected_rows,
    )
    from mechmerge.recipe.sources import effects_of

    parameters = recipe.parameters or sizes or (effects.metadata.parameters if effects is not None else {})
    shapes = {**(told or {}), **effect_shapes(effects), **mask_shapes(masks)}
    found = resolved(recipe, masks, shapes) if has_coefficients(recipe) and set(UNIT_KINDS) <= shapes.keys() else None
    rows = shares(recipe, masks, parameters, found)
    tables = {f"recipe {recipe.policy.name}": rows}
    if recipe.rules:
        tables["rules (the most specific decides)"] = rule_rows(recipe)
    # A recipe made like another one has that one's names, and may have its experts.
    effects = None if effects is None else effects_of(recipe, effects)
    if not has_coefficients(recipe):
        tables["by depth"] = depth_rows(recipe, None, {})
    elif found is not None:
        if parameters:
            for row, (taken, whole) in zip(rows, parameters_of(recipe, found, parameters).values(), strict=True):
                row["parameters"] = f"{taken:,.0f} of {whole:,}"
        tables["by depth"] = depth_rows(recipe, found, parameters)
        if len(recipe.experts) > 1:
            tables["components of several experts"] = overlap_rows(recipe, found)
        if effects is not None:
            tables["contested components"] = contested_rows(recipe, found, effects)
        tables |= _conflicts(recipe, found, effects, rounds, scores, strongest)
    if rounds is not None:
        tables["rounds"] = round_rows(rounds)
    if (expected := predicted_by(recipe, found, effects)) is not None:
        change, metric = expected
        gains = own_gains(recipe, metric, effects, rounds)
        tables[f"against the base, {counted_in(recipe, metric, effects)}"] = expected_rows(
            recipe, change, metric, gains, effects
        )
    if unknown := unexpected_rows(recipe, effects, rounds) + undecided_rows(recipe, effects, rounds, scores):
        tables["not known"] = unknown
    return tables


def _conflicts(
    recipe: Any, found: Any, effects: Any, rounds: Any, scores: Any, strongest: int | None
) -> dict[str, list[dict[str, Any]]]:
    """The table that names what was contested, under a title that says of how many; nothing where nothing tells."""
    from mechmerge.recipe.conflicts import conflict_rows, counts_of, overlap_conflict_rows

    if recipe.policy.name in ("top", "weighted"):
        rows, number = overlap_conflict_rows(recipe, found, scores, strongest)
    elif effects is None or isinstance(counts := counts_of(recipe, effects, rounds), str):
        return {}
    else:
        rows, number = conflict_rows(recipe, found, effects, counts, strongest)
    cut = f", the {len(rows)} strongest of {number:,}" if len(rows) < number else ", strongest first"
    return {f"conflicts{cut}": rows} if rows else {}
