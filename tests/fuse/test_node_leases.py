"""Leases of a node server that somebody else shows: by id, for an owner, until given back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NotFoundError,
    UsageError,
)
from envstore.fuse import access
from envstore.fuse.lease import Asked
from envstore.fuse.mount import unmount
from envstore.fuse.overlay import probe
from envstore.fuse.sockets import ask
from envstore.fuse.supplies import Source
from envstore.store import lineage
from envstore.store.snapshots import save_snapshot
from tests.fuse.lives import PATIENCE, ROOT, lived
from tests.fuse.test_node import BIG, Site
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")

LEASE = "0123456789abcdef"


class Asking(Site):
    """A node server, asked as the driver of volumes asks it."""

    def ask(self, what: str, **words: object) -> dict[str, Any]:
        found = ask(self.socket, PATIENCE, ask=what, **words)
        assert isinstance(found, dict)
        return found

    def take(self, ref: str, **words: object) -> dict[str, Any]:
        question: dict[str, object] = {
            "store": self.store.url, "ref": ref, "target": "/pods/one", "prefix": "/opt/envstore",
            "profile": "none", "fast_path": "off", "namespace": 0, "owner": "csi", "id": LEASE,
        }  # fmt: skip
        return self.ask("mount", **{**question, **words})

    def ids(self) -> list[str]:
        return [one["id"] for one in self.told()["mounts"]]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Asking) as made:
        made.mount()
        yield made


def inside(found: dict[str, Any]) -> Path:
    return Path(found["root"], found["subtree"])


@pytest.mark.parametrize("fast", ["off", "auto"])
def test_one_id_is_one_lease_however_often_it_is_asked_for(site: Asking, fast: str) -> None:
    site.add("one", {"file": b"content", "d/other": b"1234"})
    first = site.take("one", fast_path=fast)
    assert first["id"] == LEASE
    assert (first["entries"], first["bytes"]) == (3, 11)
    assert first["control"] == site.told()["control"] == site.ask("state")["control"]
    assert ask(first["control"], PATIENCE, ask="status")["leases"] == 1
    site.add("one", {"file": b"another"})
    for turn in range(10):
        assert site.take("one", fast_path=fast) == first
        if turn % 4 == 3:
            site.kill_server()
    assert site.ids() == [LEASE]
    assert (inside(first) / "file").read_bytes() == b"content"
    # A new lease is of what the ref is now.
    assert site.take("one", id="f" * 16)["snapshot"] != first["snapshot"]


def test_one_id_asked_for_by_many_at_once_is_one_lease(site: Asking) -> None:
    for name in ("one", "two"):
        site.add(name, {f"{name} {number}": b"%d" % number for number in range(300)})
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(site.take, "one") for _ in range(16)]
        others = [pool.submit(site.take, "two", id=f"{n:016x}") for n in range(8)]
        found = [one.result() for one in asked]
        assert len({one.result()["subtree"] for one in others}) == 1
    assert all(one == found[0] for one in found)
    assert sorted(site.ids()) == sorted([LEASE, *(f"{n:016x}" for n in range(8))])
    assert site.told()["snapshots"] == 2


def test_one_id_with_other_words_is_refused(site: Asking) -> None:
    site.add("one", {"file": b"content"})
    site.add("two", {"file": b"content"})
    first = site.take("one")
    others: list[dict[str, object]] = [
        {"ref": "two"},
        {"target": "/pods/two"},
        {"prefix": "/opt/other"},
        {"profile": "start"},
        {"fast_path": "auto"},
        {"owner": "somebody"},
        {"of": "one"},
        {"namespace": os.stat("/proc/self/ns/mnt").st_ino},
    ]
    for other in others:
        with pytest.raises(ConflictError):
            site.take(**{"ref": "one", **other})  # type: ignore[arg-type]
    assert site.take("one") == first
    assert site.ids() == [LEASE]


def test_a_lease_without_a_name_space_lasts_until_it_is_given_back(site: Asking) -> None:
    site.add("one", {"file": b"content"})
    found = site.take("one")
    seen = site.show("one")  # one of the other kind beside it, which is looked for
    time.sleep(2.5)  # longer than a mount may be seen nowhere
    site.kill_server()
    assert sorted(one["owner"] for one in site.told()["mounts"]) == ["", "csi"]
    unmount(seen)
    time.sleep(1.5)
    assert site.ids() == [LEASE]
    assert (inside(found) / "file").read_bytes() == b"content"
    site.ask("unmounted", id=LEASE)
    assert site.ids() == []
    assert site.names() == []
    site.ask("unmounted", id=LEASE)
    # The id is free again, for anything.
    site.add("two", {"file": b"two"})
    assert (inside(site.take("two")) / "file").read_bytes() == b"two"


@pytest.mark.parametrize(
    "words",
    [
        {"id": "0123"},
        {"id": "0123456789ABCDEF"},
        {"id": "0123456789abcdef\n"},
        {"id": 5},
        {"id": ["0123456789abcdef"]},
        {"owner": "CSI"},
        {"owner": "x" * 33},
        {"owner": None},
        {"namespace": True},
        {"namespace": -1},
        {"namespace": "0"},
        {"fast_path": "maybe"},
        {"of": "no such ref!"},
        {"of": 7},
        {"ref": "bad ref@" + "0" * 64},
        {"store": "s3://"},
        {"store": None},
        {"prefix": "/a\0b"},
        {"target": "/" + "\U0001f600" * 4000, "prefix": "/" + "\U0001f600" * 4000},
    ],
)
def test_words_that_cannot_be(words: dict[str, object]) -> None:
    good = {"store": "/a/store", "ref": "one", "target": "/pods/one", "namespace": 0}
    assert Asked.parse(good).lease.prefix == "/pods/one"
    with pytest.raises(UsageError):
        Asked.parse({**good, **words})


def test_a_digest_must_be_of_the_ref_that_is_named(site: Asking) -> None:
    digests = []
    for number in range(4):
        site.add("one", {"file": b"%d" % number})
        digests.append(site.store.repository.resolve("one").hex())
    site.add("two", {"file": b"two"})
    other = site.store.repository.resolve("two").hex()
    for number, digest in enumerate(digests):
        for _ in range(2):
            found = site.take(f"@{digest}", of="default/one:latest", id=f"{number:016x}")
            assert (inside(found) / "file").read_bytes() == b"%d" % number
    # What is served, and cached, and in the store, is nobody's who may only have "one".
    site.take(f"@{other}", id="e" * 16)
    for _ in range(2):
        with pytest.raises(AccessDeniedError, match="is not a snapshot of one:latest"):
            site.take(f"@{other}", of="one")
    with pytest.raises(NotFoundError):
        site.take(f"@{digests[0]}", of="three")
    with pytest.raises(NotFoundError):
        site.take("@" + "0" * 64)
    assert len(site.ids()) == 5


def test_only_so_many_ancestors_are_looked_at(
    site: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        site.add("one", {"file": b"%d" % number})
    history = [name for name, _ in site.store.repository.history(
        site.store.repository.resolve("one"))]  # fmt: skip
    monkeypatch.setattr(lineage, "MAX_ANCESTORS", 2)
    found = access.Access(site.store.repository.cache, _Only(site))  # type: ignore[arg-type]
    source = Source(site.store.url)
    for name in history[:2]:
        assert found.prove(source, f"@{name.hex()}", "one", None) == name
    with pytest.raises(AccessDeniedError):
        found.prove(source, f"@{history[2].hex()}", "one", None)


class _Only:
    """The supplies of one store."""

    def __init__(self, site: Asking) -> None:
        self.repository = lambda source: site.store.repository


def test_what_a_node_knows_needs_no_store(site: Asking) -> None:
    site.add("one", {"file": b"content"})
    digest = "@" + site.store.repository.resolve("one").hex()
    site.take(digest)
    site.kill_server()
    site.store.path("").rename(site.base / "away")
    again = site.take(digest, id="f" * 16, target="/pods/two")
    assert inside(again).joinpath("file").exists()
    with pytest.raises(EnvstoreError):
        site.take("one", id="e" * 16)
    (site.base / "away").rename(site.store.path(""))


def test_a_store_that_lies_about_its_id_gets_nothing_of_another(site: Asking) -> None:
    site.add("one", {"file": b"secret"})
    site.take("one")
    with Store(site.base / "liar") as liar:
        shutil.copy(site.store.path("envstore.json"), liar.path("envstore.json"))
        snapshot = replace(site.store.snapshot("one"), message="mine")
        name = save_snapshot(liar.repository.objects, snapshot)
        with pytest.raises(NotFoundError):
            site.take(f"@{name.hex()}", store=liar.url, id="f" * 16)
    assert site.ids() == [LEASE]


def test_an_image_that_is_damaged_or_gone_is_written_again(site: Asking) -> None:
    if probe(site.base / "cache") is not None:
        pytest.skip("no fast path here")
    site.add("one", {f"f{n}": b"%d" % n for n in range(50)})
    image = Path(site.take("one", fast_path="auto")["fast"]["image"])
    good = image.read_bytes()
    image.write_bytes(good[:2000] + bytes(16) + good[2016:])
    assert site.take("one", fast_path="auto")["fast"]["image"] == str(image)
    assert image.read_bytes() == good
    image.unlink()
    site.take("one", fast_path="auto")
    assert image.read_bytes() == good


def test_what_each_snapshot_has_fetched_is_told(site: Asking) -> None:
    site.add("one", {"file": BIG})
    site.add("two", {"file": noise("two", 1 << 20)})
    one, two = site.take("one"), site.take("two", id="f" * 16, owner="other", target="/pods/two")
    assert (inside(one) / "file").read_bytes() == BIG
    told = site.told()
    mounts = {mount["id"]: mount for mount in told["mounts"]}
    first, second = mounts[LEASE], mounts["f" * 16]
    assert first["digest"] == one["snapshot"]
    assert {name: first[name] for name in ("owner", "mountpoint", "ref", "prefix", "url")} == {
        "owner": "csi", "mountpoint": "/pods/one", "ref": "one", "prefix": "/opt/envstore",
        "url": site.store.url,
    }  # fmt: skip
    assert first["bytes_fetched"] >= len(BIG)
    assert first["fetch_requests"] > 0
    assert (second["owner"], second["bytes_fetched"], second["fetch_requests"]) == ("other", 0, 0)
    assert second["started"] <= site.told()["mounts"][1]["started"]
    assert told["cache"]["capacity"] > told["cache"]["bytes"] > len(BIG)
    assert told["restarts"] == 0
    site.settled()
    site.upgrade_to("")  # a server that is killed loses what it counted in its last second
    assert (inside(two) / "file").read_bytes() == noise("two", 1 << 20)
    after = {mount["id"]: mount["bytes_fetched"] for mount in site.told()["mounts"]}
    assert after[LEASE] == first["bytes_fetched"]
    assert after["f" * 16] >= 1 << 20
    assert site.told()["restarts"] == 1
