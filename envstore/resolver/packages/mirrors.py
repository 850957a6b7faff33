"""Other places where the same archives lie, as the user names them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from envstore.errors import UsageError

VARIABLE = "ENVSTORE_MIRRORS"


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Pairs of URL prefixes: what begins with the first is to be had below the second too.

    The environment variable ``ENVSTORE_MIRRORS`` holds them as ``FROM=TO``, separated by blanks;
    several for one prefix are tried in order, and the original place after them. Every archive is
    checked against its digest, so a mirror need not be trusted. ``TO`` may be of any scheme that
    archives are fetched by (``file:///srv/wheels``, ``s3://bucket/prefix?endpoint=...``).
    """

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_environment(cls) -> Mirrors:
        """Return what ``ENVSTORE_MIRRORS`` says. Raises ``UsageError``."""
        pairs = []
        for text in os.environ.get(VARIABLE, "").split():
            old, _, new = text.partition("=")
            if "://" not in old or "://" not in new:
                raise UsageError(
                    f"{VARIABLE} is not made of FROM=TO pairs of URLs",
                    hint=f"{VARIABLE}='https://files.example=https://mirror.example/files'",
                )
            pairs.append((old.rstrip("/"), new))
        return cls(tuple(pairs))

    def places(self, url: str) -> list[str]:
        """Return where to look for ``url``, in order; the last is ``url`` itself."""
        found = []
        for old, new in self.pairs:
            rest = url.removeprefix(old)
            if rest != url and rest.startswith("/"):
                base, mark, query = new.partition("?")
                found.append(base.rstrip("/") + rest.partition("#")[0] + mark + query)
        return [*found, url]
