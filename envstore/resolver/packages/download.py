"""Fetches archives into a directory: verified while they arrive, resumed, several at a time.

An archive has its final name, made of its SHA-256, only once it is complete and verified. Until
then it is ``.<sha256>.part``, which the next attempt, in this process or a later one, goes on
with. Whoever has stored an archive's content removes the file; what an interrupted push leaves
is good for the next one and is removed when nobody has used it for a week. Two pushes may share
a directory: they wait for each other's downloads.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import (
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.packages.bodies import Body, Failed
from envstore.resolver.packages.credentials import Credentials, origin_of, shown
from envstore.resolver.packages.mirrors import Mirrors
from envstore.resolver.packages.partial import (
    Partial,
    StoppedError,
    disk_error,
    remove_leftovers,
)
from envstore.resolver.packages.transport import Transport
from envstore.resolver.packages.web import Surroundings

PARALLEL = 8
"""Downloads at a time."""

_TIMEOUT_VARIABLE = "ENVSTORE_HTTP_TIMEOUT"
_TIMEOUT_SECONDS = 30.0
_MOST_ATTEMPTS = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.4, 8.0
_PIECE = 128 << 10
_WORTH_ANOTHER = 1 << 20  # bytes after which a transfer that breaks off counts as a new one
_LARGEST = 64 << 30  # of an archive that nobody gives a size for
_JOIN_SECONDS = 5.0
_TICK = 0.1
_SHORTLY = 0.02
_SUFFIXES = (".conda", ".tar.bz2", ".tar.gz", ".whl", ".zip", ".tar.xz", ".tar.zst", ".tgz")
_DIGEST = {"sha256": re.compile(r"[0-9a-f]{64}"), "md5": re.compile(r"[0-9a-f]{32}")}

_REPLACED = "it was replaced or damaged: fetch it elsewhere, or lock again if you trust it"

Progress = Callable[[int, int], None]
"""Told how many bytes are there, and how many there will be as far as known."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive to fetch. ``name`` is for messages; digests are hex, ``size`` is bytes.

    Without a ``sha256`` (empty) it is taken as it comes, or checked against ``md5`` if there is
    one. A ``size`` of 0 means unknown.
    """

    url: str
    sha256: str = ""
    size: int = 0
    name: str = ""
    md5: str = ""


@dataclass(frozen=True, slots=True)
class Fetched:
    """An archive that is there, with its real digest and size."""

    archive: Archive
    path: Path
    sha256: str
    size: int


def fetch_archives(
    packages: Sequence[Archive],
    directory: Path,
    *,
    progress: Progress | None = None,
    parallel: int = PARALLEL,
    credentials: Credentials | None = None,
) -> dict[str, Path]:
    """Fetch all ``packages`` and return their paths by SHA-256. Raises as ``iter_archives``."""
    found = iter_archives(
        packages, directory, progress=progress, parallel=parallel, credentials=credentials
    )
    return {item.sha256: item.path for item in found}


def download_unknown(url: str, directory: Path, *, md5: str = "") -> tuple[Path, str, int]:
    """Fetch what another tool's lock gives no SHA-256 for; return path, SHA-256 and size.

    Raises as ``iter_archives``.
    """
    (item,) = iter_archives([Archive(url, md5=md5)], directory)
    return item.path, item.sha256, item.size


def iter_archives(
    packages: Sequence[Archive],
    directory: Path,
    *,
    progress: Progress | None = None,
    parallel: int = PARALLEL,
    credentials: Credentials | None = None,
) -> Iterator[Fetched]:
    """Yield each archive as it is complete, the largest begun first; one of each digest.

    Downloading goes on while the caller works on what it was given, and ends when the caller
    stops asking. ``progress`` is called from the caller's own thread. ``credentials`` are those
    of the environment if not given.

    Raises ``NotFoundError`` (gone), ``CorruptError`` (another digest or size),
    ``AccessDeniedError``, ``UnavailableError`` (no network, or it fails again and again),
    ``NoSpaceError``, ``UsageError`` (malformed URL or configuration).
    """
    wanted = _distinct(packages)
    mirrors = Mirrors.from_environment()
    stopped = threading.Event()
    shared = Surroundings(credentials or Credentials(), _timeout(), stopped)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
    except OSError as error:
        raise disk_error(directory, error) from error
    tally = _Tally({_key(item): item.size for item in wanted})
    waiting: queue.SimpleQueue[Archive] = queue.SimpleQueue()
    for item in sorted(wanted, key=lambda item: -item.size):
        waiting.put(item)
    done: queue.SimpleQueue[Fetched | BaseException] = queue.SimpleQueue()
    silent: set[tuple[str, str, int]] = set()  # servers that say nothing at all
    crew = [
        _Fetcher(shared, directory, mirrors, waiting, done, tally, silent)
        for _ in range(min(parallel, len(wanted)))
    ]
    try:
        for member in crew:
            member.start()
        for _ in wanted:
            yield _next_done(done, tally, progress)
    finally:
        stopped.set()
        deadline = time.monotonic() + _JOIN_SECONDS
        while any(member.is_alive() for member in crew) and time.monotonic() < deadline:
            for member in crew:
                member.interrupt()
                member.join(_SHORTLY)


def _next_done(
    done: queue.SimpleQueue[Fetched | BaseException], tally: _Tally, progress: Progress | None
) -> Fetched:
    while True:
        try:
            item = done.get(timeout=_TICK)
        except queue.Empty:
            item = None
        if progress is not None:
            progress(*tally.sums())
        if isinstance(item, BaseException):
            raise item
        if item is not None:
            return item


class _Tally:
    """Bytes there and bytes expected, by archive."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._there = dict.fromkeys(sizes, 0)

    def set(self, archive: Archive, there: int, size: int | None = None) -> None:
        """Take note of how much of an archive is there, and of its size if that is news."""
        key = _key(archive)
        self._there[key] = there
        self._sizes[key] = max(self._sizes[key], there, size or 0)

    def sums(self) -> tuple[int, int]:
        """Return both."""
        # Copies, made in one step: the crew changes values meanwhile, but adds none.
        return sum(list(self._there.values())), sum(list(self._sizes.values()))


class _Fetcher(threading.Thread):
    """One of those who take archives from a queue and fetch them, one after the other."""

    def __init__(
        self,
        shared: Surroundings,
        directory: Path,
        mirrors: Mirrors,
        waiting: queue.SimpleQueue[Archive],
        done: queue.SimpleQueue[Fetched | BaseException],
        tally: _Tally,
        silent: set[tuple[str, str, int]],
    ) -> None:
        # A daemon: one that hangs in the resolver of the C library must not keep a process alive.
        super().__init__(name="envstore-fetch", daemon=True)
        self._directory, self._mirrors, self._tally = directory, mirrors, tally
        self._waiting, self._done = waiting, done
        self._stopped, self._silent = shared.stopped, silent
        self._transport = Transport(shared)

    def interrupt(self) -> None:
        """Make it end soon; for another thread, after ``stopped`` was set."""
        self._transport.interrupt()

    def run(self) -> None:
        """Fetch until nothing waits, something fails or ``stopped`` is set."""
        try:
            while not self._stopped.is_set():
                try:
                    archive = self._waiting.get_nowait()
                except queue.Empty:
                    return
                self._done.put(self._fetch(archive))
        except StoppedError:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._done.put(error)
        finally:
            self._transport.close()

    def _fetch(self, archive: Archive) -> Fetched:
        name = archive.sha256 or f"unknown-{secrets.token_hex(8)}"
        final = self._directory / f"{name}{_suffix(archive.url)}"
        try:
            with Partial(
                self._directory / f".{name}.part",
                ("sha256",) if archive.sha256 else ("sha256", "md5"),
                self._stopped,
                resume=bool(archive.sha256),
            ) as partial:
                size = _verified(final, archive) if archive.sha256 else None
                if size is not None:
                    self._tally.set(archive, size, size)
                    partial.restart()
                    return Fetched(archive, final, archive.sha256, size)
                self._from_anywhere(archive, partial)
                sha256 = partial.digest("sha256")
                if not archive.sha256:
                    final = self._directory / f"{sha256}{_suffix(archive.url)}"
                partial.rename(final)
                return Fetched(archive, final, sha256, partial.size)
        except OSError as error:
            raise disk_error(self._directory, error) from error

    def _from_anywhere(self, archive: Archive, partial: Partial) -> None:
        *mirrors, original = self._mirrors.places(archive.url)
        for place in mirrors:
            if origin_of(place) not in self._silent:
                try:
                    return self._from(place, archive, partial)
                except EnvstoreError as error:
                    if isinstance(error, NoSpaceError):
                        raise
        return self._from(original, archive, partial)

    def _from(self, url: str, archive: Archive, partial: Partial) -> None:
        """Complete ``partial`` from ``url``, trying again as long as that makes sense."""
        if partial.size and partial.digest("sha256") == archive.sha256:
            return
        attempts, resumed_from = 0, 0
        while True:
            attempts += 1
            before = partial.size
            try:
                self._attempt(url, archive, partial)
                trouble = self._trouble(archive, partial, url)
                if trouble is None:
                    return
                partial.restart()
                # What an earlier attempt left may have been something else.
                if not before and not resumed_from:
                    raise trouble
                resumed_from = 0
                failure = Failed(trouble, passing=attempts < _MOST_ATTEMPTS)
            except Failed as failed:
                failure = failed
            if self._stopped.is_set():
                raise StoppedError
            if partial.size - before >= _WORTH_ANOTHER:
                attempts = 0
            resumed_from = resumed_from or before
            if not failure.passing or attempts >= _MOST_ATTEMPTS:
                if failure.unreachable:
                    self._silent.add(origin_of(url))
                raise failure.error
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempts) * random.uniform(0.5, 1)  # noqa: S311
            if self._stopped.wait(max(pause, failure.wait)):
                raise StoppedError

    def _attempt(self, url: str, archive: Archive, partial: Partial) -> None:
        # Without a digest, bytes can be put together only if the server vouches for them.
        if not archive.sha256 and not partial.version:
            partial.restart()
        body = self._transport.open(url, partial.size, partial.version)
        try:
            if body.start != partial.size:
                partial.restart()
            if body.start != 0 and not partial.size:
                raise Failed(
                    UnavailableError(f"{shown(url)}: the server has less than it said before"),
                    passing=True,
                )
            if not archive.sha256:
                partial.version = body.version
            self._copy(url, body, archive, partial)
        finally:
            body.close()

    def _copy(self, url: str, body: Body, archive: Archive, partial: Partial) -> None:
        most = archive.size or _LARGEST
        if body.total is not None and archive.size and body.total != archive.size:
            raise Failed(_wrong_size(archive, url, str(body.total)), passing=False)
        while data := body.read(_PIECE):
            if self._stopped.is_set():
                raise StoppedError
            partial.write(data)
            if partial.size > most:
                trouble = _wrong_size(archive, url, f"more than {most}")
                partial.restart()
                # What was there before may be to blame.
                raise Failed(trouble, passing=body.start > 0)
            self._tally.set(archive, partial.size, body.total)
        if body.total is not None and partial.size < body.total:
            host = origin_of(url)[1] or shown(url)
            raise Failed(
                UnavailableError(
                    f"{host} broke off {_called(archive)} after {partial.size} bytes",
                    hint="check the network, and run the same again: it goes on from there",
                ),
                passing=True,
            )

    def _trouble(self, archive: Archive, partial: Partial, url: str) -> EnvstoreError | None:
        """Return what is wrong with a complete archive."""
        if archive.size and partial.size != archive.size:
            return _wrong_size(archive, url, str(partial.size))
        kind, wanted = ("sha256", archive.sha256) if archive.sha256 else ("md5", archive.md5)
        found = partial.digest(kind)
        if wanted in ("", found):
            return None
        return CorruptError(
            f"{_called(archive)} from {shown(url)} has the {kind} {found}, not {wanted} as locked",
            hint=_REPLACED,
        )


def _distinct(packages: Sequence[Archive]) -> list[Archive]:
    found: dict[str, Archive] = {}
    for item in packages:
        for kind, text in (("sha256", item.sha256), ("md5", item.md5)):
            if text and not _DIGEST[kind].fullmatch(text):
                raise UsageError(f"{_called(item)} has a malformed {kind}: {text[:80]!r}")
        found.setdefault(_key(item), item)
    return list(found.values())


def _key(archive: Archive) -> str:
    return archive.sha256 or archive.url


def _called(archive: Archive) -> str:
    return archive.name or shown(archive.url).rpartition("/")[2] or shown(archive.url)


def _suffix(url: str) -> str:
    name = url.partition("#")[0].partition("?")[0]
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _verified(path: Path, archive: Archive) -> int | None:
    """Return the size of an archive that is there already, whole; a damaged one is removed."""
    try:
        with open(path, "rb") as file:
            sound = hashlib.file_digest(file, "sha256").hexdigest() == archive.sha256
            size = os.fstat(file.fileno()).st_size
        if sound and archive.size in (0, size):
            os.utime(path)
            return size
    except FileNotFoundError:
        # Another push may be done with it, and remove it, at any time.
        return None
    path.unlink(missing_ok=True)
    return None


def _wrong_size(archive: Archive, url: str, found: str) -> CorruptError:
    wanted = f"not {archive.size} as locked" if archive.size else "which no package has"
    return CorruptError(
        f"{_called(archive)} from {shown(url)} has {found} bytes, {wanted}", hint=_REPLACED
    )


def _timeout() -> float:
    text = os.environ.get(_TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else _TIMEOUT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(
            f"{_TIMEOUT_VARIABLE} is {text[:40]!r}", hint="it is a number of seconds, such as 30"
        )
    return seconds
