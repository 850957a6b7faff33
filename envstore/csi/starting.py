"""Sees to it that there is a node server, where it is the driver's to start one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from envstore.csi.options import own_socket
from envstore.errors import EnvstoreError, UsageError
from envstore.fuse.background import start_background
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mount import clear_dead
from envstore.fuse.sockets import somebody_listens

_log = logging.getLogger("envstore.csi")

_EVERY = 2.0


class Starter:
    """Starts a node server below ``state`` whenever nobody listens at ``own_socket(state)``.

    It is a process of its own, which outlives the driver and serves on while the next one starts.
    ``targets`` are the directories below which volumes are published.
    """

    def __init__(self, state: Path, targets: Sequence[str]) -> None:
        self._request = MountRequest(
            "",
            "",
            str(state / "mnt"),
            allow_other=True,
            node=own_socket(state),
            targets=[os.path.abspath(one) for one in targets],
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node server", daemon=True)

    def start(self) -> None:
        """Start a node server if there is none; go on looking after it in a thread.

        Raises what keeps it from starting: ``AccessDeniedError``, ``UsageError``, ...
        """
        self._ensure()
        self._thread.start()

    def stop(self) -> None:
        """Look no more; the node server stays."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        said = ""
        while not self._ended.wait(_EVERY):
            try:
                self._ensure()
                said = ""
            except EnvstoreError as error:
                if str(error) != said:
                    said = str(error)
                    _log.error("the node server does not start: %s", said)

    def _ensure(self) -> None:
        try:
            if somebody_listens(self._request.node):
                return
            clear_dead(self._request.mountpoint)
            os.makedirs(self._request.mountpoint, mode=0o755, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot use the state directory {os.path.dirname(self._request.node)}: "
                f"{error.strerror}"
            ) from error
        record = start_background(self._request)
        _log.info("started a node server at %s, on %s", self._request.node, record.mountpoint)
