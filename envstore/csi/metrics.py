"""What the driver counts, for Prometheus, for probes and for ``envstore k8s status``.

Nothing here asks a store, touches a mount or holds a secret. What is said of volumes comes from
the records of what is published and from the node server, which is asked when somebody looks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import envstore
from envstore.csi.nodeserver import NodeServer
from envstore.csi.records import Publication
from envstore.csi.refusal import NAME
from envstore.errors import EnvstoreError
from envstore.fuse.histogram import Histogram
from envstore.fuse.prometheus import Page

MAX_VOLUMES = 2000
"""Volumes that are shown one by one: several times what a node may run pods."""

ABNORMAL = ("not served", "not mounted", "dead")
"""Conditions of a volume that its pod cannot use; the others: ok, in progress, unknown."""

_PUBLISH = "NodePublishVolume"
_TIMED = (_PUBLISH, "NodeUnpublishVolume")
_MOST_KINDS = 256
_LONGEST_LABEL = 200
_SHORT = 12
_HEALTH_WITHIN = 3.0


class Calls:
    """Counts the calls of a gRPC server. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._took: dict[str, Histogram] = {name: Histogram() for name in _TIMED}

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count a call of ``method`` that ended with the gRPC status ``code``."""
        with self._lock:
            key = (method, code)
            if key not in self._counts and len(self._counts) >= _MOST_KINDS:
                key = ("other", code)
            self._counts[key] += 1
            if method in self._took:
                self._took[method].add(seconds)

    def report(self) -> tuple[dict[tuple[str, str], int], dict[str, dict[str, Any]]]:
        """Return the counts by method and code, and how long calls of some methods took."""
        with self._lock:
            took = {
                name: {"buckets": [*one.counts], "count": one.count, "seconds": one.seconds}
                for name, one in self._took.items()
            }
            return dict(self._counts), took


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the pages' contents come from.

    ``published`` returns the records of all targets, ``problem`` what is wrong with the
    configuration (empty if nothing is), ``answers`` whether the gRPC server answers. Without a
    ``node`` server this is no driver of a node, but a controller.
    """

    node_id: str
    calls: Calls
    node: NodeServer | None
    published: Callable[[], Iterable[Publication]]
    problem: Callable[[], str]
    answers: Callable[[], bool]


class Pages:
    """The pages that are served; see ``envstore.csi.pages``. Safe for many threads."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def live(self) -> str:
        """Return what does not answer, in one line, empty if the driver does."""
        return "" if self._sources.answers() else "the driver does not answer"

    def healthy(self) -> str:
        """Return what does not answer, in one line, empty if the driver and node server do."""
        problem, node = self.live(), self._sources.node
        if problem or node is None:
            return problem
        try:
            node.check(_HEALTH_WITHIN)
        except EnvstoreError as error:
            return error.message
        return ""

    def status(self) -> dict[str, Any]:
        """Return what is published on this node and how it fares, as JSON.

        Of a volume, ``bytes_fetched`` in so many ``requests`` to the store and ``bytes_read`` are
        those of its snapshot, which the pods of a node share, while it is served. ``node_server``
        has what was fetched for all.
        """
        sources = self._sources
        server, mounts, seen = self._asked()
        volumes = [
            _described(record, mounts.get(record.lease), seen if server["up"] else None)
            for record in sorted(sources.published(), key=lambda one: one.started)
        ]
        problem = sources.problem()
        return {
            "driver": NAME,
            "version": envstore.__version__,
            "node": sources.node_id,
            "problems": [one for one in (self.live(), server["problem"], problem) if one],
            "node_server": server,
            "configuration": {"problem": problem},
            "published": len(volumes),
            "volumes": volumes[:MAX_VOLUMES],
        }

    def metrics(self) -> str:
        """Return the same and the counts of calls in Prometheus' text format."""
        found = self.status()
        counts, took = self._sources.calls.report()
        page = Page()
        page.family(
            *("csi_info", "gauge", "1, with the version of the driver."),
            [({"version": envstore.__version__}, 1)],
        )
        page.family(
            *("csi_calls_total", "counter", "Calls of the driver by how they ended."),
            [({"method": name, "code": code}, count) for (name, code), count in _sorted(counts)],
        )
        page.family(
            *("csi_refused_publishes_total", "counter", "Volumes that a pod did not get, yet."),
            [
                ({"code": code}, count)
                for (name, code), count in _sorted(counts)
                if name == _PUBLISH and code != "OK"
            ],
        )
        page.histogram(
            *("csi_call_seconds", "How long calls took."),
            [({"method": name}, one) for name, one in took.items()],
        )
        _of_node(page, found, self._sources.node is not None)
        _of_volumes(page, found["volumes"])
        return page.text()

    def _asked(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
        """Return what the node server says of itself, of leases, and of mounts at targets."""
        node = self._sources.node
        if node is None:
            return {"up": False, "problem": ""}, {}, {}
        try:
            holder, status = node.holder(), node.status()
            seen = {one.target: one.alive for one in node.look()}
        except EnvstoreError as error:
            return {"up": False, "problem": error.message}, {}, {}
        totals = status["totals"]
        server = {
            "up": True,
            "problem": "",
            "state": holder["state"],
            "version": holder["version"],
            "restarts": holder["restarts"],
            "last_failure": str(holder["last_failure"])[:_LONGEST_LABEL],
            "snapshots": status["snapshots"],
            "cache": status["cache"],
            "bytes_fetched": totals["store"]["bytes"],
            "requests": totals["store"]["requests"],
            "reads": totals["runs"],
        }
        return server, {one["id"]: one for one in status["mounts"]}, seen


def _described(
    record: Publication, mount: Mapping[str, Any] | None, seen: Mapping[str, bool] | None
) -> dict[str, Any]:
    """Return one volume: what its record says, and what the node server knows of it.

    ``seen`` tells of every target that is mounted whether somebody serves it.
    """
    request, pod = record.request, record.request.pod
    if not record.published:
        condition = "in progress"
    elif seen is None:
        condition = "unknown"
    elif mount is None:
        condition = "not served"
    elif record.target not in seen:
        condition = "not mounted"
    else:
        condition = "ok" if seen[record.target] else "dead"
    return {
        "volume": record.volume,
        "namespace": pod.namespace if pod else "",
        "pod": pod.name if pod else "",
        "store": record.store,
        "ref": request.ref,
        "digest": record.digest,
        "target": record.target,
        "started": record.started,
        "fast": record.fast,
        "condition": condition,
        "bytes_fetched": mount["bytes_fetched"] if mount else 0,
        "bytes_read": mount["bytes_read"] if mount else 0,
        "requests": mount["fetch_requests"] if mount else 0,
    }


def _of_node(page: Page, found: Mapping[str, Any], is_node: bool) -> None:
    server = found["node_server"]
    page.family(
        *("csi_config_broken", "gauge", "1 if the configuration file cannot be used as it is."),
        [({}, bool(found["configuration"]["problem"]))],
    )
    if not is_node:
        return
    page.family(
        *("csi_published_volumes", "gauge", "Targets that volumes are published at."),
        [({}, found["published"])],
    )
    page.family(
        *("csi_node_server_up", "gauge", "1 if the node server answers."), [({}, server["up"])]
    )
    if server["up"]:
        page.family(
            *("csi_node_server_restarts_total", "counter", "Servers that took over from others."),
            [({}, server["restarts"])],
        )
        page.family(
            *("csi_cache_bytes", "gauge", "Bytes in the node's cache."),
            [({}, server["cache"]["bytes"])],
        )
        page.family(
            *("csi_cache_capacity_bytes", "gauge", "The cap on that."),
            [({}, server["cache"]["capacity"])],
        )


def _of_volumes(page: Page, volumes: Iterable[Mapping[str, Any]]) -> None:
    # Series that say the same may not be there twice.
    labelled = [*{tuple(_labels(one).items()): (_labels(one), one) for one in volumes}.values()]
    page.family(
        *("csi_volume_abnormal", "gauge", "1 for a volume whose pod cannot use it."),
        [(labels, volume["condition"] in ABNORMAL) for labels, volume in labelled],
    )
    for name, text, key in (
        ("csi_volume_fetched_bytes", "Fetched for a volume's snapshot.", "bytes_fetched"),
        ("csi_volume_read_bytes", "Read of a volume's snapshot.", "bytes_read"),
        ("csi_volume_fetch_requests", "Requests for a volume's snapshot.", "requests"),
    ):
        # Gauges: a snapshot that is served anew begins at nothing, in the same series.
        page.family(
            *(name, "gauge", f"{text} Pods of a node share it: do not add them up."),
            [(labels, volume[key]) for labels, volume in labelled],
        )


def _labels(volume: Mapping[str, Any]) -> dict[str, str]:
    names = ("volume", "namespace", "pod", "ref")
    found = {name: str(volume[name])[:_LONGEST_LABEL] for name in names}
    return {**found, "digest": str(volume["digest"])[:_SHORT]}


def _sorted(counts: Mapping[tuple[str, str], int]) -> list[tuple[tuple[str, str], int]]:
    return sorted(counts.items())
