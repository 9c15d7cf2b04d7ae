"""mechmerge: model merging with mechanism-aware recipes.

The stages are functions of this package, by the names of the commands; each does what its command does:

    import mechmerge

    experts = {"a": "EXPERT_A", "b": "EXPERT_B"}
    mechmerge.effects("BASE", experts, {"formats": "a", "arithmetic": "b"}, "effects.safetensors")
    mechmerge.recipe(["effects.safetensors"], "conflict", "recipe.yaml")
    merged = mechmerge.merge("recipe.yaml", "merged")
    mechmerge.evaluate({"base": "BASE", "merged": merged}, ["formats"], "evaluation.json", against=["base"])

`mechmerge/api.py` says more of each. Nothing heavy is imported before it is needed: `import mechmerge` imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from mechmerge.version import __version__

if TYPE_CHECKING:
    from mechmerge.api import (
        SILENT,
        CheckpointError,
        EffectSettings,
        EvaluateSettings,
        GateRefused,
        InputError,
        LocalizeError,
        LocalizeSettings,
        MechmergeError,
        MissingError,
        Model,
        PairError,
        Progress,
        RoundSettings,
        SchemaError,
        SolveSettings,
        card,
        compare,
        effects,
        evaluate,
        export,
        gate,
        generate,
        inspect,
        localize,
        merge,
        publish,
        publish_scores,
        recipe,
        report,
        resolve,
        rounds,
        run,
        sweep,
    )

__all__ = [
    "SILENT",
    "CheckpointError",
    "EffectSettings",
    "EvaluateSettings",
    "GateRefused",
    "InputError",
    "LocalizeError",
    "LocalizeSettings",
    "MechmergeError",
    "MissingError",
    "Model",
    "PairError",
    "Progress",
    "RoundSettings",
    "SchemaError",
    "SolveSettings",
    "__version__",
    "card",
    "compare",
    "effects",
    "evaluate",
    "export",
    "gate",
    "generate",
    "inspect",
    "localize",
    "merge",
    "publish",
    "publish_scores",
    "recipe",
    "report",
    "resolve",
    "rounds",
    "run",
    "sweep",
]


class _Public:
    """A public name, looked up in `mechmerge.api` when it is used.

    Some stages have a subpackage of their name (`mechmerge.localize`). The import system stores a subpackage in its parent
    when it is imported, which would hide the function: a data descriptor goes before what is stored.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, package: types.ModuleType | None, _owner: type) -> Any:
        value = getattr(importlib.import_module("mechmerge.api"), self.name)
        subpackage = sys.modules.get(f"{__name__}.{self.name}")
        if subpackage is not None and value.__dict__ is not subpackage.__dict__:
            # `import mechmerge.localize.stage as stage` goes through this attribute: the function shows the subpackage's names.
            value.__dict__ = subpackage.__dict__
        return value

    def __set__(self, package: types.ModuleType, value: Any) -> None:
        """What the import system does with a subpackage; it stays in `sys.modules`."""


class _Package(types.ModuleType):
    """The package as a module, with its public names looked up when they are used."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


for _name in __all__:
    if _name != "__version__":
        setattr(_Package, _name, _Public(_name))
sys.modules[__name__].__class__ = _Package
