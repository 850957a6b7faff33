"""Tells another process what is kept, as it changes, without ever waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

from envstore.fuse.channel import Channel
from envstore.fuse.keeping import Keepsake


class Mirror:
    """Sends keepsakes to one end of a channel. What changes twice meanwhile is sent once."""

    def __init__(self, channel: Channel, keepsakes: Mapping[str, Keepsake]) -> None:
        """Send what is in ``keepsakes`` when its turn comes, of the keys that are ``changed``."""
        self.channel = channel
        self._keepsakes = keepsakes
        self._changed: dict[str, None] = {}

    @property
    def behind(self) -> bool:
        """Whether there is something that the other end does not know yet."""
        return bool(self._changed)

    def changed(self, key: str) -> None:
        """Note that a keepsake is new, another or gone."""
        self._changed[key] = None

    def flush(self) -> None:
        """Send as much as can be sent now. Raises ``OSError`` when nobody is at the other end."""
        while self._changed:
            key = next(iter(self._changed))
            keepsake = self._keepsakes.get(key)
            try:
                if keepsake is None:
                    self.channel.post("drop", key=key)
                else:
                    self.channel.post("keep", keepsake.files, key=key, body=keepsake.body)
            except BlockingIOError:
                return
            del self._changed[key]
