"""What a volume's ref stands for, told in words that name no URL: a tenant need not know it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from urllib.parse import urlsplit

import grpc

from envstore.csi.config import NamedStore
from envstore.csi.refusal import RefusedError
from envstore.csi.request import VolumeRequest
from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError
from envstore.store.objects import FileLocation, parse_url
from envstore.store.objects.credentials import Credentials, KeyRing
from envstore.store.repository import Repository

_LARGEST = (1 << 63) - 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot: its digest in hex, and the bytes of all its files (at most 2**63 - 1)."""

    digest: str
    size: int


def look_up(store: NamedStore, credentials: Credentials | None, request: VolumeRequest) -> Found:
    """Return the snapshot that ``request`` asks for, by its digest or else by its ref.

    Two or three requests to the store, opened with ``credentials`` or those of this process.
    Raises ``RefusedError``: ``NOT_FOUND``, ``UNAUTHENTICATED`` (the store refuses the
    credentials), ``UNAVAILABLE``, ``DATA_LOSS``, ``FAILED_PRECONDITION``.
    """
    keys = None if credentials is None else KeyRing(credentials)
    wanted = f"@{request.digest}" if request.digest else request.ref
    try:
        with Repository.open(store.url, keys=keys) as repository:
            snapshot = repository.resolve(wanted)
            size = repository.snapshot(snapshot).logical_bytes
    except EnvstoreError as error:
        _log.warning("store %s: %s", store.name, error)
        raise _refused(store, request, error) from None
    return Found(snapshot.hex(), min(size, _LARGEST))


def told(store: NamedStore, request: VolumeRequest, error: EnvstoreError) -> RefusedError:
    """Return what a tenant is told of an error: the same, unless it names where the store is."""
    refused = RefusedError.of(error)
    if not any(word in refused.message for word in _place(store.url)):
        return refused
    _log.warning("store %s: %s", store.name, error)
    return RefusedError(refused.code, _refused(store, request, error).message)


def _place(url: str) -> list[str]:
    """Return the words that tell where a store is."""
    location = parse_url(url)
    if isinstance(location, FileLocation):
        return [str(location.path)]
    host = urlsplit(location.endpoint).netloc if location.endpoint else ""
    return [word for word in (f"s3://{location.bucket}", host) if word]


def _refused(store: NamedStore, request: VolumeRequest, error: EnvstoreError) -> RefusedError:
    shown = f"{request.ref}@{request.digest}" if request.digest else request.ref
    if isinstance(error, NotFoundError):
        return RefusedError(grpc.StatusCode.NOT_FOUND, f"there is no {shown} in store {store.name}")
    if isinstance(error, AccessDeniedError):
        whose = "the volume's" if store.credentials == "volume" else "the driver's"
        return RefusedError(
            grpc.StatusCode.UNAUTHENTICATED, f"store {store.name} refuses {whose} credentials"
        )
    code = RefusedError.of(error).code
    return RefusedError(code, f"{shown} of store {store.name} cannot be had: see the driver's log")
