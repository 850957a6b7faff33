"""The API server of a cluster, asked as the kubeconfig says, in plain JSON.

Only the connection and who we are come from the ``kubernetes`` client: its model of every object
refuses what a newer or older cluster says, and changes from version to version.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from urllib3.response import BaseHTTPResponse

CONNECTIONS = 16
"""How many threads may ask at the same time without waiting for each other."""

_WITHIN, _CONNECT_WITHIN = 30.0, 10.0
_LONGEST = 32 << 20
_PAGE = 500
_LONGEST_SHOWN = 300

_KINDS: Mapping[int, type[EnvstoreError]] = {
    400: UsageError,
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UsageError,
}


class Cluster:
    """An API server. Safe for ``CONNECTIONS`` threads.

    Every method raises ``UnavailableError`` if it does not answer in time, ``AccessDeniedError``,
    ``NotFoundError``, ``ConflictError`` or ``UsageError`` as it says.
    """

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        """The one that a context names for whoever names none."""

    @classmethod
    def open(cls, context: str | None = None) -> Cluster:
        """Return the cluster of a context of the kubeconfig, or of the current one.

        The file is the one that ``KUBECONFIG`` names, else ``~/.kube/config``. It is never
        written to. No request. Raises ``NotFoundError``, ``UsageError``.
        """
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
        from yaml import YAMLError

        # The client looks at KUBECONFIG only when it is imported.
        files = os.environ.get("KUBECONFIG") or "~/.kube/config"
        configuration = Configuration()
        configuration.connection_pool_maxsize = CONNECTIONS
        try:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                files, context, client_configuration=configuration, persist_config=False
            )
            contexts, current = config.list_kube_config_contexts(files)  # type: ignore[no-untyped-call]
        except config.ConfigException as error:
            what = f"the cluster is not known: {_line(error)}"
            hint = "name a kubeconfig in KUBECONFIG, and a context in it with --context"
            raise NotFoundError(what, hint=hint) from None
        except (YAMLError, OSError, TypeError, AttributeError) as error:
            raise UsageError(f"the kubeconfig cannot be read: {_line(error)}") from None
        chosen = next((one for one in contexts if one["name"] == context), current)
        return cls(ApiClient(configuration), chosen["context"].get("namespace") or "default")

    def get(self, *path: str, within: float = _WITHIN, **query: str) -> dict[str, Any]:
        """Return what is at ``path``, whose parts are quoted, within so many seconds."""
        return self._ask("GET", path, query, within=within)

    def items(self, *path: str, **query: str) -> list[dict[str, Any]]:
        """Return all objects of a list."""
        found: list[dict[str, Any]] = []
        more = {"limit": str(_PAGE)}
        while True:
            page = self._ask("GET", path, {**query, **more})
            found += page.get("items") or ()
            following = page.get("metadata", {}).get("continue")
            if not following:
                return found
            more["continue"] = following

    def create(self, *path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object and return it."""
        return self._ask("POST", path, {}, body)

    def delete(self, *path: str) -> None:
        """Remove an object, and in the background what it owns; fine if it has gone."""
        try:
            self._ask("DELETE", path, {"propagationPolicy": "Background"})
        except NotFoundError:
            return

    def _ask(
        self,
        method: str,
        path: tuple[str, ...],
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        within: float = _WITHIN,
    ) -> dict[str, Any]:
        import urllib3

        configuration = self._client.configuration
        url = "/".join((configuration.host, *(quote(part, safe=":") for part in path)))
        headers = {"Accept": "application/json", "User-Agent": "envstore"}
        for one in configuration.auth_settings().values():
            headers[str(one["key"])] = str(one["value"])
        if body is not None:
            headers["Content-Type"] = "application/json"
        end = time.monotonic() + within
        try:
            answer = self._client.rest_client.pool_manager.request(
                method,
                url + (f"?{urlencode(query)}" if query else ""),
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=min(within, _CONNECT_WITHIN), total=within),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            with answer:
                data = _read(answer, end)
        except urllib3.exceptions.HTTPError as error:
            reason = str(getattr(error, "reason", None) or error).rpartition("): ")[2]
            raise UnavailableError(
                f"the cluster at {configuration.host} does not answer: {_line(reason)}"
            ) from None
        return _parsed(answer.status, data)


def _read(answer: BaseHTTPResponse, end: float) -> bytes:
    """Return the body, of which all must come until ``end``: some send a byte now and then.

    The connection is not used again if there is more of it than is ever sensible.
    """
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > _LONGEST:
            raise UnavailableError(f"the cluster's answer is longer than {_LONGEST >> 20} MiB")
        if time.monotonic() > end:
            raise UnavailableError("the cluster's answer takes too long")
    return bytes(data)


def _parsed(status: int, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if 200 <= status < 300:
        if not isinstance(found, dict):
            raise UnavailableError("the cluster's answer is no JSON object")
        return found
    said = found.get("message") if isinstance(found, dict) else None
    what = f"the cluster says: {_line(said)}"
    if not said:
        what = f"the cluster says: HTTP {status} {_line(data.decode(errors='replace'))}".rstrip()
    if status == 403:
        raise AccessDeniedError(what, hint="see --help for the rights that it takes")
    raise _KINDS.get(status, UnavailableError)(what)


def _line(what: object) -> str:
    """Return a message in one line that is not too long."""
    text = " ".join(str(what).split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
