"""Templates to pages: everything that is not markup of our own is escaped, and its control characters are spelt out.

The Content-Security-Policy (https://www.w3.org/TR/CSP3/) lets a page load our one script and style and nothing else; scripts
write texts as text nodes only, which `require-trusted-types-for` enforces.
"""

from __future__ import annotations

import functools
import re
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mechmerge.errors import visible
from mechmerge.report.tables import printable
from mechmerge.service.pages.assets import address_of
from mechmerge.service.tokens import LOCAL, Identity

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def shown(value: Any) -> Any:
    """What a template writes: texts in one line and without control characters, markup as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def lines(text: str) -> Markup:
    """A text as it is, line by line and with its tabs, other control characters spelt out."""
    said = "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))
    return Markup(escape(said))  # noqa: S704 - escaped here


def editable(text: str) -> Markup:
    """A text for a text area: as it is, less the control characters that no form sends."""
    # HTML drops the first line break of a text area.
    return Markup("\n") + escape(_CONTROLS.sub("", text))


def when(seconds: float | None) -> Markup:
    """A time: how long ago, with the date in UTC behind it."""
    if seconds is None:
        return Markup("–")
    moment = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.strftime("%Y-%m-%dT%H:%M:%SZ"), moment.strftime("%Y-%m-%d %H:%M:%S UTC"), ago(seconds)
    )


def ago(seconds: float) -> str:
    """How long ago a time is, in words."""
    passed = max(time.time() - seconds, 0.0)
    return "just now" if passed < 10 else f"{duration(passed)} ago"


def duration(seconds: float) -> str:
    """A duration in its largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} d"


def size(number: float) -> str:
    """A number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"


@functools.cache
def environment() -> Environment:
    """The templates."""
    found = Environment(
        loader=PackageLoader("mechmerge.service", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"lines": lines, "editable": editable, "when": when, "duration": duration, "size": size}
    found.globals |= {"asset": address_of}
    return found


def render(request: Request, template: str, identity: Identity | None, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page.

    Args:
        request: what is answered.
        template: its file.
        identity: who sees it; None where that is not known.
        status: of the answer.
        values: what the template shows.
    """
    known = {"identity": identity, "path": request.url.path, "local": identity is not None and identity.user == LOCAL}
    text = environment().get_template(template).render(known | values)
    # Under `no-referrer`, as the guard sets it elsewhere, a browser says of our own forms that they come from nowhere.
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin"}
    return HTMLResponse(text, status, headers=headers)
