"""The cluster that the driver itself runs in."""

from __future__ import annotations

import logging
import os
import threading

from envstore.csi.cluster import CONNECTIONS, Cluster
from envstore.errors import UnavailableError

_log = logging.getLogger(__name__)


class ClusterHere:
    """Gives the cluster that the driver runs in, connected to when it is first needed.

    Whoever may never need one does not pay for the client, which takes a second to import. Safe
    for many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: Cluster | None = None

    @staticmethod
    def find() -> ClusterHere | None:
        """Return how to reach the cluster, ``None`` where there is none; logs which.

        In a pod it is the pod's; elsewhere the one of the file that ``KUBECONFIG`` names.
        """
        if _is_pod() or os.environ.get("KUBECONFIG"):
            return ClusterHere()
        _log.info("no Kubernetes API here: no events for pods, no labels of namespaces")
        return None

    def __call__(self) -> Cluster:
        """Return the cluster. No request. Raises ``EnvstoreError`` if it is not known how."""
        with self._lock:
            if self._opened is None:
                self._opened = _pods_own() if _is_pod() else Cluster.open()
            return self._opened


def _is_pod() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _pods_own() -> Cluster:
    """Return the cluster as the service account of this pod, whose token is read anew."""
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration

    configuration = Configuration()
    configuration.connection_pool_maxsize = CONNECTIONS
    try:
        config.load_incluster_config(  # type: ignore[no-untyped-call]
            client_configuration=configuration
        )
    except (config.ConfigException, OSError) as error:
        raise UnavailableError(f"this pod has no service account to ask with: {error}") from None
    return Cluster(ApiClient(configuration), "default")
