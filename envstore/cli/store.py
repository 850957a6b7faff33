"""``init`` and ``du``: the store as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF
from envstore.errors import UsageError

if TYPE_CHECKING:
    from envstore.store.usage import Usage


@click.command(
    cls=Command,
    examples="""
        envstore init                        your own store, which the first push makes anyway
        envstore init /srv/envstore          a directory
        envstore init "s3://bucket/team?endpoint=https://minio.example:9000"
    """,
)
@click.argument("url", required=False, type=click.Path())
@click.option("--no-probe", is_flag=True, help="Do not try whether conditional writes are safe.")
@click.pass_obj
def init(settings: Settings, url: str | None, no_probe: bool) -> None:
    """Make a store.

    At URL, or where --store or ENVSTORE_URL says; a place that is a store already stays as it is.
    URL is file:///path, a plain path, or s3://bucket/prefix with a bucket that exists, followed by
    ?endpoint=http://host:port, region=.., path_style=1 or profile=.. where AWS's configuration does
    not say it. Credentials come from AWS_ACCESS_KEY_ID and its like, ~/.aws or the instance's role.

    First 32 writers race for one object, because refs are only safe if the server lets one of
    them win; some do not.
    """
    from envstore.store.creation import create_store

    if url is not None and settings.store is not None and url != settings.store:
        raise UsageError("two stores are named: the argument and --store", hint="name one")
    made = create_store(url or settings.url, probe=not no_probe)
    if settings.json:
        output.result(
            {
                "store": made.url,
                "id": made.config.id,
                "format": made.config.format,
                "created": made.created,
                "conditional_writes": None if made.probe is None else made.probe.ok,
            }
        )
        return
    what = "made a store in" if made.created else "already a store:"
    output.summary(settings, f"{what} {made.url}")
    if (made.created and not settings.is_default) or url is not None:
        output.summary(settings, f"  use it with: export ENVSTORE_URL='{made.url}'")


@click.command(
    cls=Command,
    examples="""
        envstore du                   every ref and the whole store
        envstore du torch:2.5.0 torch:2.5.1
    """,
)
@click.argument("refs", metavar="[REF]...", nargs=-1, type=REF)
@click.pass_obj
def du(settings: Settings, refs: tuple[str, ...]) -> None:
    """Measure how much REFs, or all of them, take.

    LOGICAL is the sum of the files' sizes, UNIQUE counts equal chunks once, STORED is what those
    take compressed, ALONE the part of it that no other of the measured refs uses.
    """
    from envstore.store.refs import RefName
    from envstore.store.usage import measure

    names = [RefName.parse(ref) for ref in dict.fromkeys(refs)]
    with settings.open() as repository:
        found = measure(repository, names)
        url = repository.objects.url
    if settings.json:
        output.result(
            {
                "store": url,
                **_usage_fields(found.total),
                "objects": found.objects,
                "object_bytes": found.object_bytes,
                "refs": [
                    {"ref": str(name), **_usage_fields(usage)} for name, usage in found.refs.items()
                ],
            }
        )
        return
    rows = [_usage_row(str(name), usage) for name, usage in found.refs.items()]
    if len(rows) != 1:
        rows.append(_usage_row("total", found.total))
    output.table(("REF", ">LOGICAL", ">UNIQUE", ">STORED", ">ALONE"), rows)
    output.summary(
        settings,
        f"\nthe store: {output.size(found.object_bytes)} in "
        f"{output.counted(found.objects, 'object')}",
    )


def _usage_row(name: str, usage: Usage) -> tuple[str, ...]:
    sizes = (usage.logical, usage.unique, usage.stored, usage.exclusive)
    return name, *map(output.size, sizes)


def _usage_fields(usage: Usage) -> dict[str, int]:
    return {
        "logical_bytes": usage.logical,
        "unique_bytes": usage.unique,
        "stored_bytes": usage.stored,
        "exclusive_bytes": usage.exclusive,
    }
