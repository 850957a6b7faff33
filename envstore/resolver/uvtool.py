"""Runs uv, and tells its failures in one line."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.conflicts import UnsatisfiableError, clip, uv_conflict
from envstore.resolver.rattler_call import without_secrets
from envstore.resolver.request import PypiRequest

_TALK = re.compile(r"^(TRACE|DEBUG|INFO) ")
_SPANS = re.compile(r"^\s*\d+(\.\d+)?m?s\s")
_STATUS = re.compile(
    r"HTTP status \w+ error \((\d{3})|status code (\d{3})|\b(401|403) (?:Unauth|Forb)"
)
_WHERE = re.compile(
    r"(?:Failed to (?:fetch|download|query|read metadata)[^:]*: ?|url \()[`(]?([a-z]+://[^\s`)]+)"
)
_REFUSED = re.compile(r"An index URL \((\S+)\) could not be queried .*?\((401|403) ")
_BUILT = re.compile(r"Failed to (?:build|download and build|prepare)[^`]*`([^`]+)`")
_FRAME = re.compile(r"hint:|cause:|\[(stdout|stderr)\]$")
_NO_PYTHON = re.compile(
    r"No interpreter found for Python (\S+) in"
    r"|Failed to inspect Python interpreter .*python([0-9.]+)`"
)
_LAST_LINES = 5
_IGNORED = frozenset(
    {
        "CONDA_PREFIX", "PYTHONHOME", "PYTHONPATH", "RUST_LOG", "VIRTUAL_ENV",
        "UV_PROJECT", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_WORKING_DIR",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Said:
    """What uv said: to those who look for faults in it (``log``), and to its user."""

    log: tuple[str, ...]
    warnings: tuple[str, ...]


def find_uv() -> str:
    """Return the path of the uv executable; raises ``NotFoundError`` without one."""
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise NotFoundError(
            "uv is needed to resolve Python packages and is not there",
            hint="pip install 'envstore[resolver]'",
        )
    return found


def run_uv(
    arguments: Sequence[str],
    directory: Path,
    logs: Path,
    *,
    environment: Mapping[str, str] | None = None,
    what: str = "",
) -> Said:
    """Run uv in ``directory`` with ``arguments`` and ``environment`` beside this process's own.

    ``what`` names what is built, for messages. No project's settings are read unless they lie
    above ``directory``; the user's and the machine's are. What a failed build said is kept in a
    file below ``logs``. Raises ``UnsatisfiableError`` and other errors for what uv could not do.
    """
    own = {key: value for key, value in os.environ.items() if key not in _IGNORED}
    command = [find_uv(), *arguments, "--no-progress", "--color", "never", "--verbose"]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**own, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise EnvstoreError(f"{command[0]} cannot be run: {error.strerror}") from error
    text = without_secrets(done.stderr.decode(errors="replace"))
    talk: list[str] = []
    messages: list[str] = []
    for line in text.splitlines():
        plain = _SPANS.sub("", line)
        (talk if _TALK.match(plain) else messages).append(plain)
    if done.returncode != 0:
        raise _failure(messages, logs, what)
    warnings = [line.removeprefix("warning: ") for line in messages if line.startswith("warning: ")]
    return Said(tuple(talk), tuple(warnings))


def index_settings(request: PypiRequest, exclude_newer: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and variables that tell uv which indexes to ask, and how.

    Logins that this program knows for the indexes (see ``packages.credentials``) are handed over
    in variables. Raises ``UsageError`` for files of logins that cannot be read.
    """
    from envstore.resolver.packages.credentials import Credentials

    arguments: list[str] = []
    variables: dict[str, str] = {}
    indexes = [("--index", url) for url in request.indexes]
    if request.default_index:
        indexes.append(("--default-index", request.default_index))
    credentials = Credentials() if indexes else None
    for number, (option, url) in enumerate(indexes):
        login = credentials.find(url) if credentials is not None else None
        pair = _pair(login.authorization) if login is not None else None
        if pair is not None and "=" not in url.partition("://")[0]:
            name = f"envstore{number}"
            variables[f"UV_INDEX_{name.upper()}_USERNAME"] = pair[0]
            variables[f"UV_INDEX_{name.upper()}_PASSWORD"] = pair[1]
            url = f"{name}={url}"
        arguments.append(f"{option}={url}")
    arguments += [f"--find-links={place}" for place in request.find_links]
    if request.no_index:
        arguments.append("--no-index")
    if request.index_strategy != "first-index":  # uv's default, unless the user's settings differ
        arguments.append(f"--index-strategy={request.index_strategy}")
    if request.prerelease:
        arguments.append(f"--prerelease={request.prerelease}")
    if exclude_newer:
        arguments.append(f"--exclude-newer={exclude_newer}")
    return arguments, variables


def _pair(authorization: str) -> tuple[str, str] | None:
    """Return user name and password of an ``Authorization`` header, ``None`` for another kind."""
    kind, _, value = authorization.partition(" ")
    if kind != "Basic":
        return None
    user, _, password = base64.b64decode(value).decode().partition(":")
    return user, password


def _failure(messages: Sequence[str], logs: Path, what: str) -> EnvstoreError:
    """Return the error for what uv said before it gave up."""
    # What comes before is of a build, whose lines may begin with "error:" as well.
    first = max((at for at, line in enumerate(messages) if line.startswith("error:")), default=0)
    lines = [line for line in messages[first:] if line.strip()]
    text = "\n".join(lines).removeprefix("error:").strip()
    flat = " ".join(text.split()).replace(" cause: ", ": ")
    refused = _REFUSED.search(flat)
    if refused:
        return _refusal(refused[1], refused[2])
    built = _BUILT.search(text)
    if "No solution found" in text:
        error = uv_conflict(text)
        if built is None:
            return error
        message = f"{what or built[1]} cannot be built: {error.message}"
        return UnsatisfiableError(message, hint=error.hint)
    missing = _NO_PYTHON.search(flat)
    if missing:
        wanted = next(group for group in missing.groups() if group)
        return NotFoundError(
            f"no Python {wanted} is there to build {what or 'a package'} with",
            hint="install one, or ask for a version that has wheels",
        )
    if re.search(r"build backend returned an error|Failed to build|Build backend failed", text):
        return _build_failure(text, messages, first, logs, what)
    status = _STATUS.search(text)
    code = next((group for group in status.groups() if group), "") if status else ""
    where = _WHERE.search(text)
    place = where[1] if where else "a package index"
    if code in {"401", "403"}:
        return _refusal(place, code)
    if "Network connectivity is disabled" in text or "--offline" in text:
        return UnavailableError(f"not in uv's cache, and the network is off: {clip(flat)}")
    if re.search(r"error sending request|dns error|client error|timed out|connection", text):
        cause = lines[-1].partition("cause:")[2].strip() or lines[-1]
        return UnavailableError(
            f"cannot reach {place}: {clip(cause)}", hint="is there a network, and is the URL right?"
        )
    if code:
        return UnavailableError(f"{place} answers with HTTP {code}")
    if "No space left" in text:
        return NoSpaceError(clip(flat))
    if re.search(r"[Hh]ash mismatch", text):
        return CorruptError(clip(flat))
    if re.search(r"not found at|No such file|does not exist", text):
        return NotFoundError(clip(flat))
    if re.search(r"Couldn't parse|Invalid|invalid|unexpected|Unsupported", text):
        return UsageError(clip(flat))
    return EnvstoreError(f"uv: {clip(flat)}" if flat else "uv failed and said nothing")


def _refusal(place: str, code: str) -> AccessDeniedError:
    what = "needs credentials" if code == "401" else "refuses these credentials"
    return AccessDeniedError(
        f"{place} {what} (HTTP {code})",
        hint="give them in ~/.netrc or UV_INDEX_<NAME>_USERNAME and _PASSWORD",
    )


def _build_failure(
    text: str, messages: Sequence[str], first: int, logs: Path, what: str
) -> EnvstoreError:
    whole = "\n".join(messages) + "\n"
    log = logs / f"build-{hashlib.sha256(whole.encode()).hexdigest()[:12]}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        log.write_text(whole)
        hint = f"log: {log}"
    except OSError as error:
        hint = f"its log could not be kept: {error.strerror}"
    named = _BUILT.search(text)
    said = [line.strip() for line in messages[:first] if line.strip()]
    rest = [line.strip() for line in messages[first + 1 :] if line.strip()]
    said += [line for line in rest if not _FRAME.match(line)]
    causes = [line.removeprefix("cause: ") for line in rest if line.startswith("cause: ")]
    if causes and "build backend returned an error" not in text:
        said = causes  # no backend ran that could have said something
    last = " | ".join(said[-_LAST_LINES:])
    return EnvstoreError(
        f"{what or (named[1] if named else 'a package')} cannot be built: {clip(last)}", hint=hint
    )
