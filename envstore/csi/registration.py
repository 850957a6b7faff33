"""Makes the driver known to the kubelet of this node, without a sidecar that does it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import grpc

from envstore.csi.options import check_path
from envstore.csi.proto import registration_pb2, registration_pb2_grpc
from envstore.csi.refusal import NAME
from envstore.csi.server import Server

_log = logging.getLogger("envstore.csi")

_VERSIONS = ["1.0.0"]
"""What the kubelet must find in the list to take a CSI driver: the protocol's major version."""


class Registration(registration_pb2_grpc.RegistrationServicer):
    """The kubelet's plugin registration, version 1.

    ``endpoint`` is the path of the driver's socket as the kubelet sees it. ``refused`` is called
    when the kubelet does not take the driver.
    """

    def __init__(self, endpoint: str, refused: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._refused = refused

    def GetInfo(  # noqa: N802
        self, request: registration_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> registration_pb2.PluginInfo:
        """Return what the kubelet asks when it finds the socket."""
        return registration_pb2.PluginInfo(
            type="CSIPlugin", name=NAME, endpoint=self._endpoint, supported_versions=_VERSIONS
        )

    def NotifyRegistrationStatus(  # noqa: N802
        self, request: registration_pb2.RegistrationStatus, context: grpc.ServicerContext
    ) -> registration_pb2.RegistrationStatusResponse:
        """Hear whether the kubelet has taken the driver."""
        if request.plugin_registered:
            _log.info("registered with the kubelet: it calls at %s", self._endpoint)
        else:
            _log.error("the kubelet refuses this driver: %r", request.error)
            self._refused()
        return registration_pb2.RegistrationStatusResponse()


def serve_registration(directory: str, endpoint: str, refused: Callable[[], None]) -> Server:
    """Return the server that the kubelet finds in ``directory`` (its ``plugins_registry``).

    It asks again whenever it starts or sees the socket anew. Raises as ``Server`` does.
    """
    service = Registration(endpoint, refused)
    return Server(
        check_path(os.path.join(directory, f"{NAME}-reg.sock")),
        [lambda server: registration_pb2_grpc.add_RegistrationServicer_to_server(service, server)],
        workers=2,
    )
