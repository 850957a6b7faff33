"""The entry point: finds the command, runs it, and turns its end into an exit status."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import click

from envstore import __version__
from envstore.cli import failures
from envstore.cli.base import LazyGroup
from envstore.cli.context import PROGRAM, Settings
from envstore.errors import EnvstoreError

_COMMANDS = {
    "init": "store",
    "push": "transfer",
    "pull": "transfer",
    "mount": "mounts",
    "umount": "mounts",
    "mounts": "mounts",
    "run": "run",
    "ls": "refs",
    "show": "refs",
    "log": "refs",
    "diff": "refs",
    "tag": "moving",
    "rm": "moving",
    "du": "store",
    "verify": "store",
    "cache": "cache",
    "doctor": "doctor",
    "completion": "completion",
}
"""Each command and the module of this package that defines it."""

_COMPLETE = "_ENVSTORE_COMPLETE"


@click.group(
    PROGRAM,
    cls=LazyGroup,
    modules={name: f"envstore.cli.{module}" for name, module in _COMMANDS.items()},
    invoke_without_command=True,
    examples="""
        envstore push analysis .venv              store an environment
        envstore run analysis -- python job.py    mount it somewhere, run in it, unmount
        envstore mount analysis /mnt/analysis     mount it until `envstore umount`
        envstore --store s3://bucket/team ls      look into another store
    """,
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Push an environment once, mount it anywhere.

    REF is [NAMESPACE/]NAME[:TAG], the tag being `latest` unless given, or @ and the first digits
    of a snapshot's digest. Global options may stand before or after the command.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv`` by default); returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = Settings()
    _tame_streams()
    try:
        return _run(arguments, settings)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if isinstance(error, OSError) and (full := _stdout_failure()) is not None:
            if isinstance(full, BrokenPipeError):
                return failures.BROKEN_PIPE
            error = EnvstoreError(f"cannot write to standard output: {full.strerror}")
        # A usage error may come before the parser has met --json.
        head = arguments[: arguments.index("--")] if "--" in arguments else arguments
        settings.json = settings.json or "--json" in head
        if failures.wants_traceback(settings):
            failures.show_traceback(error)
        return failures.report(error, settings)


def _run(arguments: list[str], settings: Settings) -> int:
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
