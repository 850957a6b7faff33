"""Which packs a check of data reads, and how far it has come, for the next one to go on.

A sample is chosen by a seed: packs come in the order of the digest of seed and name, until they
make up the share of all bytes that was asked for. So the same run can be continued, and a run
every day with a seed of its own comes by everything in time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from envstore.errors import EnvstoreError
from envstore.store.digest import digest, parse_hex

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """The ``share`` of the bytes of all packs to be read, above 0 and up to 1, and the ``seed``."""

    share: float = 1.0
    seed: str = ""

    def choose(self, packs: Mapping[bytes, int]) -> list[bytes]:
        """Return the packs to read, given the sizes of all; at least one if there is any."""
        if self.share >= 1:
            return sorted(packs)
        order = sorted(packs, key=lambda name: digest(self.seed.encode() + name))
        left = self.share * sum(packs.values())
        chosen = []
        for name in order:
            if left <= 0:
                break
            chosen.append(name)
            left -= packs[name]
        return sorted(chosen)


@dataclass(frozen=True, slots=True)
class Run:
    """One check of data: what it reads, when it began (RFC 3339, UTC), and what it has read.

    ``done`` has the sizes of the packs that were found sound.
    """

    sample: Sample
    started: str
    done: Mapping[bytes, int]


class Journal:
    """Remembers in the file ``path`` how far a check came. Use from one thread.

    A line for each pack, written at once: whoever is killed loses at most the last one.
    """

    def __init__(self, path: Path) -> None:
        """Use ``path``, whose directory is made when something is written."""
        self._path = path
        self._fd = -1

    def begin(self, sample: Sample, *, resume: bool) -> Run:
        """Begin a run, or go on with the one that was broken off, if any and ``resume``.

        Then its own sample counts and not ``sample``. Raises ``EnvstoreError``.
        """
        run = self._last() if resume else None
        with _errors(self._path):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if run is None:
                run = Run(sample, datetime.now(UTC).isoformat(timespec="seconds"), {})
                head = {
                    "format": _FORMAT,
                    "started": run.started,
                    "share": sample.share,
                    "seed": sample.seed,
                }
                partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
                partial.write_text(json.dumps(head) + "\n")
                partial.replace(self._path)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            # Behind a line that was cut off.
            os.write(self._fd, b"\n")
        return run

    def _last(self) -> Run | None:
        try:
            head, *lines = self._path.read_text().split("\n")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise EnvstoreError(
                f"cannot read {self._path}: {error}", hint="remove it, or leave out --resume"
            ) from error
        try:
            value = json.loads(head)
            sample = Sample(float(value["share"]), str(value["seed"]))
            run = Run(sample, str(value["started"]), {})
            if value["format"] != _FORMAT:
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        done = {}
        for line in lines:
            name, _, size = line.partition(" ")
            pack = parse_hex(name)
            # A dot ends each line that is whole.
            if pack is not None and size.endswith(".") and size[:-1].isdecimal():
                done[pack] = int(size[:-1])
        return replace(run, done=done)

    def add(self, pack: bytes, size: int) -> None:
        """Remember that a pack of ``size`` bytes was read and is sound."""
        with _errors(self._path):
            os.write(self._fd, b"%b %d.\n" % (pack.hex().encode(), size))

    def end(self) -> None:
        """Forget the run: it has come to its end."""
        self.close()
        with _errors(self._path):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave everything for a later run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Say of an ``OSError`` which file it is about."""
    try:
        yield
    except OSError as error:
        raise EnvstoreError(
            f"cannot write {path}: {error.strerror}", hint="set ENVSTORE_CACHE_DIR"
        ) from error
