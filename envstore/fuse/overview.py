"""What is mounted, and how each mount fares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envstore.errors import EnvstoreError, NotFoundError
from envstore.fuse.mount import active_mounts
from envstore.fuse.records import MountRecord, RecordFiles
from envstore.fuse.sockets import ask_lasting
from envstore.fuse.stats import read_stats

_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class MountOverview:
    """One mount.

    ``state`` is ``serving``, ``starting`` (a server is on its way), ``failing`` (servers keep
    dying), ``local`` (no server needed) or ``dead``. ``bytes_fetched`` and ``requests`` count what
    the store was asked for, ``hit_rate`` is the share of reads that the cache could serve. Through
    a node server, which asks the store for all, ``bytes_fetched`` is what the reads of this
    snapshot waited for. ``leased`` is whether the store was told that somebody reads this snapshot,
    ``lease_problem`` why not, if there is a reason.
    """

    mountpoint: str
    ref: str
    digest: str
    state: str
    holder_pid: int
    server_pid: int | None
    restarts: int
    bytes_fetched: int
    requests: int
    hit_rate: float | None
    last_failure: str
    version: str
    fast_path: bool
    node: str
    store: str
    manifest: str
    started: str
    log: str
    stats: str
    control: str
    prefix: str
    leased: bool
    lease_problem: str


def overview() -> list[MountOverview]:
    """Return this user's mounts. Touches none of them, only the processes behind them."""
    return [_describe(record, alive) for record, alive in active_mounts()]


def mount_stats(record: MountRecord) -> dict[str, Any]:
    """Return what was counted of a mount, see ``Metrics.report``.

    Through a node server these are the reads of its snapshot, by whichever mount. Raises
    ``NotFoundError`` if no server can tell.
    """
    if record.node:
        mounts = ask_lasting(record.node, _WITHIN, ask="status")["mounts"]
        for mount in mounts:
            if mount["id"] == record.lease:
                found: dict[str, Any] = mount
                return {"restarts": 0, **found}
    if not record.control:
        raise NotFoundError(f"nothing is counted of {record.mountpoint}: no server serves it")
    return read_stats(Path(record.stats))


def _describe(record: MountRecord, alive: bool) -> MountOverview:
    status: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    try:
        if not record.served:
            status = {"state": "local"}
        elif alive and record.node:
            status = ask_lasting(record.node, _WITHIN, ask="status")
            mounts = {one["id"]: one for one in status["mounts"]}
            stats = mounts.get(record.lease, {})
            own = RecordFiles(status["root"]).load()
            if own is not None:
                status = {**status, **ask_lasting(own.control, _WITHIN, ask="status")}
        elif alive:
            status = ask_lasting(record.control, _WITHIN, ask="status")
            if status["state"] == "serving":
                stats = read_stats(Path(record.stats))
    except EnvstoreError as error:
        status = {**status, "last_failure": str(error)}
    runs, lease = stats.get("runs", {}), stats.get("store_lease", {})
    reads = sum(runs.values())
    return MountOverview(
        mountpoint=record.mountpoint,
        ref=record.name,
        digest=record.snapshot,
        state=status.get("state", "starting" if alive else "dead"),
        holder_pid=status.get("holder_pid") or record.holder_pid,
        server_pid=status.get("server_pid"),
        restarts=status.get("restarts", 0),
        bytes_fetched=stats.get("store", {}).get("bytes", stats.get("missed_bytes", 0)),
        requests=stats.get("store", {}).get("requests", 0),
        hit_rate=1 - runs["missed"] / reads if reads else None,
        last_failure=status.get("last_failure", ""),
        version=status.get("version", ""),
        fast_path=record.fast_path,
        node=record.node,
        store=record.store,
        manifest=record.manifest,
        started=record.started,
        log=record.log,
        stats=record.stats,
        control=record.control,
        prefix=record.prefix,
        leased=bool(lease.get("until")),
        lease_problem=lease.get("reason", ""),
    )
