"""The report as one page: `report.html`, complete in itself, that answers to mouse, touch and keyboard.

Nothing is fetched: style, script and data stand in the file, and its Content-Security-Policy (https://www.w3.org/TR/CSP3/)
allows exactly that style and that script, by digest. Texts from files are escaped (`markup`), data is JSON in a script element
that is never run (`pack`), and the page's own script writes texts as text nodes only, which `require-trusted-types-for`
enforces. Tables and texts are there without JavaScript too.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template

from mechmerge.artifacts import write_text
from mechmerge.report import page_sections
from mechmerge.report.files import RunFiles
from mechmerge.report.loading import Measurements, read_run
from mechmerge.report.markup import escaped, navigation, paragraph
from mechmerge.report.pack import script_json
from mechmerge.report.page_data import MOST_NEURONS, page_data
from mechmerge.report.page_sections import LicenseOf
from mechmerge.report.recipes import coefficient_arrays
from mechmerge.versions import versions

NAME = "report.html"
POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def write_page(
    files: RunFiles, out: Path, license_of: LicenseOf = lambda model: None, *, most_neurons: int = MOST_NEURONS
) -> Path:
    """Writes the page of a run.

    Args:
        files: what the run holds (`find_run_files`).
        out: the folder to write into (the run directory).
        license_of: the licence of a parent, or None where it is not known.
        most_neurons: neuron scores that the page holds one by one (see `page_data`).

    Returns:
        The path of report.html.

    Raises:
        InputError: measurements of different bases, or a recipe that does not fit the model.
        SchemaError: a file that breaks its schema.
    """
    run = read_run(files)
    kept = {name: coefficient_arrays(path, run) for name, path in run.recipes.items()}
    sections = {
        "models": page_sections.models(run, files, license_of),
        "evaluation": page_sections.evaluation(run, files.publish),
        "recipes": page_sections.recipes(run, kept),
        "rounds": page_sections.rounds(run),
        "effects": page_sections.effects(run),
        "behaviours": page_sections.behaviors(run, kept),
        "limits": page_sections.limits(run),
        "reproduce": page_sections.reproduction(run, files.publish, versions()),
    }
    title = files.title or "Report"
    style, script = page_asset("page.css"), scoped(page_scripts())
    page = Template(page_asset("template.html")).substitute(
        policy=POLICY.format(script=_digest(script), style=_digest(style)),
        title=f"{escaped(title)} – mechmerge",
        style=style,
        navigation=navigation([(key, page_sections.TITLES[key]) for key, html in sections.items() if html]),
        main="\n".join([_head(title, files, run), *filter(None, sections.values())]),
        footer=escaped(f"Written by {', '.join(f'{name} {version}' for name, version in versions().items())}."),
        data=script_json(page_data(run, files.publish, kept, most_neurons)),
        script=script,
    )
    write_text(out / NAME, page)
    return out / NAME


def _head(title: str, files: RunFiles, run: Measurements) -> str:
    parts = [f"<h1>{escaped(title)}</h1>"]
    if files.notes:
        parts.append(paragraph(files.notes))
    if files.publish:
        parts.append(paragraph(f"The recipe that the pipeline publishes: **{files.publish}**."))
    parts.append(page_sections.gate(run))
    parts.append(paragraph("Charts need JavaScript; what they show stands in the tables as well.", "unscripted"))
    return "\n".join(filter(None, parts))


def page_asset(name: str) -> str:
    """A file of the page's folder."""
    return (resources.files("mechmerge.report") / "page" / name).read_text("utf-8")


def page_scripts() -> dict[str, str]:
    """The parts of the page's script by name, in order: `0-data.js` finds the data, `9-start.js` sets everything up."""
    folder = resources.files("mechmerge.report") / "page"
    return {name: page_asset(name) for name in sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".js"))}


def scoped(parts: Mapping[str, str]) -> str:
    """A script of several parts, in one scope of their own."""
    return '"use strict";\n(() => {\n' + "\n".join(parts.values()) + "})();\n"


def _digest(content: str) -> str:
    """The digest that a policy names: of what stands between the tags."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
