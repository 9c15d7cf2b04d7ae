"""Ways to damage a file: bytes, values of a JSON or YAML document, and the header of a safetensors file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

WEIRD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1e300, -0.0, 0.5, "", " ", "x", "\x00", "\x1b[31mred\x1b[0m",
    "../../etc/passwd",
    "/etc/passwd", "a/b", "..", "<script>alert(1)</script>", "[bold]", "\u202e", "\ud83d\ude00", "9" * 400, "x" * 5000, [], {},
    [None], [[]], [1, "a"], {"": {}}, {"a": {"b": {"c": 1}}}, "nan", float("nan"), float("inf"), "2026-01-01",
)  # fmt: skip
"""Values that stand in the place of a right one."""


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a document, its own (the empty path) first."""
    found = [prefix]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        items = []
    for key, inner in items[:40]:
        found += places(inner, (*prefix, key))
    return found


def replaced(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of the document, changed at a path: `change(parent, key)`."""
    holder = {"document": copy.deepcopy(document)}
    parent: Any = holder
    for key in ("document", *path)[:-1]:
        parent = parent[key]
    change(parent, ("document", *path)[-1])
    return holder["document"]


@st.composite
def documents(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three values replaced, dropped, doubled or renamed."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "rename", "double")))

        def change(parent: Any, key: Any, how: str = how) -> None:
            if how == "replace" or not isinstance(parent, dict) or key == "document":
                parent[key] = draw(st.sampled_from(WEIRD))
            elif how == "drop":
                del parent[key]
            elif how == "rename":
                parent[str(draw(st.sampled_from(WEIRD)))[:40]] = parent.pop(key)
            else:
                parent[key] = [parent[key], parent[key]]

        document = replaced(document, path, change)
    return document


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes, cut short, with some replaced, with some put in, or others altogether."""
    how = draw(st.sampled_from(("cut", "flip", "insert", "other")))
    if how == "other":
        return draw(st.binary(max_size=64))
    at = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:at]
    put = draw(st.binary(min_size=1, max_size=8))
    return content[:at] + put + content[at + (len(put) if how == "flip" else 0) :]


def as_json(value: Any) -> bytes:
    """JSON as Python's reader takes it (NaN included)."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def as_yaml(value: Any) -> bytes:
    """YAML without aliases."""
    return yaml.safe_dump(copy.deepcopy(json.loads(json.dumps(value))), allow_unicode=False).encode()


def texts(content: bytes, write: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """A JSON or YAML file, damaged as a document or as bytes."""
    document = json.loads(content) if write is as_json else yaml.safe_load(content)
    return st.one_of(documents(document).map(write), documents(document).map(write), damaged_bytes(content))


def tensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file, with its header (our own document in the metadata included) or its bytes damaged."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    def packed(value: Any) -> bytes:
        text = as_json(value)
        return len(text).to_bytes(8, "little") + text + body

    choices = [documents(header).map(packed), damaged_bytes(content)]
    own = (header.get("__metadata__") or {}).get("mechmerge")
    if own is not None:

        def inside(value: Any) -> bytes:
            return packed(header | {"__metadata__": {"mechmerge": json.dumps(value)}})

        choices.append(documents(json.loads(own)).map(inside))
    return st.one_of(choices)
