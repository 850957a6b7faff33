"""What fast paths are laid of, for whoever needs it many times a second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import trio

from envstore.errors import EnvstoreError
from envstore.fuse.content import Content
from envstore.fuse.fast import prepare_fast_path
from envstore.fuse.turns import Turns
from envstore.store.cache import BlobCache

_TRUSTED_SECONDS = 60.0
"""How long an image that was read and found intact is not read again, unless it was touched."""

_REMEMBERED = 256

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Checked:
    """What a fast path is laid of, whose image was found intact; ``stamp`` is of then."""

    parts: dict[str, Any]
    checked: float
    stamp: _Stamp | None

    def holds(self) -> bool:
        recent = time.monotonic() < self.checked + _TRUSTED_SECONDS
        return recent and self.stamp is not None and _stamp(self.parts["image"]) == self.stamp


class FastParts:
    """The images of one server's snapshots, each written and checked once for all who wait.

    ``impossible`` is why there are none on this machine. Belongs to one trio run.
    """

    def __init__(self, cache: BlobCache, impossible: str = "") -> None:
        self._cache = cache
        self._turns = Turns()
        self._impossible = impossible
        self._checked: dict[bytes, _Checked] = {}

    async def of(self, content: Content) -> dict[str, Any]:
        """Return the parts, see ``lay_fast_path``. Raises ``EnvstoreError`` if there are none.

        Reads the whole image, some 100 bytes a file, at most once in a minute.
        """
        if self._impossible:
            raise EnvstoreError(self._impossible, hint="see: envstore doctor")
        async with self._turns.of(content.key):
            return await trio.to_thread.run_sync(self._find, content)

    def _find(self, content: Content) -> dict[str, Any]:
        known = self._checked.pop(content.key, None)
        if known is None or not known.holds():
            parts = prepare_fast_path(content, self._cache)
            known = _Checked(parts, time.monotonic(), _stamp(parts["image"]))
        self._checked[content.key] = known
        if len(self._checked) > _REMEMBERED:
            self._checked.pop(next(iter(self._checked)), None)
        return known.parts


def _stamp(image: str) -> _Stamp | None:
    """Return what changes when a file is changed or replaced."""
    try:
        st = os.stat(image)
    except OSError:
        return None
    return st.st_dev, st.st_ino, st.st_size, st.st_ctime_ns
