"""Warms nodes of a cluster before a job starts there, by pods that do what the job's will do.

On each node a pod of the user's own, in a namespace of the user's, mounts the volume and reads it:
policy, credentials and fetching ahead are those of any pod, nobody needs more rights than for
running one, and the driver has no way in that pods do not have. The pods belong to Jobs, which
remove themselves if whoever made them cannot.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.csi import reading
from envstore.csi.cluster import CONNECTIONS, Cluster
from envstore.csi.refusal import NAME
from envstore.csi.request import VolumeRequest
from envstore.csi.snippets import attributes
from envstore.csi.survey import DRIVER
from envstore.errors import (
    AccessDeniedError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)

LABEL = "envstore.dev/warm"

_PLACE = "/volume"
_KEPT_SECONDS = 600
_POLL_SECONDS, _EVENTS_SECONDS = 1.0, 5.0
_NOBODY = 65534
_PIECE, _MOST_PIECES = 96 << 10, 5
_NODE = re.compile(r"[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?")
_HOPELESS = (
    "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName",
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
)  # fmt: skip
_REFUSED = re.compile(r"code = (\w+) desc = (.*)", re.DOTALL)
_FINAL = ("InvalidArgument", "PermissionDenied", "NotFound", "FailedPrecondition", "Unimplemented")


@dataclass(frozen=True, slots=True)
class Order:
    """What to warm nodes with.

    ``tasks`` are the ranges to read, ``None`` for everything. ``patience`` is in seconds.
    ``secret`` names the Secret with the keys to the store, where every volume brings its own.
    """

    volume: VolumeRequest
    namespace: str
    image: str
    patience: int
    tasks: Sequence[reading.Task] | None
    secret: str = ""


@dataclass(slots=True)
class Outcome:
    """One node: ``state`` is ``waiting``, ``reading``, ``done`` or ``failed`` for ``reason``.

    ``files`` could not be read by others than their owner where they are ``unreadable``.
    """

    node: str
    job: str = ""
    state: str = "waiting"
    reason: str = ""
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    unreadable: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.state in ("done", "failed")

    def fail(self, reason: str) -> None:
        """Note that the node is not warm, and why."""
        self.state, self.reason = "failed", " ".join(reason.split())[:500]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Names of the nodes that a selector fits; ``away`` are not ready."""

    ready: list[str] = field(default_factory=list)
    away: list[str] = field(default_factory=list)


def find_nodes(cluster: Cluster, selector: str) -> Candidates:
    """Return the nodes with labels that ``selector`` fits. Raises the errors of ``Cluster``."""
    found = Candidates()
    for node in cluster.items("api", "v1", "nodes", labelSelector=selector):
        conditions = node.get("status", {}).get("conditions") or ()
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        (found.ready if ready else found.away).append(str(node["metadata"]["name"]))
    return found


def check_node(name: str) -> str:
    """Return ``name`` if it can be that of a node. Raises ``UsageError``."""
    if _NODE.fullmatch(name) is None:
        raise UsageError(f"{name[:80]!r} cannot be the name of a node")
    return name


def driver_image(cluster: Cluster, namespace: str) -> str:
    """Return the image of the driver, which every node has.

    Raises ``NotFoundError``, ``AccessDeniedError``, both with what to do instead.
    """
    path = ("apis", "apps", "v1", "namespaces", namespace, "daemonsets", DRIVER)
    try:
        found = cluster.get(*path)
        return str(found["spec"]["template"]["spec"]["containers"][0]["image"])
    except AccessDeniedError as error:
        raise AccessDeniedError(
            error.message, hint="name any image with python3: --image"
        ) from None
    except (NotFoundError, KeyError, IndexError):
        raise NotFoundError(
            f"there is no DaemonSet {DRIVER} in the namespace {namespace}",
            hint="name its namespace with --driver-namespace, or an image with python3: --image",
        ) from None


def fitting(tasks: Sequence[reading.Task]) -> Sequence[reading.Task]:
    """Return the first of ``tasks``, as many as a pod's command line has room for."""
    kept, room = tasks, _PIECE * _MOST_PIECES
    while (size := len(reading.packed(kept))) > room:
        kept = kept[: int(len(kept) * room / size * 0.95)]
    return kept


def job(order: Order, node: str, name: str, run: str) -> dict[str, Any]:
    """Return the Job that warms one node: fit for the strictest level of pod security."""
    text = reading.packed(order.tasks) if order.tasks is not None else ""
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    source = Path(reading.__file__).read_text(encoding="utf-8")
    labels = {"app.kubernetes.io/name": "envstore-warm", LABEL: run}
    identity = {"runAsUser": _NOBODY, "runAsGroup": _NOBODY, "runAsNonRoot": True}
    container = {
        "name": "read",
        "image": order.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-I", "-c", source, _PLACE, *pieces],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {
            "requests": {"cpu": "10m", "memory": "64Mi"},
            "limits": {"cpu": "2", "memory": "512Mi"},
        },
        "volumeMounts": [{"name": "env", "mountPath": _PLACE, "readOnly": True}],
    }
    volume: dict[str, Any] = {
        "driver": NAME,
        "readOnly": True,
        "volumeAttributes": attributes(order.volume),
    }
    if order.secret:
        volume["nodePublishSecretRef"] = {"name": order.secret}
    spec = {
        "nodeName": node,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "tolerations": [{"operator": "Exists"}],
        "securityContext": {**identity, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "env", "csi": volume}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": order.namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": order.patience,
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


class Warmup:
    """Jobs on some nodes, from the first to the last."""

    def __init__(self, cluster: Cluster, order: Order, nodes: Iterable[str]) -> None:
        self._cluster = cluster
        self._order = order
        self._run = secrets.token_hex(4)
        self._base = ("apis", "batch", "v1", "namespaces", order.namespace, "jobs")
        self._looked = 0.0
        self.outcomes = [
            Outcome(node, f"envstore-warm-{self._run}-{number}")
            for number, node in enumerate(nodes)
        ]

    def start(self) -> None:
        """Make all Jobs. A node whose Job is refused has failed.

        Raises the error if it is the same for all.
        """
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            errors = [*pool.map(self._make, self.outcomes)]
        if errors and all(errors):
            raise next(filter(None, errors))

    def wait(self, said: Callable[[Outcome], None]) -> None:
        """Return when every node is warm or has failed; ``said`` hears of each as it ends.

        Raises the errors of ``Cluster``; that it does not answer for a while is nothing.
        """
        end = time.monotonic() + self._order.patience
        told: set[str] = set()
        while True:
            late = time.monotonic() > end
            try:
                self._look(thoroughly=late)
            except UnavailableError:
                # The pods go on without us.
                if late:
                    raise
            for one in self.outcomes:
                if late and not one.ended:
                    why = f": {one.reason}" if one.reason else ""
                    one.fail(f"not done after {self._order.patience} s{why}")
                if one.ended and one.job not in told:
                    told.add(one.job)
                    said(one)
            if len(told) == len(self.outcomes):
                return
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Remove all Jobs and their pods. Raises ``EnvstoreError`` if that fails."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda one: self._cluster.delete(*self._base, one.job), self.outcomes))

    def _make(self, outcome: Outcome) -> EnvstoreError | None:
        try:
            body = job(self._order, outcome.node, outcome.job, self._run)
            self._cluster.create(*self._base, body=body)
        except EnvstoreError as error:
            outcome.fail(error.message)
            return error
        return None

    def _look(self, *, thoroughly: bool) -> None:
        """Learn from the pods, and from events where a pod does not start."""
        path = ("api", "v1", "namespaces", self._order.namespace)
        mine = {"labelSelector": f"{LABEL}={self._run}"}
        # In this order: a pod tells more, and has ended before its Job has.
        jobs = {
            str(one["metadata"]["name"]): one for one in self._cluster.items(*self._base, **mine)
        }
        pods = self._cluster.items(*path, "pods", **mine)
        by_job = {str(pod["metadata"].get("labels", {}).get("job-name")): pod for pod in pods}
        for one in self.outcomes:
            if not one.ended and one.job in by_job:
                _learn(one, by_job[one.job])
            if not one.ended:
                _judge(one, jobs.get(one.job))
        if not thoroughly and time.monotonic() - self._looked < _EVENTS_SECONDS:
            return
        waiting = [one for one in self.outcomes if one.state == "waiting"]
        if waiting:
            self._looked = time.monotonic()
            events = self._cluster.items(*path, "events", fieldSelector="type=Warning")
            for one in waiting:
                _heed(one, events)


def _learn(outcome: Outcome, pod: Mapping[str, Any]) -> None:
    """Take over what a pod's status says."""
    status = pod.get("status", {})
    states = [one.get("state", {}) for one in status.get("containerStatuses") or ()]
    state: Mapping[str, Any] = states[0] if states else {}
    match status.get("phase"):
        case "Succeeded" | "Failed" as phase:
            ended = state.get("terminated") or {}
            report = _report(str(ended.get("message", "")))
            outcome.files, outcome.bytes = report.get("files", 0), report.get("bytes", 0)
            outcome.seconds = report.get("seconds", 0.0)
            outcome.unreadable = report.get("unreadable", 0)
            if phase == "Succeeded":
                outcome.state, outcome.reason = "done", ""
            else:
                why = report.get("reason") or status.get("message") or ended.get("message")
                outcome.fail(str(why or status.get("reason") or ended.get("reason") or "it failed"))
        case "Running":
            outcome.state = "reading"
        case _:
            waiting = state.get("waiting") or {}
            if waiting.get("reason") in _HOPELESS:
                outcome.fail(f"{waiting['reason']}: {waiting.get('message', '')}")


def _judge(outcome: Outcome, made: Mapping[str, Any] | None) -> None:
    """Give up on a node whose Job has failed, or has gone."""
    if made is None:
        outcome.fail("somebody has removed its Job")
        return
    for condition in made.get("status", {}).get("conditions") or ():
        if condition.get("type") == "Failed" and condition.get("status") == "True":
            why = str(condition.get("message") or condition.get("reason") or "it failed")
            outcome.fail(f"{why}: {outcome.reason}" if outcome.reason else why)


def _report(message: str) -> dict[str, Any]:
    """Return what the container said at its end; it is the user's own, and may say anything."""
    try:
        found = json.loads(message)
        return {
            "files": int(found["files"]),
            "bytes": int(found["bytes"]),
            "seconds": float(found["seconds"]),
            "unreadable": int(found["unreadable"]),
            "reason": str(found["reason"]),
        }
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}


def _heed(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> None:
    """Take over why a pod does not start, and give up where waiting will not help."""
    for event in events:
        name = str(event.get("involvedObject", {}).get("name", ""))
        if name != outcome.job and not name.startswith(f"{outcome.job}-"):
            continue
        said = str(event.get("message", ""))
        refused = _REFUSED.search(said)
        outcome.reason = " ".join((refused[2] if refused else said).split())
        if (refused and refused[1] in _FINAL) or event.get("reason") == "FailedCreate":
            outcome.fail(outcome.reason)
            return
