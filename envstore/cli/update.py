"""``update``: resolve what a ref was made from again, and push what that gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.changes import change_fields, print_changes
from envstore.cli.context import Settings
from envstore.cli.params import ref_argument
from envstore.cli.progress import progress
from envstore.cli.push import lock_push_fields, print_lock_push, store_lock
from envstore.cli.resolving import PHASES, Resolving, update_options

if TYPE_CHECKING:
    from envstore.resolver.pushing import LockPush
    from envstore.resolver.update import Change


@click.command(
    cls=Command,
    examples="""
        envstore update analysis                   newer versions of everything
        envstore update analysis numpy pandas      of these, and what they need
        envstore update analysis --dry-run         only say what would change
        envstore update analysis --exclude-newer 2026-06-30
    """,
)
@ref_argument()
@click.argument("packages", metavar="[PACKAGE]...", nargs=-1)
@click.option("--dry-run", "-n", is_flag=True, help="Say what would change, and store nothing.")
@update_options
@click.option(
    "--allow-abi-errors",
    is_flag=True,
    help="Store packages even if their libraries do not fit together (see `envstore check`).",
)
@click.option("--no-scripts", is_flag=True, help="Do not run the post-link scripts of packages.")
@click.option("--message", "-m", default="", help="A note for `envstore log`.")
@click.pass_obj
def update(
    settings: Settings,
    ref: str,
    packages: tuple[str, ...],
    dry_run: bool,
    resolving: Resolving,
    allow_abi_errors: bool,
    no_scripts: bool,
    message: str,
) -> None:
    """Resolve again what REF was made from, and push that.

    The snapshot's lock says what was asked for. With PACKAGE only these may change for a reason
    of their own; all others keep their versions where that is possible. An interpreter of a
    machine stays unless PACKAGE is python: then the one that runs envstore is taken. Options
    replace what was said when it was locked; an --exclude-newer that was given then still holds
    unless it is given anew. Nothing is pushed if nothing changes.
    """
    from envstore.resolver.lockfile import stored_lock
    from envstore.resolver.update import changes, resolve_again
    from envstore.store.push import PushOptions
    from envstore.store.refs import RefName

    # A snapshot by its digest cannot be moved.
    name = RefName.parse(ref)
    with settings.open() as repository:
        old = stored_lock(repository, ref)
    warnings: list[str] = []
    with progress(settings) as report:
        locked = resolve_again(
            old,
            packages,
            resolving.wishes(),
            settings.cache_directory,
            warnings,
            progress=lambda phase, at, total: report(PHASES[phase], at, total),
        )
    found = changes(old, locked.lock)
    if found and not settings.json and not settings.quiet:
        print_changes(found)
    done = None
    if found and not dry_run:
        done = store_lock(
            settings,
            name,
            locked,
            (),
            PushOptions(message),
            allow_abi_errors=allow_abi_errors,
            run_scripts=not no_scripts,
        )
    _say(settings, ref, packages, found, done, warnings)


def _say(
    settings: Settings,
    ref: str,
    packages: tuple[str, ...],
    found: tuple[Change, ...],
    done: LockPush | None,
    warnings: list[str],
) -> None:
    if settings.json:
        output.result(
            {
                "ref": ref,
                "changes": change_fields(found),
                "pushed": lock_push_fields(done, warnings) if done else None,
                "warnings": [output.printable(warning) for warning in warnings],
            }
        )
        return
    if done is not None:
        print_lock_push(settings, done, warnings)
        return
    for warning in warnings:
        output.note(settings, f"warning: {warning}")
    if not found and packages:
        names = ", ".join(map(output.printable, packages))
        what = f"nothing newer of {names} fits what {ref} is made from and what stays"
        output.summary(settings, what)
    elif not found:
        output.summary(settings, f"{ref} is up to date")
    else:
        output.note(settings, f"{output.counted(len(found), 'package')} would change")
