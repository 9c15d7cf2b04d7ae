"""What we use of mergekit (https://github.com/arcee-ai/mergekit), which has no stable API: one version, probed before use.

`mechmerge mergekit TOOL …` runs its command-line tools with our merge method registered; by itself mergekit loads no plug-ins.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from mechmerge.errors import InputError, MissingError

VERSION = "0.1.5"
PARTS: Mapping[str, tuple[str, ...]] = {
    "mergekit.architecture.base:ModelArchitecture": (),
    "mergekit.architecture.base:ModuleArchitecture": (),
    "mergekit.architecture.base:ModuleDefinition": (),
    "mergekit.architecture.base:WeightInfo": (),
    "mergekit.config:MergeConfiguration": (),
    "mergekit.graph:Executor": ("targets", "math_device", "storage_device"),
    "mergekit.io.tasks:LoaderCache": (),
    "mergekit.io.tasks:SaveTensor": (),
    "mergekit.merge:MergeOptions": (),
    "mergekit.plan:MergePlanner": ("config", "arch_info", "options", "out_model_config"),
    "mergekit.merge_methods.base:BasePolicy": (),
    "mergekit.merge_methods.base:InputContract": (),
    "mergekit.merge_methods.base:PerNonBase": (),
    "mergekit.merge_methods.base:TensorGroup": (),
    "mergekit.merge_methods.easy_define:merge_method": ("func",),
    "mergekit.merge_methods.registry:register": (),
}
"""`module:name` → parameters that it must have."""


def probe(parts: Mapping[str, tuple[str, ...]] = PARTS, version: str = VERSION) -> None:
    """Checks that mergekit is there, in the version that this was written for, with everything that is used of it.

    Raises:
        MissingError: naming what is missing.
    """
    fix = f"pip install mergekit=={version}"
    try:
        found = metadata.version("mergekit")
    except metadata.PackageNotFoundError:
        raise MissingError("mergekit", expected=f"version {version}", found="none", fix=fix) from None
    if found != version:
        raise MissingError("mergekit", expected=f"version {version}", found=found, fix=fix)
    with warnings.catch_warnings():
        # numpy.core, through one of mergekit's dependencies
        warnings.simplefilter("ignore", DeprecationWarning)
        for part, parameters in parts.items():
            module, _, name = part.partition(":")
            try:
                thing = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise MissingError(f"mergekit {found}", expected=part, found=str(error), fix=fix) from None
            missing = set(parameters) - set(inspect.signature(thing).parameters)
            if missing:
                raise MissingError(f"mergekit {found}", expected=f"{part} with {sorted(missing)[0]!r}", found="none", fix=fix)


def register_method() -> None:
    """Puts `mechmerge_masked` into mergekit's registry.

    Raises:
        MissingError: mergekit is not the version that this was written for.
    """
    probe()
    import mechmerge.merge.method  # noqa: F401 - registers on import


def tools() -> dict[str, metadata.EntryPoint]:
    """mergekit's command-line tools by name, without `mergekit-` in front.

    Raises:
        MissingError: mergekit is not there.
    """
    try:
        scripts = metadata.distribution("mergekit").entry_points.select(group="console_scripts")
    except metadata.PackageNotFoundError:
        raise MissingError(
            "mergekit", expected=f"version {VERSION}", found="none", fix=f"pip install mergekit=={VERSION}"
        ) from None
    return {script.name.removeprefix("mergekit-"): script for script in sorted(scripts, key=lambda script: script.name)}


def run_tool(name: str, arguments: Sequence[str]) -> Any:
    """Runs one of mergekit's own command-line tools in this process, our method registered.

    Args:
        name: `yaml`, `multi`, ... or `mergekit-yaml`, ...
        arguments: its own.

    Raises:
        InputError: no such tool.
        MissingError: mergekit, or something that the tool needs, is not there.
    """
    known = tools()
    script = known.get(name.removeprefix("mergekit-"))
    if script is None:
        raise InputError(f"mergekit's tool {name!r}", expected=f"one of {', '.join(known)}", found="none of them")
    register_method()
    try:
        command = script.load()
    except ImportError as error:
        raise MissingError(script.name, expected="the packages that it needs", found=str(error)) from None
    before = sys.argv
    sys.argv = [script.name, *arguments]
    try:
        # click's own way in: usage errors and `--help` are mergekit's
        return command.main(args=list(arguments), prog_name=f"mechmerge mergekit {name}", standalone_mode=False)
    finally:
        sys.argv = before
