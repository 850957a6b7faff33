"""A cluster as its users meet it: an API server on loopback, and a kubelet that runs containers.

with running_cluster(directory) as cluster:
    cluster.add_node("a", pool="gpu")
    cluster.kubeconfig(path)
    ...
    cluster.asked[0].path

Of a Job's container it runs the command as a process, with a directory in the place of the
volume, so that what pods would do is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

PATIENCE = 60.0
TOKEN = "a-token-nobody-may-see"

Body = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    body: Body | None
    login: str | None


@dataclass
class Cluster:
    """What the API server knows, and what it has been asked.

    ``denied`` are pairs of a method and a word in the path that are answered with 403. ``proxied``
    answers what is asked of a pod by ``name:port``; without, it does not answer at all.
    ``volume`` is what containers see as their volume. ``hold`` keeps pods from starting,
    ``why`` is then what events say. Answers come in pieces of ``drip`` bytes, slowly, if it is set.
    ``anybody`` may ask, as kubectl says who it is over TLS only.
    """

    directory: Path
    port: int = 0
    nodes: dict[str, Body] = field(default_factory=dict)
    daemons: list[Body] = field(default_factory=list)
    pods: list[Body] = field(default_factory=list)
    events: list[Body] = field(default_factory=list)
    jobs: dict[str, Body] = field(default_factory=dict)
    made: list[Body] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    denied: list[tuple[str, str]] = field(default_factory=list)
    proxied: dict[str, Callable[[], tuple[int, bytes]]] = field(default_factory=dict)
    volume: Path | None = None
    hold: bool = False
    why: tuple[str, str] | None = None
    page: int = 1000
    drip: int = 0
    anybody: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    gate: threading.Event = field(default_factory=threading.Event)

    def kubeconfig(self, path: Path, namespace: str = "science", token: str = TOKEN) -> Path:
        """Write a file that names this cluster and a namespace, and return its path."""
        here = {"cluster": "here", "user": "me", "namespace": namespace}
        server = f"http://127.0.0.1:{self.port}"
        written = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": server}}],
            "users": [{"name": "me", "user": {"token": token}}],
            "contexts": [{"name": "here", "context": here}],
            "current-context": "here",
        }
        path.write_text(yaml.safe_dump(written))
        return path

    def add_node(self, name: str, *, ready: bool = True, **labels: str) -> None:
        status = "True" if ready else "Unknown"
        self.nodes[name] = {
            "metadata": {"name": name, "labels": labels},
            "status": {"conditions": [{"type": "Ready", "status": status}]},
        }

    def add_daemons(self, name: str, wanted: int, namespace: str = "envstore-system") -> None:
        """Add a DaemonSet as deploy/ has it."""
        labels = {"app.kubernetes.io/name": name}
        container = {"name": "main", "image": "driver:1"}
        self.daemons.append(
            {
                "metadata": {"name": name, "namespace": namespace},
                "spec": {
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {"containers": [container]},
                    }
                },
                "status": {"desiredNumberScheduled": wanted},
            }
        )

    def add_pod(self, of: str, node: str | None, *, restarts: int = 0, waits: str = "") -> str:
        """Add a pod of a DaemonSet, which ``waits`` for a reason if it is not ready."""
        name = f"{of}-{len(self.pods)}"
        ports = [{"name": "grpc", "containerPort": 1}, {"name": "metrics", "containerPort": 9465}]
        state: Body = {"waiting": {"reason": waits}} if waits else {"running": {}}
        ready = "False" if waits or node is None else "True"
        spec: Body = {"containers": [{"name": "helper"}, {"name": "main", "ports": ports}]}
        self.pods.append(
            {
                "metadata": {
                    "name": name,
                    "namespace": "envstore-system",
                    "labels": {"app.kubernetes.io/name": of},
                },
                "spec": {**spec, **({"nodeName": node} if node else {})},
                "status": {
                    "phase": "Running" if node else "Pending",
                    "conditions": [{"type": "Ready", "status": ready}],
                    "containerStatuses": [
                        {"name": "main", "restartCount": restarts, "state": state}
                    ],
                },
            }
        )
        return name

    # --- the kubelet ---------------------------------------------------------------------------

    def run(self, made: Body) -> None:
        """Make the pod of a Job, run its container to the end, and say how that was."""
        name, template = made["metadata"]["name"], made["spec"]["template"]
        labels = {**template["metadata"]["labels"], "job-name": name}
        pod: Body = {
            "metadata": {"name": f"{name}-x7x7x", "labels": labels, **_in(made)},
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }
        with self.lock:
            if self.why is not None and self.why[0] == "FailedCreate":
                self._event(name, *self.why)
                return
            self.pods.append(pod)
            if self.why is not None:
                self._event(pod["metadata"]["name"], *self.why)
            if self.hold:
                return
        pod["status"] = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
        message = self.directory / f"{name}.message"
        container = template["spec"]["containers"][0]
        (mount,) = container["volumeMounts"]
        command = [
            str(self.volume)
            if word == mount["mountPath"]
            else word.replace("/dev/termination-log", str(message))
            for word in container["command"]
        ]
        assert command[0] == "python3"
        done = subprocess.run(
            [sys.executable, *command[1:]],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
        said = message.read_text() if message.exists() else ""
        ended = {"terminated": {"exitCode": done.returncode, "reason": "x", "message": said}}
        phase = "Failed" if done.returncode else "Succeeded"
        pod["status"] = {"phase": phase, "containerStatuses": [{"state": ended}]}

    def _event(self, name: str, reason: str, message: str) -> None:
        about = {"kind": "Pod", "name": name}
        self.events.append(
            {"type": "Warning", "reason": reason, "message": message, "involvedObject": about}
        )


def _in(thing: Body) -> Body:
    return {"namespace": thing["metadata"]["namespace"]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    cluster: Cluster

    def do_GET(self) -> None:
        self._answer(*self._handled(None))

    def do_DELETE(self) -> None:
        self._answer(*self._handled(None))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(*self._handled(body))

    def _handled(self, body: Body | None) -> tuple[int, bytes | Body]:
        cluster, parts = self.cluster, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        login = self.headers["Authorization"]
        with cluster.lock:
            cluster.asked.append(Asked(self.command, parts.path, query, body, login))
        if login != f"Bearer {TOKEN}" and not cluster.anybody:
            return 401, {"kind": "Status", "message": "Unauthorized"}
        for method, word in cluster.denied:
            if method == self.command and word in parts.path:
                what = f'{parts.path.rpartition("/")[2]} is forbidden: User "me" cannot do that'
                return 403, {"kind": "Status", "message": what}
        words = parts.path.strip("/").split("/")
        match words:
            case ["api"]:
                return 200, {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                groups = [_group(name) for name in _RESOURCES if "/" in name]
                return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case ["api", "v1"] | ["apis", _, "v1"]:
                group = "/".join(words[1:])
                kinds = [_resource(kind) for kind in _RESOURCES[group]]
                return 200, {
                    "kind": "APIResourceList",
                    "apiVersion": "v1",
                    "groupVersion": group,
                    "resources": kinds,
                }
            case ["api", "v1", "nodes"]:
                return self._listed([*cluster.nodes.values()], query)
            case ["apis", "apps", "v1", "namespaces", space, "daemonsets", *name]:
                found = [one for one in cluster.daemons if one["metadata"]["namespace"] == space]
                if not name:
                    return self._listed(found, query)
                named = [one for one in found if one["metadata"]["name"] == name[0]]
                return (200, named[0]) if named else _missing(name[0])
            case ["api", "v1", "namespaces", _, "pods", where, "proxy", "status"]:
                if where not in cluster.proxied:
                    cluster.gate.wait(PATIENCE)
                    return 503, {"kind": "Status", "message": "nobody answers"}
                return cluster.proxied[where]()
            case ["api", "v1", "namespaces", space, "pods"]:
                with cluster.lock:
                    found = [one for one in cluster.pods if one["metadata"]["namespace"] == space]
                return self._listed(found, query)
            case ["api", "v1", "namespaces", _, "events"]:
                assert query["fieldSelector"] == "type=Warning"
                return self._listed([*cluster.events], {**query, "labelSelector": ""})
            case ["apis", "batch", "v1", "namespaces", space, "jobs", *name]:
                return self._jobs(space, name, query, body)
            case _:
                return _missing(parts.path)

    def _jobs(
        self, space: str, name: list[str], query: dict[str, str], body: Body | None
    ) -> tuple[int, Body]:
        cluster = self.cluster
        if body is not None:
            assert body["metadata"]["namespace"] == space
            with cluster.lock:
                cluster.jobs[body["metadata"]["name"]] = body
                cluster.made.append(body)
            threading.Thread(target=cluster.run, args=(body,), daemon=True).start()
            return 201, body
        if self.command == "DELETE":
            assert query == {"propagationPolicy": "Background"}
            with cluster.lock:
                if cluster.jobs.pop(name[0], None) is None:
                    return _missing(name[0])
                cluster.deleted.append(name[0])
            return 200, {"kind": "Status"}
        with cluster.lock:
            if name:
                return (
                    (200, cluster.jobs[name[0]]) if name[0] in cluster.jobs else _missing(name[0])
                )
            return self._listed([*cluster.jobs.values()], query)

    def _listed(self, found: list[Body], query: dict[str, str]) -> tuple[int, Body]:
        """Answer with a page of what the label selector fits."""
        fitting = [one for one in found if _fits(one, query.get("labelSelector", ""))]
        start = int(query.get("continue", "0"))
        end = start + min(self.cluster.page, int(query["limit"]))
        more = {"continue": str(end)} if end < len(fitting) else {}
        return 200, {"kind": "List", "metadata": more, "items": fitting[start:end]}

    def _answer(self, status: int, body: bytes | Body) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for at in range(0, len(data), self.cluster.drip or len(data) or 1):
                self.wfile.write(data[at : at + (self.cluster.drip or len(data))])
                if self.cluster.drip:
                    self.wfile.flush()
                    self.cluster.gate.wait(0.2)
        except OSError:
            self.close_connection = True  # whoever asked waits no more

    def log_message(self, format: str, *args: object) -> None:
        pass


def _group(name: str) -> Body:
    version = {"groupVersion": name, "version": "v1"}
    return {"name": name.partition("/")[0], "versions": [version], "preferredVersion": version}


def _resource(kind: str) -> Body:
    name = f"{kind.lower()}es" if kind.endswith("s") else f"{kind.lower()}s"
    spaced = kind not in ("PersistentVolume", "StorageClass")
    verbs = ["create", "get", "list", "delete"]
    return {"name": name, "singularName": "", "namespaced": spaced, "kind": kind, "verbs": verbs}


_RESOURCES = {
    "v1": ("Pod", "PersistentVolume", "PersistentVolumeClaim"),
    "batch/v1": ("Job",),
    "storage.k8s.io/v1": ("StorageClass",),
}


def _missing(what: str) -> tuple[int, Body]:
    return 404, {"kind": "Status", "message": f'"{what}" not found'}


def _fits(thing: Body, selector: str) -> bool:
    """Whether a label selector fits: ``a=b,c=d`` or ``a in (b, c)``."""
    labels = thing.get("metadata", {}).get("labels", {})
    if " in (" in selector:
        key, _, values = selector.removesuffix(")").partition(" in (")
        return labels.get(key) in values.split(", ")
    pairs = (pair.partition("=") for pair in selector.split(",") if pair)
    return all(labels.get(key) == value for key, _, value in pairs)


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """Yield a cluster; containers leave their last words in ``directory``."""
    cluster = Cluster(directory)
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    cluster.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        cluster.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
