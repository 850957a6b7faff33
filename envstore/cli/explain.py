"""``explain``: why a package is in an environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import RefType
from envstore.errors import UsageError

if TYPE_CHECKING:
    from envstore.resolver.explain import Explanation, Item, Need
    from envstore.resolver.lock import Lock

_KINDS = {
    "conda": "conda package",
    "pypi": "Python package",
    "python": "interpreter of the machine where it was locked",
    "virtual": "virtual package: what the target must have",
}
_SHOWN = 5


class RefOrLock(RefType):
    """A REF, or the path of a lock file."""

    name = "REF|LOCK"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the store's refs, and files."""
        refs = super().shell_complete(ctx, param, incomplete)
        return refs or [CompletionItem(incomplete, type="file")]


@click.command(
    cls=Command,
    examples="""
        envstore explain analysis numpy           why is numpy in there?
        envstore explain envstore.lock openssl    the same of a lock file
        envstore explain analysis __glibc         who needs what of the target?
        envstore --json explain analysis numpy    for a script
    """,
)
@click.argument("where", metavar="REF|LOCK", type=RefOrLock())
@click.argument("package")
@click.option("--all", "show_all", is_flag=True, help="Show all that needs it, not only some.")
@click.pass_obj
def explain(settings: Settings, where: str, package: str, show_all: bool) -> None:
    """Say why PACKAGE is in the environment of REF or a lock.

    Shown are the shortest way to it from everything that was asked for, with the constraint that
    each package puts on the next, and what needs it directly. What lies on the way may be conda
    or Python packages. An environment that was pushed as it lay on a disk has no lock, and so
    cannot be explained.
    """
    from envstore.resolver.explain import explain as explain_lock

    found = explain_lock(_lock(settings, where), package)
    if settings.json:
        output.result({"of": where, "package": package, "found": [_fields(item) for item in found]})
        return
    for number, explanation in enumerate(found):
        if number:
            output.line()
        _print(explanation, show_all)


def _lock(settings: Settings, where: str) -> Lock:
    if not os.path.isfile(where):
        from envstore.resolver.lockfile import stored_lock

        with settings.open() as repository:
            return stored_lock(repository, where)
    from envstore.resolver.lock import Lock
    from envstore.resolver.locking import Wishes, read

    found = read([Path(where)], Wishes(), [])
    if not isinstance(found, Lock):
        raise UsageError(f"{where} is no lock", hint=f"make one: envstore lock {where}")
    return found


def _print(found: Explanation, show_all: bool) -> None:
    output.line(f"{_named(found.item)}, a{_kind(found.item)}")
    direct = [chain.asked for chain in found.chains if not chain.needs]
    if direct:
        output.line(f"asked for: {_join(direct)}")
    through = [chain for chain in found.chains if chain.needs]
    for chain in through if show_all else through[:_SHOWN]:
        output.line(f"through {output.printable(chain.asked)}:")
        for need in chain.needs:
            output.line(f"  {_needs(need)}")
    if not show_all and len(through) > _SHOWN:
        output.line(f"and {len(through) - _SHOWN} more ways (--all shows them)")
    if not found.chains:
        output.line("nothing that was asked for leads to it, as far as the lock says")
    if found.needed_by:
        output.line(f"needed by {output.counted(len(found.needed_by), 'package')}:")
        for need in found.needed_by if show_all else found.needed_by[:_SHOWN]:
            output.line(f"  {_needs(need)}")
        if not show_all and len(found.needed_by) > _SHOWN:
            output.line(f"  and {len(found.needed_by) - _SHOWN} more (--all shows them)")


def _named(item: Item) -> str:
    return output.printable(f"{item.name} {item.version}".strip())


def _kind(item: Item) -> str:
    kind = _KINDS[item.kind]
    return f"n {kind}" if kind[0] == "i" else f" {kind}"


def _needs(need: Need) -> str:
    return f"{_named(need.item)} needs {output.printable(need.constraint)}"


def _join(texts: list[str]) -> str:
    return ", ".join(map(output.printable, texts))


def _fields(found: Explanation) -> dict[str, Any]:
    return {
        **_item(found.item),
        "needed_by": [_need(need) for need in found.needed_by],
        "chains": [
            {"asked": chain.asked, "needs": [_need(need) for need in chain.needs]}
            for chain in found.chains
        ],
    }


def _item(item: Item) -> dict[str, str]:
    return {"kind": item.kind, "name": item.name, "version": item.version}


def _need(need: Need) -> dict[str, str]:
    return {**_item(need.item), "constraint": need.constraint}
