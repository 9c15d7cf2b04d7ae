"""mergekit's own command-line tools (https://github.com/arcee-ai/mergekit) with our merge method registered, in this process.

By itself mergekit loads no plug-ins, so a YAML that names `mechmerge_masked` is refused by a plain `mergekit-yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click

from mechmerge.errors import InputError, MechmergeError, MissingError, machine_error
from mechmerge.merge.probe import VERSION, probe
from mechmerge.models.checkpoint import Checkpoint


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


def check_plain(base: Checkpoint) -> None:
    """Whether a plain mergekit finds all tensors that its own tables ask for. Our engine reads names from checkpoints instead.

    Raises:
        InputError: it does not: buffers of older GPT-NeoX checkpoints, a head where the base's is tied.
        MissingError: mergekit is not the version that this was written for.
    """
    probe()
    from mergekit.architecture import arch_info_for_config
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    try:
        known = arch_info_for_config(config)
    except (RuntimeError, TypeError):
        raise InputError(
            f"{base.folder / 'config.json'}", expected="one name in `architectures`, as mergekit wants it",
            found=str(config.architectures), fix="merge it with `mechmerge merge`",
        ) from None  # fmt: skip
    there = {*base.entries, *base.stored.values()}
    for weight in known.all_weights(config) if known is not None else ():
        if not weight.optional and not {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())} & there:
            raise InputError(
                f"{base.config.get('model_type')} in mergekit {VERSION}", expected=f"a tensor {weight.name}",
                found="none in this base", fix="merge it with `mechmerge merge`",
            )  # fmt: skip


def run_tool(name: str, arguments: Sequence[str]) -> Any:
    """Runs one of mergekit's own command-line tools in this process, our method registered.

    Args:
        name: `yaml`, `multi`, ... or `mergekit-yaml`, ...
        arguments: its own.

    Raises:
        InputError: no such tool, or it fails over what it is given.
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
    except (MechmergeError, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        # mergekit checks little of what it is told, and raises whatever comes of it.
        if machine_error(error) is not None:
            raise
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"mergekit {name}", expected="arguments and files that it can work with", found=told) from error
    finally:
        sys.argv = before
