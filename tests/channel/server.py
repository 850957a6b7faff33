"""A directory over HTTP on loopback, with credentials, counts and faults as a test wants them."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_TYPES = {
    ".html": "text/html",
    ".json": "application/json",
    ".whl": "application/zip",
    ".metadata": "text/plain",
}
_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was answered. ``sent`` counts the bytes of the body."""

    method: str
    path: str
    status: int
    sent: int
    headers: dict[str, str]


@dataclass(slots=True)
class Faults:
    """What goes wrong, by path (``/noarch/x.conda``); each is used up by the requests it meets.

    ``statuses`` are answered before anything else, ``cuts`` are bodies that end after so many
    bytes with the connection. ``waiting`` holds every answer back until it is set again.
    """

    statuses: dict[str, list[int]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    waiting: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.waiting.set()


class Server:
    """Serves ``directory`` to those with ``user`` and ``password``, or ``token``, if any is set.

    Knows ranges, entity tags and, of a package index, the JSON form next to the HTML one.
    """

    def __init__(
        self, directory: Path, *, user: str = "", password: str = "", token: str = ""
    ) -> None:
        self.directory = directory
        self.requests: list[Request] = []
        self.faults = Faults()
        self.expected = f"Bearer {token}" if token else ""
        if user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.expected = f"Basic {pair}"
        self._http = _Threads(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_as(self, user: str, password: str) -> str:
        """Return the URL with credentials in it."""
        return f"http://{user}:{password}@127.0.0.1:{self.port}"

    @property
    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def paths(self, ending: str = "") -> list[str]:
        """Return the paths that were asked for and given, in order."""
        return [
            request.path
            for request in self.requests
            if request.path.endswith(ending) and request.status < 300
        ]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.faults.waiting.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serving(
    directory: Path, *, user: str = "", password: str = "", token: str = ""
) -> Iterator[Server]:
    """Serve ``directory`` meanwhile."""
    server = Server(directory, user=user, password=password, token=token)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Threads(ThreadingHTTPServer):
    # Joined when the server closes, so that no test ends with sockets of it open.
    daemon_threads = False
    owner: Server

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients hang up, above all those that are tested for it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Threads
    # A connection that is kept alive must not keep the server from closing.
    timeout = 1

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what was asked is in ``Server.requests``."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        owner = self.server.owner
        path = unquote(urlsplit(self.path).path)
        owner.faults.waiting.wait(60)
        statuses = owner.faults.statuses.get(path)
        if statuses:
            return self._refuse(path, statuses.pop(0))
        if owner.expected and self.headers.get("Authorization") != owner.expected:
            return self._refuse(path, 401)
        file = self._file(path)
        if file is None:
            return self._refuse(path, 404)
        data = file.stat().st_size
        first, last, status = 0, data - 1, 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and (wanted[1] or wanted[2]):
            if wanted[1]:
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            else:
                first = max(0, data - int(wanted[2]))
            if first > last:
                return self._refuse(path, 416)
            status = 206
        length = last - first + 1
        cuts = owner.faults.cuts.get(path)
        sent = min(cuts.pop(0), length) if cuts and body else length
        self.send_response(status)
        self.send_header("Content-Type", self._type(file))
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(str(file.stat()).encode()).hexdigest()[:16]}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{data}")
        self.end_headers()
        self._note(path, status, sent if body else 0)
        if not body:
            return None
        with open(file, "rb") as content:
            content.seek(first)
            if sent == length and length == data:
                shutil.copyfileobj(content, self.wfile)
            else:
                self.wfile.write(content.read(sent))
        self.close_connection = self.close_connection or sent < length
        return None

    def _file(self, path: str) -> Path | None:
        if path.endswith(".whl.metadata"):  # PEP 658; kept apart from what find-links sees
            path = f"metadata/{Path(path).name}"
        file = (self.server.owner.directory / path.lstrip("/")).resolve()
        if not file.is_relative_to(self.server.owner.directory.resolve()):
            return None
        if file.is_dir():
            as_json = _SIMPLE_JSON in self.headers.get("Accept", "")
            file /= "index.json" if as_json else "index.html"
        return file if file.is_file() else None

    def _type(self, file: Path) -> str:
        if file.name == "index.json":
            return _SIMPLE_JSON
        return _TYPES.get(file.suffix, "application/octet-stream")

    def _refuse(self, path: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="tests"')
        self.end_headers()
        self._note(path, status, 0)

    def _note(self, path: str, status: int, sent: int) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.owner.requests.append(Request(self.command or "", path, status, sent, headers))
