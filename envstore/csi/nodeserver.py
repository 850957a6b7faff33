"""The way to the node server, which serves and mounts what the driver is asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from envstore.errors import EnvstoreError, UnavailableError
from envstore.fuse.sockets import SilentError, ask_lasting
from envstore.store.objects.credentials import Credentials

OWNER = "csi"
"""Whose leases those of the driver are; others' are left alone."""

_BRIEF = 10.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A lease to take: ``lease`` is 16 hex digits of the caller's choice, the same for retries.

    ``ref`` is a REF, or ``@`` and a digest; ``of`` then is the REF whose snapshot or ancestor it
    must be, empty for any. ``store`` is a URL.
    """

    lease: str
    store: str
    ref: str
    target: str
    prefix: str
    of: str = ""
    profile: str = ""
    fast_path: str = "auto"
    credentials: Credentials | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A snapshot that is being served under a lease, and what it takes to show it.

    ``snapshot`` and ``manifest`` are hex digests; ``entries`` counts files, directories and
    links, ``bytes`` is the size of all files as they are read.
    """

    lease: str
    snapshot: str
    manifest: str
    entries: int
    bytes: int
    control: str
    parts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """One mount below a directory that the node server may mount in; ``alive`` if served."""

    target: str
    alive: bool
    fast: bool


class NodeServer:
    """Questions to the node server at a socket. Safe for many threads; holds no connection.

    Every method raises ``UnavailableError`` when nobody answers, and within ``within`` seconds.
    """

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._control = ""

    def take(self, wanted: Wanted, within: float) -> Served:
        """Have a snapshot served. Repeated with the same lease it returns the same.

        One to four requests to the store for a snapshot that this node does not serve yet, none
        otherwise but those of resolving ``ref``. Raises ``NotFoundError``, ``AccessDeniedError``,
        ``UsageError`` (the prefix is too long), ``CorruptError``.
        """
        question: dict[str, Any] = {
            "id": wanted.lease,
            "store": wanted.store,
            "ref": wanted.ref,
            "of": wanted.of,
            "target": wanted.target,
            "prefix": wanted.prefix,
            "profile": wanted.profile,
            "fast_path": wanted.fast_path,
            "namespace": 0,
            "owner": OWNER,
        }
        if wanted.credentials is not None:
            question["credentials"] = wanted.credentials.encode()
        found = self._ask(self.socket, within, "mount", **question)
        self._control = found["control"]
        return Served(
            lease=found["id"],
            snapshot=found["snapshot"],
            manifest=found["manifest"],
            entries=found["entries"],
            bytes=found["bytes"],
            control=found["control"],
            parts={name: found[name] for name in ("root", "subtree", "fast")},
        )

    def give_back(self, lease: str, *, in_use: bool = False) -> None:
        """End a lease, if it is there; ``in_use``: somebody may still be reading."""
        self._ask(self.socket, _BRIEF, "unmounted", id=lease, lazy=in_use)

    def answers(self, within: float) -> bool:
        """Whether mounts can be made; nothing is asked of any store."""
        try:
            self.check(within)
        except EnvstoreError:
            return False
        return True

    def status(self, within: float = _BRIEF) -> dict[str, Any]:
        """Return what the node server says of itself and of every mount; see ``Node.describe``."""
        found: dict[str, Any] = self._ask(self.socket, within, "status")
        return found

    def holder(self) -> dict[str, Any]:
        """Return what the holder of the node server says of both; see ``Holder``."""
        found: dict[str, Any] = self._ask_holder(_BRIEF, "status")
        return found

    def show(
        self, served: Served, target: str, name: str, within: float, *, required: bool = False
    ) -> bool:
        """Mount what is served on ``target``; returns whether it is on the kernel's fast path.

        Read-only, nosuid, nodev. The target directory is made if it is missing. When this
        raises (``UsageError``, ``AccessDeniedError``, ...) nothing is mounted and nothing made.
        """
        found = self._ask(
            served.control, within, "show", id=served.lease, target=target,
            source=f"envstore:{name}", required=required, **served.parts,
        )  # fmt: skip
        return bool(found["fast"])

    def hide(self, target: str, within: float = _BRIEF) -> None:
        """Take every mount of ours off ``target`` and remove the directory; fine if none is."""
        self._ask_holder(within, "hide", target=target)

    def look(self, within: float = _BRIEF) -> list[Shown]:
        """Return the mounts of ours at targets, from the kernel's tables alone."""
        found = self._ask_holder(within, "look")
        return [Shown(one["target"], one["alive"], one["fast"]) for one in found["mounts"]]

    def check(self, within: float = _BRIEF) -> None:
        """Return if mounts are being served, and can be made."""
        found = self._ask(self.socket, within, "state")
        if found["state"] != "serving":
            raise UnavailableError("the node server is ending", hint="another has to be started")
        self._control = found["control"]

    def _ask_holder(self, within: float, what: str, **question: object) -> Any:
        """Ask the holder, which answers also while no server does."""
        if self._control:
            began = time.monotonic()
            try:
                return ask_lasting(self._control, within, ask=what, **question)
            except SilentError as error:
                if time.monotonic() - began >= within:
                    raise _silent(error) from None
                # Another node server may be there, with another holder.
        self.check(within)
        return self._ask(self._control, within, what, **question)

    def _ask(self, socket: str, within: float, what: str, **question: object) -> Any:
        try:
            return ask_lasting(socket, within, ask=what, **question)
        except SilentError as error:
            raise _silent(error) from None


def _silent(error: SilentError) -> UnavailableError:
    return UnavailableError(
        f"the node server does not answer: {error.message}", hint="see: envstore node --help"
    )
