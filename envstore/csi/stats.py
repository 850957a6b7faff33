"""How published volumes are: their size from the record, their condition from the node server.

No mount is ever touched for it, as that may take as long as a store does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from envstore.csi.nodeserver import NodeServer, Shown
from envstore.csi.proto import csi_pb2
from envstore.csi.records import Publication
from envstore.errors import EnvstoreError

_FRESH = 1.0
_WITHIN = 0.5


class Health:
    """What the node server says of all mounts; asked at most once a second, and never for long."""

    def __init__(self, server: NodeServer, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._asking = threading.Lock()
        self._asked = float("-inf")
        self._mounts: dict[str, Shown] = {}
        self._problem = ""

    def condition(self, record: Publication) -> csi_pb2.VolumeCondition:
        """Return the condition of a volume, within two seconds at the very worst."""
        with self._asking:
            if self._clock() - self._asked > _FRESH:
                self._ask()
                self._asked = self._clock()
            problem = self._problem or self._wrong(self._mounts.get(record.target))
        return csi_pb2.VolumeCondition(
            abnormal=bool(problem), message=problem or "the volume is mounted and served"
        )

    def _ask(self) -> None:
        try:
            self._mounts = {one.target: one for one in self._server.look(_WITHIN)}
            self._server.check(_WITHIN)
        except EnvstoreError as error:
            self._problem = str(error)
        else:
            self._problem = ""

    @staticmethod
    def _wrong(mount: Shown | None) -> str:
        if mount is None:
            return "the volume is not mounted on its target any more; it will be mounted again"
        if not mount.alive:
            return "the mount is dead: nobody serves it; pods that use it have to be started again"
        return ""


def usage(record: Publication) -> list[csi_pb2.VolumeUsage]:
    """Return the size of a volume, of which nothing is available: it cannot be written to."""
    found = csi_pb2.VolumeUsage
    return [
        found(unit=found.BYTES, total=record.size, used=record.size),
        found(unit=found.INODES, total=record.entries, used=record.entries),
    ]
