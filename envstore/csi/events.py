"""Events of pods: why a volume is not there yet, where people look for it (``kubectl describe``).

They are told on the side: nobody waits for the API server, and nothing fails because of it. One
pod is told of one kind of thing once in some minutes; what comes in between is counted and told
next time, in the words of the last. What cannot be told, or is too much, is dropped and logged.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from envstore.csi.cluster import Cluster
from envstore.csi.refusal import NAME
from envstore.csi.request import Pod
from envstore.errors import EnvstoreError, UnavailableError

REFUSED, SLOW = "EnvstoreRefused", "EnvstoreSlow"
"""Reasons of events: a volume is not mounted; it is, but takes long."""

EVERY = 300.0
"""Seconds between two events of one reason for one pod."""

_TYPES = {REFUSED: "Warning", SLOW: "Normal"}
_MOST_WAITING = 256
_MOST_KNOWN = 4096
_LONGEST = 1000
_LONGEST_NAME = 230
_WITHIN = 10.0
_AGAIN_AFTER = 5.0
_TIMES = 3

_log = logging.getLogger(__name__)

_Key = tuple[str, str]


@dataclass(slots=True)
class _Waiting:
    """What one pod is to be told for one reason, not before ``due`` (monotonic seconds)."""

    pod: Pod
    reason: str
    due: float
    message: str = ""
    count: int = 0
    tries: int = 0
    first: str = ""
    last: str = ""


class Silent:
    """Tells nobody: for a driver that no API server is known to. The log has all that matters."""

    def refused(self, pod: Pod, message: str) -> None:
        """Tell nobody."""

    def slow(self, pod: Pod, message: str) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """Do nothing."""


class PodEvents:
    """Tells pods of one node. Every method but ``close`` returns at once and raises nothing."""

    def __init__(self, cluster: Callable[[], Cluster], node: str, *, every: float = EVERY) -> None:
        """``cluster`` is asked for when there is something to tell; see ``envstore.csi.here``."""
        self._cluster = cluster
        self._node = node
        self._every = every
        self._changed = threading.Condition()
        self._waiting: OrderedDict[_Key, _Waiting] = OrderedDict()
        self._told: OrderedDict[_Key, float] = OrderedDict()
        self._ended = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="pod events", daemon=True)
        self._thread.start()

    def refused(self, pod: Pod, message: str) -> None:
        """Tell that a volume is not mounted, and why."""
        self._put(pod, REFUSED, message)

    def slow(self, pod: Pod, message: str) -> None:
        """Tell that a volume takes long to be mounted."""
        self._put(pod, SLOW, message)

    def close(self, within: float = 2.0) -> None:
        """Tell what is due now and end, after so many seconds in any case."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(within)

    def is_alive(self) -> bool:
        """Return whether there may still be something to tell."""
        return self._thread.is_alive()

    def _put(self, pod: Pod, reason: str, message: str) -> None:
        key = (pod.uid, reason)
        with self._changed:
            if key not in self._waiting:
                if len(self._waiting) >= _MOST_WAITING or self._ended:
                    self._drop()
                    return
                told = self._told.get(key)
                due = time.monotonic() if told is None else told + self._every
                self._waiting[key] = _Waiting(pod, reason, due, first=_now())
            waiting = self._waiting[key]
            waiting.message = _line(message)
            waiting.count += 1
            waiting.last = _now()
            self._changed.notify()

    def _drop(self) -> None:
        self._dropped += 1
        if self._dropped & (self._dropped - 1) == 0:
            _log.warning("dropped %d events of pods so far", self._dropped)

    def _run(self) -> None:
        while True:
            found = self._next()
            if found is None:
                return
            key, waiting = found
            try:
                body = _event(waiting, self._node)
                self._cluster().create(
                    "api", "v1", "namespaces", waiting.pod.namespace, "events", body=body
                )
            except UnavailableError as error:
                self._put_back(key, waiting, error)
            except EnvstoreError as error:
                self._give_up(key, waiting, error)
            except Exception:  # noqa: BLE001 - others are to be told, whatever is wrong with this
                _log.exception("an event of a pod could not be made")
            else:
                self._note(key)

    def _next(self) -> tuple[_Key, _Waiting] | None:
        """Return what is due, once something is; ``None`` at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                key = min(self._waiting, key=lambda one: self._waiting[one].due, default=None)
                if key is not None and self._waiting[key].due <= now:
                    return key, self._waiting.pop(key)
                if self._ended:
                    return None
                self._changed.wait(None if key is None else self._waiting[key].due - now)

    def _note(self, key: _Key) -> None:
        with self._changed:
            now = time.monotonic()
            self._told[key] = now
            self._told.move_to_end(key)
            while len(self._told) > _MOST_KNOWN:
                self._told.popitem(last=False)
            if key in self._waiting:
                self._waiting[key].due = now + self._every

    def _put_back(self, key: _Key, waiting: _Waiting, error: EnvstoreError) -> None:
        waiting.tries += 1
        if waiting.tries >= _TIMES:
            self._give_up(key, waiting, error)
            return
        with self._changed:
            newer = self._waiting.pop(key, None)
            if newer is not None:
                waiting.message, waiting.last = newer.message, newer.last
                waiting.count += newer.count
            waiting.due = time.monotonic() + _AGAIN_AFTER * waiting.tries
            self._waiting[key] = waiting

    def _give_up(self, key: _Key, waiting: _Waiting, error: EnvstoreError) -> None:
        pod = f"{waiting.pod.namespace}/{waiting.pod.name}"
        _log.warning("pod %s is not told of %s: %s", pod, waiting.reason, error.message)
        self._note(key)


def _event(waiting: _Waiting, node: str) -> dict[str, Any]:
    """Return an Event (API v1) about a pod."""
    pod = waiting.pod
    name = pod.name[:_LONGEST_NAME].rstrip("-.")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{secrets.token_hex(8)}", "namespace": pod.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
        },
        "type": _TYPES[waiting.reason],
        "reason": waiting.reason,
        "message": waiting.message,
        "count": waiting.count,
        "firstTimestamp": waiting.first,
        "lastTimestamp": waiting.last,
        "source": {"component": NAME, "host": node},
        "reportingComponent": NAME,
        "reportingInstance": node,
    }


def _line(message: str) -> str:
    """Return a message in one printable line that is not too long."""
    text = "".join(one if one.isprintable() else " " for one in message[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
