"""Who the driver says it is, when it says that it is ready, and how the kubelet gets to know it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

import envstore
from envstore.cli.main import main
from envstore.csi.proto import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc
from envstore.csi.refusal import NAME
from envstore.fuse.overview import overview
from envstore.fuse.sockets import somebody_listens
from tests.csi.driving import Site, refused, serves
from tests.fuse.lives import PATIENCE, until, within

Probe = csi_pb2.ProbeRequest
Capabilities = csi_pb2.GetPluginCapabilitiesRequest


def test_the_driver_says_who_it_is(site: Site) -> None:
    found = site.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())
    assert found.name == "csi.envstore.dev"
    # As the specification and the kubelet want a name, and a directory of it may be made.
    assert re.fullmatch(r"[a-zA-Z][A-Za-z0-9.-]{0,61}[a-zA-Z]", found.name)
    assert found.vendor_version == envstore.__version__


def test_it_offers_a_controller_if_it_has_one(site: Site) -> None:
    found = site.identity.GetPluginCapabilities(Capabilities())
    kinds = [one.service.type for one in found.capabilities]
    assert kinds == [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE]
    assert site.controller.ControllerGetCapabilities(
        csi_pb2.ControllerGetCapabilitiesRequest()
    ).capabilities


def test_it_is_ready_while_the_node_server_answers(site: Site) -> None:
    for _ in range(10):
        assert site.identity.Probe(Probe()).ready.value is True


def test_calls_that_nobody_offers_are_not_implemented(site: Site) -> None:
    for method in ("Node/NodeStageVolume", "Controller/CreateSnapshot", "Controller/None"):
        call = site.channel.unary_unary(f"/csi.v1.{method}")
        refused(lambda call=call: call(b""), "UNIMPLEMENTED")  # type: ignore[misc]
    call = site.channel.unary_unary("/csi.v1.GroupController/GroupControllerGetCapabilities")
    refused(lambda: call(b""), "UNIMPLEMENTED")


class Another:
    """A driver beside the one of the module, with options of its own."""

    def __init__(self, site: Site, base: Path) -> None:
        self.site = site
        self.socket = base / "other" / "csi.sock"
        self.state = base / "other state"

    @contextmanager
    def running(self, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        process = self.site.spawn(
            [
                *(sys.executable, "-m", "envstore", "--store", self.site.store.url),
                *("csi", "serve", "--endpoint", f"unix://{self.socket}", *map(str, options)),
            ]
        )
        try:
            until(lambda: serves(self.socket) or process.poll() is not None, "a driver")
            yield process
        finally:
            process.kill()
            process.wait()

    def node(self, *options: str | Path) -> list[str | Path]:
        return ["--node-id", "other", "--state-dir", self.state, *options]


@pytest.fixture
def another(site: Site, tmp_path: Path) -> Another:
    return Another(site, tmp_path)


@contextmanager
def calling(path: Path) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        yield channel


def test_without_a_node_server_it_is_alive_but_not_ready(another: Another, tmp_path: Path) -> None:
    nobody = tmp_path / "nobody.sock"
    with another.running(*another.node("--node-socket", nobody)), calling(another.socket) as line:
        identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
        assert identity.Probe(Probe()).ready.value is False
        assert not identity.GetPluginCapabilities(Capabilities()).capabilities
        node = csi_pb2_grpc.NodeStub(line)  # type: ignore[no-untyped-call]
        assert node.NodeGetInfo(csi_pb2.NodeGetInfoRequest()).node_id == "other"
        controller = csi_pb2_grpc.ControllerStub(line)  # type: ignore[no-untyped-call]
        ask = csi_pb2.ControllerGetCapabilitiesRequest()
        refused(lambda: controller.ControllerGetCapabilities(ask), "UNIMPLEMENTED")
        # It is used as soon as it is there.
        nobody.symlink_to(another.site.node_socket)
        assert identity.Probe(Probe()).ready.value is True


def test_a_controller_alone_is_always_ready(another: Another) -> None:
    with another.running("--controller"), calling(another.socket) as line:
        identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
        assert identity.Probe(Probe()).ready.value is True
        node = csi_pb2_grpc.NodeStub(line)  # type: ignore[no-untyped-call]
        refused(lambda: node.NodeGetInfo(csi_pb2.NodeGetInfoRequest()), "UNIMPLEMENTED")


def test_a_node_server_that_it_starts_outlives_it_and_is_used_by_the_next(
    another: Another, tmp_path: Path
) -> None:
    options = another.node("--targets", tmp_path)
    socket, place = another.state / "node.sock", another.state / "mnt"

    def server() -> int | None:
        found = {one.mountpoint: one.server_pid for one in overview()}
        return found.get(str(place))

    try:
        with another.running(*options) as process, calling(another.socket) as line:
            identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
            assert identity.Probe(Probe()).ready.value is True
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert somebody_listens(socket)
        before = server()
        with another.running(*options) as process, calling(another.socket) as line:
            identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
            assert identity.Probe(Probe()).ready.value is True
            assert server() == before
            # One that has gone altogether is started again.
            within(PATIENCE, sys.executable, "-m", "envstore", "umount", place)
            until(lambda: server() not in (before, None), "another node server")
            assert identity.Probe(Probe()).ready.value is True
        # Without leave to start one it starts none.
        within(PATIENCE, sys.executable, "-m", "envstore", "umount", place)
        with another.running(*options, "--no-start-node"), calling(another.socket) as line:
            identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
            assert identity.Probe(Probe()).ready.value is False
    finally:
        if server() is not None:
            within(PATIENCE, sys.executable, "-m", "envstore", "umount", place)


# --- registration -------------------------------------------------------------------------------


class Kubelet:
    """What a kubelet does with a socket that it finds in its plugins_registry."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / f"{NAME}-reg.sock"

    def ask(self) -> registration_pb2.PluginInfo:
        with calling(self.socket) as line:
            stub = registration_pb2_grpc.RegistrationStub(line)  # type: ignore[no-untyped-call]
            found = stub.GetInfo(registration_pb2.InfoRequest(), timeout=PATIENCE)
        assert isinstance(found, registration_pb2.PluginInfo)
        return found

    def tell(self, *, registered: bool, error: str = "") -> None:
        said = registration_pb2.RegistrationStatus(plugin_registered=registered, error=error)
        with calling(self.socket) as line:
            stub = registration_pb2_grpc.RegistrationStub(line)  # type: ignore[no-untyped-call]
            stub.NotifyRegistrationStatus(said, timeout=PATIENCE)


@pytest.fixture
def kubelet(tmp_path: Path) -> Kubelet:
    registry = tmp_path / "plugins_registry"
    registry.mkdir()
    return Kubelet(registry)


def registering(another: Another, kubelet: Kubelet, *more: str) -> list[str | Path]:
    options = another.node("--node-socket", another.site.node_socket)
    return [*options, "--register", kubelet.socket.parent, *more]


def test_a_kubelet_finds_the_driver(another: Another, kubelet: Kubelet) -> None:
    with another.running(*registering(another, kubelet)) as process:
        until(kubelet.socket.exists, "the socket for the kubelet")
        # The kubelet takes every socket there whose name has no dot in front for a plugin.
        assert [path.name for path in kubelet.socket.parent.iterdir()] == [kubelet.socket.name]
        for _ in range(3):  # it asks again whenever it starts
            found = kubelet.ask()
            assert found.type == "CSIPlugin"
            assert found.name == NAME
            assert found.endpoint == str(another.socket)
            assert [*found.supported_versions] == ["1.0.0"]
            with calling(Path(found.endpoint)) as line:
                identity = csi_pb2_grpc.IdentityStub(line)  # type: ignore[no-untyped-call]
                assert identity.Probe(Probe()).ready.value is True
            kubelet.tell(registered=True)
        until(lambda: "registered with the kubelet" in another.site.driver_log())
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        # A kubelet forgets a driver whose socket goes.
        assert not kubelet.socket.exists()


def test_the_kubelet_is_told_the_path_that_it_sees(another: Another, kubelet: Kubelet) -> None:
    seen = "/var/lib/kubelet/plugins/csi.envstore.dev/csi.sock"
    with another.running(*registering(another, kubelet, "--kubelet-endpoint", seen)):
        until(kubelet.socket.exists, "the socket for the kubelet")
        assert kubelet.ask().endpoint == seen


def test_a_driver_that_the_kubelet_refuses_ends_to_be_tried_again(
    another: Another, kubelet: Kubelet
) -> None:
    with another.running(*registering(another, kubelet)) as process:
        until(kubelet.socket.exists, "the socket for the kubelet")
        kubelet.tell(registered=False, error="no such\nversion" + "x" * 5000)
        assert process.wait(PATIENCE) == 1
    said = [line for line in another.site.driver_log().splitlines() if "refuses" in line]
    assert len(said) == 1
    assert "no such\\nversion" in said[0]


# --- the command line ---------------------------------------------------------------------------

Failing = Callable[..., None]


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Failing:
    monkeypatch.chdir(tmp_path)

    def run(status: int, *arguments: str | Path, says: str) -> None:
        assert main(["csi", "serve", *map(str, arguments)]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("envstore: "), err
        assert says in err, err

    return run


@pytest.mark.parametrize(
    "endpoint",
    ["", "csi.sock", "unix:csi.sock", "unix://csi.sock", "unix:///", "unix:///dir/", "tcp://h:1",
     "unix:///no\nline/"],
)  # fmt: skip
def test_what_is_no_socket_is_no_endpoint(fails: Failing, endpoint: str) -> None:
    fails(2, f"--endpoint={endpoint}", "--controller", says="endpoint")


def test_a_path_that_no_socket_can_have_is_refused(fails: Failing, tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100) / "csi.sock"
    fails(2, "--endpoint", f"unix://{long}", "--controller", says="can have 107 bytes")
    assert not long.parent.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing to serve"),
        (["--node-id", "n"], "go together"),
        (["--state-dir", "s"], "go together"),
        (["--node-id", "", "--state-dir", "s"], "a node's name"),
        (["--node-id", "n" * 257, "--state-dir", "s"], "a node's name"),
        (["--node-id", "a\nb", "--state-dir", "s"], "a node's name"),
        (["--controller", "--register", "r"], "for a node"),
        (["--controller", "--node-socket", "r"], "for a node"),
        (["--controller", "--config", "missing.yaml"], "missing.yaml"),
        (["--controller", "--kubelet-endpoint", "csi.sock"], "no absolute path"),
        (["--controller", "--kubelet-endpoint", "unix:///csi.sock"], "no absolute path"),
        (["--node-id", "n", "--state-dir", "s", "--node-socket", "x", "--start-node"], "not at"),
    ],
)
def test_options_that_make_no_driver_are_refused(
    fails: Failing, tmp_path: Path, options: list[str], says: str
) -> None:
    fails(2, "--endpoint", f"unix://{tmp_path}/csi.sock", *options, says=says)
    assert [*tmp_path.iterdir()] == []


def test_a_driver_that_starts_no_node_server_needs_nothing_that_mounts() -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(('pyfuse3', 'trio')))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{without}import envstore.csi.driver"], check=False
    )
    assert done.returncode == 0


def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    without = "import sys; sys.modules['grpc'] = None\n"
    without += "from envstore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["csi", "serve", "--endpoint", f"unix://{tmp_path}/csi.sock", "--controller"]
    done = subprocess.run(
        [sys.executable, "-c", without, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "needs the Python module grpc, which is not installed" in done.stderr
    assert "pip install 'envstore[csi]'" in done.stderr
