"""``init``, ``du`` and ``verify``: the store as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF
from envstore.cli.progress import progress
from envstore.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from envstore.store.usage import Usage
    from envstore.store.verify import Problem, Report


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


@click.command(
    cls=Command,
    examples="""
        envstore verify                 every ref: is all there, and does it fit together?
        envstore verify --read-data     read and hash every byte, too
        envstore verify analysis        one ref
    """,
)
@click.argument("ref", required=False, type=REF)
@click.option("--read-data", is_flag=True, help="Read every pack and hash every frame and chunk.")
@click.pass_obj
def verify(settings: Settings, ref: str | None, read_data: bool) -> None:
    """Look for damage in what REF, or every ref, leads to.

    Names the damaged objects and the refs that they harm. Without --read-data metadata is read
    and hashed, and of each pack the table of contents. Without REF also the index is checked,
    which pushes look chunks up in. The cache is not used. Exits with 1 if anything is damaged.
    """
    from envstore.store.catalog import all_targets
    from envstore.store.verify import verify as check

    broken: list[Problem] = []
    with settings.open(cached=False) as repository:
        if ref is not None:
            targets = [(ref, repository.resolve(ref))]
        else:
            targets, broken = all_targets(repository)
        url = repository.objects.url
        with progress(settings, unit_bytes=False) as draw:
            report = check(
                repository,
                targets,
                read_data=read_data,
                whole=ref is None,
                progress=lambda done, total: draw("checking packs", done, total),
            )
    report.problems[:0] = broken
    print_report(settings, report)
    if not report.ok:
        raise CorruptError(
            f"{output.counted(len(report.problems), 'problem')} found in {url}",
            hint="restore the objects from a copy of the store, or push the trees to a new one",
        )


def print_report(settings: Settings, report: Report) -> None:
    """Print what was found damaged, and how much was looked at."""
    if settings.json:
        output.result(_report_fields(report))
        return
    for problem in report.problems:
        harms = f" [{', '.join(problem.harms)}]" if problem.harms else ""
        output.line(f"damaged: {problem.object}: {output.printable(problem.reason)}{harms}")
    output.summary(
        settings,
        f"checked {output.counted(report.snapshots, 'snapshot')}, "
        f"{output.counted(report.packs, 'pack')}, {output.counted(report.frames, 'frame')}, "
        f"{output.counted(report.chunks, 'chunk')}; read {output.size(report.bytes_read)} of packs"
        + ("; all is well" if report.ok else ""),
    )


def _report_fields(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "snapshots": report.snapshots,
        "packs": report.packs,
        "frames": report.frames,
        "chunks": report.chunks,
        "bytes_read": report.bytes_read,
        "problems": [
            {
                "object": problem.object,
                "reason": output.printable(problem.reason),
                "harms": list(problem.harms),
            }
            for problem in report.problems
        ],
    }
