"""Turns whatever ends a command into one line on stderr and an exit status."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

import click

from envstore.cli.context import PROGRAM, Settings
from envstore.cli.output import printable
from envstore.errors import EnvstoreError
from envstore.redaction import redacted
from envstore.store.private import make_private, private

INTERRUPTED = 130
BROKEN_PIPE = 141
_LOG_LIMIT = 1 << 20
_EXTRAS = {
    **dict.fromkeys(("packaging", "rattler", "uv", "yaml"), ("resolver", "reading and resolving")),
    **dict.fromkeys(("pyfuse3", "trio"), ("fuse", "mounting")),
    **dict.fromkeys(("google", "grpc", "kubernetes"), ("csi", "working with Kubernetes")),
}
"""What needs more than the core, by the top-level module that is missing then."""


def report(error: BaseException, settings: Settings) -> int:
    """Print the line that says what went wrong and return the exit status.

    0 success, 1 failure, 2 usage, 130 interrupted, 141 the reader of our output went away.
    """
    if isinstance(error, EnvstoreError):
        return _say(settings, _kind(error), error.message, error.hint, error.exit_code)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else PROGRAM
        return _say(settings, "usage", _joined(error), f"see: {where} --help", 2)
    if isinstance(error, click.ClickException):
        return _say(settings, "failed", _joined(error), None, error.exit_code)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _say(settings, "interrupted", "interrupted", None, INTERRUPTED)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in _EXTRAS:
        module = str(error.name).partition(".")[0]
        extra, what = _EXTRAS[module]
        message = f"{what} needs the Python module {module}, which is not installed"
        return _say(settings, "failed", message, f"pip install 'envstore[{extra}]'", 1)
    return _report_bug(error, settings)


def _joined(error: click.ClickException) -> str:
    """Return click's message, which may be laid out over several lines, in one."""
    return " ".join(error.format_message().split()).removesuffix(".")


def _kind(error: EnvstoreError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return "failed" if name == "Envstore" else re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _say(settings: Settings, kind: str, message: str, hint: str | None, status: int) -> int:
    message = printable(redacted(message))
    hint = printable(redacted(hint)) if hint else None
    if settings.json:
        body = {"kind": kind, "message": message, "hint": hint, "exit_code": status}
        text = json.dumps({"error": body})
    else:
        text = f"{PROGRAM}: {message}" + (f" ({hint})" if hint else "")
    click.echo(text, err=True)
    return status


def _report_bug(error: BaseException, settings: Settings) -> int:
    message = f"unexpected {type(error).__name__}: {error}; this is a bug"
    if wants_traceback(settings):
        return _say(settings, "bug", message, None, 1)
    try:
        where = _write_log(error)
    except OSError:
        hint = "run it again with ENVSTORE_DEBUG=1 to see where"
    else:
        hint = f"the traceback is in {where}"
    return _say(settings, "bug", message, hint, 1)


def wants_traceback(settings: Settings) -> bool:
    """Whether the user asked to see where an error comes from."""
    return bool(settings.verbose) or os.environ.get("ENVSTORE_DEBUG", "0") not in ("", "0")


def show_traceback(error: BaseException) -> None:
    """Print where ``error`` comes from."""
    click.echo(redacted("".join(traceback.format_exception(error))), err=True, nl=False)


def _write_log(error: BaseException) -> Path:
    from envstore import __version__

    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(base) / "envstore" / "errors.log"
    make_private(path.parent)
    if path.exists() and path.stat().st_size > _LOG_LIMIT:
        path.replace(path.with_suffix(".log.old"))
    with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=private) as log:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        log.write(f"--- {now} {PROGRAM} {__version__}, Python {sys.version.split()[0]}\n")
        log.write(redacted("".join(traceback.format_exception(error))))
    return path
