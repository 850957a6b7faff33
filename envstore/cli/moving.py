"""``tag`` and ``rm``: making refs point elsewhere, or nowhere."""

from __future__ import annotations

import sys

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import ref_argument
from envstore.errors import UsageError


@click.command(
    cls=Command,
    examples="""
        envstore tag analysis analysis:paper          keep what it is now under a name of its own
        envstore tag --force @3f2a9c1b analysis       go back to an earlier snapshot
        envstore tag team/torch:2.6 torch             give a ref another name
    """,
)
@ref_argument()
@ref_argument("newref")
@click.option("--force", "-f", is_flag=True, help="Move NEWREF if it points elsewhere.")
@click.pass_obj
def tag(settings: Settings, ref: str, newref: str, force: bool) -> None:
    """Point another REF at the same snapshot.

    No data is copied. A NEWREF that points elsewhere is left alone unless --force is given. If
    somebody moves it at the same moment the command fails and changes nothing.
    """
    from envstore.store import catalog
    from envstore.store.refs import RefName

    target = RefName.parse(newref)
    with settings.open() as repository:
        done = catalog.tag(repository, ref, target, force=force)
    if settings.json:
        output.result(
            {
                "ref": str(done.name),
                "digest": done.snapshot.hex(),
                "previous": done.before.hex() if done.before else None,
                "unchanged": done.before == done.snapshot,
            }
        )
        return
    was = "" if done.before is None else f", was @{output.short(done.before)}"
    if done.before == done.snapshot:
        was = ", as before"
    output.summary(settings, f"{done.name} -> @{output.short(done.snapshot)}{was}")


@click.command(
    cls=Command,
    examples="""
        envstore rm analysis:old                    asks first
        envstore rm --yes analysis:1 analysis:2     does not
    """,
)
@ref_argument("refs", nargs=-1, required=True)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def rm(settings: Settings, refs: tuple[str, ...], yes: bool) -> None:
    """Remove REFs.

    Asks first on a terminal; elsewhere --yes is needed. Only the names go. The snapshots stay
    reachable by @digest, and their bytes in the store, until a garbage collection frees what no
    ref leads to.
    """
    from envstore.store import catalog
    from envstore.store.refs import RefName

    names = [RefName.parse(ref) for ref in refs]
    with settings.open() as repository:
        found = catalog.current(repository, names)
        if not yes and not _agreed([str(name) for name, _ in found]):
            output.note(settings, "nothing was removed")
            raise click.exceptions.Exit(1)
        catalog.remove_refs(repository, (name for name, _ in found))
    if settings.json:
        removed = [
            {"ref": str(name), "digest": ref.snapshot.hex() if ref else None} for name, ref in found
        ]
        output.result({"removed": removed})
        return
    for name, ref in found:
        was = f" (undo: envstore tag @{output.short(ref.snapshot)} {name})" if ref else ""
        output.summary(settings, f"removed {name}{was}")
    output.note(settings, "the bytes are freed by a later garbage collection")


def _agreed(names: list[str]) -> bool:
    if not output.is_terminal(sys.stdin):
        raise UsageError(
            "there is no terminal to ask on", hint="add --yes to remove without asking"
        )
    return click.confirm(f"remove {', '.join(names)}?", err=True)
