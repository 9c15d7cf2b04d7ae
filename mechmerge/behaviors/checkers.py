"""Importing checker classes of other packages without what their parents import, and without network.

The packages that carry IFEval's and IFBench's checkers import a task manager or data sets on the way, and their helpers look
for NLTK data, and fetch it, when they are imported. While the checkers are imported, an empty package stands for the parent,
and NLTK neither looks nor fetches. Everything is put back, so that a later import gets the real packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

from mechmerge.errors import MissingError


def checker_classes(parent: str, module: str, what: str, package: str, fix: str) -> dict[str, Any]:
    """`INSTRUCTION_DICT` of a module: instruction id → checker class.

    Args:
        parent: the package that an empty one stands for.
        module: the module's full name, somewhere under `parent`.
        what: what the checkers are, for the error.
        package: the distribution that carries them.
        fix: how to get it.

    Raises:
        MissingError: the package, or one that it needs, is not installed.
    """
    try:
        top = importlib.util.find_spec(parent.partition(".")[0])
        if top is None or top.submodule_search_locations is None:
            raise ImportError(f"no package {parent.partition('.')[0]}")
        import nltk

        # A parent inside a package needs that package itself, which holds it as an attribute.
        outer = vars(importlib.import_module(parent.rpartition(".")[0])) if "." in parent else {}
    except ImportError as error:
        raise MissingError(what, expected=package, found=str(error), fix=fix) from None
    before = {name: loaded for name, loaded in sys.modules.items() if _under(parent, name)}
    leaf = parent.rpartition(".")[2]
    attribute = outer.get(leaf)
    find, download = nltk.data.find, nltk.download
    nltk.data.find = nltk.download = lambda *_, **__: True
    try:
        for name in before:
            del sys.modules[name]
        stub = types.ModuleType(parent)
        stub.__path__ = ["/".join((place, *parent.split(".")[1:])) for place in top.submodule_search_locations]
        sys.modules[parent] = stub
        found: dict[str, Any] = dict(importlib.import_module(module).INSTRUCTION_DICT)
    except ImportError as error:
        raise MissingError(what, expected=package, found=str(error), fix=fix) from None
    finally:
        nltk.data.find, nltk.download = find, download
        for name in [name for name in sys.modules if _under(parent, name)]:
            del sys.modules[name]
        sys.modules.update(before)
        if attribute is None:
            outer.pop(leaf, None)
        else:
            outer[leaf] = attribute
    return found


def _under(parent: str, name: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
