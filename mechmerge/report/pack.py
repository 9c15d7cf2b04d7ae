"""Arrays and texts as a page holds them: short, exact enough to read, and unable to end the script element they stand in.

An array is `{"t": kind, "n": [size, …], "d": data}`:
    f32    each float32 in base64, little end first: for numbers that count something
    f24    the upper 24 bits of each float32 in the same way: 1.5e-5 relative, more than four digits
    b16    the upper 16 bits (bfloat16): for standard errors, 0.4 % relative
    bits   one bit a value, first value lowest, for arrays of 0 and 1
    const  one number that holds everywhere
    few    [[flat index, value], …]; NaN everywhere else
JSON in HTML: every `<`, `>` and `&` is written as an escape, so that no text can be read as markup
(https://html.spec.whatwg.org/multipage/scripting.html#restrictions-for-contents-of-script-elements).
"""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import numpy as np

from mechmerge.report.style import Array
from mechmerge.report.tables import printable

Packed = dict[str, Any]


Kind = Literal["f32", "f24", "b16"]
DROPPED = {"f32": 0, "f24": 8, "b16": 16}
"""Lower bits of a float32 that each kind leaves out."""


def pack(values: Array, kind: Kind = "f24") -> Packed:
    """An array of numbers or NaN in the shortest form that fits; `kind` is taken where no shorter one is exact."""
    values = np.ascontiguousarray(values, np.float32)
    size = {"n": list(values.shape)}
    first = values.flat[0] if values.size else np.float32(0)
    if np.isfinite(first) and (values == first).all():
        return {"t": "const", **size, "d": digits(float(first))}
    if ((values == 0) | (values == 1)).all():
        return {"t": "bits", **size, "d": _text(np.packbits(values.astype(bool).ravel(), bitorder="little"))}
    there = np.flatnonzero(np.isfinite(values))
    if 8 * len(there) < values.size:
        return {"t": "few", **size, "d": [[int(i), digits(float(values.flat[i]))] for i in there]}
    drop = DROPPED[kind]
    # Rounded to nearest; NaN's own bits (0x7fc00000) stay NaN.
    raw = (values.astype("<f4").view("<u4").astype(np.uint64) + (1 << drop >> 1)).astype("<u4") >> drop
    width = (32 - drop) // 8
    return {"t": kind, **size, "d": _text(raw.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width])}


def digits(value: float) -> float | None:
    """A number rounded to four significant digits; None where it is not finite (JSON has no NaN)."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _text(raw: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(raw).tobytes()).decode()


def clean(value: Any) -> Any:
    """A JSON-able value with all its texts, keys included, made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    return value


def script_json(value: Any) -> str:
    """JSON for a script element of type application/json."""
    text = json.dumps(clean(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
