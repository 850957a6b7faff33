"""A cluster for a whole run. None of these tests is even looked at but by `make e2e-k8s`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import NODE_ADDRESS, PAUSE, Cluster
from tests.e2e.images import busybox_layer, write_image
from tests.e2e.parts import wait_until
from tests.e2e.pods import APP_IMAGE, SYSTEM, Pods
from tests.s3server import ACCESS_KEY, SECRET_KEY, S3Server, running_s3
from tests.tcpproxy import TcpProxy

REPOSITORY = Path(__file__).parent.parent.parent
OVERLAY = REPOSITORY / "deploy" / "overlays" / "e2e"
STORE_PORT = 18333  # as in deploy/overlays/e2e
STORE_URL = f"s3://envs?endpoint=http://{NODE_ADDRESS}:{STORE_PORT}"

# Where scripts/e2e-k8s.sh has put everything; read before the environment is cleared for tests.
GIVEN = {
    name: Path(os.environ.get(f"ENVSTORE_E2E_{name.upper()}", ""))
    for name in ("binaries", "image", "root")
}
collect_ignore_glob = ["test_*"] if Path() in GIVEN.values() else []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A node that is ready, with all images, and nothing of envstore in it yet."""
    cluster = Cluster(GIVEN["binaries"])
    with tempfile.TemporaryDirectory(prefix="envstore-e2e-") as directory:
        pause, app = Path(directory) / "pause.tar", Path(directory) / "app.tar"
        layer = busybox_layer(Path("/bin/busybox"))
        write_image(pause, PAUSE, layer, ["/bin/sleep", "2147483647"])
        write_image(app, APP_IMAGE, GIVEN["root"].read_bytes(), ["/bin/sh"])
        try:
            cluster.up([pause, app, GIVEN["image"]])
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def s3(cluster: Cluster) -> Iterator[S3Server]:
    """A real S3 server that pods reach through the node's own address."""
    with (
        tempfile.TemporaryDirectory(prefix="envstore-s3-", ignore_cleanup_errors=True) as directory,
        running_s3(Path(directory)) as server,
    ):
        proxy = TcpProxy(server.endpoint, (NODE_ADDRESS, STORE_PORT))
        client = server.client()
        try:
            client.create_bucket(Bucket="envs")
            yield server
        finally:
            client.close()
            proxy.close()


@pytest.fixture(scope="session")
def environment(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ref of an environment in the store: an interpreter and numpy."""
    directory = tmp_path_factory.mktemp("push")
    (directory / "requirements.txt").write_text("numpy\n")
    for words in (("init",), ("push", "science", "requirements.txt")):
        done = subprocess.run(
            [Path(sys.executable).parent / "envstore", "--store", STORE_URL, *words],
            cwd=directory,
            env={**os.environ, **s3.env, "XDG_CACHE_HOME": str(directory / "cache")},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return "science"


@pytest.fixture(scope="session")
def driver(cluster: Cluster, environment: str) -> Cluster:
    """The cluster with envstore installed and registered, as the documentation says."""
    cluster.apply_directory(OVERLAY)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "envstore-credentials-main", "namespace": SYSTEM},
        "stringData": {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY},
    }
    cluster.apply(secret)
    wait_until(
        lambda: all(cluster.is_rolled_out(name) for name in ("envstore-node", "envstore-csi")),
        "both DaemonSets ready",
        within=180,
    )
    wait_until(cluster.drivers, "the driver registered with the kubelet")
    return cluster


@pytest.fixture
def pods(driver: Cluster) -> Iterator[Pods]:
    """Makes pods, all of which are gone after the test, and whatever was mounted for them."""
    pods = Pods(driver)
    yield pods
    pods.remove_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cluster = getattr(item, "funcargs", {}).get("driver") or getattr(item, "funcargs", {}).get(
        "cluster"
    )
    if report.failed and isinstance(cluster, Cluster):
        report.sections.append(("the cluster", cluster.explain()))
    return report
