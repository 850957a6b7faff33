"""Credentials that somebody gives for a store, instead of those of this process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from envstore.errors import UsageError

_LONGEST = {"access_key_id": 256, "secret_access_key": 1024, "session_token": 16 << 10}
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

    def encode(self) -> dict[str, str]:
        """Return them as JSON, for ``parse``."""
        return {name: getattr(self, name) for name in _LONGEST}


@dataclass(slots=True, eq=False)
class KeyRing:
    """Where an open store finds the credentials for its next request: they may be replaced.

    ``None`` until there are any; then every request is refused. Safe for many threads.
    """

    credentials: Credentials | None = field(default=None, repr=False)
