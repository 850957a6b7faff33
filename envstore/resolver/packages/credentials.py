"""Who asks for a package: logins by URL, from where pip, uv and conda tools keep them.

Sources, the first that knows a host wins: user names and passwords in the index URLs of the
environment variables of uv and pip, ``UV_INDEX_<NAME>_USERNAME`` and ``_PASSWORD``, the file that
``RATTLER_AUTH_FILE`` names, ``~/.rattler/credentials.json``, and the ``.netrc`` file. What a lock
holds is never a source. A login is found by the host that is asked, so it cannot follow a
redirect to another one.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from envstore.errors import UsageError

_URL_VARIABLES = (
    "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS",
)  # fmt: skip
_NAMED = re.compile(r"([A-Za-z0-9._-]+)=(.+)", re.DOTALL)
_TOKEN_IN_PATH = re.compile(r"^/t/[^/]+(?=/|$)")
_ANY_TOKEN = re.compile(r"/t/[^/]+(?=/|$)")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Login:
    """What to send to a host: an ``Authorization`` header, or a token that goes into the path.

    ``source`` says where it was found and may be shown.
    """

    source: str
    authorization: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        # Anything else would end the header or the path early.
        if not (self.authorization + self.token).isprintable() or " " in self.token:
            raise UsageError(f"{self.source} holds a login with characters that none can have")

    def address(self, url: str) -> str:
        """Return ``url`` as it is to be asked for."""
        split = urlsplit(url)
        if not self.token or _TOKEN_IN_PATH.match(split.path):
            return url
        return urlunsplit(split._replace(path=f"/t/{quote(self.token)}{split.path}"))


class Credentials:
    """The logins of this user. Reads files when it is made, and never again."""

    def __init__(self, indexes: Mapping[str, str] | None = None, urls: Iterable[str] = ()) -> None:
        """Collect logins; ``indexes`` are URLs by the name that ``UV_INDEX_<NAME>_...`` uses.

        ``urls`` are further URLs from the user's configuration that may hold a login. Raises
        ``UsageError`` for a file of credentials that is named or there but cannot be read.
        """
        self.looked_in: list[str] = []
        self._origins: dict[tuple[str, str, int], Login] = {}
        self._hosts: dict[str, Login] = {}
        self._default: Login | None = None
        named = dict(indexes or {})
        for url in urls:
            self._add_url(url, "the URL given")
        for variable in _URL_VARIABLES:
            for text in os.environ.get(variable, "").split():
                match = _NAMED.fullmatch(text) if "://" in text else None
                url = match[2] if match and "://" not in match[1] else text
                if match:
                    named.setdefault(match[1], url)
                self._add_url(url, variable)
        for name, url in named.items():
            self._add_named(name, url)
        self._add_rattler()
        self._add_netrc()

    def find(self, url: str) -> Login | None:
        """Return the login for ``url``, ``None`` if there is none."""
        origin = origin_of(url)
        if origin in self._origins:
            return self._origins[origin]
        host = origin[1]
        if host in self._hosts:
            return self._hosts[host]
        parts = host.split(".")
        for at in range(len(parts)):
            login = self._hosts.get("*." + ".".join(parts[at:]))
            if login is not None:
                return login
        return self._default

    def _add_url(self, url: str, source: str) -> None:
        try:
            split = urlsplit(url)
            user, password = split.username, split.password
            if user is None and password is None:
                return
            origin = origin_of(url)
        except ValueError:
            return  # whoever uses the URL says that it is none
        login = Login(source, _basic(unquote(user or ""), unquote(password or "")))
        self._origins.setdefault(origin, login)

    def _add_named(self, name: str, url: str) -> None:
        variable = "UV_INDEX_" + re.sub(r"[^A-Z0-9]", "_", name.upper())
        user = os.environ.get(f"{variable}_USERNAME")
        password = os.environ.get(f"{variable}_PASSWORD")
        if user is not None or password is not None:
            login = Login(f"{variable}_USERNAME", _basic(user or "", password or ""))
            try:
                self._origins.setdefault(origin_of(url), login)
            except ValueError:
                return  # whoever uses the URL says that it is none

    def _add_rattler(self) -> None:
        chosen = os.environ.get("RATTLER_AUTH_FILE")
        if chosen:
            self._add_rattler_file(Path(chosen), "RATTLER_AUTH_FILE")
        usual = Path(os.path.expanduser("~")) / ".rattler" / "credentials.json"
        self.looked_in.append("~/.rattler/credentials.json")
        if usual.is_file():
            self._add_rattler_file(usual, "~/.rattler/credentials.json")

    def _add_rattler_file(self, path: Path, source: str) -> None:
        if source not in self.looked_in:
            self.looked_in.append(source)
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{source} ({path}) cannot be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise UsageError(f"{source} ({path}) is not JSON: {where}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{source} ({path}) is not JSON: it is not UTF-8") from None
        if not isinstance(value, dict):
            raise UsageError(f"{source} ({path}) is not a JSON object of hosts")
        for host, entry in value.items():
            login = _rattler_login(entry, source)
            if login is not None:
                self._hosts.setdefault(host.lower(), login)

    def _add_netrc(self) -> None:
        chosen = os.environ.get("NETRC")
        home = Path(os.path.expanduser("~"))
        for path in [Path(chosen)] if chosen else [home / ".netrc", home / "_netrc"]:
            source = "NETRC" if chosen else f"~/{path.name}"
            if not chosen and not path.is_file():
                continue
            self.looked_in.append(source)
            try:
                found = netrc.netrc(str(path))
            except netrc.NetrcParseError as error:
                # Its own message may repeat what it stumbled over, which may be a password.
                where = f"line {error.lineno}"
                raise UsageError(f"{source} ({path}) is malformed: {where}") from None
            except UnicodeDecodeError:
                raise UsageError(f"{source} ({path}) is malformed: it is not UTF-8") from None
            except OSError as error:
                raise UsageError(f"{source} ({path}) cannot be read: {error.strerror}") from error
            for host, (user, account, password) in found.hosts.items():
                login = Login(source, _basic(user or account or "", password or ""))
                if host == "default":
                    self._default = login
                else:
                    self._hosts.setdefault(host.lower(), login)
            return


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of ``url``. Raises ``ValueError`` for a malformed one."""
    split = urlsplit(url)
    return split.scheme.lower(), (split.hostname or "").lower(), _port(split)


def without_login(url: str) -> str:
    """Return ``url`` without the user name and password that may stand in it."""
    split = urlsplit(url)
    return urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2]))


def shown(url: str) -> str:
    """Return ``url`` as messages may show it: no login, no token, no query (it may be signed)."""
    try:
        split = urlsplit(url)
    except ValueError:
        return "a malformed URL"
    path = _ANY_TOKEN.sub("/t/***", split.path)
    return urlunsplit((split.scheme, split.netloc.rpartition("@")[2], path, "", ""))


def _port(split: SplitResult) -> int:
    return split.port or _DEFAULT_PORTS.get(split.scheme.lower(), 0)


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _rattler_login(entry: Any, source: str) -> Login | None:
    """Return one entry of rattler's file as a login; ``None`` for a kind that is not HTTP's."""
    if not isinstance(entry, dict):
        return None
    login = Login(source)
    bearer, token = entry.get("BearerToken"), entry.get("CondaToken")
    basic = entry.get("BasicHTTP", entry.get("BasicHttp"))
    if isinstance(bearer, str):
        return replace(login, authorization=f"Bearer {bearer}")
    if isinstance(token, str):
        return replace(login, token=token)
    if isinstance(basic, dict):
        user, password = basic.get("username"), basic.get("password")
        if isinstance(user, str) and isinstance(password, str):
            return replace(login, authorization=_basic(user, password))
    return None
