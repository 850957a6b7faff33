"""What goes over the driver's socket: bytes, limits, time, and nothing secret into the log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import envstore
from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.csi.redaction import STRIPPED, TOKENS, redacted
from envstore.csi.server import Server
from envstore.errors import EnvstoreError, NotFoundError, UsageError
from tests.csi.driving import NODE_ID, POD, Site, capability, publish_request, refused
from tests.fuse.lives import PATIENCE, until

# --- bytes --------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def field(number: int, value: bytes | str | int) -> bytes:
    """Return a field as it goes over the wire, from nothing but its number and value."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def entry(number: int, key: str, value: str) -> bytes:
    return field(number, field(1, key) + field(2, value))


def raw(site: Site, method: str, request: bytes) -> bytes:
    found = site.channel.unary_unary(f"/csi.v1.{method}")(request, timeout=PATIENCE)
    assert isinstance(found, bytes)
    return found


UNKNOWN = field(99, "of a later version") + field(100, 7)


def test_the_numbers_of_the_fields_are_those_of_the_specification(site: Site) -> None:
    """Written by hand from the specification's text, not by what the driver is made with."""
    name = field(1, "csi.envstore.dev") + field(2, envstore.__version__)
    assert raw(site, "Identity/GetPluginInfo", UNKNOWN) == name
    controller = field(1, field(1, field(1, 1)))  # capabilities, service, CONTROLLER_SERVICE
    assert raw(site, "Identity/GetPluginCapabilities", b"") == controller
    assert raw(site, "Identity/Probe", b"") == field(1, field(1, 1))
    assert raw(site, "Node/NodeGetInfo", b"").startswith(field(1, NODE_ID))
    found = raw(site, "Node/NodeGetCapabilities", b"")
    assert field(1, field(1, field(1, 2))) in found  # GET_VOLUME_STATS
    assert field(1, field(1, field(1, 4))) in found  # VOLUME_CONDITION
    found = raw(site, "Controller/ControllerGetCapabilities", b"")
    assert field(1, field(1, field(1, 1))) in found  # CREATE_DELETE_VOLUME

    target = site.target("raw")
    reader_only = field(2, b"") + field(3, field(1, 3))  # mount, MULTI_NODE_READER_ONLY
    publish = (
        field(1, "raw-1") + field(4, str(target)) + field(5, reader_only) + field(6, 1)
        + entry(8, "ref", "env") + b"".join(entry(8, *pair) for pair in POD.items()) + UNKNOWN
    )  # fmt: skip
    assert raw(site, "Node/NodePublishVolume", publish) == b""
    assert site.shown() == [str(target)]
    stats = raw(site, "Node/NodeGetVolumeStats", field(1, "raw-1") + field(2, str(target)))
    parsed = csi_pb2.NodeGetVolumeStatsResponse.FromString(stats)
    one = parsed.usage[0]
    assert one.unit == csi_pb2.VolumeUsage.BYTES
    assert stats.startswith(field(1, field(2, one.total) + field(3, one.used) + field(4, 1)))
    assert stats.endswith(field(2, field(2, parsed.volume_condition.message)))
    unpublish = field(1, "raw-1") + field(2, str(target))
    assert raw(site, "Node/NodeUnpublishVolume", unpublish) == b""
    assert not target.exists()


def test_making_a_volume_has_the_numbers_of_the_specification(site: Site) -> None:
    reader_only = field(2, b"") + field(3, field(1, 3))
    made = raw(
        site,
        "Controller/CreateVolume",
        field(1, "pvc-1") + field(3, reader_only) + entry(4, "ref", "env") + UNKNOWN,
    )
    volume = csi_pb2.CreateVolumeResponse.FromString(made).volume
    assert field(2, volume.volume_id) in made
    assert all(entry(3, *pair) in made for pair in volume.volume_context.items())
    assert raw(site, "Controller/DeleteVolume", field(1, volume.volume_id)) == b""


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\x05abc", field(1, b"\xff\xfe") + field(2, "/x"), b"\x00" * 50, b"\x0b\x0b"],
)
def test_what_is_no_message_is_refused(site: Site, data: bytes) -> None:
    refused(lambda: raw(site, "Node/NodeUnpublishVolume", data), "INVALID_ARGUMENT", "no message")


# --- limits -------------------------------------------------------------------------------------

HOSTILE = {
    "ten thousand bytes": "x" * 10_000,
    "one byte too many": "x" * 129,
    "too many bytes in few characters": "é" * 65,
    "a NUL": "csi\0-1",
    "a line break and a colour": "csi-1\x1b[31m",
    "a C1 control": "csi-1\x85",
}


def everything(site: Site) -> set[str]:
    """Return every path that the driver may make or remove."""
    found = [*site.kubelet.rglob("*"), *site.state.rglob("*"), *site.base.iterdir()]
    return {str(path) for path in found}


@pytest.mark.parametrize("volume", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_volume_id_is_refused_and_nothing_is_done(site: Site, volume: str) -> None:
    target = site.target("hostile")
    before = everything(site)
    calls: list[Callable[[], object]] = [
        lambda: site.publish(volume, target),
        lambda: site.volume_stats(volume, target),
        lambda: site.unpublish(volume, target),
        lambda: site.controller.ValidateVolumeCapabilities(
            csi_pb2.ValidateVolumeCapabilitiesRequest(
                volume_id=volume, volume_capabilities=[capability()]
            )
        ),
    ]
    for call in calls:
        said = refused(call, "INVALID_ARGUMENT")
        assert said.isprintable()
        assert len(said) < 1001
    assert everything(site) == before


def test_a_volume_id_is_no_way_to_other_files(site: Site) -> None:
    volume, target = "../../../../etc/passwd", site.target("hostile")
    before = everything(site)
    refused(lambda: site.publish(volume, target), "INVALID_ARGUMENT")
    with pytest.raises(grpc.RpcError):
        site.volume_stats(volume, target)
    with contextlib.suppress(grpc.RpcError):
        site.unpublish(volume, target)
    assert everything(site) == before


@pytest.mark.parametrize("volume", ["/etc/passwd", "a b", "🜁" * 32, "-rf", "%2e%2e%2f", "$(id)"])
def test_a_strange_volume_id_names_a_volume_and_nothing_else(site: Site, volume: str) -> None:
    with site.published(volume, target=site.target("strange")) as target:
        assert (target / "empty").read_bytes() == b""
        assert len(os.listdir(site.state / "published")) == 1


HOSTILE_TARGETS = {
    "relative": "kubelet/x",
    "a way out": "{kubelet}/pods/../../../out",
    "elsewhere": "/etc/envstore-target",
    "the directory itself": "{kubelet}",
    "a NUL": "{kubelet}/pods/a\0b",
    "doubled": "/{kubelet}/x",
    "too long": "{kubelet}/" + "x/" * 2100,
    "a name too long": "{kubelet}/" + "x" * 256,
    "not simple": "{kubelet}/./x",
    "a slash behind": "{kubelet}/x/",
    "no parent": "{kubelet}/missing/x",
}


@pytest.mark.parametrize("target", HOSTILE_TARGETS.values(), ids=HOSTILE_TARGETS)
def test_a_hostile_target_is_refused_and_nothing_is_done(site: Site, target: str) -> None:
    path = target.format(kubelet=site.kubelet)
    before = everything(site)
    refused(lambda: site.publish("csi-1", path), "INVALID_ARGUMENT")
    assert everything(site) == before
    assert not Path("/etc/envstore-target").exists()


def test_a_target_may_be_as_long_as_paths_are(site: Site) -> None:
    deep = site.kubelet.joinpath(*["d" * 200] * 10, "mount")
    deep.parent.mkdir(parents=True)
    with site.published("csi-deep", target=deep) as target:
        assert len(str(target)) > 2000


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attributes": {"ref": "env", "x": "y" * 4096}}, "volume_context holds"),
        ({"attributes": {"ref": "env", **{f"key {n}": "v" * 40 for n in range(100)}}}, "holds"),
        ({"secrets": {"access_key_id": "k" * 5000}}, "secrets holds"),
        ({"publish_context": {"é" * 2048: "v"}}, "publish_context holds"),
        ({"staging_target_path": "/" + "x" * 4095}, "staging_target_path is"),
        ({"volume_capability": capability(fs_type="e" * 129)}, "fs_type is"),
        ({"volume_capability": capability(mount_flags=["f" * 100] * 41)}, "mount_flags is"),
        ({"volume_capability": capability(volume_mount_group="\x07")}, "control characters"),
    ],
)
def test_fields_that_are_too_large_are_refused(
    site: Site, fields: dict[str, Any], says: str
) -> None:
    said = refused(lambda: site.publish(**fields), "INVALID_ARGUMENT", says)
    assert "xxxx" not in said
    assert "kkkk" not in said


def test_tokens_of_the_kubelet_do_not_count(site: Site) -> None:
    tokens = json.dumps({"sts": {"token": "t" * 5000, "expirationTimestamp": "2030"}})
    with site.published("csi-tokens", pod={**POD, TOKENS: tokens}):
        pass
    assert "tttt" not in site.driver_log()


def test_a_request_that_is_far_too_large_is_not_even_read(site: Site) -> None:
    huge = field(1, "x" * (1 << 20))
    refused(lambda: raw(site, "Node/NodeUnpublishVolume", huge), "RESOURCE_EXHAUSTED")
    assert site.identity.Probe(csi_pb2.ProbeRequest()).ready.value is True


# --- secrets ------------------------------------------------------------------------------------

METHODS = [
    method
    for service in csi_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name.values()
]


def fill(message: Message, secret: str) -> int:
    """Put a secret wherever one may be, and something into every other field."""
    count = 0
    for one in message.DESCRIPTOR.fields:
        if one.containing_oneof is not None and one.containing_oneof.fields[-1] is not one:
            continue
        count += fill_field(message, one, secret)
    return count


def fill_field(message: Message, one: FieldDescriptor, secret: str) -> int:
    options: Any = one.GetOptions()
    hidden = bool(options.Extensions[csi_pb2.csi_secret])
    here = getattr(message, one.name)
    kind = one.message_type
    if kind is not None and kind.GetOptions().map_entry:
        here.update({"key": f"{secret}-{one.name}" if hidden else "value"})
        if one.name == "volume_context":
            here.update({TOKENS: json.dumps({"sts": {"token": f"{secret}-token"}})})
        return int(hidden) or int(one.name == "volume_context")
    if kind is not None:
        if one.is_repeated:
            return fill(here.add(), secret)
        here.SetInParent()
        return fill(here, secret)
    if one.is_repeated:
        here.append(f"{secret}-{one.name}" if hidden else "text")
    elif one.type == FieldDescriptor.TYPE_STRING:
        setattr(message, one.name, "/path" if one.name.endswith("path") else "text")
    elif one.enum_type is not None:
        setattr(message, one.name, one.enum_type.values[-1].number)
    return int(hidden)


@pytest.mark.parametrize("method", METHODS, ids=[one.full_name for one in METHODS])
def test_no_secret_of_any_request_is_logged(site: Site, method: MethodDescriptor) -> None:
    request = GetMessageClass(method.input_type)()
    secret = f"sesame-{method.name}"
    count = fill(request, secret)
    call = site.channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
    )
    said = ""
    try:
        call(request, timeout=PATIENCE)
    except grpc.RpcError as error:
        said = str(error)
    assert secret not in said
    log = site.driver_log()
    assert secret not in log
    assert secret not in json.dumps(redacted(request))
    if count:
        (line,) = [line for line in log.splitlines() if f" {method.name} " in line][-1:]
        assert STRIPPED in line
        assert "value" in line or "text" in line


def test_keys_of_a_volume_are_in_no_file_and_no_argument(site: Site) -> None:
    keys = {"access_key_id": "AKIASESAME", "secret_access_key": "open-sesame-123456789"}
    refused(lambda: site.publish("csi-keys", secrets=keys), "INVALID_ARGUMENT")
    refused(lambda: site.publish("open-sesame-123456789", secrets=keys), "INVALID_ARGUMENT")
    found = subprocess.run(
        ["grep", "-rl", "--exclude-dir=cache", "open-sesame-123456789", str(site.base)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""
    (process,) = [site.driver.pid] if site.driver else []
    assert b"sesame" not in Path(f"/proc/{process}/cmdline").read_bytes()


# --- the guard, in this process -----------------------------------------------------------------


class Handlers(csi_pb2_grpc.NodeServicer):
    """Does to each call what its volume id says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()

    def NodePublishVolume(  # noqa: N802
        self, request: csi_pb2.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        self.begun.append(request.volume_id)
        what = request.volume_id.partition("-")[0]
        if what == "wait":
            self.go.wait(PATIENCE)
        errors: dict[str, Exception] = {
            "usage": UsageError("wrong\nway", hint="do it another way"),
            "missing": NotFoundError("no such thing"),
            "failed": EnvstoreError("it failed"),
            "bug": KeyError(f"{request.secrets.get('key')} in {request.target_path}"),
            "implement": NotImplementedError("some day"),
        }
        if what in errors:
            raise errors[what]
        return csi_pb2.NodePublishVolumeResponse()


class Inside:
    """A server of ``Handlers`` with few workers, and a way to call it."""

    def __init__(self, path: Path, workers: int = 2) -> None:
        self.handlers = Handlers()
        self.observed: list[tuple[str, str]] = []
        identity = _Identity()

        def add_node(server: grpc.Server) -> None:
            csi_pb2_grpc.add_NodeServicer_to_server(self.handlers, server)  # type: ignore[no-untyped-call]

        def add_identity(server: grpc.Server) -> None:
            csi_pb2_grpc.add_IdentityServicer_to_server(identity, server)  # type: ignore[no-untyped-call]

        self.server = Server(
            str(path),
            [add_node, add_identity],
            observe=lambda method, code, seconds: self.observed.append((method, code)),
            workers=workers,
        )
        self.channel = grpc.insecure_channel(f"unix:{path}")
        self.node = csi_pb2_grpc.NodeStub(self.channel)  # type: ignore[no-untyped-call]
        self.identity = csi_pb2_grpc.IdentityStub(self.channel)  # type: ignore[no-untyped-call]

    def call(self, volume: str, **fields: Any) -> Any:
        return self.node.NodePublishVolume(self.request(volume, **fields), timeout=PATIENCE)

    def begin(self, volume: str, timeout: float = PATIENCE) -> Any:
        """Begin a call and return its future, once the server has it."""
        return self.node.NodePublishVolume.future(self.request(volume), timeout=timeout)

    @staticmethod
    def request(volume: str, **fields: Any) -> csi_pb2.NodePublishVolumeRequest:
        return csi_pb2.NodePublishVolumeRequest(volume_id=volume, **fields)


class _Identity(csi_pb2_grpc.IdentityServicer):
    def Probe(self, request: csi_pb2.ProbeRequest, context: Any) -> csi_pb2.ProbeResponse:  # noqa: N802
        return csi_pb2.ProbeResponse()


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    made = Inside(tmp_path / "in.sock")
    yield made
    made.handlers.go.set()
    made.channel.close()
    made.server.stop(5.0)


def test_errors_are_told_in_one_line_with_the_code_that_they_mean(inside: Inside) -> None:
    line = refused(lambda: inside.call("usage"), "INVALID_ARGUMENT")
    assert line == "wrong way (do it another way)"
    refused(lambda: inside.call("missing"), "NOT_FOUND", "no such thing")
    refused(lambda: inside.call("failed"), "INTERNAL", "it failed")
    assert inside.observed == [
        ("NodePublishVolume", code) for code in ("INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL")
    ]


def test_of_a_bug_only_the_log_has_the_traceback(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "envstore.csi")
    secret = 'pass"wörd\n'
    said = refused(
        lambda: inside.call("bug", target_path="/some/where", secrets={"key": secret}), "INTERNAL"
    )
    assert "/some/where" not in said
    assert "KeyError" in caplog.text
    assert "/some/where" in caplog.text
    assert "wörd" not in caplog.text
    said = refused(lambda: inside.call("implement"), "INTERNAL")
    assert "some day" not in said


def test_a_call_that_was_cancelled_before_its_turn_is_not_begun(tmp_path: Path) -> None:
    inside = Inside(tmp_path / "one.sock", workers=1)
    try:
        first = inside.begin("wait-1")
        until(lambda: inside.handlers.begun == ["wait-1"])
        cancelled, late = inside.begin("plain-2"), inside.begin("plain-3", timeout=0.2)
        assert cancelled.cancel()
        refused(late.result, "DEADLINE_EXCEEDED")
        # Not before the server knows of both: then they are before this one in its queue.
        fourth = inside.begin("plain-4")
        inside.handlers.go.set()
        first.result()
        fourth.result()
        assert inside.handlers.begun == ["wait-1", "plain-4"]
    finally:
        inside.handlers.go.set()
        inside.channel.close()
        inside.server.stop(5.0)


def test_a_probe_is_answered_while_all_workers_are_busy(inside: Inside) -> None:
    calls = [inside.begin(f"wait-{number}") for number in range(6)]
    until(lambda: len(inside.handlers.begun) == 2)
    inside.identity.Probe(csi_pb2.ProbeRequest(), timeout=PATIENCE)
    assert len(inside.handlers.begun) == 2
    inside.handlers.go.set()
    for call in calls:
        call.result()
    assert len(inside.handlers.begun) == 6


def test_calls_under_way_end_before_the_server_does(inside: Inside) -> None:
    call = inside.begin("wait-1")
    until(lambda: inside.handlers.begun == ["wait-1"])
    ended: list[bool] = []
    stopping = threading.Thread(target=lambda: ended.append(inside.server.stop(PATIENCE)))
    stopping.start()
    until(lambda: not os.path.exists(inside.server.path), "the socket's end")
    inside.handlers.go.set()
    call.result()
    stopping.join(PATIENCE)
    assert ended == [True]


def test_a_call_that_does_not_end_is_cut_off(inside: Inside) -> None:
    call = inside.begin("wait-1")
    until(lambda: inside.handlers.begun == ["wait-1"])
    assert inside.server.stop(0.2) is False
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    error: Any = caught.value
    assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


# --- time ---------------------------------------------------------------------------------------


class SilentStore:
    """A store that takes connections and does not answer, until it hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"s3://bucket?endpoint=http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._held: list[socket.socket] = []
        self._silent = True
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._held.append(self._listener.accept()[0])
                if not self._silent:
                    self.hang_up()

    def be_silent(self) -> None:
        self._silent = True

    def hang_up(self) -> None:
        self._silent = False
        while self._held:
            self._held.pop().close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.hang_up()
        self._listener.close()


class Slow(NamedTuple):
    """A driver with a store that never answers beside the other."""

    site: Site
    store: SilentStore
    config: Path

    def begin(self, name: str, timeout: float) -> Any:
        self.store.be_silent()
        request = publish_request(f"csi-{name}", str(self.site.target(name)), SILENT, secrets=KEYS)
        return self.site.node.NodePublishVolume.future(request, timeout=timeout)

    def leaves_nothing(self) -> None:
        """See that nothing is left once the store has let go of whoever asked it."""
        self.store.hang_up()
        until(lambda: self.site.remains() == [], "that nothing is left")


@pytest.fixture(scope="module")
def slow(driven: Site) -> Iterator[Slow]:
    store = SilentStore()
    config = driven.base / "stores.yaml"
    stores = {
        "main": {"url": driven.store.url},
        "silent": {"url": store.url, "credentials": "volume"},
    }
    policy = [{"stores": ["*"]}]
    config.write_text(json.dumps({"stores": stores, "default": "main", "policy": policy}))
    try:
        driven.restart("--config", config)
        yield Slow(driven, store, config)
    finally:
        store.close()
        driven.restart()


KEYS = {"access_key_id": "AKIA", "secret_access_key": "sesame"}
SILENT = {"ref": "env", "store": "silent"}


def test_a_publish_that_takes_too_long_ends_in_time_and_leaves_nothing(slow: Slow) -> None:
    call = slow.begin("late", 1.0)
    refused(call.result, "DEADLINE_EXCEEDED")
    slow.leaves_nothing()


def test_a_publish_that_nobody_waits_for_leaves_nothing(slow: Slow) -> None:
    site = slow.site
    call = slow.begin("gone", 5.0)
    until(lambda: os.listdir(site.state / "published"), "that it has begun")
    call.cancel()
    # Others go on meanwhile, and the same target is free again when its call has ended.
    with site.published("csi-other", target=site.target("other")):
        assert site.identity.Probe(csi_pb2.ProbeRequest()).ready.value is True
    slow.leaves_nothing()
    with site.published("csi-gone", target=site.target("gone")):
        pass


def test_a_driver_that_is_told_to_stop_lets_its_calls_end(slow: Slow) -> None:
    site = slow.site
    assert site.driver is not None
    call = slow.begin("last", PATIENCE)
    until(lambda: os.listdir(site.state / "published"), "that it has begun")
    site.driver.send_signal(signal.SIGTERM)
    until(lambda: not site.socket.exists(), "that it stops")
    slow.store.hang_up()
    refused(call.result, "UNAVAILABLE", "store")
    assert site.driver.wait(PATIENCE) == 0
    site.start("--config", slow.config)
    slow.leaves_nothing()


# --- life and death -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_driver_and_no_mount(site: Site, number: int) -> None:
    target = site.publish()
    assert site.signal(number) == 0
    assert not site.socket.exists()
    assert (target / "empty").read_bytes() == b""
    site.start()
    assert site.volume_stats().volume_condition.abnormal is False
    site.unpublish()


def test_a_socket_that_a_killed_driver_left_is_taken(site: Site) -> None:
    target = site.publish()
    assert site.signal(signal.SIGKILL) == -signal.SIGKILL
    assert site.socket.is_socket()
    site.start()
    site.publish()
    assert (target / "empty").read_bytes() == b""
    site.unpublish()
    assert [path.name for path in site.socket.parent.iterdir()] == [site.socket.name]


def test_the_socket_is_for_its_user_and_group_alone(site: Site) -> None:
    assert site.socket.stat().st_mode & 0o777 == 0o660


def fails_to_start(site: Site, *options: str | Path) -> str:
    done = subprocess.run(
        site.arguments(*options), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2, done
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("envstore: ")]
    assert "Traceback" not in done.stderr
    return line


def test_a_second_driver_at_the_same_socket_is_refused(site: Site, tmp_path: Path) -> None:
    said = fails_to_start(site, "--state-dir", tmp_path / "state")
    assert "somebody listens" in said
    assert site.identity.Probe(csi_pb2.ProbeRequest()).ready.value is True


def test_a_second_driver_with_the_same_state_is_refused(site: Site, tmp_path: Path) -> None:
    said = fails_to_start(site, "--endpoint", f"unix://{tmp_path}/csi.sock")
    assert "another driver uses the state directory" in said
    assert [*tmp_path.iterdir()] == []


def test_of_many_drivers_that_start_at_once_one_gets_the_socket(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    drivers = [
        subprocess.Popen(
            [*(sys.executable, "-m", "envstore", "csi", "serve"),
             *("--endpoint", f"unix://{path}", "--controller")],
            stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        until(lambda: sum(one.poll() is None for one in drivers) == 1, "that one is left")
        assert sorted(one.poll() or 0 for one in drivers) == [0, 2, 2, 2]
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = csi_pb2_grpc.IdentityStub(channel)  # type: ignore[no-untyped-call]
            stub.Probe(csi_pb2.ProbeRequest(), timeout=PATIENCE)
    finally:
        for one in drivers:
            one.kill()
            one.wait()


def test_what_is_no_socket_is_left_where_it_is(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "csi.sock"
    file.write_text("precious")
    said = fails_to_start(site, "--endpoint", f"unix://{file}", "--state-dir", tmp_path / "state")
    assert "it is not a socket" in said
    assert file.read_text() == "precious"
