"""What the two processes of the sandbox say to each other: plain data as JSON, each message with its length before it.

Nothing but numbers, texts and containers of them can be said: no object of the answer's, no code (as pickle would bring).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

MESSAGE = 2_000_000
"""Most bytes of a message between the two; longer ones are refused."""
ITEMS = 100_000
"""Most items that are taken from an iterator that the answer returns."""


def encode(value: Any) -> Any:
    """A plain value as JSON; subclasses become their base, iterators their items.

    Raises:
        TypeError: not plain data.
    """
    if value is None or isinstance(value, (bool, float, str)):
        return float(value) if isinstance(value, float) else str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, dict):
        return ["dict", *([encode(k), encode(v)] for k, v in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    if isinstance(value, Iterator):
        return ["iterator", *map(encode, islice(value, ITEMS))]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(value: Any) -> Any:
    """The plain value that `encode` wrote.

    Raises:
        Exception: of any kind, where it did not.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise TypeError("not plain data")
        return value
    kind, *items = value
    match kind:
        case "int":
            return int(items[0], 16)
        case "bytes":
            return bytes.fromhex(items[0])
        case "complex":
            return complex(*items)
        case "dict":
            return {decode(k): decode(v) for k, v in items}
        case "iterator":
            return iter([decode(item) for item in items])
        case "list" | "tuple" | "set" | "frozenset":
            build: Callable[[Any], Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
            return build(decode(item) for item in items)
    raise TypeError(f"{kind!r} is not plain data")


def send(descriptor: int, message: Any) -> None:
    """Writes a message.

    Raises:
        ValueError: it is longer than `MESSAGE`.
    """
    data = json.dumps(message).encode()
    if len(data) > MESSAGE:
        raise ValueError("too large a value")
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Reads the next message.

    Raises:
        EOFError: the other side is gone.
        ValueError: what came is none.
    """
    (length,) = struct.unpack(">I", _exactly(descriptor, 4))
    if length > MESSAGE:
        raise ValueError("too long a message")
    return json.loads(_exactly(descriptor, length))


def _exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
