"""HTML from rows and texts: everything that comes from a file is escaped here, and nowhere else.

A small subset of Markdown is kept because tables are shared with the Markdown summary: `**strong**`, and `*emphasis*` at the
start of a text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from mechmerge.errors import visible
from mechmerge.report.tables import Rows, printable

_STRONG = re.compile(r"\*\*(.+?)\*\*")
_EMPHASIS = re.compile(r"^\*([^*]+)\*")
_NUMBER = re.compile(r"[+−-]?[\d.]+( ?[±%(\[].*|, [+−-]?[\d.]+)?|–")


def escaped(value: object) -> str:
    """A value as text in HTML, in one line and without control characters."""
    return html.escape(printable(str(value)))


def text(value: object) -> str:
    """The same with strong and emphasised parts."""
    return _EMPHASIS.sub(r"<em>\1</em>", _STRONG.sub(r"<strong>\1</strong>", escaped(value)))


def paragraph(value: object, kind: str = "") -> str:
    """A paragraph, with a class."""
    return f"<p{_class(kind)}>{text(value)}</p>"


def table(caption: str, rows: Rows) -> str:
    """A table in a container of its own that scrolls; empty where there are no rows. The first column heads its row."""
    header, body = rows
    if not body:
        return ""
    lines = [
        f'<div class="scroll" role="region" aria-label="{escaped(caption)}" tabindex="0"><table>',
        f"<caption><span>{text(caption)}</span></caption>",
        "<thead><tr>",
        *(f'<th scope="col">{text(name)}</th>' for name in header),
        "</tr></thead><tbody>",
    ]
    for row in body:
        first, *others = (str(value) for value in row)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{"".join(map(_cell, others))}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(value: str) -> str:
    kind = "worse" if value.startswith("▼") else "better" if value.startswith("▲") else ""
    return f"<td{_class(kind or ('number' if _NUMBER.fullmatch(value) else ''))}>{text(value)}</td>"


def badge(value: str, kind: str) -> str:
    """A short label; `kind` is good, bad or plain. Its text says what its colour says."""
    return f'<span class="badge {kind}">{text(value)}</span>'


def chart(name: str, **data: object) -> str:
    """The place of a chart that the page's script draws; hidden without it."""
    fields = "".join(f' data-{key}="{escaped(value)}"' for key, value in data.items())
    return f'<div class="chart" data-chart="{name}"{fields} hidden></div>'


def section(identity: str, title: str, *parts: str) -> str:
    """A section with its heading."""
    return "\n".join([f'<section id="{identity}">', f"<h2>{text(title)}</h2>", *filter(None, parts), "</section>"])


def details(summary: str, *parts: str, opened: bool = False, identity: str = "") -> str:
    """Parts that a reader opens; `summary` is HTML."""
    place = f' id="{identity}"' if identity else ""
    return "\n".join(
        [f"<details{place}{' open' if opened else ''}><summary>{summary}</summary>", *filter(None, parts), "</details>"]
    )


def bullets(items: Iterable[str]) -> str:
    """A list of HTML items."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def code(label: str, value: str) -> str:
    """A block of text as it is, line by line, with a label for screen readers."""
    lines = "\n".join(html.escape(visible(line)) for line in value.split("\n"))
    # The keyboard must reach what scrolls.
    return f'<pre class="scroll" role="region" aria-label="{escaped(label)}" tabindex="0"><code>{lines}</code></pre>'


def navigation(entries: Sequence[tuple[str, str]]) -> str:
    """Links to sections."""
    return bullets(f'<a href="#{identity}">{text(title)}</a>' for identity, title in entries)


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
