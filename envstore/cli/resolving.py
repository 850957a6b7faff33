"""The options of every command that resolves: what an environment is made of, and for whom."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from envstore.cli.params import PathType

if TYPE_CHECKING:
    from envstore.resolver.locking import Wishes

_Function = TypeVar("_Function", bound=Callable[..., Any])

PHASES = {
    "resolve": "resolving",
    "download": "downloading",
    "build": "building wheels",
}
"""What the phases of ``make_lock`` are called."""

_FILE = PathType(path_type=Path)
_PLATFORMS = ("linux-64", "linux-aarch64", "linux-ppc64le", "linux-s390x", "linux-riscv64")


class TimeType(click.ParamType[str]):
    """A moment as RFC 3339 has it, or a date, which is its end in UTC."""

    name = "TIME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the moment in RFC 3339, in UTC."""
        from envstore.errors import UsageError
        from envstore.resolver.conda import cutoff_time

        try:
            moment = cutoff_time(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        if moment is None:
            self.fail("the time is empty", param, ctx)
        return _rfc3339(moment)


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Resolving:
    """The options as given."""

    conda: tuple[Path, ...] = ()
    pip: tuple[Path, ...] = ()
    platform: str | None = None
    glibc: str | None = None
    cuda: str | None = None
    python: str | None = None
    channel: tuple[str, ...] = ()
    exclude_newer: str | None = None
    environment: str | None = None
    extra: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    index_url: str | None = None
    extra_index_url: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()

    @property
    def names_files(self) -> bool:
        """Whether specifications are named by options."""
        return bool(self.conda or self.pip)

    def wishes(self) -> Wishes:
        """Return them as the resolver takes them. Raises ``UsageError`` for credentials."""
        from envstore.resolver.locking import Wishes
        from envstore.resolver.specs.files import refuse_secrets

        for option, places in (
            ("--channel", self.channel),
            ("--index-url", (self.index_url or "",)),
            ("--extra-index-url", self.extra_index_url),
            ("--find-links", self.find_links),
        ):
            for place in places:
                refuse_secrets(place, option)
        python = self.python or ""
        program = Path(os.path.abspath(python)) if os.sep in python else None
        return Wishes(
            platform=self.platform,
            glibc=self.glibc,
            cuda=self.cuda,
            python="" if program else python,
            interpreter=program,
            channels=self.channel,
            exclude_newer=self.exclude_newer or "",
            environment=self.environment or "",
            extras=self.extra,
            groups=self.group,
            default_index=self.index_url or "",
            indexes=self.extra_index_url,
            find_links=tuple(map(_as_url, self.find_links)),
        )


def _as_url(place: str) -> str:
    return place if "://" in place else Path(os.path.abspath(place)).as_uri()


_WHAT = (
    click.option(
        "--conda",
        metavar="FILE",
        type=_FILE,
        multiple=True,
        help="A specification of conda packages (repeatable).",
    ),
    click.option(
        "--pip",
        metavar="FILE",
        type=_FILE,
        multiple=True,
        help="A specification of Python packages (repeatable).",
    ),
    click.option(
        "--platform",
        type=click.Choice(_PLATFORMS),
        help="Resolve for machines of another kind than this one.",
    ),
    click.option(
        "--python",
        metavar="VERSION|PROGRAM",
        help="The version of Python, or the path of an interpreter to take.",
    ),
    click.option(
        "--environment", metavar="NAME", help="The environment to take of a pixi project or lock."
    ),
    click.option(
        "--extra",
        metavar="NAME",
        multiple=True,
        help="An extra of a Python project to take as well (repeatable).",
    ),
    click.option(
        "--group",
        metavar="NAME",
        multiple=True,
        help="A dependency group of a Python project to take as well (repeatable).",
    ),
)
"""What to make an environment of."""

_HOW = (
    click.option(
        "--glibc", metavar="VERSION", help="The oldest C library it must run with, such as 2.28."
    ),
    click.option(
        "--cuda",
        metavar="VERSION",
        help="The newest CUDA that the target's driver runs, such as 12.4, or none.",
    ),
    click.option(
        "--channel",
        "-c",
        metavar="CHANNEL",
        multiple=True,
        help="A conda channel that comes before those of the specifications (repeatable).",
    ),
    click.option(
        "--exclude-newer",
        metavar="TIME",
        type=TimeType(),
        help="Leave out what was published later than this date or time.",
    ),
    click.option(
        "--index-url", metavar="URL", help="The index of Python packages to use by default."
    ),
    click.option(
        "--extra-index-url",
        metavar="URL",
        multiple=True,
        help="An index that is asked before it (repeatable).",
    ),
    click.option(
        "--find-links",
        metavar="URL|DIR",
        multiple=True,
        help="A page or directory with wheels (repeatable).",
    ),
)
"""For whom it is made, and from where."""


def resolver_options(function: _Function) -> Callable[..., Any]:
    """Add all options; ``function`` gets them as ``resolving``, a ``Resolving``."""
    return _with_options(function, (*_WHAT, *_HOW))


def update_options(function: _Function) -> Callable[..., Any]:
    """Add those that change how something is resolved again, in the same way."""
    return _with_options(function, _HOW)


def _with_options(
    function: Callable[..., Any], options: Sequence[Callable[[Any], Any]]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        names = Resolving.__dataclass_fields__.keys() & kwargs.keys()
        given = Resolving(**{name: kwargs.pop(name) for name in names})
        return function(*args, resolving=given, **kwargs)

    decorated: Callable[..., Any] = wrapped
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
