"""Sets of very many 64-bit numbers: sorted runs in memory, and beyond a limit in files.

Cost: 8 bytes for each number, in memory up to ``LIMIT`` bytes and else on disk, where a number
that many runs hold may take 8 bytes in each of up to 16 of them. Numbers are merged a shard at a
time, so that no more than some 300,000 of them are ever Python objects.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from envstore.errors import NoSpaceError

LIMIT = 192 << 20
_SHARD = 300_000
_MOST_FILES = 16
_END = 1 << 64


class Runs:
    """A set of numbers below 2**64 that is filled first and searched then. Use from one thread.

    Files are made in the system's directory for temporary ones (``TMPDIR``), and have no name.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._memory: list[Sequence[int]] = []
        self._files: list[Sequence[int]] = []
        self._held = 0
        self.spilled = 0
        """Bytes written to files so far."""

    def add(self, numbers: array[int]) -> None:
        """Add ``numbers``, of type ``Q`` and ascending; they must not be changed afterwards.

        Raises ``NoSpaceError``.
        """
        self._memory.append(numbers)
        self._held += 8 * len(numbers)
        if self._held > self._limit:
            self._compact()

    def finish(self) -> None:
        """Merge all runs into one; call it once, after the last ``add``. Raises likewise."""
        runs = self._files + self._memory
        if len(runs) > 1:
            if self._files or self._held > self._limit:
                self._files, self._memory = [self._write(_merged(runs))], []
            else:
                self._files, self._memory = [], [_joined(runs)]

    def between(self, low: int, high: int) -> Sequence[int]:
        """Return the numbers from ``low`` to below ``high``, ascending. Call ``finish`` first."""
        (run,) = (self._files + self._memory) or [array("Q")]
        return run[bisect_left(run, low) : bisect_left(run, high)]

    def __len__(self) -> int:
        return sum(map(len, self._files + self._memory))

    def _compact(self) -> None:
        merged = _joined(self._memory)
        if 16 * len(merged) <= self._limit:
            self._memory, self._held = [merged], 8 * len(merged)
            return
        self._files.append(self._write([merged]))
        self._memory, self._held = [], 0
        if len(self._files) > _MOST_FILES:
            self._files = [self._write(_merged(self._files))]

    def _write(self, pieces: Iterable[array[int]]) -> Sequence[int]:
        """Store ascending pieces as one run."""
        try:
            with tempfile.TemporaryFile(prefix="envstore-gc-") as file:
                size = 0
                for piece in pieces:
                    size += file.write(piece.tobytes())
                file.flush()
                self.spilled += size
                if not size:
                    return array("Q")
                # Gone with the last view of it, as a run is once it was merged into another.
                return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)).cast("Q")
        except OSError as error:
            raise NoSpaceError(
                f"cannot write temporary files in {tempfile.gettempdir()}: {error.strerror}",
                hint="set TMPDIR to a directory on a disk with some space",
            ) from error


def _joined(runs: Sequence[Sequence[int]]) -> array[int]:
    found = array("Q")
    for piece in _merged(runs):
        found.extend(piece)
    return found


def _merged(runs: Sequence[Sequence[int]]) -> Iterator[array[int]]:
    """Yield all numbers of ``runs`` once, ascending, in pieces."""
    left = [(run, 0) for run in runs if len(run)]
    while left:
        step = max(1, _SHARD // len(left))
        end = min(
            (run[at + step] for run, at in left if at + step < len(run)),
            default=_END,
        )
        pieces, rest = [], []
        for run, at in left:
            stop = bisect_left(run, end, at, min(len(run), at + step))
            pieces.append(run[at:stop])
            if stop < len(run):
                rest.append((run, stop))
        # The pieces stay in order in a dictionary, and sorting merges what is.
        yield array("Q", sorted(dict.fromkeys(chain.from_iterable(pieces))))
        left = rest
