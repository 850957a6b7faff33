"""What a mount's processes hand to each other: enough that any one of them can go on alone.

The holder has all of it, and each server gets a copy, so that a holder that is killed can be
replaced by one that the server starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from envstore.errors import UnsupportedFormatError
from envstore.fuse.channel import Channel
from envstore.fuse.session import Session

STATE_FORMAT = 1

LEASE = "lease/"
"""What the keepsakes of a node's mounts are called, before their ids."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount where: store URL, REF or ``@digest``, and the mount point.

    ``profile`` names the start profile to fetch ahead, empty for the one that fits, ``none`` for
    none. ``fast_path`` is ``auto``, ``on`` or ``off``. ``patience`` is how many seconds a reader
    waits for a store that does not answer. ``record`` has every read noted. ``prefix`` is the path
    at which whoever uses the tree sees it, empty for the mount point as it is given. ``node`` is a
    path:
    this is then no mount of a REF but a node server with its control socket there.
    ``metrics`` is an address to serve Prometheus' text format on: a path or HOST:PORT.
    ``hung_after`` is how many seconds a server may give no sign of life, ``lease_grace`` how many
    a node's mount may be seen nowhere. ``targets`` are the directories below which a node server
    makes mounts for others. ``fdstore`` is the socket of the process that keeps what a node server
    needs when none of its own is left. ``no_fast_path`` is why this machine has none, empty if it
    has, or nobody has tried: a server could not.
    """

    store: str
    ref: str
    mountpoint: str
    allow_other: bool = False
    profile: str = ""
    fast_path: str = "off"
    patience: float = 300.0
    record: bool = False
    node: str = ""
    metrics: str = ""
    hung_after: float = 15.0
    lease_grace: float = 60.0
    prefix: str = ""
    targets: Sequence[str] = ()
    fdstore: str = ""
    no_fast_path: str = ""

    def __post_init__(self) -> None:
        """Be equal to what went through JSON."""
        object.__setattr__(self, "targets", tuple(self.targets))

    def placed(self) -> MountRequest:
        """Return the same request with the prefix that it stands for."""
        return replace(self, prefix=self.prefix or os.path.abspath(self.mountpoint))


@dataclass(frozen=True, slots=True)
class Keepsake:
    """Something a server needs again after a restart: a few facts and open files."""

    body: dict[str, Any]
    files: tuple[int, ...] = ()


@dataclass(slots=True)
class Kept:
    """All there is to a live mount, and its descriptors by what they are for.

    ``files``: ``lock`` (see ``RecordFiles``), ``counters`` (memory), ``stats`` and ``control``
    (listening sockets), ``understudy`` (see there), of a node also ``node``, and ``life`` and
    ``watch`` (see ``Deposit``).
    ``fuse`` is the device, -1 before the mount is made; ``device`` the number that what it serves
    has in the mount table, if known.
    """

    request: MountRequest
    files: dict[str, int]
    keepsakes: dict[str, Keepsake] = field(default_factory=dict)
    fuse: int = -1
    target: str = ""
    init: bytes = b""
    flags: int = 0
    restarts: int = 0
    started: float = 0.0
    device: str = ""

    def session(self) -> Session:
        """Return the live mount. ``target`` is where its device is mounted."""
        return Session(self.fuse, self.target, self.init, self.flags)

    def descriptors(self) -> list[int]:
        """Return every open descriptor."""
        kept = [fd for keepsake in self.keepsakes.values() for fd in keepsake.files]
        return [*self.files.values(), *kept, *([self.fuse] if self.fuse >= 0 else [])]

    def send(self, channel: Channel) -> None:
        """Tell a server everything but the keepsakes."""
        files, body = self.told()
        channel.send("kept", files, **body)

    def told(self, without: Collection[str] = ()) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return what ``send`` sends: descriptors, of those with names not all, and facts."""
        names = [name for name in self.files if name not in without]
        device = [self.fuse] if self.fuse >= 0 else []
        return (*map(self.files.__getitem__, names), *device), {"names": names, **self._body()}

    @classmethod
    def received(cls, body: dict[str, Any], files: tuple[int, ...]) -> Kept:
        """Return what ``send`` sent."""
        names = body["names"]
        named = dict(zip(names, files, strict=False))
        fuse = files[len(names)] if len(files) > len(names) else -1
        return cls._from(body, named, fuse)

    def _body(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "request": asdict(self.request),
            "target": self.target,
            "init": self.init.hex(),
            "flags": self.flags,
            "restarts": self.restarts,
            "started": self.started,
            "device": self.device,
        }

    @classmethod
    def _from(cls, body: dict[str, Any], files: dict[str, int], fuse: int) -> Kept:
        if body["format"] != STATE_FORMAT:
            raise UnsupportedFormatError(
                "this mount was made by another version of envstore, whose state is not known here",
                hint="unmount it and mount it again",
            )
        known = {name: body["request"][name] for name in MountRequest.__slots__
                 if name in body["request"]}  # fmt: skip
        return cls(
            MountRequest(**known),
            files,
            {},
            fuse,
            body["target"],
            bytes.fromhex(body["init"]),
            body["flags"],
            body["restarts"],
            body["started"],
            body.get("device", ""),
        )

    def save(self) -> dict[str, Any]:
        """Return all of it as JSON, descriptors by number, for a process that inherits them."""
        return {
            **self._body(),
            "files": self.files,
            "fuse": self.fuse,
            "keepsakes": {
                key: {"body": keepsake.body, "files": keepsake.files}
                for key, keepsake in self.keepsakes.items()
            },
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> Kept:
        """Return what ``save`` returned; its descriptors are no longer inherited from here on."""
        kept = cls._from(state, state["files"], state["fuse"])
        for key, saved in state["keepsakes"].items():
            kept.keepsakes[key] = Keepsake(saved["body"], tuple(saved["files"]))
        for fd in kept.descriptors():
            os.set_inheritable(fd, False)
        return kept


def write_state(state: dict[str, Any]) -> int:
    """Return a descriptor of ``state``, for another holder to ``read_state`` and ``adopt``."""
    memory = os.memfd_create("envstore-state", os.MFD_CLOEXEC)
    os.write(memory, json.dumps(state).encode())
    return memory


def read_state(memory: int) -> dict[str, Any]:
    """Return what ``write_state`` has written, and close it."""
    with os.fdopen(memory, "rb") as file:
        file.seek(0)
        found: dict[str, Any] = json.loads(file.read())
    return found
