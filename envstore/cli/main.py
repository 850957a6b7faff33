"""The entry point: runs the command line and turns its end into an exit status.

What takes long to import is imported where a Ctrl-C is already caught.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType

from envstore.cli.context import PROGRAM, Settings
from envstore.errors import EnvstoreError

_COMPLETE = "_ENVSTORE_COMPLETE"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv`` by default); returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = Settings()
    try:
        _tame_streams()
        return _run(arguments, settings)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the one place where every error ends
        # Impatience must not spoil the one line that is still to come.
        impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _failed(error, arguments, settings)
        finally:
            signal.signal(signal.SIGINT, impatience)


def _failed(error: BaseException, arguments: list[str], settings: Settings) -> int:
    from envstore.cli import failures

    error = _interrupt_behind(error) or error
    if isinstance(error, OSError):
        # Without a buffer (PYTHONUNBUFFERED) it does not fail again; nothing else that fails
        # for want of space comes here without the name of a file.
        unbuffered = error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None
        full = _stdout_failure() or (error if unbuffered else None)
        if isinstance(full, BrokenPipeError):
            return failures.BROKEN_PIPE
        if full is not None:
            error = EnvstoreError(f"cannot write to standard output: {full.strerror}")
    # A usage error may come before the parser has met --json.
    head = arguments[: arguments.index("--")] if "--" in arguments else arguments
    settings.json = settings.json or "--json" in head
    if failures.wants_traceback(settings):
        failures.show_traceback(error)
    return failures.report(error, settings)


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that ``error`` came of: cleaning up in its wake may fail in many ways."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found


def _run(arguments: list[str], settings: Settings) -> int:
    import click

    from envstore.cli.group import cli

    if _COMPLETE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {"obj": settings}, PROGRAM, _COMPLETE, os.environ[_COMPLETE])
    _unwind_on_signals()
    try:
        with cli.make_context(PROGRAM, arguments, obj=settings) as context:
            cli.invoke(context)
        status = 0
    except click.exceptions.Exit as end:
        status = end.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


def _stdout_failure() -> OSError | None:
    """Return what is wrong with stdout, if that is what failed, and write to it no more."""
    try:
        # What could not be written is still in the buffer, and fails again.
        sys.stdout.flush()
    except OSError as error:
        # Or python would try once more on its way out, and complain.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return error
    return None


def _tame_streams() -> None:
    """Let no file name or message fail to be printed, whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a command like Ctrl-C does: what it began is tidied up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup a signal is ignored, and shall be.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
