"""What is shown at targets that others name: the holder's side, which touches none of it.

Each mount is made and taken away by a child, of which some work at a time, never two at one
target, and those for one target in the order in which they were asked for. What is shown is kept
like everything else about a mount, so that the next holder knows it; it is noted before it is
begun, because a child outlives a holder that is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from envstore.errors import EnvstoreError, NotFoundError, UnavailableError, UsageError
from envstore.fuse import session as sessions
from envstore.fuse.attaching import Showing, Tell, attach, take_away, undo
from envstore.fuse.control import Connection
from envstore.fuse.keeping import LEASE, Keepsake, Kept
from envstore.fuse.mountinfo import find_mount, list_mounts, resolve
from envstore.fuse.overlay import FILESYSTEM
from envstore.fuse.sockets import raised, told
from envstore.fuse.targets import Target, find_target
from envstore.store.cache import default_directory

SHOWN = "shown/"
"""What the keepsakes of mounts at targets are called, before the target."""

_AT_ONCE = 16
_MOST_WAITING = 1024
_MOST_HUNG = 64
_SUBTREE = re.compile(r"\d{1,10}-[0-9a-f]{16}")
_LONGEST_SOURCE = 1024
_PIPE = 65_536

_log = logging.getLogger(__name__)


class _Help(Protocol):
    def __call__(
        self, work: Callable[[], int], done: Callable[[int], None], keep: tuple[int, ...] = ()
    ) -> int: ...


class _Work(Protocol):
    def __call__(self, *, tell: Tell) -> dict[str, Any]: ...


@dataclass(slots=True, eq=False)
class _Job:
    """Something asked for at a target, and the child that does it once one does.

    ``showing`` is what is to be shown for ``lease``, ``None`` to hide; ``before`` what was noted of
    the target when its turn came; ``turn`` tells the present child from one that was given up.
    """

    connection: Connection
    target: Target
    showing: Showing | None = None
    lease: str = ""
    before: Keepsake | None = None
    turn: int = 0
    pidfd: int = -1
    pipe: int = -1
    deadline: float = 0.0
    said: dict[str, Any] = field(default_factory=dict)
    failure: EnvstoreError | None = None


class Shows:
    """Answers ``show``, ``hide`` and ``look``; see docs/architecture.md. For the holder's loop."""

    def __init__(
        self, kept: Kept, help_out: _Help, note: Callable[[str, Keepsake | None], None]
    ) -> None:
        """Have ``help_out`` start children, and ``note`` keep or drop what is shown."""
        self._kept = kept
        self._help = help_out
        self._note = note
        self._allowed = {one: resolve(one) for one in kept.request.targets}
        self._within = 2 * kept.request.hung_after
        self._waiting: deque[_Job] = deque()
        self._working: dict[str, _Job] = {}
        self._hung = 0
        self._idle: Callable[[], None] | None = None
        self._paused = False

    # --- questions ------------------------------------------------------------------------------

    def show(self, connection: Connection, question: dict[str, Any]) -> None:
        """Mount what a lease is for.

        Raises ``UsageError``, ``NotFoundError`` (no such lease), ``UnavailableError``.
        """
        target = find_target(question["target"], self._allowed)
        if self._hung >= _MOST_HUNG:
            raise UnavailableError("the node server does not answer", hint="try again later")
        lease = str(question["id"])
        self._enter(_Job(connection, target, self._showing(lease, question), lease))

    def hide(self, connection: Connection, question: dict[str, Any]) -> None:
        """Take all mounts of ours off a target. Raises ``UsageError``, ``UnavailableError``."""
        self._enter(_Job(connection, find_target(question["target"], self._allowed)))

    def look(self) -> list[dict[str, Any]]:
        """Return every mount of ours below the allowed directories, as the kernel lists them."""
        device, found, seen = self._device(), [], set()
        for mounted in list_mounts():
            path = self._named(mounted.mountpoint)
            if path is None or not sessions.is_ours(mounted):
                continue
            fast = mounted.type == FILESYSTEM
            keepsake = self._kept.keepsakes.get(SHOWN + path)
            known = keepsake is not None and keepsake.body["device"] == mounted.device
            seen.add(path)
            found.append(
                {
                    "target": path,
                    "device": mounted.device,
                    "alive": bool(device) and (known if fast else mounted.device == device),
                    "fast": fast,
                    "id": keepsake.body["id"] if keepsake is not None and known else "",
                }
            )
        self._forget_all_but(seen)
        return found

    def _forget_all_but(self, seen: set[str]) -> None:
        """Forget what was unmounted by others."""
        for key in [one for one in self._kept.keepsakes if one.startswith(SHOWN)]:
            path = key.removeprefix(SHOWN)
            if path not in seen and path not in self._working:
                self._note(key, None)

    @property
    def busy(self) -> bool:
        """Whether a child is at work."""
        return bool(self._working)

    def pause(self, *, on: bool = True) -> None:
        """Begin nothing more; with ``on=False`` go on."""
        self._paused = on
        self._start()

    # --- the loop -------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return when the clock alone gives something to do."""
        return min((job.deadline for job in self._working.values()), default=None)

    def on_time(self) -> None:
        """Give up what takes too long: kill it, and have undone what it may have done."""
        now = time.monotonic()
        for job in list(self._working.values()):
            if now >= job.deadline:
                _log.error("%s gives no answer: giving it up", job.target.path)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(job.pidfd, signal.SIGKILL)
                job.turn += 1
                self._hung += 1
                self._hear(job)
                late = f"{job.target.path}: no answer in {self._within:.0f} s"
                self._undo(job, UnavailableError(late, hint="see the node server's log"))

    def when_idle(self, then: Callable[[], None]) -> None:
        """Begin nothing until nothing is under way any more, and ``then`` was called."""
        self._idle = then
        self._start()

    # --- parts ----------------------------------------------------------------------------------

    def _enter(self, job: _Job) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            raise UnavailableError("the node server has too much to do", hint="try again later")
        self._waiting.append(job)
        self._start()

    def _showing(self, lease: str, question: dict[str, Any]) -> Showing:
        """Return what was asked for, if it is ours to show. Raises ``UsageError``, ..."""
        kept = self._kept
        keepsake = kept.keepsakes.get(LEASE + lease)
        if keepsake is None:
            raise NotFoundError(f"there is no lease {lease!r}", hint="ask the node socket for one")
        subtree, source = str(question["subtree"]), str(question["source"])
        if not _SUBTREE.fullmatch(subtree) or not subtree.startswith(f"{keepsake.body['slot']}-"):
            raise UsageError("the subtree is not that of the lease")
        if question["root"] != kept.request.mountpoint:
            raise UsageError("the root is not that of this node server")
        if not source.startswith("envstore:") or len(source) > _LONGEST_SOURCE or "\0" in source:
            raise UsageError("the source is to be envstore: and a name")
        device = self._device()
        if not device:
            raise UnavailableError("the node server is ending", hint="try again later")
        return Showing(
            root=kept.request.mountpoint,
            subtree=subtree,
            device=device,
            fast=_checked_parts(question["fast"]),
            source=source,
            required=bool(question["required"]),
        )

    def _device(self) -> str:
        """Return the device number of the file system served here, empty if it is no more."""
        kept = self._kept
        if kept.fuse < 0 or sessions.is_gone(kept.fuse):
            return ""
        if not kept.device:
            mounted = find_mount(kept.target)
            kept.device = mounted.device if mounted is not None else ""
        return kept.device

    def _named(self, mountpoint: str) -> str | None:
        """Return a mount point by the name that askers have for it, if it is one they may have."""
        for base, real in self._allowed.items():
            if mountpoint.startswith(real.rstrip("/") + "/"):
                return base.rstrip("/") + mountpoint[len(real.rstrip("/")) :]
        return None

    def _start(self) -> None:
        """Begin what may be begun."""
        if self._idle is not None:
            if self._working:
                return
            then, self._idle = self._idle, None
            then()
        if self._paused:
            return
        taken = set(self._working)
        shows = [job.showing is not None for job in self._working.values()]
        for job in list(self._waiting):
            path, show = job.target.path, job.showing is not None
            # Apart, so that nothing that waits for a server keeps a dead mount in its place.
            if path not in taken and shows.count(show) < _AT_ONCE:
                shows.append(show)
                self._waiting.remove(job)
                self._begin(job)
            taken.add(path)

    def _begin(self, job: _Job) -> None:
        key = SHOWN + job.target.path
        job.before = self._kept.keepsakes.get(key)
        self._working[job.target.path] = job
        if job.showing is None:
            self._fork(job, partial(take_away, job.target), self._ended)
            return
        showing = job.showing
        if job.before is None:
            self._note(key, Keepsake({"id": job.lease, "device": "", "fast": False}))
        elif not job.before.body["device"]:
            showing = replace(showing, pending=True)
        elif job.before.body["id"] == job.lease:
            showing = replace(showing, before=(job.before.body["device"], job.before.body["fast"]))
        self._fork(job, partial(attach, job.target, showing), self._ended)

    def _fork(self, job: _Job, work: _Work, ended: Callable[[_Job, int], None]) -> None:
        try:
            job.pipe, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._finish(job, EnvstoreError(f"no helper can be started: {error.strerror}"))
            return
        job.turn += 1
        job.deadline = time.monotonic() + self._within
        try:
            done = partial(self._collect, job, job.turn, ended)
            job.pidfd = self._help(partial(_child, work, writer), done, keep=(writer,))
        except OSError as error:
            os.close(job.pipe)
            self._finish(job, EnvstoreError(f"no helper can be started: {error.strerror}"))
        finally:
            os.close(writer)

    def _collect(
        self, job: _Job, turn: int, ended: Callable[[_Job, int], None], status: int
    ) -> None:
        """See to the end of a child."""
        if job.turn != turn:
            self._hung -= 1  # it was given up long ago
        else:
            self._hear(job)
            ended(job, status)

    def _hear(self, job: _Job) -> None:
        """Take what a child has said, and hear no more of it."""
        with contextlib.suppress(BlockingIOError):
            for line in os.read(job.pipe, _PIPE).splitlines():
                job.said.update(json.loads(line))
        os.close(job.pipe)

    def _ended(self, job: _Job, status: int) -> None:
        if "error" in job.said:
            self._finish(job, raised(job.said["error"]))
        elif "done" in job.said:
            self._finish(job, None)
        else:
            died = f"{job.target.path}: the helper ended with status {status}"
            _log.error("%s", died)
            self._undo(job, EnvstoreError(died, hint="see the node server's log"))

    def _undo(self, job: _Job, failure: EnvstoreError) -> None:
        """Take back what a show has done before it was stopped; then answer."""
        if job.showing is None or job.failure is not None:
            self._finish(job, failure)
            return
        job.failure = failure
        made, mount = "made" in job.said, job.said.get("moving")
        work = partial(undo, job.target, made=made, mount=mount)
        self._fork(job, work, lambda job, status: self._finish(job, failure))

    def _finish(self, job: _Job, failure: EnvstoreError | None) -> None:
        """Note what is at the target now, and answer."""
        del self._working[job.target.path]
        key = SHOWN + job.target.path
        if failure is not None:
            if job.showing is not None and job.before is None:
                self._note(key, None)
            job.connection.answer(error=told(failure))
        elif job.showing is not None:
            self._note(key, Keepsake({"id": job.lease, **job.said["done"]}))
            job.connection.answer(fast=job.said["done"]["fast"])
        else:
            if job.before is not None:
                self._note(key, None)
            job.connection.answer()
        self._start()


def _child(work: _Work, writer: int) -> int:
    """Do ``work`` and say how it went."""

    def say(what: str, value: object) -> None:
        os.write(writer, json.dumps({what: value}).encode() + b"\n")

    try:
        say("done", work(tell=say))
    except EnvstoreError as error:
        say("error", told(error))
    except OSError as error:
        say("error", told(EnvstoreError(str(error))))
    return 0


def _checked_parts(parts: object) -> dict[str, str] | None:
    """Return the parts of a fast path if they are in this node server's cache."""
    if parts is None:
        return None
    cache = default_directory()
    if (
        not isinstance(parts, dict)
        or Path(str(parts["local"])) != cache / "files"
        or Path(str(parts["image"])).parent != cache / "images"
    ):
        raise UsageError("the fast path is not laid of what is in this node server's cache")
    return {name: str(parts[name]) for name in ("image", "local")}
