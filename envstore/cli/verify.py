"""``verify``, ``repair`` and ``rebuild-index``: is the store whole, and what can be done."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF, ShareType
from envstore.cli.progress import progress
from envstore.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from envstore.store.problems import Problem, Report
    from envstore.store.rebuild import Rebuilt
    from envstore.store.repair import Repaired
    from envstore.store.repository import Repository
    from envstore.store.sampling import Sample

_SHOWN = 20
"""Files that are shown for one problem; ``--json`` has more of them."""


def _some(context: click.Context, parameter: click.Parameter, share: float | None) -> float | None:
    """Return the share of a sample, which has to be more than nothing."""
    if share == 0:
        raise click.BadParameter("a sample of nothing tells nothing; write for example 1%")
    return share


def _rate(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Return the bytes a second that ``50MB`` stands for."""
    from envstore.store.cache import parse_size

    if text is None:
        return None
    rate = parse_size(text.removesuffix("/s"))
    if rate <= 0:
        raise click.BadParameter(f"{text!r} is no rate; write for example 50MB")
    return rate


@click.command(
    cls=Command,
    examples="""
        envstore verify                                every ref: is all there, and does it fit?
        envstore verify --read-data                    read and hash every byte, too
        envstore verify --read-data --sample 1%        a random hundredth of them, every day
        envstore verify --read-data --limit-rate 50MB  at 50 MiB a second at most
        envstore verify --read-data --resume           go on where that was broken off
        envstore verify analysis team/llama:8b         some refs
    """,
)
@click.argument("refs", metavar="[REF]...", nargs=-1, type=REF)
@click.option("--read-data", is_flag=True, help="Read packs, and hash every frame and chunk.")
@click.option(
    "--sample",
    metavar="SHARE",
    type=ShareType(),
    callback=_some,
    help="Read a random share of all bytes: 1%.",
)
@click.option("--seed", metavar="TEXT", help="Choose the sample by TEXT and not at random.")
@click.option(
    "--limit-rate",
    metavar="SIZE",
    callback=_rate,
    help="Read at most SIZE (50MB) a second of the store.",
)
@click.option("--resume", is_flag=True, help="Go on with a --read-data that was broken off here.")
@click.option("--dry-run", is_flag=True, help="Leave the store's list of damaged packs as it is.")
@click.pass_obj
def verify(
    settings: Settings,
    refs: tuple[str, ...],
    read_data: bool,
    sample: float | None,
    seed: str | None,
    limit_rate: int | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Look for damage in what REFs, or all refs, lead to.

    Names the damaged objects, the refs that they harm and the files that are lost. Without
    --read-data metadata is read and hashed, and of each pack the table of contents. Without REF
    also the index is checked, which pushes look chunks up in, and whether a ref went back since
    this machine saw it last. The cache is not used.

    Damaged packs are put on a list in the store, and whole ones are taken off it: pushes store
    again what those on it held, and so heal it. `envstore repair` heals what it can at once.

    Exit status: 0 all is well, 1 something is damaged.
    """
    from envstore.store.checking import Reading, check_store, try_to_keep_list
    from envstore.store.sampling import Sample

    if not read_data and (sample is not None or seed is not None or resume):
        raise UsageError("--sample, --seed and --resume say how to read data", hint="--read-data")
    chosen: Sample | None = None
    if sample is not None:
        chosen = Sample(sample, seed if seed is not None else secrets.token_hex(8))
    with settings.open(cached=False) as repository:
        reading = Reading(read_data, chosen, _journal(settings, repository), resume, limit_rate)
        with progress(settings, unit_bytes=read_data) as draw:
            report = check_store(
                repository,
                refs,
                reading,
                remember=not dry_run,
                progress=lambda done, total: draw("checking packs", done, total),
            )
        changed = (0, 0) if dry_run else try_to_keep_list(repository, report)
        url = repository.objects.url
    print_report(settings, report, resume=resume, changed=changed)
    if not report.ok:
        raise CorruptError(
            f"{output.counted(len(report.problems), 'problem')} found in {url}",
            hint="heal what can be healed: envstore repair; or push what is lost again",
        )


def _journal(settings: Settings, repository: Repository) -> Path:
    """Return the file that remembers how far a check of this store's data came."""
    return settings.cache_directory / "verify" / repository.config.id


def print_report(
    settings: Settings,
    report: Report,
    *,
    resume: bool = False,
    changed: tuple[int, int] = (0, 0),
) -> None:
    """Print what was found damaged, and how much was looked at.

    ``changed`` is how many packs were put on the list of damaged ones, and taken off it.
    """
    for warning in report.warnings:
        output.note(settings, warning)
    if settings.json:
        output.result(
            {
                **_report_fields(report),
                "earlier_packs": report.earlier_packs,
                "earlier_bytes": report.earlier_bytes,
                "started": report.started,
                "noted": changed[0],
                "cleared": changed[1],
            }
        )
        return
    for problem in report.problems:
        print_problem(problem)
    if report.earlier_packs:
        output.summary(
            settings,
            f"going on with the check begun {output.age(report.started)}, which had read "
            f"{output.counted(report.earlier_packs, 'pack')}, {output.size(report.earlier_bytes)}",
        )
    elif resume:
        output.summary(settings, "there was no check to go on with; this one is new")
    if report.quarantined:
        output.summary(
            settings,
            f"{output.counted(len(report.quarantined), 'damaged pack')} that nothing needs: "
            "`envstore gc` removes them",
        )
    if changed != (0, 0):
        output.summary(
            settings,
            f"put {output.counted(changed[0], 'pack')} on the list of damaged ones, "
            f"took {changed[1]:,} off it",
        )
    output.summary(
        settings,
        f"checked {output.counted(report.snapshots, 'snapshot')}, "
        f"{output.counted(report.packs, 'pack')}, {output.counted(report.frames, 'frame')}, "
        f"{output.counted(report.chunks, 'chunk')}; read {output.size(report.bytes_read)} of packs"
        + (f", {report.data_packs:,} of them whole" if report.data_packs else "")
        + ("; all is well" if report.ok else ""),
    )


def print_problem(problem: Problem) -> None:
    """Print a damaged object, whom that harms, and the first of the files that are lost."""
    harms = f" [{', '.join(problem.harms)}]" if problem.harms else ""
    reason = output.printable(problem.reason.removeprefix(f"{problem.object} "))
    output.line(f"damaged: {problem.object}: {reason}{harms}")
    for file in problem.files[:_SHOWN]:
        output.line(f"  lost: {output.printable(file.path)} [{', '.join(file.harms)}]")
    if problem.lost > _SHOWN:
        output.line(f"  and {output.counted(problem.lost - _SHOWN, 'more file')}")


def _report_fields(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "snapshots": report.snapshots,
        "packs": report.packs,
        "frames": report.frames,
        "chunks": report.chunks,
        "bytes_read": report.bytes_read,
        "data_packs": report.data_packs,
        "quarantined": sorted(pack.hex() for pack in report.quarantined),
        "warnings": [output.printable(warning) for warning in report.warnings],
        "problems": [problem_fields(problem) for problem in report.problems],
    }


def problem_fields(problem: Problem) -> dict[str, Any]:
    """Return a problem for ``--json``."""
    return {
        "object": problem.object,
        "reason": output.printable(problem.reason),
        "harms": list(problem.harms),
        "lost_files": problem.lost,
        "files": [
            {"path": output.exact(file.path), "harms": list(file.harms)} for file in problem.files
        ],
    }


@click.command(
    cls=Command,
    examples="""
        envstore repair --dry-run       what could be healed, and what could not
        envstore repair                 heal it
        envstore repair --read-data     look at every byte first
    """,
)
@click.option("--read-data", is_flag=True, help="Read and hash every byte, to find more to heal.")
@click.option("--dry-run", is_flag=True, help="Write nothing to the store; say what would be done.")
@click.pass_obj
def repair(settings: Settings, read_data: bool, dry_run: bool) -> None:
    """Heal what is damaged, as far as that can be done from here.

    Chunks of damaged packs are taken from other packs that have them, from what can still be read,
    and from this machine's cache. Lost locations are made anew, and so is the index; damaged
    profiles and stored packages are removed, as they can be made again. Then the store is checked
    once more, and what could not be healed is named with its files, and with what would heal it.

    What `envstore verify` found is remembered in the store: run that with --read-data before, or
    this. May run beside pushes, mounts and collectors.

    Exit status: 0 all is whole now, 1 something is not.
    """
    from envstore.store.checking import Reading
    from envstore.store.repair import COUNTED
    from envstore.store.repair import repair as repair_store

    with settings.open() as repository:
        with progress(settings, unit_bytes=read_data, counted=COUNTED) as draw:
            done = repair_store(
                repository, dry_run=dry_run, reading=Reading(read_data), progress=draw
            )
        url = repository.objects.url
    _print_repaired(settings, done, dry_run=dry_run)
    if not done.ok:
        raise CorruptError(
            f"{output.counted(len(done.after.problems), 'problem')} in {url} cannot be healed "
            "from here",
            hint="each is named above, with what would heal it",
        )


def _print_repaired(settings: Settings, done: Repaired, *, dry_run: bool) -> None:
    from envstore.store.repair import advice

    if settings.json:
        output.result(
            {
                "ok": done.ok,
                "dry_run": dry_run,
                "found": len(done.before.problems),
                "done": done.done,
                "unhealed": [
                    {**problem_fields(problem), "advice": advice(problem)}
                    for problem in done.after.problems
                ],
            }
        )
        return
    for line in done.done:
        output.summary(settings, f"would have {line}" if dry_run else line)
    for problem in done.after.problems:
        print_problem(problem)
        output.line(f"  to heal it: {advice(problem)}")
    output.summary(
        settings,
        f"{output.counted(len(done.before.problems), 'problem')} found, "
        f"{len(done.after.problems):,} {'would be left' if dry_run else 'left'}",
    )


@click.command(
    "rebuild-index",
    cls=Command,
    examples="""
        envstore rebuild-index          after index objects were lost or damaged
    """,
)
@click.pass_obj
def rebuild_index(settings: Settings) -> None:
    """Make a lost or damaged index anew, from packs alone.

    Every pack says at its end what it holds. Those that no sound segment lists are listed in new
    ones, and damaged segments and samples go. The index spares pushes from storing again what is
    there; mounts and pulls do without. May run beside everything else.
    """
    from envstore.store.rebuild import rebuild_index as rebuild
    from envstore.store.repository import Repository
    from envstore.store.sessions import writing

    with (
        settings.open(cached=False) as repository,
        progress(settings, unit_bytes=False) as draw,
        writing(repository, "rebuild-index") as (session, inside),
    ):
        done = rebuild(
            Repository(inside.objects, inside.config, None),
            session.doomed_packs | session.damaged_packs,
            progress=lambda at, total: draw("reading packs", at, total),
        )
    _print_rebuilt(settings, done)


def _print_rebuilt(settings: Settings, done: Rebuilt) -> None:
    if settings.json:
        output.result(
            {
                "packs": done.packs,
                "stored": done.stored,
                "removed": done.removed,
                "unreadable": [
                    {"pack": pack.hex(), "reason": output.printable(reason)}
                    for pack, reason in sorted(done.unreadable.items())
                ],
            }
        )
        return
    for pack, reason in sorted(done.unreadable.items()):
        output.line(f"not listed: pack {pack.hex()}: {output.printable(reason)}")
    output.summary(
        settings,
        f"listed {output.counted(done.packs, 'pack')} in "
        f"{output.counted(len(done.stored), 'new object')} of the index; removed "
        f"{output.counted(len(done.removed), 'damaged object')}",
    )
