"""What goes wrong on the Hugging Face Hub, as errors of ours: one line that ends with what to do.

Status codes and their meaning are those of the Hub (https://huggingface.co/docs/hub/api) and of huggingface_hub's exceptions
(https://huggingface.co/docs/huggingface_hub/package_reference/utilities). A message never holds a token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator

from mechmerge.errors import InputError, MechmergeError, MissingError

LOGIN = "log in with `hf auth login`"
AGAIN = "run the same command again later: it goes on where it stopped"
FLEETING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be gone a moment later."""
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bBearer\s+\S+", re.IGNORECASE)
_FULL = re.compile(r"quota|storage (?:limit|space)|limit reached", re.IGNORECASE)


def cause_of(error: BaseException) -> BaseException:
    """The error beneath a RuntimeError that huggingface_hub wrapped around a failed upload."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, None where it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    error = cause_of(error)
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def is_fleeting(error: BaseException) -> bool:
    """Whether trying again may help: a cut or slow connection, a busy or ailing server."""
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    error = cause_of(error)
    status = status_of(error)
    if status is not None:
        return status in FLEETING
    if isinstance(error, json.JSONDecodeError):
        return True  # half an answer, or a proxy's page
    if isinstance(error, OfflineModeIsEnabled | EntryNotFoundError | PermissionError | FileNotFoundError):
        return False
    # hf_xet reports what its server or connection did as plain RuntimeError or ConnectionError.
    return isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError | RuntimeError)


def wait_asked(error: BaseException) -> float | None:
    """Seconds that the server asks to wait (`Retry-After`, or the `RateLimit` header of a 429), None where it says nothing."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    error = cause_of(error)
    if not isinstance(error, HfHubHTTPError):
        return None
    said = error.response.headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said)
    limit = parse_ratelimit_headers(error.response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def said_by(error: BaseException) -> str:
    """The first line of what an error says, without tokens."""
    error = cause_of(error)
    said = getattr(error, "server_message", None) or str(error)
    first = next((line.strip(" -") for line in said.splitlines() if line.strip(" -")), type(error).__name__)
    return without_tokens(first)[:300]


def without_tokens(text: str) -> str:
    """The text with anything that looks like a token taken out."""
    return _TOKEN.sub("***", text)


def is_hubs(error: BaseException) -> bool:
    """Whether an exception is one of those that talking to the Hub raises; any other is a bug."""
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError

    return isinstance(error, MechmergeError | httpx2.HTTPError | EntryNotFoundError | OSError | RuntimeError | ValueError)


def hub_error(error: BaseException, where: str) -> MechmergeError:
    """The error of ours for what huggingface_hub raised.

    Args:
        error: an exception of huggingface_hub, httpx2, hf_xet or the system.
        where: what was being done, such as `publishing to owner/name`.
    """
    from huggingface_hub import errors

    error = cause_of(error)
    if isinstance(error, MechmergeError):
        return error
    found = said_by(error)
    if isinstance(error, errors.HFValidationError | errors.HfUriError):
        return InputError(where, expected="a name that the Hub takes (owner/name)", found=found)
    if isinstance(error, errors.GatedRepoError):
        return MissingError(where, expected="access", found="a gated repository", fix="accept its conditions on the Hub")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(where, expected="a revision of the repository", found=f"none of that name ({found})")
    if isinstance(error, errors.EntryNotFoundError) and status_of(error) is not None:
        return InputError(where, expected="a file of the repository", found=f"none of that name ({found})")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _out_of_reach(where, type(error).__name__)
    status = status_of(error)
    if status in (402, 413, 507) or (status in (None, 400, 403) and _FULL.search(f"{found} {error}")):
        said = next((line for line in str(error).splitlines() if _FULL.search(line)), found)
        return MissingError(
            where, expected="room on the Hub", found=without_tokens(said)[:300], fix="free some storage, then run it again"
        )
    if status is None:
        if isinstance(error, PermissionError):
            return MissingError(where, expected="a token with the right to upload", found=found, fix=LOGIN)
        if isinstance(error, ValueError):
            return InputError(where, expected="what the Hub takes", found=found)
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            return InputError(where, expected="files that can be read and written", found=found)
        return _out_of_reach(where, f"{type(error).__name__}: {found}")
    return _by_status(error, status, where, found)


def _by_status(error: BaseException, status: int, where: str, found: str) -> MechmergeError:
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            where,
            expected="a repository that exists and that you may see",
            found="none",
            fix=f"check its name and type; if it is private, {LOGIN}",
        )
    if status == 401:
        return MissingError(
            where, expected="a valid token", found="one that the Hub refuses (wrong or expired)", fix=f"{LOGIN} anew"
        )
    if status == 403:
        return InputError(
            where,
            expected="the right to do this",
            found=f"a token without it ({found})",
            fix="use a token that may write there (`hf auth login`), or propose it with --pr",
        )
    if status == 412:
        return InputError(
            where,
            expected="the commit that was planned on",
            found="a newer one: someone pushed in between",
            fix="plan again: run the same command once more",
        )
    if status == 429:
        asked = wait_asked(error)
        later = f"in {asked:.0f} s" if asked is not None else "later"
        return MissingError(
            where, expected="requests within the Hub's rate limit", found="too many", fix=f"run it again {later}"
        )
    if status in FLEETING or status >= 500:
        return _out_of_reach(where, f"{status} ({found})")
    return InputError(where, expected="what the Hub takes", found=f"{status}: {found}")


def _out_of_reach(where: str, found: str) -> MissingError:
    return MissingError(where, expected="the Hub within reach", found=without_tokens(found), fix=f"check the network; {AGAIN}")


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the client's own warnings about requests that fail: what became of them is said once, by us."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
