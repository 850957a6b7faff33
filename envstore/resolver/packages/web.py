"""Asks web servers for archives, over connections that stay open in between.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` are honoured, and so are
``SSL_CERT_FILE``, ``SSL_CERT_DIR`` and ``REQUESTS_CA_BUNDLE``.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import socket
import ssl
import threading
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote, urljoin, urlsplit

from envstore import __version__
from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.packages.bodies import Body, Failed, Nothing, malformed
from envstore.resolver.packages.credentials import (
    Credentials,
    Login,
    origin_of,
    shown,
    without_login,
)

_MOST_HOPS = 10
_MOST_PATIENCE = 30.0  # seconds that a server may ask to wait
_WORTH_DRAINING = 64 << 10
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 522, 524})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_URL_SAFE = "/%:@!$&'()*+,;=~-._"


@dataclass(slots=True)
class Surroundings:
    """What all transports of one fetch share. ``timeout`` is in seconds, of silence.

    ``stopped`` ends everything.
    """

    credentials: Credentials
    timeout: float
    stopped: threading.Event


class Web:
    """The web as one thread sees it; ``interrupt`` is for any thread."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._shared = surroundings
        self._connections: dict[tuple[str, str, int], _Plain | _Secure] = {}
        self._proxies = urllib.request.getproxies_environment()

    def interrupt(self) -> None:
        """Make a read that waits in another thread fail at once."""
        for connection in list(self._connections.values()):
            if connection.opened is not None:
                with contextlib.suppress(OSError, ValueError):
                    # Not SSLSocket's own, which would say goodbye first.
                    socket.socket.shutdown(connection.opened, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def open(self, url: str, start: int = 0, version: str = "") -> Body:
        """Open ``url`` at ``start`` if the server can, else at 0.

        With ``version``, only if it is still that, else all of it. Raises ``Failed``.
        """
        url = without_login(url).partition("#")[0]
        for _ in range(_MOST_HOPS):
            login = self._shared.credentials.find(url)
            headers = {
                "User-Agent": f"envstore/{__version__}",
                "Accept": "*/*",
                "Accept-Encoding": "identity",
            }
            if login is not None and login.authorization:
                headers["Authorization"] = login.authorization
            if start:
                headers["Range"] = f"bytes={start}-"
                if version:
                    headers["If-Range"] = version
            address = login.address(url) if login is not None else url
            connection, answer = self._ask(address, headers)
            if answer.status not in _REDIRECTS:
                return self._answered(url, connection, answer, login, start)
            location = answer.getheader("Location")
            _drain(connection, answer)
            url = self._next(url, location)
        raise Failed(
            UnavailableError(f"{shown(url)} is redirected more than {_MOST_HOPS} times"),
            passing=False,
        )

    def _next(self, url: str, location: str | None) -> str:
        try:
            following = without_login(urljoin(url, location or "")).partition("#")[0]
            old, new = origin_of(url), origin_of(following)
        except ValueError:
            raise malformed(url) from None
        if not location or new[0] not in ("http", "https") or not new[1]:
            raise Failed(UnavailableError(f"{shown(url)} is redirected nowhere"), passing=False)
        if old[0] == "https" and new[0] == "http":
            raise Failed(
                UnavailableError(
                    f"{shown(url)} is redirected from https to http, to {shown(following)}",
                    hint="name the address that is meant, or a mirror with ENVSTORE_MIRRORS",
                ),
                passing=False,
            )
        return following

    def _ask(
        self, address: str, headers: dict[str, str]
    ) -> tuple[_Plain | _Secure, http.client.HTTPResponse]:
        origin = origin_of(address)
        split = urlsplit(address)
        target = quote(split.path or "/", safe=_URL_SAFE)
        if split.query:
            target += "?" + quote(split.query, safe=_URL_SAFE + "?")
        connection = self._connections.get(origin)
        reused = connection is not None and connection.sock is not None
        if connection is None:
            connection = self._connections[origin] = self._connect(origin)
        if connection.through_proxy:
            target = f"http://{split.netloc.rpartition('@')[2]}{target}"
            headers = headers | connection.proxy_headers
        try:
            try:
                return connection, _exchange(connection, target, headers)
            except (http.client.RemoteDisconnected, ConnectionError):
                if not reused:
                    raise
                # A server may close a connection that waited too long for its next request.
                connection.close()
                return connection, _exchange(connection, target, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise self.unreachable(address, error) from error

    def _connect(self, origin: tuple[str, str, int]) -> _Plain | _Secure:
        scheme, host, port = origin
        proxy = self._proxy(scheme, host, port)
        timeout = self._shared.timeout
        at = (proxy[0], proxy[1]) if proxy else (host, port)
        if scheme == "http":
            plain = _Plain(*at, timeout=timeout)
            if proxy:
                plain.through_proxy, plain.proxy_headers = True, proxy[2]
            return plain
        secure = _Secure(*at, timeout=timeout, context=self._context)
        if proxy:
            secure.set_tunnel(host, port, headers=proxy[2])
        return secure

    def _proxy(self, scheme: str, host: str, port: int) -> tuple[str, int, dict[str, str]] | None:
        """Return host, port and headers of the proxy for a server, ``None`` to ask it directly."""
        url = self._proxies.get(scheme) or self._proxies.get("all")
        if not url or urllib.request.proxy_bypass(f"{host}:{port}", self._proxies):
            return None
        try:
            split = urlsplit(url if "://" in url else f"http://{url}")
            proxy, at = split.hostname, split.port or 80
        except ValueError:
            split, proxy, at = urlsplit(""), None, 0
        if split.scheme != "http" or not proxy:
            raise Failed(
                UsageError(
                    f"the proxy of {scheme} is not of a kind that is known here",
                    hint=f"set {scheme.upper()}_PROXY to http://host:port, or NO_PROXY",
                ),
                passing=False,
            )
        headers = {}
        if split.username is not None:
            login = f"{unquote(split.username)}:{unquote(split.password or '')}".encode()
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login).decode()
        return proxy, at, headers

    @cached_property
    def _context(self) -> ssl.SSLContext:
        bundle = os.environ.get("REQUESTS_CA_BUNDLE")
        if not bundle or os.environ.get("SSL_CERT_FILE"):
            return ssl.create_default_context()
        try:
            if os.path.isdir(bundle):
                return ssl.create_default_context(capath=bundle)
            return ssl.create_default_context(cafile=bundle)
        except OSError as error:
            raise Failed(
                UsageError("REQUESTS_CA_BUNDLE does not name a file of certificates"),
                passing=False,
            ) from error

    def unreachable(self, url: str, error: Exception) -> Failed:
        """Return what a broken connection to the server of ``url`` means."""
        host = urlsplit(shown(url)).netloc
        if self._shared.stopped.is_set():
            return Failed(UnavailableError(f"{host}: interrupted"), passing=False)
        if isinstance(error, ssl.SSLCertVerificationError):
            return Failed(
                UnavailableError(
                    f"no trusted TLS connection to {host}: {error.verify_message}",
                    hint="SSL_CERT_FILE names a file of other authorities",
                ),
                passing=False,
            )
        return Failed(
            UnavailableError(
                f"cannot reach {host}: {_reason(error)}",
                hint="check the network and the proxy settings, "
                "or name a mirror with ENVSTORE_MIRRORS",
            ),
            passing=not isinstance(error, socket.gaierror) or error.errno == socket.EAI_AGAIN,
            unreachable=True,
        )

    def _answered(
        self,
        url: str,
        connection: _Plain | _Secure,
        answer: http.client.HTTPResponse,
        login: Login | None,
        start: int,
    ) -> Body:
        status = answer.status
        if status in (200, 206):
            body = _HttpBody(self, url, connection, answer)
            if status == 206 and not body.starts_at(start):
                body.close()
                raise Failed(
                    CorruptError(f"{shown(url)}: the server answered another range than asked"),
                    passing=False,
                )
            return body
        wait = _patience(answer.getheader("Retry-After"))
        _drain(connection, answer)
        if status == 416:
            return Nothing()
        if status in (401, 403, 407):
            raise Failed(self._refused(url, status, login), passing=False)
        if status in (404, 410):
            raise Failed(
                NotFoundError(
                    f"{shown(url)} is not there (HTTP {status})",
                    hint="if it was there before, it was removed: lock again, "
                    "or name a mirror with ENVSTORE_MIRRORS",
                ),
                passing=False,
            )
        raise Failed(
            UnavailableError(f"{shown(url)}: the server answered HTTP {status}", hint="try later"),
            passing=status in _PASSING,
            wait=wait,
        )

    def _refused(self, url: str, status: int, login: Login | None) -> AccessDeniedError:
        if status == 407:
            return AccessDeniedError(
                "the proxy wants a login (HTTP 407)", hint="put it into HTTPS_PROXY"
            )
        if login is not None:
            return AccessDeniedError(
                f"{shown(url)}: access denied (HTTP {status}) with the login of {login.source}",
                hint=f"correct it in {login.source}",
            )
        places = ", ".join(self._shared.credentials.looked_in)
        return AccessDeniedError(
            f"{shown(url)}: access denied (HTTP {status}), and no login for its host is known",
            hint=f"looked in index URLs, UV_INDEX_<NAME>_USERNAME, {places}",
        )


class _Plain(http.client.HTTPConnection):
    """A connection that remembers its socket, which an answer may take over."""

    opened: socket.socket | None = None
    through_proxy = False
    proxy_headers: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed

    def connect(self) -> None:
        """Connect as the base class does."""
        super().connect()
        self.opened = self.sock


class _Secure(http.client.HTTPSConnection):
    """The same over TLS."""

    opened: socket.socket | None = None
    through_proxy = False
    proxy_headers: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed

    def connect(self) -> None:
        """Connect as the base class does."""
        super().connect()
        self.opened = self.sock


class _HttpBody:
    """The body of an HTTP answer."""

    def __init__(
        self,
        web: Web,
        url: str,
        connection: _Plain | _Secure,
        answer: http.client.HTTPResponse,
    ) -> None:
        self._web, self._url = web, url
        self._connection, self._answer = connection, answer
        self.start = 0
        length = answer.length if answer.getheader("Content-Encoding") is None else None
        self.total = length if answer.status == 200 else None
        tag = answer.getheader("ETag") or ""
        self.version = tag if tag.startswith('"') else ""

    def starts_at(self, start: int) -> bool:
        """Take over what a partial answer says of itself; ``False`` if it is not from there."""
        match = _RANGE.match(self._answer.getheader("Content-Range") or "")
        if match is None or int(match[1]) != start:
            return False
        self.start = start
        self.total = None if match[2] == "*" else int(match[2])
        return True

    def read(self, size: int) -> bytes:
        """See ``Body.read``."""
        try:
            return self._answer.read(size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise self._web.unreachable(self._url, error) from error

    def close(self) -> None:
        """See ``Body.close``."""
        if not self._answer.isclosed():
            # What is left of the answer would be taken for the next one.
            self._connection.close()
        self._answer.close()


def _exchange(
    connection: _Plain | _Secure, target: str, headers: dict[str, str]
) -> http.client.HTTPResponse:
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _drain(connection: _Plain | _Secure, answer: http.client.HTTPResponse) -> None:
    """Make the connection ready for another request, if that is cheap, else close it."""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        if answer.length is not None and answer.length <= _WORTH_DRAINING:
            answer.read()
    if not answer.isclosed():
        connection.close()
    answer.close()


def _patience(text: str | None) -> float:
    """Return the seconds that ``Retry-After`` asks for; a date is not worth parsing."""
    return min(float(text), _MOST_PATIENCE) if text and text.isdecimal() else 0


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, http.client.HTTPException):
        return "the answer is not HTTP, or broke off"
    return type(error).__name__
