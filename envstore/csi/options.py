"""What a driver is started with, checked before anything that takes long is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import UsageError

LONGEST_NODE_ID = 256
"""Bytes in a node's name (CSI specification, NodeGetInfo)."""

# What fits into the address of a socket (unix(7)): nobody could call at a longer path.
_LONGEST_PATH = 107


def endpoint_path(endpoint: str) -> str:
    """Return the path of an endpoint ``unix:///path/csi.sock``; ``UsageError`` if it is none."""
    scheme, _, path = endpoint.partition(":")
    path = path[2:] if path.startswith("//") else path
    if scheme != "unix" or not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise UsageError(
            f"{endpoint!r} is no endpoint of a CSI driver",
            hint="it is the path of a socket: unix:///path/csi.sock",
        )
    return check_path(path)


def check_path(path: str) -> str:
    """Return ``path`` if it fits into a socket's address; ``UsageError`` if not."""
    size = len(os.fsencode(path))
    if size > _LONGEST_PATH:
        raise UsageError(
            f"the path of a socket can have {_LONGEST_PATH} bytes, and this one has {size}: {path}",
            hint="use a shorter directory",
        )
    return path


def check_seen(path: str) -> str:
    """Return what the kubelet sees a socket as, if it is a path; ``UsageError`` if not."""
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise UsageError(f"{path!r} is no absolute path of a socket, for the kubelet to call at")
    return check_path(path)


def check_node_id(name: str) -> str:
    """Return a node's name if it is one; ``UsageError`` if not."""
    if not name.isprintable() or not 0 < len(name.encode()) <= LONGEST_NODE_ID:
        raise UsageError(f"a node's name has 1 to {LONGEST_NODE_ID} bytes, without line breaks")
    return name


def own_socket(state: Path) -> str:
    """Return where a node server listens that the driver with this state directory starts."""
    return str(state / "node.sock")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The Node service: this node's name, and where it records what is published.

    ``socket`` is the node server's; ``start``: one is started whenever none is there, to make
    mounts below ``targets``.
    """

    id: str
    state: Path
    socket: str
    start: bool
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """What a driver is started with.

    ``path`` is the socket to serve at. Without ``config`` everybody may use the store at ``url``.
    ``credentials`` holds a directory of keys for each store. ``register`` is the kubelet's
    plugins_registry, ``kubelet_endpoint`` what it sees ``path`` as.
    """

    path: str
    url: str
    node: NodeOptions | None
    controller: bool
    config: Path | None = None
    credentials: Path | None = None
    register: str | None = None
    kubelet_endpoint: str | None = None
    metrics: str = ""
