"""Whether a driver answers at its socket, asked the way its callers do."""

from __future__ import annotations

import grpc

from envstore.csi.proto import csi_pb2, csi_pb2_grpc

_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def driver_answers(path: str, within: float = 3.0) -> bool:
    """Return whether a CSI driver answers at the socket ``path`` within so many seconds.

    Whatever it answers: what it needs itself may be away.
    """
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=within)
        except grpc.RpcError as error:
            return error.code() not in _SILENT
        return True
