"""``lock``: what a specification gives, written down exactly."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.changes import change_fields, print_changes
from envstore.cli.context import Settings
from envstore.cli.params import PathType
from envstore.cli.progress import progress
from envstore.cli.resolving import PHASES, Resolving, resolver_options
from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    from envstore.resolver.lock import Lock
    from envstore.resolver.update import Change

_DEFAULT = "envstore.lock"
_STDOUT = "-"
_SHOWN = 5


@click.command(
    cls=Command,
    examples="""
        envstore lock environment.yml                    write envstore.lock
        envstore lock requirements.txt -o web.lock       under another name
        envstore lock --conda environment.yml --pip requirements.txt
        envstore lock environment.yml --platform linux-aarch64 --glibc 2.28
        envstore lock environment.yml --upgrade          newer versions of everything
        envstore lock environment.yml --check            in CI: does the lock still hold?
        envstore lock envstore.lock --format pylock -o pylock.toml
    """,
)
@click.argument("specs", metavar="[SPEC]...", type=PathType(path_type=Path), nargs=-1)
@click.option(
    "--output",
    "-o",
    "target",
    metavar="FILE",
    help=f"Where to write; - is standard output, which other formats than envstore's go to unless "
    f"this is given. [default: {_DEFAULT}]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["envstore", "pixi", "pylock", "requirements", "explicit"]),
    default="envstore",
    show_default=True,
    help="What to write; pylock and requirements hold the Python packages only, explicit the "
    "conda packages.",
)
@click.option(
    "--upgrade", "-U", is_flag=True, help="Do not keep the versions of the lock that is there."
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if the lock would change.")
@resolver_options
@click.pass_obj
def lock(
    settings: Settings,
    specs: tuple[Path, ...],
    target: str | None,
    form: str,
    upgrade: bool,
    check: bool,
    resolving: Resolving,
) -> None:
    """Resolve SPEC and write down every package, with its digest.

    SPEC is a specification of packages: environment.yml, requirements.txt, pyproject.toml,
    uv.lock, pylock.toml, pixi.toml, pixi.lock, conda-lock.yml, an @EXPLICIT list, a directory
    with one of these, or a lock of envstore. What is a lock already is not resolved but taken as
    it is; digests that it lacks are found by fetching.

    If the lock is there already, versions in it stay as they are where the specification still
    allows it, and so does the machine that it is for. The file appears when it is complete, and
    is not touched if nothing changes.
    """
    from envstore.resolver.exports import export_lock
    from envstore.resolver.locking import make_lock, read
    from envstore.resolver.specs import Prefix
    from envstore.resolver.update import changes, same_but_for_tools

    if not specs and not resolving.names_files:
        raise UsageError("nothing to lock", hint="name a specification")
    if target == "":
        raise UsageError("the path after --output is empty")
    where = target or (_DEFAULT if form == "envstore" else _STDOUT)
    if check and (where == _STDOUT or form != "envstore"):
        raise UsageError("--check compares with a lock file of envstore")
    _refuse_to_overwrite(where, (*specs, *resolving.conda, *resolving.pip))
    before = _existing(where) if form == "envstore" else None
    if check and before is None:
        raise UsageError(f"there is no {where} to check")
    warnings: list[str] = []
    wishes = resolving.wishes()
    found = read(specs, wishes, warnings, conda=resolving.conda, pip=resolving.pip)
    if isinstance(found, Prefix):
        raise UsageError(
            f"{found.path} is an environment, not a specification of one",
            hint=f"push it as it is: envstore push REF {found.path}",
        )
    machine, held = wishes.target(), None
    if before and not upgrade and before.platform == machine.platform:
        held, machine = before, wishes.target_again(before)
    with progress(settings) as report:
        locked = make_lock(
            found,
            wishes,
            settings.cache_directory,
            warnings,
            target=machine,
            keep=held.packages if held else (),
            progress=lambda phase, at, total: report(PHASES[phase], at, total),
        )
    new = locked.lock
    data = export_lock(new, form)
    for warning in warnings:
        output.note(settings, f"warning: {warning}")
    if where == _STDOUT and settings.json and form != "envstore":
        output.result({"format": form, "text": data.decode()})
        return
    if where == _STDOUT:
        _to_stdout(data)
        return
    same = before is not None and same_but_for_tools(before, new)
    different = changes(before, new) if before else ()
    if not same:
        if check:
            raise _outdated(where, different)
        write_atomically(Path(where), data)
    _say(settings, where, new, different, same=same, warnings=warnings)


def _say(
    settings: Settings,
    where: str,
    new: Lock,
    different: tuple[Change, ...],
    *,
    same: bool,
    warnings: list[str],
) -> None:
    if settings.json:
        output.result(
            {
                "path": os.path.abspath(where),
                "platform": new.platform,
                "conda": len(new.conda()),
                "pypi": len(new.pypi()),
                "changed": not same,
                "changes": change_fields(different),
                "warnings": [output.printable(warning) for warning in warnings],
            }
        )
        return
    if different and not settings.quiet:
        print_changes(different)
    conda, pypi = len(new.conda()), len(new.pypi())
    what = f"{output.counted(conda, 'conda package')}, {output.counted(pypi, 'Python package')}"
    did = "unchanged" if same else "locked"
    output.summary(settings, f"{did} {output.printable(where)}: {what} for {new.platform}")


def _outdated(where: str, different: tuple[Change, ...]) -> EnvstoreError:
    """Return the error that says what of a lock would change."""
    shown = [_described(change) for change in different[:_SHOWN]]
    if len(different) > _SHOWN:
        shown.append(f"and {len(different) - _SHOWN} more")
    what = ", ".join(shown) or "its packages stay, and what it was made from changed"
    return EnvstoreError(f"{where} is not up to date: {what}", hint="run it without --check")


def _described(change: Change) -> str:
    if not change.before:
        return f"{change.name} {change.after} is new"
    if not change.after:
        return f"{change.name} {change.before} is gone"
    return f"{change.name} {change.before} becomes {change.after}"


def _existing(where: str) -> Lock | None:
    """Return the lock that is there; ``None`` if there is none."""
    from envstore.resolver.lockfile import load_lock

    if where == _STDOUT or not os.path.isfile(where):
        return None
    return load_lock(Path(where))


def _refuse_to_overwrite(where: str, specs: tuple[Path, ...]) -> None:
    if where == _STDOUT:
        return
    for spec in specs:
        with contextlib.suppress(OSError):
            if os.path.samefile(where, spec):
                raise UsageError(
                    f"{where} is what is to be read", hint="write to another file with -o"
                )


def _to_stdout(data: bytes) -> None:
    # As bytes, for the locale of a terminal must not change what is written.
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it; a device is written to as it is.

    Raises ``NotFoundError``, ``AccessDeniedError``, ``NoSpaceError``.
    """
    # What a symbolic link leads to is meant.
    real = os.path.realpath(path)
    try:
        # Under its own name: what /dev/stdout leads to has none if it is a pipe.
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb") as device:
                device.write(data)
            return
        temporary = f"{real}.{secrets.token_hex(4)}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, real)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> EnvstoreError:
    reason = f"cannot write {path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(reason)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(reason, hint="check permissions")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(reason, hint="make its directory first")
    return EnvstoreError(reason)
