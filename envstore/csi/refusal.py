"""What a caller of the driver is told: a gRPC status code and one clear line."""

from __future__ import annotations

import grpc

from envstore import errors

NAME = "csi.envstore.dev"
"""The driver's name (CSI specification, GetPluginInfo)."""

_CODES: tuple[tuple[type[errors.EnvstoreError], grpc.StatusCode], ...] = (
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AccessDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.NoSpaceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.CorruptError, grpc.StatusCode.DATA_LOSS),
    (errors.UnsupportedFormatError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ConflictError, grpc.StatusCode.ABORTED),
)


class RefusedError(Exception):
    """A call ends with ``code`` and ``message``: nothing was done, nothing is left behind."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @classmethod
    def of(cls, error: errors.EnvstoreError) -> RefusedError:
        """Return what an error means in the words of the CSI specification's error scheme."""
        for kind, code in _CODES:
            if isinstance(error, kind):
                return cls(code, str(error))
        return cls(grpc.StatusCode.INTERNAL, str(error))


def invalid(message: str) -> RefusedError:
    """Return the refusal of a malformed request."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
