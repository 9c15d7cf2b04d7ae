"""`mechmerge cache list` and `mechmerge cache prune`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import format_option, show

if TYPE_CHECKING:
    from mechmerge.models.cache_entries import Entry


@click.group()
def command() -> None:
    """See and clear what mechmerge keeps on this machine: ~/.cache/mechmerge, or MECHMERGE_CACHE.

    Models of the Hub lie in huggingface_hub's own cache; `hf cache` is for those.
    """


@command.command("list")
@format_option
def list_(output: str) -> None:
    """List every entry: its size, when it was used last, what refers to it, and whether a process uses it now."""
    from mechmerge.models.cache import cache_folder
    from mechmerge.models.cache_entries import entries

    found = entries()
    if output == "json":
        show([_row(entry, output) for entry in found], output, "cache")
        return
    rows = [_row(entry, output) for entry in found if entry.kind != "digests"]
    digests = [entry for entry in found if entry.kind == "digests"]
    if digests:
        size = _size(sum(entry.bytes for entry in digests))
        rows.append({"kind": "digests", "entry": f"{len(digests)} files", "size": size, "used": "", "refers": "", "in use": ""})
    show(rows, output, f"{cache_folder()}: {_size(sum(entry.bytes for entry in found))}")


@command.command("prune")
@click.option(
    "--older-than", metavar="AGE", default="30d", show_default=True, help="Not used for this long, such as 12h, 30d, 0."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@format_option
def prune_(older_than: str, dry_run: bool, output: str) -> None:
    """Remove entries that were not used for a while, and what interrupted processes left half made.

    Nothing that a running process uses or makes is removed. What is removed can be made again: by the same command, from
    the same base and adapter.
    """
    from mechmerge.models.cache_entries import parse_age, prune

    removed, kept = prune(parse_age(older_than), dry_run=dry_run)
    what = "would remove" if dry_run else "removed"
    rows = [{"what": what} | _row(entry, output) for entry in removed]
    rows += [{"what": "in use"} | _row(entry, output) for entry in kept]
    freed = sum(entry.bytes for entry in removed)
    show(rows, output, "prune" if output == "json" else f"{what} {len(removed)} entries, {_size(freed)}; {len(kept)} in use")


def _row(entry: Entry, output: str) -> dict[str, Any]:
    if output == "json":
        facts = {"kind": entry.kind, "path": str(entry.path), "bytes": entry.bytes, "used": entry.used}
        return facts | {"refers": list(entry.refers), "in_use": entry.in_use}
    age = max(time.time() - entry.used, 0)
    used = f"{age / 86400:.0f} days ago" if age > 2 * 86400 else f"{age / 3600:.0f} hours ago" if age > 7200 else "lately"
    name = entry.path.name if len(entry.path.name) < 40 else f"{entry.path.name[:12]}…"
    return {
        "kind": entry.kind, "entry": name, "size": _size(entry.bytes), "used": used, "refers": "\n".join(entry.refers),
        "in use": "yes" if entry.in_use else "",
    }  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e9 else f"{count / 1e6:.1f} MB" if count > 1e5 else f"{count} B"
