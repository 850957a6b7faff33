"""The CSI Node service: what the kubelet asks for on this node.

Every call may come again, at any time and from several callers at once (specification,
"Timeouts"): what is done already is not done twice, and what failed left nothing. Volumes are not
staged: the node server shares between targets whatever can be shared.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from typing import Protocol

import grpc

from envstore.csi.access import check_access, check_id, check_path
from envstore.csi.calls import Context, seconds_left
from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.csi.publishing import Grant, Grants, Left, Publisher
from envstore.csi.records import Publication
from envstore.csi.refusal import RefusedError, invalid
from envstore.csi.request import Pod, VolumeRequest, parse_request, pod_of
from envstore.csi.stats import Health, usage
from envstore.errors import EnvstoreError

SLOW_AFTER = 5.0
"""Seconds after which the pod is told that it waits for a volume, and for what."""

_COUNT_WITHIN = 2.0
_CAPABILITIES = ("GET_VOLUME_STATS", "VOLUME_CONDITION", "SINGLE_NODE_MULTI_WRITER")
# They tell of who asked, not of the volume.
_UNTOLD = frozenset(
    {grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
)

_log = logging.getLogger(__name__)


class Teller(Protocol):
    """Tells whoever looks at a pod what happens to its volumes. Returns at once, never fails."""

    def refused(self, pod: Pod, message: str) -> None:
        """Tell that a volume is not mounted, and why."""

    def slow(self, pod: Pod, message: str) -> None:
        """Tell that a volume takes long to be mounted."""


class NodeService(csi_pb2_grpc.NodeServicer):
    """Answers for the node ``node_id``. What it refuses is a ``RefusedError``."""

    def __init__(
        self,
        node_id: str,
        publisher: Publisher,
        grants: Grants,
        teller: Teller,
        *,
        slow_after: float = SLOW_AFTER,
    ) -> None:
        self._node_id = node_id
        self._publisher = publisher
        self._records = publisher.records
        self._grants = grants
        self._teller = teller
        self._slow_after = slow_after
        self._health = Health(publisher.server)

    # --- publish --------------------------------------------------------------------------------

    def NodePublishVolume(  # noqa: N802
        self, request: csi_pb2.NodePublishVolumeRequest, context: Context
    ) -> csi_pb2.NodePublishVolumeResponse:
        """Mount a snapshot on the target path, read-only, nosuid, nodev and exec.

        Comes again for as long as the pod lives (``requiresRepublish``): then it is judged anew
        whether the pod may have the volume, and a mount that is gone is made again.
        """
        # Whatever is wrong with the request, its pod hears of it.
        with self._told(pod_of(request.volume_context)):
            record = _read(request)
            with self._publisher.targets.take(record.target):
                self._publish(record, request.secrets, partial(seconds_left, context))
        return csi_pb2.NodePublishVolumeResponse()

    def _publish(self, record: Publication, keys: Mapping[str, str], left: Left) -> None:
        publisher = self._publisher
        known = self._records.find(record.target)
        if known is not None and not known.published:
            publisher.withdraw(known)
            known = None
        if known is None:
            grant = self._grants.grant(record.request, keys, left)
            with self._watched(record):
                publisher.publish(record, grant, left)
            return
        _check_same(known, record)
        with self._lasting(known):
            grant = self._grant_again(known, keys, left)
            if not publisher.is_alive(known.target):
                with self._watched(known):
                    publisher.restore(known, grant, left)
                return
        if publisher.keys_are_new(known, grant):
            publisher.refresh(known, grant, left)

    def _grant_again(self, known: Publication, keys: Mapping[str, str], left: Left) -> Grant:
        """Return what a volume may use now, and unmount it if that is nothing any more.

        The record stays until the kubelet unpublishes: until then it may be granted again.
        """
        try:
            return self._grants.grant_again(known, keys, left)
        except RefusedError as refused:
            if refused.code is grpc.StatusCode.PERMISSION_DENIED:
                _log.warning("unmounting %s: %s", known.target, refused.message)
                self._publisher.suspend(known)
            raise

    @contextmanager
    def _lasting(self, known: Publication) -> Iterator[None]:
        """Refuse what is published already with a code that promises nothing: ``ABORTED``.

        At one that says that all is over, most kubelets delete what they know of a volume that is
        not mounted any more. Then they never unpublish it, and the pod does not end (see
        kubernetes#121271, mended in some releases of 1.34 and in 1.37).
        """
        try:
            yield
        except (RefusedError, EnvstoreError) as error:
            refused = error if isinstance(error, RefusedError) else RefusedError.of(error)
            if refused.code in _UNTOLD or refused.code is grpc.StatusCode.UNAVAILABLE:
                raise refused from None
            if known.request.pod is not None:
                self._teller.refused(known.request.pod, refused.message)
            raise RefusedError(grpc.StatusCode.ABORTED, refused.message) from None

    @contextmanager
    def _told(self, pod: Pod | None) -> Iterator[None]:
        """Turn what goes wrong into a refusal, and tell the pod of it."""
        try:
            yield
        except (RefusedError, EnvstoreError) as error:
            refused = error if isinstance(error, RefusedError) else RefusedError.of(error)
            if pod is not None and refused.code not in _UNTOLD:
                self._teller.refused(pod, refused.message)
            raise refused from None

    @contextmanager
    def _watched(self, record: Publication) -> Iterator[None]:
        """Tell the pod if what is done meanwhile takes long."""
        pod = record.request.pod
        if pod is None:
            yield
            return
        timer = threading.Timer(self._slow_after, self._say_slow, (pod, record))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say_slow(self, pod: Pod, record: Publication) -> None:
        try:
            count = self._publisher.fetched(record, _COUNT_WITHIN)
            fetched = f"{count / 1e6:.1f} MB were fetched so far"
        except EnvstoreError as error:
            fetched = error.message
        waited = f"{record.request.ref} is not mounted after {self._slow_after:g} s"
        self._teller.slow(pod, f"{waited}: {fetched}")

    # --- unpublish ------------------------------------------------------------------------------

    def NodeUnpublishVolume(  # noqa: N802
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: Context
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Remove the mount, dead or alive, and the target path; fine if nothing is there.

        The id is used for nothing but to notice mistakes, so any will do: what could never be
        published under it must not keep a pod from ending.
        """
        if not request.volume_id:
            raise invalid("volume_id is missing")
        target = check_path(request.target_path, "target_path")
        with self._publisher.targets.take(target):
            known = self._records.find(target)
            if known is None:
                self._publisher.clear(target)
            elif known.volume != request.volume_id:
                raise RefusedError(
                    grpc.StatusCode.NOT_FOUND, f"another volume is published at {target}"
                )
            else:
                self._publisher.withdraw(known)
        return csi_pb2.NodeUnpublishVolumeResponse()

    # --- questions ------------------------------------------------------------------------------

    def NodeGetVolumeStats(  # noqa: N802
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: Context
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """Return the size of a volume and its condition, at once; the mount is not touched."""
        if not request.volume_id:
            raise invalid("volume_id is missing")
        path = check_path(request.volume_path, "volume_path")
        record = self._records.find(path)
        if record is None or not record.published or record.volume != request.volume_id:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, f"the volume is not published at {path}")
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=usage(record), volume_condition=self._health.condition(record)
        )

    def NodeGetCapabilities(  # noqa: N802
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: Context
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        """Return what is offered beyond publishing: statistics, and access modes as they are."""
        found = csi_pb2.NodeServiceCapability
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[found(rpc=found.RPC(type=name)) for name in _CAPABILITIES]
        )

    def NodeGetInfo(  # noqa: N802
        self, request: csi_pb2.NodeGetInfoRequest, context: Context
    ) -> csi_pb2.NodeGetInfoResponse:
        """Return the node's name. Every node can have every volume, and any number of them."""
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)


def _read(request: csi_pb2.NodePublishVolumeRequest) -> Publication:
    """Return what is to be published. Raises ``RefusedError``, always ``INVALID_ARGUMENT``."""
    volume = check_id(request.volume_id)
    target = check_path(request.target_path, "target_path")
    if not request.HasField("volume_capability"):
        raise invalid("volume_capability is missing")
    wanted = parse_request(request.volume_context)
    mode = check_access(
        request.volume_capability, readonly=request.readonly, ephemeral=wanted.ephemeral
    )
    return Publication(
        volume=volume,
        target=target,
        lease=token_hex(8),
        store=wanted.store,
        url="",
        access=mode,
        readonly=request.readonly,
        request=wanted,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        digest=wanted.digest,
    )


def _check_same(known: Publication, asked: Publication) -> None:
    """Refuse to publish anything else at a target (specification, ``ALREADY_EXISTS``)."""
    names = [
        name
        for name in ("volume", "access", "readonly")
        if getattr(known, name) != getattr(asked, name)
    ]
    names += [
        name
        for name in VolumeRequest.__slots__
        if getattr(known.request, name) != getattr(asked.request, name)
    ]
    if names:
        raise RefusedError(
            grpc.StatusCode.ALREADY_EXISTS,
            f"{known.target} is published already, with another {' and another '.join(names)}",
        )
