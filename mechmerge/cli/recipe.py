"""`mechmerge recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import click

from mechmerge.cli.common import (
    SEED,
    Finite,
    format_option,
    make_progress,
    named,
    named_numbers,
    pair_options,
    quiet_option,
    set_threads,
    show_all,
    threads_option,
)
from mechmerge.cli.recipe_emit import FORM, Form, emitted, yaml_beside
from mechmerge.cli.recipe_emit import emit as emit_command
from mechmerge.cli.recipe_explain import diff, explain, summary
from mechmerge.recipe.compile import BASELINES, POLICIES


class CommandWithOthers(click.Command):
    """A command that hands over to another one where its first argument is the other's name (a file of that name: ./diff)."""

    others: ClassVar[dict[str, click.Command]] = {"diff": diff, "emit": emit_command, "explain": explain}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that the arguments name."""
        if args and args[0] in self.others:
            return self.others[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Invokes the command that the context belongs to."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names the others below the options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, other.get_short_help_str(90)) for name, other in self.others.items()])


@click.command(cls=CommandWithOthers)
@click.argument("files", nargs=-1, required=True)
@click.option("--policy", type=click.Choice(POLICIES), required=True, help="How coefficients are chosen.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="recipe.yaml; its masks go beside it."
)
@click.option(
    "--budget",
    type=Finite(0, 1, min_open=True),
    help="top, weighted, solve: fraction of each expert's head + kv + neuron parameters.",
)
@click.option(
    "--overlap",
    type=click.Choice(["sum", "share", "winner"]),
    help="top, weighted: what a component that several experts want gets.",
)
@click.option(
    "--scale", type=click.Choice(["rank", "share"]), help="weighted: coefficients by rank or in proportion to scores."
)
@click.option("--weight", "weights", multiple=True, metavar="[NAME=]W",
              help="conflict: weight of a behaviour, as NAME=W; baselines but sce and model-stock: weight of every"
                   " expert, as W (linear, ties and della divide by it).")  # fmt: skip
@click.option(
    "--weighting", type=click.Choice(["own-gain", "equal"]), help="conflict: divide weights by the own expert's gain or not."
)
@click.option(
    "--agreement/--no-agreement",
    default=None,
    help="conflict: drop only what harms on both halves of the prompts; solve: the worst case is that of both halves.",
)
@click.option("--certainty", type=Finite(0, 100),
              help="conflict: standard errors by which a component must harm to be dropped (0: any harm).")  # fmt: skip
@click.option(
    "--protect", multiple=True, metavar="NAME=W", help="conflict: weight of a protected behaviour of the effect file."
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=NATS",
              help="solve: most predicted rise of a behaviour's loss above the base's (protected ones: 0.1).")  # fmt: skip
@click.option("--unproven", is_flag=True, default=None,
              help="solve: although the effects are not known to predict (the recipe says so).")  # fmt: skip
@click.option("--strength", "strengths", multiple=True, metavar="NAME=S",
              help="Multiply every coefficient of an expert (in linear, ties and della only ratios matter).")  # fmt: skip
@click.option("--density", type=Finite(0, 1), help="ties, dare-ties, della, breadcrumbs: share of every delta kept.")
@click.option("--lambda", type=Finite(-100, 100), help="ties, della: what is added to the base, times this (1).")
@click.option("--epsilon", type=Finite(0, 1), help="della: half the range of the drawing probabilities (.15).")
@click.option("--gamma", type=Finite(0, 1), help="breadcrumbs: share of the largest elements left out (.01).")
@click.option("--topk", type=Finite(0, 1), help="sce: share of elements kept, by variance over experts (1).")
@click.option("--filter-wise", is_flag=True, default=None, help="model-stock: a place of its own for every row of a tensor.")
@click.option("--within", metavar="FILE",
              help="ties, dare-ties: work only inside this recipe's coefficients.")  # fmt: skip
@click.option("--like", metavar="FILE", help="random, magnitude: the recipe whose shares they copy.")
@click.option("--per-layer", is_flag=True, help="random, magnitude: keep the count of each layer as well.")
@click.option("--match-norms", is_flag=True, default=None,
              help="random: shuffle within each layer among components whose deltas are about as large.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True,
              help="random, dare-ties, della: seed of what is drawn.")  # fmt: skip
@click.option("--out-dtype", type=click.Choice(["bfloat16", "float32", "float16"]), default="bfloat16", show_default=True)
@click.option(
    "--emit", type=FORM, help="Write mergekit YAML too, as [NAME.]mergekit.yaml beside the recipe (later: `recipe emit`)."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=MODEL",
    help="Where a model lies, for --emit, magnitude and --match-norms.",
)
@pair_options
@threads_option
@quiet_option
@format_option
def command(
    files: tuple[str, ...],
    policy: str,
    out: Path,
    weights: tuple[str, ...],
    protect: tuple[str, ...],
    limits: tuple[str, ...],
    strengths: tuple[str, ...],
    like: str | None,
    within: str | None,
    seed: int,
    emit: Form | None,
    models: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Compile measured FILES (score, effect and rounds files) into a merge recipe.

    FILES are paths, or files on the Hub: hf://datasets/owner/name[@revision]/scores/title.safetensors.

    conflict and solve need an effect file (solve takes a file of `rounds --solve` as well), rounds a rounds file, top
    and weighted score files of every expert; random and magnitude are made like another recipe; the baselines (mergekit's own
    methods) take only the models from the files.

    Prints what it takes from whom; `recipe explain` prints it again, `recipe diff A B` compares two, `recipe emit` writes
    mergekit YAML.
    """
    from mechmerge.cli.models import open_folders
    from mechmerge.merge.engine import norms_of
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.compile import compile_recipe
    from mechmerge.recipe.schema import read_recipe, write_recipe
    from mechmerge.recipe.sources import read_sources

    set_threads(threads)
    progress = make_progress(quiet)
    folders = open_folders(models)
    sources = read_sources([local_file(file, progress) for file in files])
    model = None if like is None else read_recipe(local_file(like, progress))
    common = {key: options.pop(key) for key in ("out_dtype", "vocabulary", "positions")}
    strong = {f"strength.{name}": value for name, value in named_numbers(strengths, "--strength").items()}
    compiled = compile_recipe(
        policy,
        sources,
        parameters=_parameters(policy, weights, options) | _of_behaviors(sources, protect, limits) | strong,
        seed=seed,
        like=model,
        within=None if within is None else read_recipe(local_file(within, progress)),
        delta_norms=None if model is None else lambda name: norms_of(model[0], name, folders),
        **common,
    )
    for note in compiled.notes:
        progress.note(note)
    text = None if emit is None else emitted(emit, compiled.recipe, compiled.masks, out, folders, progress)
    recipe = write_recipe(out, compiled.recipe, compiled.masks)
    if text is not None:
        from mechmerge.artifacts import write_text

        write_text(yaml_beside(out), text)
    show_all(
        summary(
            recipe, compiled.masks, sources.effects, sources.unit_parameters(), scores=sources.scores, rounds=sources.rounds
        ),
        output,
    )


def _parameters(policy: str, weights: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The policy's parameters from the options that were given; compile_recipe refuses those that belong to other policies."""
    from mechmerge.errors import InputError

    given = {key: value for key, value in options.items() if value is not None and key != "per_layer"}
    if options["per_layer"]:
        given["per_layer"] = True
    try:
        if policy in BASELINES:
            if len(weights) > 1:
                raise InputError("--weight", expected="one number for a baseline", found=" ".join(weights))
            return given | ({"weight": float(weights[0])} if weights else {})
        return given | {f"weight.{name}": float(value) for name, value in named(weights, "--weight").items()}
    except ValueError:
        raise InputError("--weight", expected="a number", found=" ".join(weights)) from None


def _of_behaviors(sources: Any, protect: tuple[str, ...], limits: tuple[str, ...]) -> dict[str, float]:
    """Weights of protected behaviours and limits of damage, as parameters.

    Raises:
        InputError: not NAME=NUMBER, or a behaviour that the effect file does not protect.
    """
    from mechmerge.errors import InputError

    weights = named_numbers(protect, "--protect")
    known = [] if sources.effects is None else [b.name for b in sources.effects.metadata.behaviors if b.protected]
    for name in weights:
        if name not in known:
            raise InputError(
                "--protect", expected=f"a protected behaviour of the effect file ({', '.join(known) or 'it has none'})",
                found=name, fix="measure it with `mechmerge effects --protect`",
            )  # fmt: skip
    found = {f"weight.{name}": value for name, value in weights.items()}
    return found | {f"limit.{name}": value for name, value in named_numbers(limits, "--limit").items()}
