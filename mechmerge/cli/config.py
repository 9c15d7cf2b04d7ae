"""The user's configuration: `~/.config/mechmerge/config.toml`, or the file that `MECHMERGE_CONFIG` names.

    device = "cuda"            # options that commands share: device, dtype, seed, threads, format, quiet
    threads = 8
    cache_folder = "/data/mechmerge"   # as MECHMERGE_CACHE

    [evaluate]                 # options of one command, by their long names
    batch = 32

What is said more closely wins: an option on the command line, then MECHMERGE_COMMAND_OPTION, then MECHMERGE_OPTION (of the
shared ones), then the command's table here, then the top of the file, then the default. A file in the working folder is not
looked for: a folder that one enters must not change what commands do.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from mechmerge.errors import InputError, SchemaError

SHARED = ("device", "dtype", "seed", "threads", "format", "quiet")
"""Options that may stand at the top of the file, and in the environment without a command's name."""

FOLDER = "cache_folder"
"""The key that names the cache's folder."""


def config_file() -> Path | None:
    """The file to read; None where there is none.

    Raises:
        InputError: `MECHMERGE_CONFIG` names a file that is not there.
    """
    named = os.environ.get("MECHMERGE_CONFIG")
    if named:
        path = Path(named).expanduser()
        if not path.exists():
            raise InputError("MECHMERGE_CONFIG", expected="a file", found=f"nothing at {path}")
        return path
    home = os.environ.get("XDG_CONFIG_HOME")
    path = (Path(home) if home else Path.home() / ".config") / "mechmerge" / "config.toml"
    return path if path.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """Parses a configuration file.

    Raises:
        InputError, SchemaError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), expected="a readable UTF-8 text file", found=str(error)) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SchemaError(str(path), expected="valid TOML", found=str(error)) from None


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file may set, by long name with `_`."""
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("help", None):
            longest = max(parameter.opts, key=len)
            found[longest.removeprefix("--").replace("-", "_")] = parameter
    return found


def inner_commands(command: click.Command) -> dict[str, click.Command]:
    """The commands inside a command: those of a group, or those that `recipe` hands over to."""
    return dict(command.commands if isinstance(command, click.Group) else getattr(command, "others", {}))


def name_variables(command: click.Command, prefix: str) -> None:
    """Names the environment variable of every option by its long name (click would take the parameter's name in our code)."""
    for key, option in options_of(command).items():
        option.envvar = option.envvar or f"{prefix}_{key.upper()}"
    for name, inner in inner_commands(command).items():
        name_variables(inner, f"{prefix}_{name.upper()}")


def defaults(
    group: click.Group, context: click.Context, names: Iterable[str], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """click's map of defaults for some commands of a group: what the file says, under what the shared environment says.

    Args:
        group: the group.
        context: its context.
        names: of the commands that are wanted.
        values: the parsed file: shared options and tables.
        where: how errors call it.

    Raises:
        SchemaError: an unknown key, a value that cannot be one, or an option in a table that the command does not have.
    """
    known = set(group.list_commands(context))
    for key, value in values.items():
        if isinstance(value, Mapping):
            if key.replace("_", "-") not in known:
                raise SchemaError(f"{where}: [{key}]", expected=f"a command ({', '.join(sorted(known))})", found="none")
        elif key not in (*SHARED, FOLDER):
            raise SchemaError(f"{where}: {key}", expected=f"one of {', '.join((*SHARED, FOLDER))}, or a command's table")
    tables = {key.replace("_", "-"): value for key, value in values.items() if isinstance(value, Mapping)}
    shared = {key: value for key, value in values.items() if key in SHARED} | environment()
    wanted = {*names, *tables}
    return {name: _of_command(group, context, name, shared, tables.get(name, {}), where) for name in wanted & known}


def environment() -> dict[str, str]:
    """Shared options in the environment, such as `MECHMERGE_DEVICE`."""
    return {name: os.environ[f"MECHMERGE_{name.upper()}"] for name in SHARED if os.environ.get(f"MECHMERGE_{name.upper()}")}


def _of_command(
    group: click.Group, context: click.Context, name: str, shared: Mapping[str, Any], table: Mapping[str, Any], where: str
) -> dict[str, Any]:
    command = group.get_command(context, name)
    if command is None:
        return {}
    nested: dict[str, Any] = {}
    if isinstance(command, click.Group):
        inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
        table = {key: value for key, value in table.items() if key not in inner}
        if table and not options_of(command):
            raise SchemaError(f"{where}: [{name}] {next(iter(table))}", expected=f"a table [{name}.COMMAND]", found="an option")
        below = context.__class__(command, parent=context, info_name=name)
        if unknown := [key for key in inner if key not in command.list_commands(below)]:
            raise SchemaError(f"{where}: [{name}.{unknown[0]}]", expected=f"one of {', '.join(command.list_commands(below))}")
        nested = {
            one: _of_command(command, below, one, shared, inner.get(one, {}), f"{where}: {name}")
            for one in command.list_commands(below)
        }
    return nested | _options(command, name, shared, table, where)


def _options(
    command: click.Command, name: str, shared: Mapping[str, Any], table: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """What the file and the shared environment say of a command's own options, by click's names."""
    options = options_of(command)
    found: dict[str, Any] = {}
    for key, value in {**{k: v for k, v in shared.items() if k in options and k not in table}, **table}.items():
        option = options.get(key.replace("-", "_"))
        if option is None or option.name is None:
            raise SchemaError(f"{where}: [{name}] {key}", expected=f"an option ({', '.join(sorted(options))})", found="none")
        if isinstance(value, Mapping) or (isinstance(value, list) and not option.multiple):
            raise SchemaError(f"{where}: [{name}] {key}", expected="one value", found=repr(value)[:60])
        if option.multiple and not isinstance(value, list):
            raise SchemaError(f"{where}: [{name}] {key}", expected="a list", found=repr(value)[:60])
        found[option.name] = value
    # The shared environment goes before the file, the command's own table included.
    found |= {options[key].name or key: value for key, value in environment().items() if key in options}
    return found


def apply(context: click.Context, group: click.Group, invoked: str | None) -> None:
    """Reads the configuration into a context's map of defaults, and the cache's folder into the environment.

    Raises:
        InputError, SchemaError: the file cannot be read or holds what it may not.
    """
    path = config_file()
    values = read_config(path) if path is not None else {}
    cache = values.get(FOLDER)
    if cache is not None:
        if not isinstance(cache, str) or not cache:
            raise SchemaError(f"{path}: {FOLDER}", expected="a folder", found=repr(cache)[:60])
        os.environ.setdefault("MECHMERGE_CACHE", cache)
    if path is not None or environment():
        context.default_map = defaults(group, context, [invoked] if invoked else [], values, str(path))
