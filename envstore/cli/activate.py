"""``activate``: the environment of a REF in the shell one works in."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import PROGRAM, Settings
from envstore.cli.params import PathType, ref_argument
from envstore.errors import UsageError

if TYPE_CHECKING:
    from envstore.fuse.records import MountRecord

_SHELLS = ("bash", "zsh", "fish", "sh")


@click.command(
    cls=Command,
    examples="""
        eval "$(envstore activate analysis)"                  bash, zsh, sh
        envstore activate analysis | source                   fish
        eval "$(envstore activate analysis --mountpoint ~/envs/analysis)"
        envstore_deactivate                                   puts everything back
        envstore_deactivate --umount                          and unmounts
    """,
)
@ref_argument()
@click.option(
    "--shell",
    type=click.Choice(_SHELLS),
    help="The shell that evaluates what is printed. Default: the one that asks.",
)
@click.option(
    "--mountpoint",
    metavar="DIR",
    type=PathType(path_type=Path, file_okay=False),
    help="Mount there. Default: a directory of its own for each snapshot, below"
    " $XDG_RUNTIME_DIR/envstore or ~/.local/share/envstore.",
)
@click.option(
    "--register",
    "listed",
    is_flag=True,
    help="List the mounted environment in ~/.conda/environments.txt, where editors look.",
)
@click.pass_obj
def activate(
    settings: Settings, ref: str, shell: str | None, mountpoint: Path | None, listed: bool
) -> None:
    """Print shell code that activates an environment.

    REF is mounted, unless it is already, and stays so when the shell ends. The code puts the
    environment's `bin` first in PATH, sets what conda would set (CONDA_PREFIX and its like, the
    variables of its packages), or VIRTUAL_ENV for a venv, reads the scripts in etc/conda/activate.d
    and defines `envstore_deactivate`, which puts everything back. Activating another
    environment leaves the first one until that is deactivated.
    """
    from envstore.fuse.keeping import MountRequest
    from envstore.fuse.mount import unmount
    from envstore.fuse.places import mount_or_join, place_of
    from envstore.resolver.activation import read_activation
    from envstore.resolver.hooks import shell_hook

    settings.export_cache()
    shell = shell or _asking_shell()
    snapshot = _snapshot(settings, ref)
    place = Path(os.path.abspath(mountpoint)) if mountpoint else place_of(ref, snapshot)
    if ":" in str(place):
        raise UsageError(
            f"{place} cannot be in PATH, where : separates directories",
            hint="choose another with --mountpoint",
        )
    request = MountRequest(settings.url, ref, str(place), fast_path="auto")
    record, made = mount_or_join(request, snapshot)
    suffix = ".fish" if shell == "fish" else ".sh"
    try:
        activation = read_activation(place, ref, os.environ, suffix=suffix)
        if listed:
            from envstore.resolver.registry import register

            register(place)
    except BaseException:
        if made:
            unmount(place, lazy=True)
        raise
    umount = [sys.executable, "-P", "-m", "envstore", "umount", str(place)]
    hook = shell_hook(activation, shell, umount, "" if mountpoint else str(place))
    if settings.json:
        output.result(_facts(record, made, shell, hook))
        return
    if sys.stdout.isatty():
        evaluated = f"{PROGRAM} activate {ref}"
        how = f"{evaluated} | source" if shell == "fish" else f'eval "$({evaluated})"'
        output.note(settings, f"this is for your shell to evaluate: {how}")
    # As it is: a path need not be text.
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(hook))


def _snapshot(settings: Settings, ref: str) -> str:
    """Return the digest that ``ref`` stands for, in hex; a whole digest needs no store."""
    from envstore.store.digest import parse_hex

    whole = parse_hex(ref.removeprefix("@")) if ref.startswith("@") else None
    if whole is not None:
        return whole.hex()
    with settings.open(cached=False) as repository:
        return repository.resolve(ref).hex()


def _facts(record: MountRecord, made: bool, shell: str, hook: str) -> dict[str, object]:
    return {
        "ref": record.name,
        "digest": record.snapshot,
        "mountpoint": record.mountpoint,
        "mounted": made,
        "shell": shell,
        "script": hook,
    }


def _asking_shell() -> str:
    """Return the kind of shell that started this, or that the user logs in to."""
    names = [os.path.basename(os.environ.get("SHELL", ""))]
    try:
        with open(f"/proc/{os.getppid()}/comm") as comm:
            names.insert(0, comm.read().strip())
    except OSError:
        pass  # it has ended
    return next((name for name in names if name in _SHELLS), "sh")
