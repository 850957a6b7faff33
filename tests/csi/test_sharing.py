"""Who may mount what, and who hears of it: a driver process, a node server and an API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from envstore.csi.proto import csi_pb2
from envstore.csi.request import KUBERNETES
from tests.csi.apiserver import ApiServer, running_api_server
from tests.csi.driving import FILES, POD, Site, capability, refused

GOLD = {"namespaceLabels": {"tier": "gold"}, "refs": ["default/*"]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_api_server() as server:
        server.namespaces |= {"team-a": {"tier": "gold"}, "team-b": {}}
        yield server


@pytest.fixture(scope="module")
def config(node_site: Site) -> Path:
    return node_site.base / "config.yaml"


@pytest.fixture(scope="module")
def shared(node_site: Site, api: ApiServer, config: Path) -> Site:
    """A driver with a configuration, in a cluster."""
    allow(node_site, config, GOLD)
    kubeconfig = api.kubeconfig(node_site.base / "kubeconfig")
    node_site.start("--config", config, env={"KUBECONFIG": str(kubeconfig)})
    return node_site


@pytest.fixture
def site(shared: Site, config: Path) -> Iterator[Site]:
    allow(shared, config, GOLD)
    yield shared
    assert shared.remains() == []


def allow(site: Site, config: Path, *rules: object) -> None:
    """Replace the configuration, as a ConfigMap is."""
    said = {"stores": {"main": {"url": site.store.url}}, "policy": [*rules]}
    (config.parent / "new.yaml").write_text(yaml.safe_dump(said))
    (config.parent / "new.yaml").rename(config)


def pod(namespace: str, uid: str) -> dict[str, str]:
    return {**POD, KUBERNETES + "pod.namespace": namespace, KUBERNETES + "pod.uid": uid}


def told(api: ApiServer, uid: str) -> str:
    """Return what a pod hears of."""

    def events() -> list[str]:
        return [
            str(event["message"])
            for event in api.events
            if event["involvedObject"]["uid"] == uid and event["reason"] == "EnvstoreRefused"
        ]

    api.wait(lambda: bool(events()))
    return events()[0]


def test_a_namespace_with_the_label_mounts_and_another_hears_why_not(
    site: Site, api: ApiServer
) -> None:
    with site.published(pod=pod("team-a", "uid-a")) as target:
        assert (target / "lib" / "data").read_bytes() == FILES["lib/data"]
        message = refused(
            lambda: site.publish("csi-2", site.target("b"), pod=pod("team-b", "uid-b")),
            "PERMISSION_DENIED",
            "namespace team-b (service account default) may not use default/env:latest",
        )
    assert told(api, "uid-b") == message
    assert not site.target("b").exists()


@pytest.mark.parametrize(
    ("number", "attributes", "said"),
    [
        (1, {"ref": "../../etc"}, "ref '../../etc'"),
        (2, {"ref": "env", "prefix": "/opt/../etc"}, "prefix"),
        (3, {"ref": "env", "endpoint": "http://evil.example"}, "'endpoint' is not known"),
        (4, {"ref": "env", "store": "other"}, "may not use default/env:latest of store other"),
        (5, {"ref": "env:never"}, "env:never"),
    ],
)
def test_a_pod_hears_what_is_wrong_with_its_volume(
    site: Site, api: ApiServer, number: int, attributes: dict[str, str], said: str
) -> None:
    uid = f"uid-wrong-{number}"
    code = {4: "PERMISSION_DENIED", 5: "NOT_FOUND"}.get(number, "INVALID_ARGUMENT")
    refused(lambda: site.publish(attributes=attributes, pod=pod("team-a", uid)), code, said)
    assert said in told(api, uid)


def test_a_grant_that_is_taken_back_takes_the_volume_away(
    site: Site, api: ApiServer, config: Path
) -> None:
    here = pod("team-a", "uid-guest")
    target = site.publish(pod=here)
    config.write_text("stores: {")
    site.publish(pod=here)
    assert (target / "empty").exists()
    allow(site, config, {"namespaces": ["team-c"]})
    # With a code that does not make kubelets forget the volume; see NodeService.
    refused(lambda: site.publish(pod=here), "ABORTED", "no rule allows it")
    assert "no rule allows it" in told(api, "uid-guest")
    assert not target.exists()
    site.unpublish()
    assert site.remains() == []


def test_a_claims_volume_is_not_for_every_namespace(site: Site, config: Path) -> None:
    allow(site, config, {"namespaces": ["team-a"]})
    reader = capability("MULTI_NODE_READER_ONLY")
    request = csi_pb2.CreateVolumeRequest(
        name="pvc-1",
        parameters={"ref": "env", KUBERNETES + "pvc/namespace": "team-a"},
        volume_capabilities=[reader],
    )
    volume = site.controller.CreateVolume(request).volume
    attributes = dict(volume.volume_context)
    here = {**pod("team-a", "uid-claim"), KUBERNETES + "ephemeral": "false"}
    with site.published(
        volume.volume_id, attributes=attributes, pod=here, volume_capability=reader
    ) as target:
        assert (target / "empty").exists()
        elsewhere = {**here, KUBERNETES + "pod.namespace": "team-b"}
        refused(
            lambda: site.publish(
                volume.volume_id,
                site.target("b"),
                attributes,
                pod=elsewhere,
                volume_capability=reader,
            ),
            "PERMISSION_DENIED",
        )
