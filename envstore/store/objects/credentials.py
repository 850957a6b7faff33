"""Credentials that somebody gives for a store, instead of those of this process."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from envstore.errors import UsageError

_LONGEST = {"access_key_id": 256, "secret_access_key": 1024, "session_token": 8 << 10}
_MOST, _MOST_TEXT = 16, 48 << 10
_WORD = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Keys to an S3 store, the token empty unless they are of a session. Never shown."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)

    @classmethod
    def parse(cls, given: object) -> Credentials:
        """Return the credentials in a JSON object of their names.

        Raises ``UsageError``, which repeats nothing of what was given.
        """
        if not isinstance(given, Mapping) or not _LONGEST.keys() >= given.keys():
            raise UsageError(f"credentials are an object of {', '.join(_LONGEST)}")
        words = {name: given.get(name) or "" for name in _LONGEST}
        for name, word in words.items():
            if not isinstance(word, str) or not _WORD.fullmatch(word):
                raise UsageError(
                    f"the {name} given is not one word of ASCII",
                    hint="spaces and line ends are no part of it",
                )
            if len(word) > _LONGEST[name]:
                raise UsageError(f"the {name} given is longer than {_LONGEST[name]}")
            if not word and name != "session_token":
                raise UsageError(f"the credentials given have no {name}")
        return cls(**words)

    @property
    def length(self) -> int:
        """How many characters they have together."""
        return len(self.access_key_id) + len(self.secret_access_key) + len(self.session_token)

    def encode(self) -> dict[str, str]:
        """Return them as JSON, for ``parse``."""
        return {name: getattr(self, name) for name in _LONGEST}


class KeyRing:
    """Where an open store finds credentials for its next request. Safe for many threads.

    The newest come first. Those that a request was refused with go behind the others: what is
    revoked, or has expired, is in nobody's way as long as there are any that are good.
    """

    def __init__(self, *credentials: Credentials) -> None:
        """Begin with these, the newest first; there may be none."""
        self._lock = threading.Lock()
        self._all = credentials
        self._taken = threading.local()

    def add(self, credentials: Credentials) -> bool:
        """Put credentials first; returns whether they were not there yet.

        Of the others at most 15 stay, those that came last.
        """
        with self._lock:
            new = credentials not in self._all
            others = [one for one in self._all if one != credentials]
            found, left = [credentials], _MOST_TEXT - credentials.length
            for one in others[: _MOST - 1]:
                left -= one.length
                if left >= 0:
                    found.append(one)
            self._all = tuple(found)
            return new

    def take(self) -> Credentials | None:
        """Return what this thread shall sign its next request with, if there is anything."""
        with self._lock:
            self._taken.credentials = self._all[0] if self._all else None
        found: Credentials | None = self._taken.credentials
        return found

    def refused(self) -> bool:
        """Learn that what this thread took last was of no use; returns whether others are left."""
        taken = getattr(self._taken, "credentials", None)
        with self._lock:
            if self._all and self._all[0] == taken:
                self._all = (*self._all[1:], self._all[0])
            return bool(self._all) and self._all[0] != taken

    def all(self) -> tuple[Credentials, ...]:
        """Return everything on the ring, for another."""
        return self._all
