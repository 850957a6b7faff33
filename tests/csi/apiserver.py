"""A real HTTP server on loopback in the place of a cluster's API server.

It knows namespaces and takes events, and fails as it is told to: ``status`` answers whatever is
asked with an error, ``gate`` lets answers wait.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

PATIENCE = 60.0


@dataclass
class ApiServer:
    """What it knows, what it was told and asked, as ``(method, path)`` and ``Authorization``."""

    port: int = 0
    scheme: str = "http"
    namespaces: dict[str, dict[str, str]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)
    status: int = 0
    answer: bytes | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Be well again, and know nothing."""
        for known in (self.namespaces, self.events, self.asked, self.logins):
            known.clear()
        self.status, self.answer = 0, None
        self.gate.set()

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds after a request."""
        with self.changed:
            assert self.changed.wait_for(holds, PATIENCE), (self.asked, self.events)

    def kubeconfig(self, path: Path, *, token: str = "a-token") -> Path:
        """Write a file that names this server, and return its path."""
        name = "here"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": name, "cluster": {"server": self.url}}],
                    "users": [{"name": name, "user": {"token": token}}],
                    "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
                    "current-context": name,
                }
            )
        )
        return path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece: the rest of it would wait for an acknowledgement
    disable_nagle_algorithm = True
    api: ApiServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/v1/namespaces/")
        labels = self.api.namespaces.get(name)
        if labels is None:
            self._answer(404, {"kind": "Status", "message": f'namespaces "{name}" not found'})
        else:
            self._answer(200, {"kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith(f"/{body['metadata']['namespace']}/events"):
            self._answer(400, {"kind": "Status", "message": "an event belongs elsewhere"})
            return
        self._answer(201, body, body)

    def _answer(
        self, status: int, body: Mapping[str, Any], event: dict[str, Any] | None = None
    ) -> None:
        api = self.api
        status = api.status or status
        with api.changed:
            api.asked.append((self.command, self.path))
            api.logins.append(self.headers["Authorization"])
            if event is not None and status < 300:
                api.events.append(event)
            api.changed.notify_all()
        assert api.gate.wait(PATIENCE)
        said = {"kind": "Status", "message": "it was told to fail"} if api.status else body
        data = api.answer if api.answer is not None else json.dumps(said).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # whoever asked waits no more

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_api_server(certificate: Path | None = None) -> Iterator[ApiServer]:
    """Yield a server; it speaks TLS with a ``certificate``, a PEM file with the key in it."""
    api = ApiServer(scheme="https" if certificate else "http")
    api.gate.set()
    handler = type("Handler", (_Handler,), {"api": api})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    api.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that no request tells of."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
