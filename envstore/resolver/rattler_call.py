"""The one way into rattler: its coroutines run from ordinary code, and its errors become ours."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.conflicts import clip, conda_conflict

_T = TypeVar("_T")
_SETTLE = 0.02
"""Seconds a loop lives on after its call. Threads of rattler's (0.28) still let go of Python
objects when the call has returned; without this a process that ends at once may crash."""

PATIENCE = 600.0
"""Seconds that a call may take. Rattler (0.28) itself waits for ever for a channel that accepts
connections and never answers; what is read from a slow one is far from taking so long."""

_SECRETS = re.compile(r"(?<=://)[^/\s@]+@|(?<=/t/)[^/\s]+(?=/)")
_STATUS = re.compile(r"\((\d{3}) [^)]*\) for url \(([^)]*)\)")
_URL = re.compile(r"(?:url \(|channel '|`)([^)'`]*)")
_USAGE = frozenset(
    {
        "CanonicalMatchSpecError",
        "ConfigError",
        "ConversionError",
        "InvalidChannelError",
        "InvalidMatchSpecError",
        "InvalidPackageNameError",
        "InvalidUrlError",
        "InvalidVersionError",
        "InvalidVersionSpecError",
        "PackageNameMatcherParseError",
        "ParseArchError",
        "ParseSubdirError",
        "VirtualPackageOverrideError",
    }
)
_BROKEN = frozenset(
    {
        "ExtractError",
        "ParseCondaLockError",
        "ParseExplicitEnvironmentSpecError",
        "ValidatePackageRecordsError",
    }
)

_log = logging.getLogger(__name__)


def call(start: Callable[[], Awaitable[_T]]) -> _T:
    """Run what ``start`` returns, in a loop of its own, and return its result.

    May be called from several threads at once, but not from a thread that already runs an
    asyncio loop. ``start`` is called inside the loop. What rattler raises becomes one of the
    ``EnvstoreError`` family; ``UnavailableError`` after ``PATIENCE``.
    """

    async def settle() -> _T:
        try:
            async with asyncio.timeout(PATIENCE):
                return await start()
        finally:
            await asyncio.sleep(_SETTLE)

    try:
        return asyncio.run(settle())
    except EnvstoreError:
        raise
    except TimeoutError as error:
        raise UnavailableError(
            f"no answer within {PATIENCE:.0f} s: a channel accepts connections and says nothing",
            hint="try again, or name a mirror of it",
        ) from error
    except Exception as error:
        raise translated(error) from error


def checked(make: Callable[[], _T]) -> _T:
    """Return what ``make`` does with rattler's values; raises ``EnvstoreError`` for its errors."""
    try:
        return make()
    except EnvstoreError:
        raise
    except ValueError as error:
        raise UsageError(clip(without_secrets(str(error)))) from error
    except Exception as error:
        raise translated(error) from error


def without_secrets(text: str) -> str:
    """Return ``text`` without user names, passwords and tokens in the URLs it names."""
    return _SECRETS.sub(lambda found: "" if found[0].endswith("@") else "***", text)


def translated(error: Exception) -> EnvstoreError:
    """Return ``error`` as one of ours, on one line; what is not rattler's is raised as it is."""
    if not _of_rattler(error):
        raise error
    kind = type(error).__name__
    text = without_secrets(str(error)).strip()
    _log.debug("%s: %s", kind, text)
    if kind == "SolverError":
        return conda_conflict(text)
    if kind in _USAGE:
        return UsageError(clip(text))
    if kind in _BROKEN:
        return CorruptError(clip(text))
    return _of_fetching(text)


def _of_rattler(error: Exception) -> bool:
    # Rust's exceptions claim a module named plainly "exceptions".
    return type(error).__module__ in {"exceptions", "rattler.exceptions"} or isinstance(
        error, OSError
    )


def _of_fetching(text: str) -> EnvstoreError:
    """Return the error for a channel or package that could not be read."""
    first, _, causes = text.partition("\n")
    last = causes.rpartition("Caused by: ")[2] or first
    status = _STATUS.search(text)
    url = _URL.search(text)
    where = (status[2] if status else url[1] if url else "").partition("?")[0]
    if status and int(status[1]) in {401, 403}:
        hint = "give them in ~/.netrc or in the file that RATTLER_AUTH_FILE names"
        what = "needs credentials" if status[1] == "401" else "refuses these credentials"
        return AccessDeniedError(f"{where} {what} (HTTP {status[1]})", hint=hint)
    if "could not find subdir" in text:
        subdir = re.search(r"subdir '([^']*)'", text)
        part = f" {subdir[1]}" if subdir else ""
        channel = re.search(r"channel '([^']*)'", text)
        return NotFoundError(
            f"channel {channel[1] if channel else where} has no{part} packages: {clip(last)}",
            hint="check the channel's name or URL",
        )
    if status and status[1] in {"404", "410"}:
        return NotFoundError(f"{where} is not there (HTTP {status[1]})")
    if "No such file" in text:
        return NotFoundError(clip(f"{first.partition(':')[0]}: there is no such file"))
    if "No space left" in text or "quota" in text.lower():
        return NoSpaceError(clip(first + ": " + last))
    if "Permission denied" in text:
        return AccessDeniedError(clip(first + ": " + last))
    if ("hash" in text and "mismatch" in text) or "sha256" in text:
        return CorruptError(clip(text.replace("\nCaused by:", ":")))
    if "failed to parse" in text or "failed to deserialize" in text:
        return CorruptError(f"a channel's answer is malformed: {clip(last)}")
    if "error sending request" in text or status or "dns error" in text:
        reason = f"HTTP {status[1]}" if status else last
        return UnavailableError(
            f"cannot reach {where}: {clip(reason)}",
            hint="is there a network, and is the URL right?",
        )
    return UnavailableError(clip(text.replace("\nCaused by:", ":")))
