"""Volumes for claims (CSI specification, Controller): a StorageClass's ref becomes a digest.

Making a volume moves no data and leaves nothing behind: all that a volume is, is in its context,
which Kubernetes keeps. So there is nothing to delete either.

What has been answered is remembered as long as this process lives, so that whoever repeats a
request is told the same even if the tag has moved meanwhile. After that a repeated request is a
new one; the id, made of name and parameters, is the same.

A volume that a claim was granted is not granted to pods: the policy decides again for each.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from envstore.csi.access import check_access, check_id
from envstore.csi.calls import seconds_left
from envstore.csi.config import NamedStore
from envstore.csi.credentials import find_credentials
from envstore.csi.limits import MAP
from envstore.csi.policy import Policy
from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.csi.refusal import RefusedError, invalid
from envstore.csi.request import KUBERNETES, VolumeRequest, is_label, parse_request, quoted
from envstore.csi.resolving import Found, look_up
from envstore.csi.turns import Turns
from envstore.store import canonical
from envstore.store.digest import digest
from envstore.store.objects.credentials import Credentials

CLAIM_NAMESPACE = KUBERNETES + "pvc/namespace"
"""Under which key the provisioner says whose claim it is (``--extra-create-metadata``)."""

_POLICY_WITHIN = 10.0
_RESOLVE_WITHIN = 60.0
_RESOLVERS = 8
_MOST = 10_000
_OF_PODS = 1024
"""Bytes of a volume's context that are left to what the kubelet adds when it is published."""
_ID = re.compile(r"(envstore-[0-9a-f]{32})-[0-9a-f]{32}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Made:
    """What was answered to the request for a name."""

    parameters: Mapping[str, str]
    volume: csi_pb2.Volume


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """Makes volumes of refs. Safe for many threads."""

    def __init__(self, policy: Policy, credentials: Path | None) -> None:
        """``credentials`` is the directory of the driver's own keys."""
        self._policy = policy
        self._credentials = credentials
        self._names = Turns()
        self._lock = threading.Lock()
        self._made: OrderedDict[str, _Made] = OrderedDict()
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="csi-resolve")

    def CreateVolume(  # noqa: N802
        self, request: csi_pb2.CreateVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        """Make a volume: look its tag up. Two or three requests to the store, none repeated.

        ``capacity_bytes`` is what is asked for, or the size of the files if that is more.
        Ends with ``INVALID_ARGUMENT``, ``NOT_FOUND`` (no such ref), ``ALREADY_EXISTS``,
        ``OUT_OF_RANGE``, ``PERMISSION_DENIED``, ``UNAUTHENTICATED`` or ``UNAVAILABLE``.
        """
        if not request.name:
            raise invalid("name is missing")
        _check_capabilities(request.volume_capabilities)
        if request.HasField("volume_content_source"):
            raise invalid("a volume is made of a ref, not of another volume or snapshot")
        if request.mutable_parameters:
            raise invalid("a volume has no parameters that can be changed")
        required, limit = _capacity(request.capacity_range)
        wanted = parse_request(request.parameters)
        parameters = wanted.attributes()
        identity = _identity(request.name, parameters)
        with self._names.take(request.name, seconds_left(context, _RESOLVE_WITHIN)):
            namespace = _claim_namespace(request.parameters)
            left = seconds_left(context, _POLICY_WITHIN)
            store = self._policy.check_claim(wanted, namespace, left)
            made = self._recall(identity)
            if made is not None:
                _check_same(made, parameters, required, limit)
                return csi_pb2.CreateVolumeResponse(volume=made.volume)
            keys = find_credentials(store, self._credentials, request.secrets)
            found = self._resolve(context, store, keys, wanted)
            size = max(required, found.size)
            if limit and size > limit:
                raise RefusedError(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"{wanted.ref} has {found.size} bytes, and the limit is {limit}",
                )
            kept = replace(wanted, store=store.name, digest=found.digest).attributes()
            _check_context(kept)
            volume = csi_pb2.Volume(capacity_bytes=size, volume_id=identity, volume_context=kept)
            self._remember(identity, _Made(parameters, volume))
        _log.info("volume %s is %s@%s", volume.volume_id, wanted.ref, found.digest)
        return csi_pb2.CreateVolumeResponse(volume=volume)

    def DeleteVolume(  # noqa: N802
        self, request: csi_pb2.DeleteVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        """Forget a volume. There is nothing to remove, whatever the id."""
        identity = check_id(request.volume_id)
        with self._lock:
            self._made.pop(_name_part(identity), None)
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(  # noqa: N802
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        """Confirm what a volume can be used as, and that its context is one of ours.

        Ends with ``NOT_FOUND`` for an id that no volume made here can have.
        """
        identity = check_id(request.volume_id)
        if not request.volume_capabilities:
            raise invalid("volume_capabilities are missing")
        if _ID.fullmatch(identity) is None:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, f"there is no volume {quoted(identity)}")
        response = csi_pb2.ValidateVolumeCapabilitiesResponse()
        try:
            _check_capabilities(request.volume_capabilities)
            for said in filter(None, (request.volume_context, request.parameters)):
                parse_request(said)
        except RefusedError as refused:
            response.message = refused.message
        else:
            confirmed = response.confirmed
            confirmed.volume_context.update(request.volume_context)
            confirmed.parameters.update(request.parameters)
            confirmed.volume_capabilities.extend(request.volume_capabilities)
        return response

    def ControllerGetCapabilities(  # noqa: N802
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        """Return that volumes can be made, and nothing else."""
        response = csi_pb2.ControllerGetCapabilitiesResponse()
        kind = csi_pb2.ControllerServiceCapability.RPC
        response.capabilities.add().rpc.type = kind.CREATE_DELETE_VOLUME
        return response

    def close(self) -> None:
        """End the threads that ask stores, as soon as these have answered."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    def _resolve(
        self,
        context: grpc.ServicerContext,
        store: NamedStore,
        keys: Credentials | None,
        wanted: VolumeRequest,
    ) -> Found:
        # In another thread, because no store may keep a caller waiting beyond its time.
        asked = self._resolvers.submit(look_up, store, keys, wanted)
        try:
            return asked.result(seconds_left(context, _RESOLVE_WITHIN))
        except TimeoutError:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, f"store {store.name} does not answer in time"
            ) from None
        finally:
            asked.cancel()

    def _recall(self, identity: str) -> _Made | None:
        with self._lock:
            return self._made.get(_name_part(identity))

    def _remember(self, identity: str, made: _Made) -> None:
        with self._lock:
            self._made[_name_part(identity)] = made
            while len(self._made) > _MOST:
                self._made.popitem(last=False)


def _identity(name: str, parameters: Mapping[str, str]) -> str:
    """Return the id of a volume: hashes of its name and of what it was asked to be."""
    parts = digest(name.encode()), digest(canonical.encode(dict(parameters)))
    return "-".join(("envstore", *(part.hex()[:32] for part in parts)))


def _name_part(identity: str) -> str:
    return identity.rpartition("-")[0]


def _check_capabilities(capabilities: Sequence[csi_pb2.VolumeCapability]) -> None:
    if not capabilities:
        raise invalid("volume_capabilities are missing")
    for capability in capabilities:
        check_access(capability, readonly=False, ephemeral=False)


def _capacity(wanted: csi_pb2.CapacityRange) -> tuple[int, int]:
    """Return the least and the most bytes that are wanted, 0 for whatever."""
    required, limit = wanted.required_bytes, wanted.limit_bytes
    if required < 0 or limit < 0 or (limit and required > limit):
        raise invalid("capacity_range is negative or ends before it begins")
    return required, limit


def _check_same(made: _Made, parameters: Mapping[str, str], required: int, limit: int) -> None:
    size = made.volume.capacity_bytes
    if made.parameters != parameters:
        what = "parameters"
    elif required > size or (limit and limit < size):
        what = "capacity"
    else:
        return
    raise RefusedError(
        grpc.StatusCode.ALREADY_EXISTS, f"the volume of this name was made with other {what}"
    )


def _check_context(context: Mapping[str, str]) -> None:
    size = sum(len(f"{key}{value}".encode()) for key, value in context.items())
    if size > MAP - _OF_PODS:
        raise invalid(f"the attributes have {size} bytes, at most {MAP - _OF_PODS} can be kept")


def _claim_namespace(parameters: Mapping[str, str]) -> str:
    namespace = parameters.get(CLAIM_NAMESPACE, "")
    if namespace and not is_label(namespace):
        raise invalid(f"{CLAIM_NAMESPACE} {quoted(namespace)} is no name in Kubernetes")
    return namespace
