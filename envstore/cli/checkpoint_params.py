"""What the commands of ``checkpoint`` take: a run, and a step of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from envstore.cli.context import Settings
from envstore.errors import EnvstoreError

if TYPE_CHECKING:
    from envstore.checkpoint.protocol import RunStore
    from envstore.checkpoint.records import Commit
    from envstore.store.repository import Repository

_PATIENCE_SECONDS = "2"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class RunType(click.ParamType[str]):
    """A RUN as typed; checked by whoever opens it, completed from the store."""

    name = "RUN"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the store's runs; none if it does not answer soon."""
        os.environ.setdefault("ENVSTORE_S3_TIMEOUT", _PATIENCE_SECONDS)
        from envstore.checkpoint.listing import list_runs

        try:
            with ctx.ensure_object(Settings).open(cached=False) as repository:
                names = [str(run.name) for run in list_runs(repository.objects)]
        except (EnvstoreError, OSError):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def run_argument(*, required: bool = True) -> Callable[[_Function], _Function]:
    """Return the decorator for a RUN argument."""
    metavar = "RUN" if required else "[RUN]"
    return click.argument("run", metavar=metavar, type=RunType(), required=required)


def step_option(text: str = "The checkpoint of this step [the newest].") -> Callable[..., Any]:
    """Return the decorator for a --step option."""
    return click.option("--step", type=click.IntRange(0, 10**12 - 1), metavar="N", help=text)


def find(repository: Repository, run: str, step: int | None) -> tuple[RunStore, Commit]:
    """Return the checkpoint of ``step``, or the newest.

    Raises ``UsageError``, ``NoCheckpointError``.
    """
    from envstore.checkpoint.layout import RunName
    from envstore.checkpoint.protocol import RunStore

    runs = RunStore(repository, RunName.parse(run))
    commit = runs.latest() if step is None else runs.find(step)
    if commit is None:
        raise no_checkpoint(runs)
    return runs, commit


def no_checkpoint(runs: RunStore) -> EnvstoreError:
    """Return the error of a run that has none that counts, or that is not there at all."""
    from envstore.checkpoint.errors import NoCheckpointError

    return NoCheckpointError(
        f"{runs.run} has no checkpoint", hint="see: envstore checkpoint ls [--all RUN]"
    )
