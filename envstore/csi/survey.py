"""How the driver fares on every node of a cluster, through the API server alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from envstore.csi.cluster import CONNECTIONS, Cluster
from envstore.errors import EnvstoreError, NotFoundError

NAMESPACE = "envstore-system"
DRIVER, NODE_SERVER = "envstore-csi", "envstore-node"
"""The label ``app.kubernetes.io/name`` of the two DaemonSets and of their pods."""

_NAME = "app.kubernetes.io/name"
_PORT = "metrics"
_REASON = re.compile(r"[A-Za-z]{1,64}")


@dataclass(slots=True)
class NodeReport:
    """One node. ``problems`` is empty if all is well; sizes are bytes.

    ``restarts`` counts containers of both pods and servers in them. What is ``None`` was not
    told. ``volumes`` are as the driver's ``/status`` has them, see ``Pages.status``.
    """

    node: str
    problems: list[str] = field(default_factory=list)
    version: str | None = None
    mounts: int | None = None
    bytes_fetched: int | None = None
    cache_bytes: int | None = None
    cache_capacity: int | None = None
    hit_rate: float | None = None
    restarts: int = 0
    volumes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Survey:
    """All nodes by name, and what is wrong with none of them in particular."""

    nodes: list[NodeReport]
    problems: list[str]

    @property
    def ready(self) -> bool:
        """Whether nothing is wrong anywhere."""
        return not self.problems and not any(node.problems for node in self.nodes)


def survey(cluster: Cluster, namespace: str, within: float) -> Survey:
    """Ask every node for at most ``within`` seconds, and return what they say.

    Raises ``NotFoundError`` if no driver is installed in ``namespace``, and the errors of
    ``Cluster`` where the API server itself refuses; a node that does not answer is reported.
    """
    base = ("apis", "apps", "v1", "namespaces", namespace, "daemonsets")
    sets = [one for one in cluster.items(*base) if _label(one) in (DRIVER, NODE_SERVER)]
    if not any(_label(one) == DRIVER for one in sets):
        raise NotFoundError(
            f"there is no DaemonSet of envstore in the namespace {namespace}",
            hint="install it, or name its namespace with --namespace",
        )
    selector = f"{_NAME} in ({DRIVER}, {NODE_SERVER})"
    pods = cluster.items("api", "v1", "namespaces", namespace, "pods", labelSelector=selector)
    nodes: dict[str, NodeReport] = {}
    drivers: dict[str, dict[str, Any]] = {}
    problems = [problem for one in sets for problem in _missing(one, pods)]
    for pod in sorted(pods, key=_name):
        where = pod.get("spec", {}).get("nodeName")
        if not where:
            problems.append(f"{_name(pod)} is on no node: {_why(pod)}")
            continue
        report = nodes.setdefault(where, NodeReport(where))
        report.restarts += sum(int(one.get("restartCount", 0)) for one in _statuses(pod))
        leaving = "deletionTimestamp" in pod["metadata"]
        if leaving or not _ready(pod):
            reason = "is ending" if leaving else f"is not ready: {_why(pod)}"
            report.problems.append(f"{_name(pod)} {reason}")
        if _pod_label(pod) == DRIVER and not leaving:
            drivers[where] = pod
    with ThreadPoolExecutor(CONNECTIONS) as pool:

        def ask(report: NodeReport) -> None:
            _ask(cluster, namespace, report, drivers.get(report.node), within)

        list(pool.map(ask, nodes.values()))
    return Survey([nodes[name] for name in sorted(nodes)], problems)


def _ask(
    cluster: Cluster,
    namespace: str,
    report: NodeReport,
    pod: Mapping[str, Any] | None,
    within: float,
) -> None:
    """Fill in what the driver of a node says of itself."""
    if pod is None:
        report.problems.append("no driver runs here")
        return
    port = _port(pod)
    if not port:
        report.problems.append(f"{_name(pod)} has no port called {_PORT} to ask at")
        return
    where = f"{_name(pod)}:{port}"
    path = ("api", "v1", "namespaces", namespace, "pods", where, "proxy", "status")
    try:
        told = cluster.get(*path, within=within)
        _fill(report, told)
    except EnvstoreError as error:
        report.problems.append(f"{_name(pod)} does not tell: {error.message}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        report.problems.append(f"{_name(pod)} tells what this version does not understand")


def _fill(report: NodeReport, told: Mapping[str, Any]) -> None:
    report.version = str(told["version"])
    report.mounts = int(told["published"])
    report.volumes = [dict(one) for one in told["volumes"]]
    report.problems += [str(one) for one in told["problems"]]
    server = told["node_server"]
    if server["up"]:
        report.restarts += int(server["restarts"])
        report.bytes_fetched = int(server["bytes_fetched"])
        report.cache_bytes = int(server["cache"]["bytes"])
        report.cache_capacity = int(server["cache"]["capacity"])
        reads = {kind: int(count) for kind, count in server["reads"].items()}
        if sum(reads.values()):
            report.hit_rate = 1 - reads["missed"] / sum(reads.values())
        if server["state"] != "serving":
            report.problems.append(f"the node server is {server['state']}")
    for one in report.volumes:
        if one["condition"] not in ("ok", "in progress", "unknown"):
            of = f"{one['namespace']}/{one['pod']}" if one["pod"] else one["volume"]
            report.problems.append(f"the volume of {of} is {one['condition']}")


def _missing(daemons: Mapping[str, Any], pods: list[dict[str, Any]]) -> list[str]:
    wanted = int(daemons.get("status", {}).get("desiredNumberScheduled", 0))
    name = _label(daemons)
    found = sum(_pod_label(pod) == name for pod in pods)
    if found >= wanted and wanted:
        return []
    if not wanted:
        return [f"the DaemonSet {_name(daemons)} fits no node"]
    return [f"the DaemonSet {_name(daemons)} has {found} of {wanted} pods"]


def _port(pod: Mapping[str, Any]) -> int:
    for container in pod["spec"].get("containers", ()):
        for port in container.get("ports", ()):
            if port.get("name") == _PORT:
                return int(port["containerPort"])
    return 0


def _ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions") or ()
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def _why(pod: Mapping[str, Any]) -> str:
    """Return the reason that Kubernetes gives, in a word or two."""
    for one in _statuses(pod):
        for state in ("waiting", "terminated"):
            reason = str(one.get("state", {}).get(state, {}).get("reason", ""))
            if _REASON.fullmatch(reason):
                return f"{one.get('name')}: {reason}"
    return str(pod.get("status", {}).get("phase", "Unknown"))


def _statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    status = pod.get("status", {})
    return [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]


def _name(thing: Mapping[str, Any]) -> str:
    return str(thing["metadata"]["name"])


def _label(daemons: Mapping[str, Any]) -> str:
    return _pod_label(daemons["spec"]["template"])


def _pod_label(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"].get("labels", {}).get(_NAME, ""))
