"""``cache show`` and ``cache clear``: what is kept on this machine."""

from __future__ import annotations

import click

from envstore.cli import output
from envstore.cli.base import Group
from envstore.cli.context import Settings


@click.group(
    cls=Group,
    examples="""
        envstore cache show       where it is and how full
        envstore cache clear      give the space back
    """,
)
def cache() -> None:
    """Look at the cache of fetched data, or clear it.

    It is shared by all stores and mounts of one user, and stays below ENVSTORE_CACHE_SIZE (20G) by
    dropping what was not used for longest; only what was hydrated stays. Beyond that it holds
    images of the names of fast mounts, 256 MiB of them and what is in use. Losing it costs time,
    never data.
    """


@cache.command(
    examples="""
        envstore cache show
        envstore --json cache show
    """,
)
@click.pass_obj
def show(settings: Settings) -> None:
    """Show where the cache is, its size and its cap."""
    found = settings.cache()
    usage = found.usage()
    if settings.json:
        output.result(
            {
                "directory": output.printable(str(found.root)),
                "bytes": usage.bytes,
                "blobs": usage.blobs,
                "files": usage.files,
                "pinned_bytes": usage.pinned,
                "capacity": usage.capacity,
            }
        )
        return
    output.fields(
        [
            ("directory", output.printable(str(found.root))),
            (
                "used",
                f"{output.size(usage.bytes)} in {output.counted(usage.blobs, 'blob')} and "
                f"{output.counted(usage.files, 'file')}",
            ),
            ("hydrated", output.size(usage.pinned)),
            ("cap", output.size(usage.capacity)),
        ]
    )


@cache.command(
    examples="""
        envstore cache clear
    """,
)
@click.pass_obj
def clear(settings: Settings) -> None:
    """Remove what was fetched, but for hydrated snapshots.

    Mounts that are in use fetch again what they need. To let a hydrated snapshot go, see
    `envstore hydrate --drop`.
    """
    freed = settings.cache().clear()
    if settings.json:
        output.result({"freed_bytes": freed})
        return
    output.summary(settings, f"freed {output.size(freed)}")
