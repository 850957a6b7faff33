"""Volumes for claims, over a real socket and of a real store."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envstore.csi.config import DriverConfig, NamedStore, Rule
from envstore.csi.controller import CLAIM_NAMESPACE, ControllerService
from envstore.csi.policy import Policy
from envstore.csi.proto import csi_pb2, csi_pb2_grpc
from envstore.csi.refusal import RefusedError
from envstore.csi.request import KUBERNETES, VolumeRequest, parse_request
from envstore.csi.server import Server
from envstore.store.config import init_store
from envstore.store.objects import Credentials, KeyRing, open_objects
from envstore.store.refs import RefName, move_ref
from envstore.store.repository import Repository
from tests.csi.driving import capability, refused
from tests.s3server import S3Server
from tests.stores import Store

PATIENCE = 60.0
READERS = ("MULTI_NODE_READER_ONLY", "SINGLE_NODE_READER_ONLY")
WRITERS = (
    "SINGLE_NODE_WRITER",
    "SINGLE_NODE_SINGLE_WRITER",
    "SINGLE_NODE_MULTI_WRITER",
    "MULTI_NODE_SINGLE_WRITER",
    "MULTI_NODE_MULTI_WRITER",
)


class Driver:
    """A Controller service at a socket, what it is configured with and how it is called."""

    def __init__(self, directory: Path, store: Store) -> None:
        self.store = store
        self.directory = directory
        self.everybody = DriverConfig(
            {"main": NamedStore("main", store.url)}, "main", (Rule(stores=("*",)),)
        )
        self.config = self.everybody
        self.policy = Policy(lambda: self.config)
        self.credentials = directory / "credentials"
        self._restarts = 0
        self.start()

    def start(self) -> None:
        """Start one that remembers nothing."""
        self._restarts += 1
        self.service = ControllerService(self.policy, self.credentials)
        add = partial(csi_pb2_grpc.add_ControllerServicer_to_server, self.service)
        path = str(self.directory / f"csi-{self._restarts}.sock")
        self.server = Server(path, [add], observe=lambda method, code, seconds: None)
        self.channel = grpc.insecure_channel(f"unix:{path}")
        self.stub = csi_pb2_grpc.ControllerStub(self.channel)

    def stop(self) -> None:
        self.channel.close()
        assert self.server.stop()
        self.service.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def create(
        self,
        name: str = "pvc-1",
        *,
        capacity: tuple[int, int] = (0, 0),
        modes: tuple[str, ...] = ("MULTI_NODE_READER_ONLY",),
        secrets: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> csi_pb2.Volume:
        request = csi_pb2.CreateVolumeRequest(
            name=name,
            parameters={"ref": "env", **parameters},
            volume_capabilities=[capability(mode) for mode in modes],
            secrets=secrets,
        )
        if any(capacity):
            request.capacity_range.required_bytes, request.capacity_range.limit_bytes = capacity
        return self.stub.CreateVolume(request, timeout=PATIENCE).volume

    def delete(self, volume: str) -> None:
        self.stub.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume), timeout=PATIENCE)


@pytest.fixture(scope="module")
def module_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    base = tmp_path_factory.mktemp("controller")
    tree = base / "tree"
    tree.mkdir()
    (tree / "data").write_bytes(b"d" * 70_000)
    with Store(base / "store") as store:
        store.push(tree, "env:old")
        (tree / "more").write_bytes(b"more")
        store.push(tree, "env")
        driver = Driver(base, store)
        yield driver
        driver.stop()


@pytest.fixture
def driver(module_driver: Driver) -> Driver:
    module_driver.config = module_driver.everybody
    return module_driver


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    """Forget what tests before have made."""
    if "driver" in request.fixturenames:
        request.getfixturevalue("driver").service._made.clear()


def digest_of(driver: Driver, ref: str) -> str:
    return driver.store.repository.resolve(ref).hex()


# --- CreateVolume -------------------------------------------------------------------------------


def test_a_volume_is_what_its_ref_is_at_that_moment(driver: Driver) -> None:
    volume = driver.create(prefix="/opt/env", profile="start", fastPath="on")
    assert dict(volume.volume_context) == {
        "ref": "default/env:latest",
        "store": "main",
        "digest": digest_of(driver, "env"),
        "prefix": "/opt/env",
        "profile": "start",
        "fastPath": "on",
    }
    assert volume.capacity_bytes == 70_004
    assert not volume.HasField("content_source")
    assert not volume.accessible_topology
    assert parse_request(volume.volume_context) == VolumeRequest(
        "main", "default/env:latest", digest_of(driver, "env"), "/opt/env", "on", "start"
    )


def test_a_tag_that_moves_later_changes_nothing(driver: Driver) -> None:
    objects = driver.store.repository.objects
    name, old = RefName.parse("moving"), driver.store.repository.resolve("env:old")
    ref = move_ref(objects, name, old, None)
    first = driver.create("pvc-a", ref="moving")
    version = objects.get_versioned(name.key)[1]
    move_ref(objects, name, driver.store.repository.resolve("env"), (ref, version))
    assert driver.create("pvc-a", ref="moving") == first
    assert driver.create("pvc-b", ref="moving").volume_context["digest"] == digest_of(driver, "env")
    driver.delete(first.volume_id)
    again = driver.create("pvc-a", ref="moving")
    assert again.volume_id == first.volume_id
    assert again.volume_context["digest"] == digest_of(driver, "env")
    objects.delete(name.key)


def test_a_pinned_volume_is_looked_up_all_the_same(driver: Driver) -> None:
    old = digest_of(driver, "env:old")
    assert driver.create("pvc-a", ref=f"env@{old}").volume_context["digest"] == old
    assert driver.create("pvc-b", digest=old).volume_context["digest"] == old
    refused(lambda: driver.create("pvc-c", ref=f"env@{'0' * 64}"), "NOT_FOUND", "in store main")


def test_making_a_volume_ten_times_makes_one(driver: Driver) -> None:
    volumes = [driver.create(capacity=(1 << 30, 0)) for _ in range(10)]
    assert all(volume == volumes[0] for volume in volumes)
    assert volumes[0].capacity_bytes == 1 << 30


def test_making_a_volume_from_many_callers_makes_one(driver: Driver) -> None:
    with ThreadPoolExecutor(20) as pool:
        volumes = list(pool.map(lambda _: driver.create(), range(20)))
        others = list(pool.map(lambda i: driver.create(f"pvc-{i}"), range(20)))
    assert all(volume == volumes[0] for volume in volumes)
    assert len({volume.volume_id for volume in others}) == 20


def test_a_driver_that_was_restarted_gives_the_same_id(driver: Driver) -> None:
    before = driver.create()
    driver.restart()
    assert driver.create() == before


def test_a_name_stands_for_one_volume(driver: Driver) -> None:
    driver.create(capacity=(1 << 30, 1 << 31))
    driver.create(capacity=(1 << 20, 0))
    refused(lambda: driver.create(ref="env:old"), "ALREADY_EXISTS", "parameters")
    refused(lambda: driver.create(prefix="/elsewhere"), "ALREADY_EXISTS", "parameters")
    refused(lambda: driver.create(capacity=(1 << 31, 0)), "ALREADY_EXISTS", "capacity")
    refused(lambda: driver.create(capacity=(0, 1 << 20)), "ALREADY_EXISTS", "capacity")
    # The same in other words, and by another claim's metadata.
    driver.create(ref="default/env:latest", fastPath="auto", **{KUBERNETES + "pv/name": "pv"})


def test_what_is_remembered_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.csi.controller._MOST", 3)
    for number in range(6):
        driver.create(f"pvc-{number}")
    assert len(driver.service._made) == 3
    driver.create("pvc-0", ref="env:old")


@pytest.mark.parametrize(
    ("capacity", "code"),
    [
        ((-1, 0), "INVALID_ARGUMENT"),
        ((0, -1), "INVALID_ARGUMENT"),
        ((2, 1), "INVALID_ARGUMENT"),
        ((0, 70_003), "OUT_OF_RANGE"),
        ((1, 10), "OUT_OF_RANGE"),
    ],
)
def test_a_capacity_that_cannot_be(driver: Driver, capacity: tuple[int, int], code: str) -> None:
    refused(lambda: driver.create(capacity=capacity), code)
    assert driver.create(capacity=(0, 70_004)).capacity_bytes == 70_004


@pytest.mark.parametrize("mode", WRITERS)
def test_a_volume_to_write_to_is_refused(driver: Driver, mode: str) -> None:
    for modes in ((mode,), ("MULTI_NODE_READER_ONLY", mode)):
        refused(
            lambda modes=modes: driver.create(modes=modes),  # type: ignore[misc]
            "INVALID_ARGUMENT",
            "read-only",
            "ReadOnlyMany",
        )


def test_a_volume_may_be_read_in_every_way(driver: Driver) -> None:
    assert driver.create(modes=READERS) == driver.create(modes=READERS[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.ClearField("name"), "name is missing"),
        (lambda r: setattr(r, "name", "x" * 129), "name is 129 bytes long"),
        (lambda r: setattr(r, "name", "x\ny\x00"), "control characters"),
        (lambda r: r.ClearField("volume_capabilities"), "volume_capabilities are missing"),
        (lambda r: r.volume_capabilities[0].ClearField("mount"), "no access type"),
        (lambda r: r.volume_capabilities[0].block.SetInParent(), "cannot be a block device"),
        (lambda r: r.volume_capabilities[0].ClearField("access_mode"), "no access mode"),
        (lambda r: setattr(r.volume_capabilities[0].access_mode, "mode", 99), "no access mode"),
        (lambda r: setattr(r.volume_capabilities[0].mount, "fs_type", "xfs"), "fsType"),
        (lambda r: r.volume_capabilities[0].mount.mount_flags.append("rw"), "rw cannot be had"),
        (lambda r: setattr(r.volume_content_source.volume, "volume_id", "x"), "of a ref"),
        (lambda r: r.mutable_parameters.update(a="b"), "can be changed"),
        (lambda r: r.parameters.clear(), "ref is missing"),
        (lambda r: r.parameters.update(ref="../../x"), "ref '../../x' is not of the form"),
        (lambda r: r.parameters.update(bucket="x"), "'bucket' is not known"),
        (lambda r: r.parameters.update(prefix="/a/../b"), "prefix"),
        (lambda r: r.parameters.update(prefix="/" + "a" * 3500), "can be kept"),
        (lambda r: r.parameters.update(prefix="/" + "a" * 4095), "at most 4096"),
        (lambda r: r.parameters.update({CLAIM_NAMESPACE: "../x"}), "'../x' is no name"),
        (lambda r: r.secrets.update(access_key_id="a"), "takes no keys of a volume"),
    ],
)
def test_a_request_that_is_wrong(
    driver: Driver, change: Callable[[csi_pb2.CreateVolumeRequest], Any], said: str
) -> None:
    request = csi_pb2.CreateVolumeRequest(
        name="pvc-0",
        parameters={"ref": "env"},
        volume_capabilities=[capability("MULTI_NODE_READER_ONLY")],
    )
    driver.stub.CreateVolume(request, timeout=PATIENCE)
    request.name = "pvc-1"
    change(request)
    refused(lambda: driver.stub.CreateVolume(request, timeout=PATIENCE), "INVALID_ARGUMENT", said)


def test_topology_means_nothing_here(driver: Driver) -> None:
    request = csi_pb2.CreateVolumeRequest(
        name="x" * 128,
        parameters={"ref": "env"},
        volume_capabilities=[capability("MULTI_NODE_READER_ONLY")],
    )
    request.accessibility_requirements.requisite.add().segments["zone"] = "a"
    assert driver.stub.CreateVolume(request, timeout=PATIENCE).volume.volume_id


def test_a_ref_that_is_not_there(driver: Driver) -> None:
    message = refused(lambda: driver.create(ref="nothere:1"), "NOT_FOUND")
    assert message == "there is no default/nothere:1 in store main"


# --- who may ------------------------------------------------------------------------------------


def test_a_claim_is_granted_what_its_namespace_is(driver: Driver) -> None:
    driver.config = DriverConfig(
        driver.everybody.stores, "main", (Rule(namespaces=("team-a",), refs=("default/env",)),)
    )
    driver.create("pvc-a", **{CLAIM_NAMESPACE: "team-a", KUBERNETES + "pvc/name": "claim"})
    for name in ("pvc-a", "pvc-b"):
        refused(
            lambda name=name: driver.create(name, **{CLAIM_NAMESPACE: "team-b"}),  # type: ignore[misc]
            "PERMISSION_DENIED",
            "namespace team-b may not use default/env:latest of store main",
        )


def test_what_a_claim_was_granted_its_pods_are_not(driver: Driver) -> None:
    driver.config = DriverConfig(driver.everybody.stores, "main", (Rule(namespaces=("team-a",)),))
    volume = driver.create(**{CLAIM_NAMESPACE: "team-a"})
    said = dict(volume.volume_context)
    said[KUBERNETES + "pod.name"], said[KUBERNETES + "pod.uid"] = "pod-1", "uid-1"
    for namespace, granted in (("team-a", True), ("team-b", False)):
        request = parse_request({**said, KUBERNETES + "pod.namespace": namespace})
        if granted:
            assert driver.policy.check(request, PATIENCE).name == "main"
        else:
            with pytest.raises(RefusedError, match="no rule allows it"):
                driver.policy.check(request, PATIENCE)


def test_a_volume_keeps_its_store_though_another_becomes_the_default(driver: Driver) -> None:
    volume = driver.create()
    other = NamedStore("other", "file:///nowhere")
    driver.config = DriverConfig({**driver.everybody.stores, "other": other}, "other", ())
    assert parse_request(volume.volume_context).store == "main"


# --- stores that fail ---------------------------------------------------------------------------


def test_a_store_that_is_not_there(driver: Driver, tmp_path: Path) -> None:
    driver.config = DriverConfig(
        {"main": NamedStore("main", f"file://{tmp_path}/secret-place")}, "main", (Rule(),)
    )
    message = refused(driver.create, "NOT_FOUND", "store main")
    assert "secret-place" not in message


def test_a_store_that_is_damaged(driver: Driver, tmp_path: Path) -> None:
    objects = open_objects(f"file://{tmp_path}", create=True)
    init_store(objects)
    objects.put(RefName.parse("env").key, b"no ref")
    objects.close()
    driver.config = DriverConfig(
        {"main": NamedStore("main", f"file://{tmp_path}")}, "main", (Rule(),)
    )
    refused(driver.create, "DATA_LOSS", "default/env:latest of store main cannot be had")


def test_a_store_that_is_silent_keeps_nobody_beyond_his_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        url = f"s3://envs?endpoint=http://127.0.0.1:{listener.getsockname()[1]}"
        driver.config = DriverConfig({"main": NamedStore("main", url)}, "main", (Rule(),))
        with monkeypatch.context() as patch:
            patch.setattr("envstore.csi.controller._RESOLVE_WITHIN", 0.1)
            message = refused(driver.create, "UNAVAILABLE")
        assert message == "store main does not answer in time"
        message = refused(driver.create, "UNAVAILABLE", "store main cannot be had")
        assert "127.0.0.1" not in message


def test_a_busy_name_is_refused_when_the_time_is_over(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driver.service._names.take("pvc-1"):
        with monkeypatch.context() as patch:
            patch.setattr("envstore.csi.controller._RESOLVE_WITHIN", 0.1)
            refused(driver.create, "ABORTED", "another operation")
        waiting: list[csi_pb2.Volume] = []
        caller = threading.Thread(target=lambda: waiting.append(driver.create()))
        caller.start()
        assert driver.create("pvc-2").volume_id
    caller.join(PATIENCE)
    assert waiting == [driver.create()]


# --- keys to stores -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_url(module_driver: Driver, s3_server: S3Server) -> str:
    """Return the URL of a copy of the store, whose keys are not in the environment."""
    url = s3_server.url(s3_server.new_bucket())
    keys = KeyRing(Credentials(s3_server.access_key, s3_server.secret_key))
    objects = open_objects(url, keys=keys)
    for info in module_driver.store.repository.objects.list(""):
        objects.put(info.key, module_driver.store.repository.objects.get(info.key))
    Repository.open(url, keys=keys).close()
    objects.close()
    return url


def configured(driver: Driver, url: str, source: Any) -> None:
    driver.config = DriverConfig({"main": NamedStore("main", url, source)}, "main", (Rule(),))


def test_the_drivers_own_keys_open_a_store(
    driver: Driver, s3_url: str, s3_server: S3Server
) -> None:
    configured(driver, s3_url, "secret")
    refused(driver.create, "UNAVAILABLE", "the driver's own credentials for store main")
    keys = driver.credentials / "main"
    keys.mkdir(parents=True)
    (keys / "access_key_id").write_text(s3_server.access_key)
    (keys / "secret_access_key").write_text("wrong-" + s3_server.secret_key)
    message = refused(driver.create, "UNAUTHENTICATED", "store main refuses the driver's")
    assert s3_server.secret_key not in message
    (keys / "secret_access_key").write_text(s3_server.secret_key + "\n")
    assert driver.create().volume_context["digest"] == digest_of(driver, "env")


def test_keys_that_come_with_a_request_open_a_store(
    driver: Driver, s3_url: str, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    configured(driver, s3_url, "volume")
    refused(driver.create, "INVALID_ARGUMENT", "provisioner-secret-name")
    keys = {"access_key_id": s3_server.access_key, "secret_access_key": s3_server.secret_key}
    wrong = {**keys, "secret_access_key": "wrong-" + s3_server.secret_key}
    message = refused(
        lambda: driver.create(secrets=wrong), "UNAUTHENTICATED", "refuses the volume's"
    )
    volume = driver.create(secrets=keys)
    assert volume.volume_context["digest"] == digest_of(driver, "env")
    for text in (message, caplog.text, json.dumps(dict(volume.volume_context))):
        assert s3_server.secret_key not in text


# --- the other calls ----------------------------------------------------------------------------


def test_deleting_is_always_done(driver: Driver) -> None:
    volume = driver.create().volume_id
    for identity in (volume, volume, "no-volume-of-ours", "x" * 128):
        driver.delete(identity)
    driver.create(ref="env:old")
    refused(lambda: driver.delete(""), "INVALID_ARGUMENT", "volume_id is missing")
    refused(lambda: driver.delete("../../etc"), "INVALID_ARGUMENT")
    refused(lambda: driver.delete("x" * 129), "INVALID_ARGUMENT")


def validate(driver: Driver, **fields: Any) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(**fields)
    return driver.stub.ValidateVolumeCapabilities(request, timeout=PATIENCE)


def test_what_a_volume_can_be_used_as(driver: Driver) -> None:
    volume = driver.create()
    fields = {
        "volume_id": volume.volume_id,
        "volume_context": volume.volume_context,
        "parameters": {"ref": "env"},
        "volume_capabilities": [capability(mode) for mode in READERS],
    }
    confirmed = validate(driver, **fields).confirmed
    assert dict(confirmed.volume_context) == dict(volume.volume_context)
    assert dict(confirmed.parameters) == {"ref": "env"}
    assert list(confirmed.volume_capabilities) == fields["volume_capabilities"]
    for change, said in (
        ({"volume_capabilities": [capability("MULTI_NODE_MULTI_WRITER")]}, "read-only"),
        ({"volume_context": {"ref": "../x"}}, "ref"),
        ({"parameters": {"bucket": "x"}}, "bucket"),
    ):
        found = validate(driver, **{**fields, **change})  # type: ignore[dict-item]
        assert not found.HasField("confirmed")
        assert said in found.message


def test_a_volume_that_was_never_made_can_be_nothing(driver: Driver) -> None:
    asked = {"volume_capabilities": [capability("MULTI_NODE_READER_ONLY")]}
    refused(lambda: validate(driver, volume_id="pvc-1", **asked), "NOT_FOUND", "'pvc-1'")
    refused(lambda: validate(driver, **asked), "INVALID_ARGUMENT", "volume_id is missing")
    volume = driver.create().volume_id
    refused(
        lambda: validate(driver, volume_id=volume),
        "INVALID_ARGUMENT",
        "volume_capabilities are missing",
    )


def test_volumes_can_be_made_and_that_is_all(driver: Driver) -> None:
    stub = driver.stub
    found = stub.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest())
    kind = csi_pb2.ControllerServiceCapability.RPC
    assert [one.rpc.type for one in found.capabilities] == [kind.CREATE_DELETE_VOLUME]
    for name in (
        "ControllerPublishVolume",
        "ControllerUnpublishVolume",
        "ListVolumes",
        "GetCapacity",
        "ControllerExpandVolume",
        "ControllerGetVolume",
    ):
        call, request = getattr(stub, name), getattr(csi_pb2, name + "Request")()
        refused(lambda call=call, request=request: call(request), "UNIMPLEMENTED")  # type: ignore[misc]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=st.text(max_size=140),
    parameters=st.dictionaries(
        st.sampled_from(["ref", "store", "prefix", "digest", "profile", CLAIM_NAMESPACE])
        | st.text(max_size=8),
        st.sampled_from(["env", "env:old", "/x", "main", "0" * 64]) | st.text(max_size=8),
        max_size=4,
    ),
    required=st.integers(-1, 1 << 40),
    limit=st.integers(-1, 1 << 40),
)
def test_whatever_is_asked_is_answered_or_refused_by_its_rules(
    driver: Driver, name: str, parameters: dict[str, str], required: int, limit: int
) -> None:
    request = csi_pb2.CreateVolumeRequest(
        name=name,
        parameters=parameters,
        capacity_range=csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit),
        volume_capabilities=[capability("MULTI_NODE_READER_ONLY")],
    )
    try:
        volume = driver.stub.CreateVolume(request, timeout=PATIENCE).volume
    except grpc.RpcError as error:
        allowed = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "OUT_OF_RANGE"}
        # A store that nobody configured looks like one that nobody may use.
        allowed |= {"PERMISSION_DENIED"} if "store" in parameters else set()
        refused = (error.code().name in allowed, "\n" in error.details())
        assert refused == (True, False), error  # noqa: PT017 - it may be raised or not
        return
    assert volume.capacity_bytes >= max(required, 0)
    assert parse_request(volume.volume_context).digest
