"""``push``: trees and environments into the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli import resolving as options
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF, PathType, ref_argument
from envstore.cli.progress import progress
from envstore.cli.resolving import Resolving, resolver_options
from envstore.errors import UsageError

if TYPE_CHECKING:
    from envstore.resolver.locking import Locked
    from envstore.resolver.pushing import LockPush
    from envstore.store.push import PushOptions, PushResult
    from envstore.store.refs import RefName

PHASES = options.PHASES | {
    "look": "looking for packages",
    "unpack": "unpacking",
    "scan": "looking for files",
    "read": "reading",
    "store": "storing",
    "check": "checking libraries",
    "scripts": "running post-link scripts",
    "commit": "committing",
}
"""What the phases of a push are called."""

_LARGEST_SPECIFICATION = 64 << 20


@click.command(
    cls=Command,
    examples="""
        envstore push analysis environment.yml       conda and pip packages, resolved and locked
        envstore push analysis requirements.txt      Python packages and an interpreter
        envstore push analysis envstore.lock         a lock: nothing is resolved
        envstore push analysis --conda environment.yml --pip requirements.txt
        envstore push analysis .venv                 a virtual environment as it is
        envstore push team/llama:8b ./llama-3-8b     a model, in a namespace, with a tag
        envstore push backup ./data --kind dir       any directory, every bit of it
        envstore push analysis .venv -m "numpy 2.3"  with a message for `envstore log`
        envstore --json push analysis .venv          what it cost, for a script
    """,
)
@ref_argument()
@click.argument("specs", metavar="[SPEC]...", type=PathType(path_type=Path), nargs=-1)
@click.option(
    "--kind",
    type=click.Choice(["env", "model", "dir"]),
    help="Store SPEC as a tree of this kind, whatever is in it; found out by itself unless "
    "given. An env is stored without what makes two equal installations differ; a dir with "
    "every byte, permission and time stamp.",
)
@resolver_options
@click.option(
    "--allow-abi-errors",
    is_flag=True,
    help="Store packages even if their libraries do not fit together (see `envstore check`).",
)
@click.option("--no-scripts", is_flag=True, help="Do not run the post-link scripts of packages.")
@click.option("--message", "-m", default="", help="A note for `envstore log`.")
@click.option(
    "--parent",
    "parents",
    metavar="REF",
    type=REF,
    multiple=True,
    help="Another snapshot that this resembles, to store only what differs from it (repeatable).",
)
@click.option(
    "--level",
    type=click.IntRange(1, 19),
    default=3,
    show_default=True,
    help="zstd level: higher is smaller and slower.",
)
@click.pass_obj
def push(
    settings: Settings,
    ref: str,
    specs: tuple[Path, ...],
    kind: str | None,
    resolving: Resolving,
    allow_abi_errors: bool,
    no_scripts: bool,
    message: str,
    parents: tuple[str, ...],
    level: int,
) -> None:
    """Store an environment or any tree, and point REF at it.

    SPEC is a directory, which is stored as it is (an environment, a model, data), or a
    specification of packages: environment.yml, requirements.txt, pyproject.toml, uv.lock,
    pylock.toml, pixi.toml, pixi.lock, conda-lock.yml, an @EXPLICIT list or a lock of
    `envstore lock`. Unless it is a lock it is resolved. The environment is composed of packages,
    and those that the store does not hold yet are fetched; nothing is installed.

    Only what the store does not hold yet is sent; an unchanged tree is not even read. If REF
    exists it moves on, and the snapshot it pointed at becomes the parent of the new one. The ref
    moves last: a push that is interrupted changes nothing, and the next one uses what it sent.

    Without --store and ENVSTORE_URL the store is one of your own, made by the first push.
    """
    from envstore.store.push import PushOptions
    from envstore.store.refs import RefName

    name = RefName.parse(ref)
    chosen = PushOptions(message, level=level)
    tree = None if resolving.names_files else _tree_among(specs, kind)
    if tree is not None:
        _push_tree(settings, name, tree, kind, parents, chosen)
        return
    if not specs and not resolving.names_files:
        raise UsageError("nothing to push", hint="name a directory or a specification")
    from envstore.resolver.locking import make_lock, read
    from envstore.resolver.specs import Prefix

    warnings: list[str] = []
    wishes = resolving.wishes()
    found = read(specs, wishes, warnings, conda=resolving.conda, pip=resolving.pip)
    if isinstance(found, Prefix):
        raise UsageError(f"{found.path} is an environment", hint="push it alone")
    if not settings.is_default:
        settings.open(cached=False).close()  # resolving may take long, to fail after it for this
    with progress(settings) as report:
        locked = make_lock(
            found,
            wishes,
            settings.cache_directory,
            warnings,
            progress=lambda phase, at, total: report(PHASES[phase], at, total),
        )
    done = store_lock(
        settings,
        name,
        locked,
        parents,
        chosen,
        python=wishes.interpreter,
        allow_abi_errors=allow_abi_errors,
        run_scripts=not no_scripts,
    )
    print_lock_push(settings, done, warnings)


def _tree_among(specs: Sequence[Path], kind: str | None) -> Path | None:
    """Return what is to be stored as it is, ``None`` if ``specs`` are specifications."""
    if len(specs) != 1:
        if kind is not None:
            raise UsageError("--kind is for one directory or file")
        return None
    path = specs[0]
    if kind is not None or not os.path.isfile(path):
        return path
    if os.path.getsize(path) > _LARGEST_SPECIFICATION:
        return path
    from envstore.resolver.specs.detect import detect_format

    return None if detect_format(path) else path


def _push_tree(
    settings: Settings,
    name: RefName,
    path: Path,
    kind: str | None,
    parents: Sequence[str],
    chosen: PushOptions,
) -> None:
    from dataclasses import replace

    from envstore.resolver.kinds import open_source
    from envstore.store.push import push as push_tree

    # The path is looked at first: a typing error must not make a store.
    source = open_source(path, kind)
    warnings = () if kind else _doubts(path, source.kind)
    try:
        repository, created = settings.open_for_push()
        with repository, settings.stat_cache() as stat_cache:
            if created:
                output.note(settings, f"made a store in {settings.url}; --store names another")
            bases = tuple(repository.resolve(parent) for parent in parents)
            with progress(settings) as report:
                done = push_tree(
                    repository,
                    source,
                    name,
                    stat_cache,
                    state=settings.pending(repository),
                    options=replace(chosen, parents=bases),
                    progress=lambda phase, at, total: report(PHASES[phase], at, total),
                )
    finally:
        source.close()
    _print_warnings(settings, (*warnings, *done.warnings))
    if settings.json:
        output.result(_fields(done, warnings))
    else:
        _print(settings, done)


def _doubts(path: Path, kind: str) -> tuple[str, ...]:
    """Return what to say of what is stored as it is and may be meant for packages."""
    from envstore.resolver.specs.detect import lists_names, specification_in

    if os.path.isdir(path):
        inside = specification_in(path) if kind == "dir" else None
        if inside is None:
            return ()
        return (f"{path} is stored as a tree: for the environment it describes, push {inside}",)
    if os.path.getsize(path) > _LARGEST_SPECIFICATION or not lists_names(path):
        return ()
    return (f"{path} is stored as a file: if these are names of packages, push --pip {path}",)


def store_lock(
    settings: Settings,
    name: RefName,
    locked: Locked,
    parents: Sequence[str],
    chosen: PushOptions,
    *,
    python: Path | None = None,
    allow_abi_errors: bool = False,
    run_scripts: bool = True,
) -> LockPush:
    """Push a lock to the store of ``settings``, making that if need be. Raises as ``push_lock``."""
    from dataclasses import replace

    from envstore.resolver.pushing import Places, push_lock

    repository, created = settings.open_for_push()
    with repository:
        if created:
            output.note(settings, f"made a store in {settings.url}; --store names another")
        bases = tuple(repository.resolve(parent) for parent in parents)
        places = Places(
            settings.pending(repository),
            settings.cache_directory / "archives",
            locked.local,
            python,
        )
        with progress(settings) as report:
            return push_lock(
                repository,
                locked.lock,
                name,
                places,
                options=replace(chosen, parents=bases),
                check_abi=not allow_abi_errors,
                run_scripts=run_scripts,
                progress=lambda phase, at, total: report(PHASES[phase], at, total),
            )


def print_lock_push(settings: Settings, done: LockPush, warnings: Sequence[str] = ()) -> None:
    """Say what pushing a lock did."""
    result = done.result
    _print_warnings(settings, (*warnings, *result.warnings))
    if settings.json:
        output.result(lock_push_fields(done, warnings))
        return
    _print(settings, result)
    if not result.unchanged:
        output.summary(
            settings,
            f"  {output.counted(done.packages, 'package')}, {done.new_packages} of them new; "
            f"downloaded {output.size(done.downloaded_bytes)}",
        )


def lock_push_fields(done: LockPush, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return what pushing a lock did, for ``--json``."""
    return _fields(done.result, warnings) | {
        "packages": done.packages,
        "new_packages": done.new_packages,
        "downloaded_bytes": done.downloaded_bytes,
    }


def _print_warnings(settings: Settings, warnings: Sequence[str]) -> None:
    for warning in warnings:
        output.note(settings, f"warning: {warning}")


def _print(settings: Settings, done: PushResult) -> None:
    what = (
        f"{done.ref} @{output.short(done.snapshot)} ({done.kind}): "
        f"{output.counted(done.files, 'file')}, {output.size(done.logical_bytes)}"
    )
    if done.unchanged:
        output.summary(settings, f"unchanged {what} ({done.seconds:.1f} s)")
        return
    output.summary(settings, f"pushed {what}")
    output.summary(
        settings,
        f"  new {output.size(done.new_chunk_bytes)}, stored as {output.size(done.stored_bytes)}; "
        f"sent {output.size(done.uploaded_bytes)} in "
        f"{output.counted(done.requests, 'request')}, {done.seconds:.1f} s",
    )


def _fields(done: PushResult, warnings: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "ref": done.ref,
        "digest": done.snapshot.hex(),
        "manifest": done.manifest.hex(),
        "kind": done.kind,
        "files": done.files,
        "logical_bytes": done.logical_bytes,
        "read_bytes": done.read_bytes,
        "new_chunk_bytes": done.new_chunk_bytes,
        "stored_bytes": done.stored_bytes,
        "uploaded_bytes": done.uploaded_bytes,
        "requests": done.requests,
        "seconds": round(done.seconds, 3),
        "unchanged": done.unchanged,
        "warnings": [output.printable(warning) for warning in (*warnings, *done.warnings)],
    }
