"""Whether the mergekit that is installed is the one that we call: it is pinned, but an environment may hold another."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from mechmerge.errors import MissingError

VERSION = "0.1.5"
NEEDED: dict[str, tuple[str, ...]] = {
    "mergekit.architecture:arch_info_for_config": ("config",),
    "mergekit.architecture.base:ModelArchitecture": ("modules", "architectures", "model_type"),
    "mergekit.architecture.base:ModuleDefinition": ("architecture",),
    "mergekit.architecture.base:WeightInfo": ("name", "aliases"),
    "mergekit.config:MergeConfiguration.model_validate": (),
    "mergekit.graph:Executor": ("targets", "math_device", "storage_device"),
    "mergekit.graph:Executor.run": ("quiet",),
    "mergekit.io.tasks:LoaderCache": (),
    "mergekit.io.tasks:SaveTensor": (),
    "mergekit.merge:MergeOptions": ("quiet", "write_model_card", "copy_tokenizer", "out_shard_size", "device"),
    "mergekit.plan:MergePlanner.plan_to_disk": ("out_path",),
    "mergekit.merge_methods.base:BasePolicy.REQUIRED": (),
    "mergekit.merge_methods.base:InputContract": ("base",),
    "mergekit.merge_methods.base:PerNonBase": (),
    "mergekit.merge_methods.base:TensorGroup": (),
    "mergekit.merge_methods.easy_define:merge_method": ("func",),
    "mergekit.merge_methods.registry:register": (),
}
"""What is used of mergekit, with the parameters that are named."""


def probe(needed: dict[str, tuple[str, ...]] | None = None, wanted: str = VERSION) -> str:
    """Checks version, names and parameters; returns mergekit's version.

    Raises:
        MissingError: mergekit is not there, or not the one that is needed.
    """
    import importlib
    from importlib import metadata

    fix = f"pip install mergekit=={wanted}"
    try:
        version = metadata.version("mergekit")
    except metadata.PackageNotFoundError:
        raise MissingError("mergekit", expected=f"version {wanted}", found="none", fix=fix) from None
    if version != wanted:
        raise MissingError("mergekit", expected=f"version {wanted}", found=version, fix=fix)
    for place, parameters in (NEEDED if needed is None else needed).items():
        module, _, names = place.partition(":")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                found: Any = importlib.import_module(module)
                for name in names.split("."):
                    found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise MissingError(f"mergekit {version}", expected=place, found=str(error), fix=fix) from None
        lacking = set(parameters) - set(inspect.signature(found).parameters) if parameters else set()
        if lacking:
            raise MissingError(
                f"mergekit {version}", expected=f"{place} with {', '.join(sorted(lacking))}", found="none", fix=fix
            )
    return version
