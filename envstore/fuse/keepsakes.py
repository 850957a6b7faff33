"""What is kept for the next server: each learns of it while another serves.

The server that serves and the holder say what is new or gone. The standby is told at once, so that
it knows all there is to know when its turn comes, and is ended if it cannot be. What the holder
says is told to the one that serves, too, which hands it to the next holder should this one die;
that never waits, because this server may hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from envstore.fuse.keeping import Keepsake, Kept
from envstore.fuse.mirror import Mirror
from envstore.fuse.processes import ServerProcess


class Keepsakes:
    """Changes those of one mount."""

    def __init__(
        self,
        kept: Kept,
        changed: Callable[[str], None],
        standby: Callable[[], ServerProcess | None],
    ) -> None:
        """Call ``changed`` with each key that changes; ``standby`` returns who only waits."""
        self._kept = kept
        self._changed = changed
        self._standby = standby
        self._notes: Mirror | None = None

    @property
    def behind(self) -> bool:
        """Whether the server that serves is still to be told something."""
        return self._notes is not None and self._notes.behind

    def serve(self, server: ServerProcess) -> None:
        """Tell ``server``, which knows all that there is now, what is noted from here on."""
        self._notes = Mirror(server.channel, self._kept.keepsakes)

    def keep(self, server: ServerProcess, key: str, keepsake: Keepsake) -> None:
        """Keep what ``server`` wants to be kept."""
        self._forget(key)
        self._kept.keepsakes[key] = keepsake
        self._changed(key)
        self._forward(server, "keep", keepsake.files, key=key, body=keepsake.body)

    def drop(self, server: ServerProcess, key: str) -> None:
        """Drop what ``server`` has no more use for."""
        self._forget(key)
        self._changed(key)
        self._forward(server, "drop", key=key)

    def note(self, key: str, keepsake: Keepsake | None) -> None:
        """Keep or drop something of the holder's own; servers know it for the next holder."""
        self._forget(key)
        self._changed(key)
        if keepsake is not None:
            self._kept.keepsakes[key] = keepsake
            self._forward(None, "keep", key=key, body=keepsake.body)
        else:
            self._forward(None, "drop", key=key)
        if self._notes is not None:
            self._notes.changed(key)
            self.flush()

    def flush(self) -> None:
        """Tell the server that serves as much as it takes without waiting."""
        if self._notes is not None:
            try:
                self._notes.flush()
            except OSError:
                self._notes = None  # that server has ended, and the next one knows it all

    def _forward(
        self, server: ServerProcess | None, kind: str, files: tuple[int, ...] = (), **body: object
    ) -> None:
        """Tell the standby what another server, or none, has said."""
        standby = self._standby()
        if standby is not None and server is not standby:
            try:
                standby.channel.send(kind, files, **body)
            except OSError:
                standby.kill()  # it would not know what it has to

    def _forget(self, key: str) -> None:
        before = self._kept.keepsakes.pop(key, None)
        for fd in before.files if before else ():
            os.close(fd)
