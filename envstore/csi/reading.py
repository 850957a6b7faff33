"""Runs in a pod that warms a node: reads a volume, or ranges of its files, and says how much.

It gets there as text, for ``python3 -c``, so that any image with a Python will do: it may import
nothing but the standard library.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

MESSAGE = "/dev/termination-log"
"""Where Kubernetes looks for what a container has to say at its end."""

_THREADS = 4
_PIECE = 1 << 20

Task = tuple[bytes, int, int]
"""A path below the volume, an offset and a length; a negative length means to the end."""


class Reader:
    """Reads and counts. Safe for many threads."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._files: set[bytes] = set()
        self.bytes = 0
        self.unreadable = 0
        self.failed = 0
        self.reason = ""

    def read(self, task: Task) -> None:
        """Read a range, as far as the file goes. What cannot be read is counted."""
        path, offset, length = task
        try:
            self._read(path, offset, length)
        except PermissionError:
            with self._lock:
                self.unreadable += 1
        except OSError as error:
            with self._lock:
                self.failed += 1
                self.reason = self.reason or f"{os.fsdecode(path)}: {error.strerror}"

    def _read(self, path: bytes, offset: int, length: int) -> None:
        fd = os.open(os.path.join(self._root, path), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            while length:
                size = _PIECE if length < 0 else min(_PIECE, length)
                data = os.pread(fd, size, offset)
                if not data:
                    break
                offset += len(data)
                length -= len(data) if length > 0 else 0
                with self._lock:
                    self.bytes += len(data)
        finally:
            os.close(fd)
        with self._lock:
            self._files.add(path)

    def report(self) -> dict[str, object]:
        """Return what was read, as JSON."""
        return {
            "files": len(self._files),
            "bytes": self.bytes,
            "unreadable": self.unreadable,
            "failed": self.failed,
            "reason": self.reason[:1000],
        }


def everything(root: bytes) -> Iterator[Task]:
    """Return every file below ``root``, whole."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield os.path.relpath(path, root), 0, -1


def packed(tasks: Iterable[Task]) -> str:
    """Return ``tasks`` as text for a command line."""
    fields = [part for path, *numbers in tasks for part in (path, *(b"%d" % n for n in numbers))]
    return base64.b64encode(zlib.compress(b"\0".join(fields))).decode()


def unpacked(text: str) -> list[Task]:
    """Return what ``packed`` was given."""
    fields = zlib.decompress(base64.b64decode(text)).split(b"\0")
    triples = zip(fields[::3], fields[1::3], fields[2::3], strict=False)
    return [(path, int(offset), int(length)) for path, offset, length in triples]


def main(arguments: list[str]) -> int:
    """Read below the first of ``arguments`` what the others name, everything if there are none."""
    started = time.monotonic()
    root = os.fsencode(arguments[0])
    tasks = unpacked("".join(arguments[1:])) if arguments[1:] else everything(root)
    reader = Reader(root)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(reader.read, tasks))
    report = {**reader.report(), "seconds": round(time.monotonic() - started, 3)}
    text = json.dumps(report)
    sys.stdout.write(text + "\n")
    with open(MESSAGE, "w", encoding="utf-8") as file:
        file.write(text)
    return 1 if reader.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
