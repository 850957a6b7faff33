"""Labels of namespaces, asked of the API server and believed for some seconds."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from envstore.csi.cluster import Cluster
from envstore.errors import EnvstoreError, NotFoundError, UnavailableError

_LASTING = 30.0
_MOST = 1000


class Namespaces:
    """The namespaces of a cluster. Safe for many threads."""

    def __init__(self, cluster: Callable[[], Cluster], lasting: float = _LASTING) -> None:
        """Believe an answer for ``lasting`` seconds: so late may a label count that has gone."""
        self._cluster = cluster
        self._lasting = lasting
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Mapping[str, str]]] = OrderedDict()

    def labels(self, namespace: str, within: float) -> Mapping[str, str]:
        """Return a namespace's labels. One request at most, of at most ``within`` seconds.

        Raises ``NotFoundError`` if there is no such namespace, ``UnavailableError`` if the API
        server does not say.
        """
        now = time.monotonic()
        with self._lock:
            known = self._known.get(namespace)
        if known is not None and now - known[0] < self._lasting:
            return known[1]
        labels = _labels(self._ask(namespace, within))
        with self._lock:
            self._known[namespace] = (now, labels)
            self._known.move_to_end(namespace)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return labels

    def _ask(self, namespace: str, within: float) -> Mapping[str, object]:
        what = f"the labels of namespace {namespace} are not known"
        try:
            cluster = self._cluster()
        except EnvstoreError as error:
            # Not even that there is no cluster says that there is no such namespace.
            raise UnavailableError(f"{what}: {error.message}") from None
        try:
            return cluster.get("api", "v1", "namespaces", namespace, within=within)
        except NotFoundError:
            raise
        except EnvstoreError as error:
            raise UnavailableError(f"{what}: {error.message}") from None


def _labels(found: Mapping[str, object]) -> Mapping[str, str]:
    metadata = found.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    if not isinstance(labels, dict):
        return {}
    return {str(key): str(value) for key, value in labels.items()}
