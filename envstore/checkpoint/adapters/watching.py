"""Watching a directory into which a program that nobody may change writes its checkpoints.

Each one is stored and committed once it is whole: its framework's own sign is there, its files end
where their formats say, and nothing in it has changed for a while. Looking costs one ``stat`` a
file; nothing is kept on disk, so that a watcher may be killed and started again at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envstore.checkpoint.adapters.completeness import (
    Candidate,
    find_candidates,
    metrics_of,
    what_lacks,
)
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.errors import FencedError
from envstore.checkpoint.records import Commit
from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError
from envstore.store.source import ChangedError

QUIET = 5.0
POLL = 1.0
_MAX_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Event:
    """What a watcher did about one checkpoint.

    ``saved``: it is durable now, as ``commit``. ``present``: it was already. ``waiting``: it rests
    but is not whole; ``message`` says what it lacks. ``failed``: ``message`` says why, and it is
    tried again.
    """

    kind: Literal["saved", "present", "waiting", "failed"]
    path: Path
    step: int
    commit: Commit | None = None
    message: str = ""


@dataclass(slots=True)
class _Seen:
    """What is known of one candidate: since when it is as it is, and what was done about it."""

    signature: str
    since: float
    done: bool = False
    told: str = ""
    pause: float = POLL
    retry: float = 0.0


def watch(
    directory: Path,
    run: DirectoryRun,
    *,
    quiet: float = QUIET,
    poll: float = POLL,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Save what is, and what will be, in ``directory``, and tell of it; until ``stop`` is set.

    Taken for checkpoints are directories and files whose names hold a step: ``checkpoint-500``,
    ``step-500``, ``global_step500``, ``epoch=1-step=500.ckpt``, ``model_500.pt``. ``quiet`` is for
    how many seconds nothing in one must have changed, ``poll`` how often to look. What is removed
    from the directory stays in the run. Raises ``UsageError`` (no such directory),
    ``FencedError`` (the run has gone on elsewhere) and ``AccessDeniedError``; other errors of the
    store are events. Closing the iterator, and Ctrl-C, leave nothing half done.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory", hint="name where checkpoints will be")
    stop = stop or threading.Event()
    seen: dict[Path, _Seen] = {}
    while not stop.is_set():
        candidates = find_candidates(directory)
        for gone in seen.keys() - {one.path for one in candidates}:
            del seen[gone]
        for candidate in candidates:
            event = _look(candidate, seen, run, quiet)
            if event is not None:
                yield event
            if stop.is_set():
                return
        stop.wait(poll)


def _look(
    candidate: Candidate, seen: dict[Path, _Seen], run: DirectoryRun, quiet: float
) -> Event | None:
    now = time.monotonic()
    signature = candidate.signature
    known = seen.get(candidate.path)
    if known is None or known.signature != signature:
        known = seen[candidate.path] = _Seen(signature, now)
        present = run.find_source(candidate.step, signature)
        if present is not None:
            known.done = True
            return Event("present", candidate.path, candidate.step, present)
    if known.done or now - known.since < quiet or now < known.retry:
        return None
    lacking = what_lacks(candidate)
    if lacking is not None:
        return _tell(known, Event("waiting", candidate.path, candidate.step, message=lacking))
    try:
        commit = run.save(
            candidate.step,
            candidate.path,
            metrics=metrics_of(candidate),
            source=signature,
            settled=lambda: _is_as(candidate),
        )
    except (ChangedError, NotFoundError) as error:
        if _is_as(candidate):
            return _failed(known, candidate, error)
        known.since = time.monotonic()
        return None
    except (FencedError, AccessDeniedError):
        raise
    except EnvstoreError as error:
        return _failed(known, candidate, error)
    known.done = True
    return Event("saved", candidate.path, candidate.step, commit)


def _failed(known: _Seen, candidate: Candidate, error: EnvstoreError) -> Event | None:
    known.pause = min(known.pause * 2, _MAX_PAUSE)
    known.retry = time.monotonic() + known.pause
    return _tell(known, Event("failed", candidate.path, candidate.step, message=str(error)))


def _tell(known: _Seen, event: Event) -> Event | None:
    """Return ``event`` unless the last one said the same."""
    if known.told == event.message:
        return None
    known.told = event.message
    return event


def _is_as(candidate: Candidate) -> bool:
    return any(
        one.path == candidate.path and one.signature == candidate.signature
        for one in find_candidates(candidate.path.parent)
    )
