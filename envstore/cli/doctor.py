"""``doctor``: is everything there, and if not, what mends it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.errors import EnvstoreError

if TYPE_CHECKING:
    from envstore.store.checks import Check

_SHOWN = {"ok": ("ok", "green"), "note": ("note", "yellow"), "failed": ("FAIL", "red")}


@click.command(
    cls=Command,
    examples="""
        envstore doctor
        envstore --store s3://bucket/team doctor
        envstore --json doctor --no-probe
    """,
)
@click.option("--no-probe", is_flag=True, help="Do not write to the store to try it.")
@click.pass_obj
def doctor(settings: Settings, no_probe: bool) -> None:
    """Check that everything works, and say how to mend it.

    Python, the kernel and its FUSE device, fusermount3, pyfuse3, what fast mounts need of the
    kernel (EROFS, overlayfs, root), the store and the cache. Of the store it tries whether one of
    32 concurrent writers wins, which writes a few small objects and removes them. Exits with 1 if
    something essential fails; notes are not essential.
    """
    found = []
    for check in _checks(settings, probe=not no_probe):
        found.append(check)
        if not settings.json:
            _print_check(check)
    bad = [check for check in found if check.verdict == "failed"]
    if settings.json:
        output.result(
            {
                "ok": not bad,
                "checks": [
                    {
                        "name": check.name,
                        "verdict": check.verdict,
                        "detail": output.printable(check.detail),
                        "mend": check.mend,
                    }
                    for check in found
                ],
            }
        )
    if bad:
        names = ", ".join(check.name for check in bad)
        raise EnvstoreError(f"{output.counted(len(bad), 'check')} failed: {names}")


def _checks(settings: Settings, *, probe: bool) -> Iterator[Check]:
    from envstore.fuse.checks import check_fast_path, check_mounting
    from envstore.store.checks import check_cache, check_store, failed

    yield from check_mounting()
    yield check_fast_path(settings.cache_directory)
    yield from check_store(settings.url, may_be_missing=settings.is_default, probe=probe)
    try:
        capacity = settings.cache_capacity
    except EnvstoreError as error:
        yield failed("cache", error)
        return
    yield from check_cache(settings.cache_directory, capacity)


def _print_check(check: Check) -> None:
    word, colour = _SHOWN[check.verdict]
    verdict = click.style(f"{word:<4}", fg=colour)
    output.line(f"{verdict}  {check.name:<18}  {output.printable(check.detail)}")
    if check.mend:
        output.line(f"{'':24}  -> {output.printable(check.mend)}")
