"""What a kubelet, a pod's author and an administrator can hand to the CSI driver."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from envstore.csi import node, warmup
from envstore.csi.config import NamedStore, read_config
from envstore.csi.credentials import find_credentials
from envstore.csi.limits import check_limits
from envstore.csi.policy import Policy
from envstore.csi.proto import csi_pb2
from envstore.csi.records import Publication
from envstore.csi.redaction import redacted, secrets
from envstore.csi.refusal import RefusedError
from envstore.csi.request import parse_request
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json

_CAPABILITY = csi_pb2.VolumeCapability(
    mount=csi_pb2.VolumeCapability.MountVolume(),
    access_mode=csi_pb2.VolumeCapability.AccessMode(mode=3),
)
_STORE = NamedStore("default", "s3://bucket/prefix", credentials="volume")
_POD = {
    "csi.storage.k8s.io/pod.name": "p", "csi.storage.k8s.io/pod.namespace": "n",
    "csi.storage.k8s.io/pod.uid": "u", "csi.storage.k8s.io/serviceAccount.name": "a",
}  # fmt: skip


def _publish_seeds() -> list[bytes]:
    found = csi_pb2.NodePublishVolumeRequest(
        volume_id="v1", target_path="/var/lib/kubelet/pods/x/mount", readonly=True,
        volume_capability=_CAPABILITY, secrets={"access_key_id": "k", "secret_access_key": "s"},
        volume_context={"ref": "a/b:c@" + "0" * 64, "prefix": "/opt/x", "profile": "start", **_POD},
    )  # fmt: skip
    return [found.SerializeToString(deterministic=True)]


@target(
    "csi-publish", _publish_seeds, words=(b"/../", b"ref", b"prefix", b"\n", b"csi.storage.k8s.io/")
)
def csi_publish(data: bytes) -> None:
    try:
        request = csi_pb2.NodePublishVolumeRequest.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        return
    shown = json.dumps(redacted(request))
    for secret in secrets(request):
        expect(len(secret) < 8 or secret not in shown, "a secret is shown")
    try:
        check_limits(request)
        found = node._read(request)
        find_credentials(_STORE, None, request.secrets)
    except RefusedError as refused:
        expect("\n" not in refused.message and len(refused.message) < 3000, "a refusal's message")
        return
    expect(
        found.target.startswith("/") and "/../" not in found.target + "/", "a target that climbs"
    )
    expect("\0" not in found.target and found.target.isprintable(), "a target with odd characters")
    expect(Publication.decode(found.encode()) == found, "a record is not read as written")


@target("csi-attributes", lambda: [json.dumps({"ref": "x", **_POD}).encode()], mutate_json)
def csi_attributes(data: bytes) -> None:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict):
        return
    try:
        found = parse_request({str(key): str(item) for key, item in value.items()})
    except RefusedError as refused:
        expect(refused.message.isprintable(), "a message that is not printable")
        return
    expect(parse_request(found.attributes()).attributes() == found.attributes(), "attributes")


def _record_seeds() -> list[bytes]:
    request = parse_request({"ref": "x", **_POD})
    return [
        Publication("v", "/t", "0" * 16, "s", "file:///s", "ROX", True, request, "now").encode()
    ]


@target("csi-record", _record_seeds, mutate_json)
def csi_record(data: bytes) -> None:
    """A file in the driver's state directory; ``Records`` sets aside what raises these."""
    try:
        found = Publication.decode(data)
    except (ValueError, RecursionError):
        return
    expect(Publication.decode(found.encode()) == found, "a record is not read as written")


def _config_seeds() -> list[bytes]:
    return [
        b"stores:\n  a:\n    url: s3://bucket/prefix\ndefault: a\nrules:\n"
        b"  - namespaces: [team-*]\n    stores: [a]\n    refs: ['team/*']\n"
    ]


@target(
    "csi-config",
    _config_seeds,
    words=(b"&a ", b"*a", b"!!python/object:os.system", b"[" * 50, b"? "),
)
def csi_config(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(data)
        config = read_config(path)
        try:
            Policy(lambda: config).check(parse_request({"ref": "team/x", **_POD}), 1.0)
        except RefusedError:
            return


@target("csi-keys", lambda: [b"AKIA\nsecret\n", b""])
def csi_keys(data: bytes) -> None:
    """Files of keys, as a Secret is mounted."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "default"
        directory.mkdir()
        for name, part in zip(
            ("access_key_id", "secret_access_key"), data.split(b"\n"), strict=False
        ):
            (directory / name).write_bytes(part)
        try:
            find_credentials(replace(_STORE, credentials="secret"), Path(folder), {})
        except RefusedError as refused:
            expect(refused.message.isprintable(), "a message that is not printable")


@target("csi-warmup-report", lambda: [b'{"files":1,"bytes":5,"seconds":0.5}'], mutate_json)
def csi_warmup_report(data: bytes) -> None:
    """The last words of a pod, which anybody may have made."""
    warmup._report(data.decode("utf-8", "replace"))
