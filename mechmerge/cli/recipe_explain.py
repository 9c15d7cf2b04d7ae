"""`mechmerge recipe diff` and `mechmerge recipe explain`."""

from __future__ import annotations

from typing import Any

import click

from mechmerge.cli.common import format_option, make_progress, show_all

EFFECTS = click.option(
    "--effects", metavar="FILE", help="The effect file that it was made from: adds what is expected and contested."
)


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
    from mechmerge.recipe.explain import (
        difference_rows,
        differing_fields,
        differing_sizes,
        mask_shapes,
        predicted_difference,
        resolved,
    )
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
    same = not tables["what differs"] and not any(row["differ"] for row in tables.get("components", []))
    if same and output == "table":
        click.echo("A and B are the same recipe")
        return
    show_all(tables, output)


@click.command()
@click.argument("recipe")
@click.option("--component", metavar="NAME", help="One component, such as L7.head.3, L7.attention or embed.")
@EFFECTS
@format_option
def explain(recipe: str, component: str | None, effects: str | None, output: str) -> None:
    """Print what RECIPE takes from whom, or what it does with one component and why.

    Without --component: shares and parameters by expert, kind and depth, components that several experts put in, and the
    expected change of each behaviour; with --effects also what was contested, and the expected recovery.
    With --component: its coefficient from each expert, what decides it, and with --effects what it does to each behaviour.
    """
    from mechmerge.localize.effect_file import read_effects
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.explain import (
        component_effects,
        component_rows,
        effect_shapes,
        mask_shapes,
        plain_architecture,
        resolved,
    )
    from mechmerge.recipe.schema import read_recipe

    progress = make_progress(quiet=False)
    made, masks = read_recipe(local_file(recipe, progress))
    measured = None if effects is None else read_effects(local_file(effects, progress))
    if component is None:
        show_all(summary(made, masks, measured), output)
        return
    shapes = effect_shapes(measured) | mask_shapes(masks)
    found = resolved(made, masks, shapes)
    tables = {component: component_rows(made, masks, found, component)}
    if measured is not None:
        title = f"effects of {component}, {measured.metadata.unit} (positive helps)"
        tables[title] = component_effects(measured, component, plain_architecture(shapes, tied=False))
    show_all(tables, output)


def summary(
    recipe: Any, masks: Any, effects: Any = None, sizes: dict[str, int] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The tables of a whole recipe, by title; those that cannot be made are left out.

    Args:
        recipe: the recipe.
        masks: its masks.
        effects: the effect file that it was made from, where there is one.
        sizes: parameters of a unit by kind, where the recipe does not tell.
    """
    from mechmerge.localize.effect_file import UNITS
    from mechmerge.models.components import UNIT_KINDS
    from mechmerge.recipe.compile import shares
    from mechmerge.recipe.explain import (
        contested_rows,
        depth_rows,
        effect_shapes,
        expected_rows,
        mask_shapes,
        overlap_rows,
        parameters_of,
        resolved,
    )

    told = recipe.parameters or sizes or (effects.metadata.parameters if effects is not None else {})
    rows = shares(recipe, masks, told)
    tables = {f"recipe {recipe.policy.name}": rows}
    shapes = effect_shapes(effects) | mask_shapes(masks)
    if (recipe.mergekit is None or recipe.mergekit.within) and set(UNIT_KINDS) <= shapes.keys():
        found = resolved(recipe, masks, shapes)
        if told:
            for row, (taken, whole) in zip(rows, parameters_of(recipe, found, told).values(), strict=True):
                row["parameters"] = f"{taken:,.0f} of {whole:,}"
        tables["by depth"] = depth_rows(recipe, found, told)
        if len(recipe.experts) > 1:
            tables["components of several experts"] = overlap_rows(recipe, found)
        if effects is not None:
            tables["contested components"] = contested_rows(recipe, found, effects)
    if recipe.predicted is not None:
        tables[f"against the base, {UNITS[recipe.predicted_on]}"] = expected_rows(recipe, effects)
    return tables
