"""Who this driver is, what it offers and whether it works (CSI specification, Identity)."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from envstore import __version__
from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.csi.refusal import NAME


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """Answers at once, whatever the rest of the driver does.

    ``controller`` tells whether the Controller service is offered too. ``ready`` tells whether
    calls of the other services can be served: that must not depend on the store, as a liveness
    probe restarts what is not ready.
    """

    def __init__(self, ready: Callable[[], bool], *, controller: bool) -> None:
        self._ready = ready
        self._controller = controller

    def GetPluginInfo(  # noqa: N802
        self, request: csi_pb2.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        """Return the driver's name and envstore's version."""
        return csi_pb2.GetPluginInfoResponse(name=NAME, vendor_version=__version__)

    def GetPluginCapabilities(  # noqa: N802
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        """Return whether there is a Controller service."""
        response = csi_pb2.GetPluginCapabilitiesResponse()
        if self._controller:
            service = csi_pb2.PluginCapability.Service
            response.capabilities.add().service.type = service.CONTROLLER_SERVICE
        return response

    def Probe(  # noqa: N802
        self, request: csi_pb2.ProbeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ProbeResponse:
        """Return whether the driver is ready."""
        return csi_pb2.ProbeResponse(ready=BoolValue(value=self._ready()))
