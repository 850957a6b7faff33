"""``check``: do the libraries of an environment fit together, and its target?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from envstore.cli import output
from envstore.cli.base import Command
from envstore.cli.context import Settings
from envstore.cli.params import REF
from envstore.errors import EnvstoreError, UsageError

if TYPE_CHECKING:
    from envstore.resolver.abi.findings import Finding
    from envstore.resolver.abi.host import AbiTarget
    from envstore.resolver.abi.search import Tree

_COLOURS = {"error": "red", "warning": "yellow"}
_NAMED = 4


@click.command(
    cls=Command,
    examples="""
        envstore check analysis                  what would fail to load, and why
        envstore check analysis --glibc 2.28     on machines that have this glibc
        envstore check analysis --cuda 12.4      and a driver that runs CUDA 12.4
        envstore check ./.venv --host            a directory, with this machine's libraries
    """,
)
@click.argument("what", metavar="REF|PATH", type=REF)
@click.option("--platform", metavar="SUBDIR", help="The machines it is for, such as linux-64.")
@click.option("--glibc", metavar="VERSION", help="The glibc that all of them have at least.")
@click.option("--cuda", metavar="VERSION", help="The newest CUDA their driver runs; `none`: none.")
@click.option("--host", is_flag=True, help="Look for libraries from outside on this machine.")
@click.option("--strict", is_flag=True, help="Take warnings for errors.")
@click.pass_obj
def check(
    settings: Settings,
    what: str,
    platform: str | None,
    glibc: str | None,
    cuda: str | None,
    host: bool,
    strict: bool,
) -> None:
    """Say which libraries and symbols an environment would miss.

    What is said is what the dynamic loader would say, without anything being loaded: missing
    libraries and symbol versions, undefined symbols, a glibc or CUDA runtime that is too new, the
    wrong architecture. What the environment is for comes from its lock, as far as no option says
    otherwise. Without --host the answer is the same on every machine. A PATH starts with `/` or
    `.`. Exits with 1 if there are errors.
    """
    from envstore.resolver.abi.check import check as find
    from envstore.resolver.abi.check import glibc_floor
    from envstore.resolver.abi.machine import MachineLibraries

    is_path = what.startswith(("/", "./", "../")) or what in (".", "..")
    tree, target, packages = _directory(what) if is_path else _pushed(settings, what)
    if platform:
        target = replace(target, platform=platform)
    if glibc:
        target = replace(target, glibc=glibc)
    if cuda:
        target = replace(target, cuda="" if cuda == "none" else cuda)
    machine = MachineLibraries(*target.architecture[:2]) if host else None
    findings = find(tree, target, packages, machine)
    if strict:
        findings = [replace(finding, level="error") for finding in findings]
    floor = glibc_floor(tree)
    errors = sum(finding.level == "error" for finding in findings)
    if settings.json:
        output.result(
            {
                "ok": not errors,
                "files": len(tree.files),
                "glibc_needed": floor,
                "target": {
                    "platform": target.platform,
                    "glibc": target.glibc,
                    "cuda": target.cuda,
                },
                "findings": [finding.to_json() for finding in findings],
            }
        )
    else:
        _show(findings)
        text = output.counted(len(tree.files), "ELF file")
        text += f", {output.counted(errors, 'error')}"
        text += f", {output.counted(len(findings) - errors, 'warning')}"
        output.summary(settings, text + (f"; needs glibc {floor} or newer" if floor else ""))
    if errors:
        names = sorted({finding.package for finding in findings if finding.level == "error"})
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise EnvstoreError(
            f"{output.counted(errors, 'thing')} would fail to load: "
            f"{', '.join(names[:_NAMED])}{more}",
        )


def _directory(text: str) -> tuple[Tree, AbiTarget, dict[str, str]]:
    from envstore.resolver.abi.reading import directory_tree

    path = Path(text)
    if path.is_file():
        raise UsageError(f"{text} is a file", hint="name the environment's directory")
    tree = directory_tree(path)
    return tree, _likely_target(tree), {}


def _pushed(settings: Settings, ref: str) -> tuple[Tree, AbiTarget, dict[str, str]]:
    """Return the files of a snapshot, what it is for, and the versions of its packages."""
    from envstore.resolver.abi.reading import pushed_tree
    from envstore.resolver.libraries import stored_tree, target_of, versions_of
    from envstore.resolver.lockfile import parse_lock
    from envstore.store.locks import load_lock_bytes

    with settings.open() as repository:
        snapshot = repository.snapshot(repository.resolve(ref))
        if snapshot.lock is None:
            kept = settings.cache_directory / "abi.sqlite"
            tree = pushed_tree(repository, snapshot.manifest, kept)
            return tree, _likely_target(tree), {}
        lock = parse_lock(load_lock_bytes(repository.objects, snapshot.lock), f"the lock of {ref}")
        stored = stored_tree(repository, lock)
        if stored is None:
            kept = settings.cache_directory / "abi.sqlite"
            stored = pushed_tree(repository, snapshot.manifest, kept)
        return stored, target_of(lock), versions_of(lock)


def _likely_target(tree: Tree) -> AbiTarget:
    """Return the platform that the interpreter is for, else that of most files."""
    from collections import Counter

    from envstore.resolver.abi.check import find_interpreter
    from envstore.resolver.abi.host import AbiTarget, platform_of

    interpreter = find_interpreter(tree)
    paths = [interpreter] if interpreter else list(tree.files)
    counted = Counter(
        platform_of(facts.machine, facts.bits, facts.big_endian) for facts in map(tree.facts, paths)
    )
    platforms = [platform for platform, _ in counted.most_common() if platform]
    return AbiTarget(platforms[0]) if platforms else AbiTarget()


def _show(findings: Sequence[Finding]) -> None:
    """Print findings by package, those of one kind and remedy together."""
    by_package = sorted(findings, key=lambda item: item.package)
    for package, group in groupby(by_package, key=lambda item: item.package):
        output.line(click.style(output.printable(package), bold=True))
        for line in _lines(list(group)):
            output.line(line)


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    together: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = finding.level, finding.code, finding.hint
        together.setdefault(key, []).append(finding)
    for (level, code, hint), group in together.items():
        word = click.style(f"{level:<7}", fg=_COLOURS[level])
        first = group[0]
        message = output.printable(first.message)
        if len(group) > 1:
            others = ", ".join(output.printable(item.subject) for item in group[1:_NAMED])
            more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
            message += f"; also {others}{more}"
        yield f"  {word}  {code}: {message}"
        where = output.printable(first.path)
        if first.files > 1:
            where += f" and {output.counted(first.files - 1, 'other file')}"
        if where:
            yield f"{'':11}in {where}"
        if first.provider not in ("", "the machine") and len(group) == 1:
            yield f"{'':11}from {output.printable(first.provider)}"
        if hint:
            yield f"{'':11}-> {output.printable(hint)}"
