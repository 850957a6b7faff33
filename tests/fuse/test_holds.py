"""What is mounted is leased in its store: by whichever server, for as long as it is mounted."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from envstore.errors import AccessDeniedError, UnavailableError
from envstore.fuse import holds as holds_module
from envstore.fuse.complaints import Complaints
from envstore.fuse.holds import HOLD, Holds
from envstore.fuse.keeping import Keepsake
from envstore.fuse.mount import unmount
from envstore.fuse.supplies import Source
from envstore.store.catalog import remove_refs
from envstore.store.gc.collecting import collect
from envstore.store.push import PushResult
from envstore.store.refs import RefName
from envstore.store.snapshots import snapshot_key
from tests.fuse.lives import ROOT, Live, kill, lived, until
from tests.fuse.test_node import Site
from tests.stores import Store

SOURCE = Source("file:///store")


class Server:
    """The leases of servers that follow each other, and what the holder keeps of them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.kept: dict[str, Keepsake] = {}

    def run(self, main: Callable[[Holds], Awaitable[None]]) -> None:
        """Run one server, which goes on with what the last one has left, and then dies."""

        async def loop() -> None:
            complaints = Complaints(logging.getLogger("envstore.fuse"))
            holds = Holds("here", self.kept.__setitem__, self.drop, complaints)
            for key, keepsake in [*self.kept.items()]:
                holds.restore(key, keepsake)
            async with trio.open_nursery() as nursery:
                holds.start(nursery)
                await main(holds)
                nursery.cancel_scope.cancel()

        trio.run(loop)

    def drop(self, key: str) -> None:
        del self.kept[key]

    def leases(self) -> list[str]:
        return self.store.object_keys("leases/")


@pytest.fixture
def pushed(store: Store, tmp_path: Path) -> PushResult:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content")
    return store.push(tmp_path / "tree")


@pytest.fixture
def server(store: Store) -> Server:
    return Server(store)


async def soon(true: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not true():
            await trio.sleep(0.01)


def test_one_lease_outlives_its_server(server: Server, pushed: PushResult) -> None:
    wanted = {(SOURCE, pushed.snapshot): server.store.repository.objects}

    async def first(holds: Holds) -> None:
        assert holds.describe(SOURCE, pushed.snapshot)["until"] == 0
        holds.settle(wanted)
        await soon(lambda: holds.describe(SOURCE, pushed.snapshot)["until"])

    server.run(first)
    (key,) = server.leases()
    ((kept, keepsake),) = server.kept.items()
    assert kept == HOLD + key[-16:]
    body = server.store.repository.objects.get(key)
    assert abs(keepsake.body["until"] - json.loads(body)["until"]) < 60

    async def second(holds: Holds) -> None:
        holds.settle(wanted)
        # There is time until it is to be renewed: nothing is asked of the store.
        await trio.testing.wait_all_tasks_blocked()
        assert holds.describe(SOURCE, pushed.snapshot)["until"] == keepsake.body["until"]
        assert server.leases() == [key]
        await holds.end()

    server.store.faults.clear()
    server.run(second)
    assert server.store.faults.count("put") == 0
    assert server.leases() == []
    assert server.kept == {}


def test_whoever_comes_late_renews_at_once(server: Server, pushed: PushResult) -> None:
    wanted = {(SOURCE, pushed.snapshot): server.store.repository.objects}
    body = {"store": SOURCE.url, "given": False, "snapshot": pushed.snapshot.hex(), "until": 7}
    server.kept[f"{HOLD}0123456789abcdef"] = Keepsake(body)

    async def main(holds: Holds) -> None:
        holds.settle(wanted)
        assert holds.describe(SOURCE, pushed.snapshot)["until"] == 0
        await soon(lambda: holds.describe(SOURCE, pushed.snapshot)["until"])

    server.run(main)
    assert server.leases() == [f"leases/{pushed.snapshot.hex()}/0123456789abcdef"]


def test_what_is_no_longer_served_is_given_back(server: Server, pushed: PushResult) -> None:
    wanted = {(SOURCE, pushed.snapshot): server.store.repository.objects}

    async def main(holds: Holds) -> None:
        for _ in range(3):
            holds.settle(wanted)
            await soon(server.leases)
            holds.settle({})
            await soon(lambda: not server.leases() and not server.kept)

    server.run(main)


def test_it_is_renewed_when_the_store_is_back(
    server: Server, pushed: PushResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(holds_module, "RENEW_SECONDS", 0.01)
    wanted = {(SOURCE, pushed.snapshot): server.store.repository.objects}
    fault = server.store.faults.fail("put", UnavailableError("away"), key="leases/", times=3)

    async def main(holds: Holds) -> None:
        holds.settle(wanted)
        await soon(lambda: holds.describe(SOURCE, pushed.snapshot)["reason"] == "away")
        await soon(lambda: holds.describe(SOURCE, pushed.snapshot)["until"])
        assert holds.describe(SOURCE, pushed.snapshot)["reason"] == ""
        await soon(lambda: server.store.faults.count("put", "leases/") > 6)
        await holds.end()

    server.run(main)
    assert fault.hits == 3
    assert server.leases() == []


def test_without_permission_it_is_told_once(
    server: Server, pushed: PushResult, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(holds_module, "RENEW_SECONDS", 0.01)
    wanted = {(SOURCE, pushed.snapshot): server.store.repository.objects}
    fault = server.store.faults.fail("put", AccessDeniedError("read only"), key="leases/")

    async def main(holds: Holds) -> None:
        holds.settle(wanted)
        await soon(lambda: fault.hits > 3)
        found = holds.describe(SOURCE, pushed.snapshot)
        assert found == {"until": 0, "reason": "read only"}
        await holds.end()

    server.run(main)
    assert [one for one in caplog.messages if "lease" in one] == ["no lease: read only"]


# Real mounts.


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with lived(tmp_path, monkeypatch) as made:
        made.push(files=6)
        yield made


def leases(live: Live) -> list[str]:
    return live.store.object_keys("leases/")


def drop_the_cache(live: Live) -> None:
    for path in (live.base / "cache" / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()


def collect_all(live: Live, *refs: str) -> None:
    """Remove refs and then everything that nothing keeps."""
    repository = live.store.repository
    remove_refs(repository, [RefName.parse(ref) for ref in refs])
    collect(repository, grace=0, max_unused=0)


def test_a_mount_outlives_its_ref_and_its_servers(live: Live) -> None:
    snapshot = live.store.repository.resolve("tree")
    live.mount()
    until(lambda: leases(live), "a lease")
    (key,) = leases(live)
    until(lambda: live.stats()["store_lease"]["until"] > 0)
    assert live.overview().leased
    live.kill_server()
    collect_all(live, "tree")
    drop_the_cache(live)
    live.check()
    kill(live.settled()["holder_pid"])
    live.kill_server()
    assert leases(live) == [key]
    drop_the_cache(live)
    live.check()
    unmount(live.place)
    assert leases(live) == []
    collect_all(live)
    assert live.store.repository.objects.size(snapshot_key(snapshot)) is None


def test_a_mount_goes_on_when_a_collector_repacks_it(live: Live) -> None:
    """Of a pack of which most is dead the rest is moved, and the pack deleted."""
    part = live.base / "part"
    part.mkdir()
    for name in ("file 0", "file 1"):
        shutil.copy2(live.tree / name, part / name)
    live.store.push(part, "part")
    live.request = replace(live.request, ref="part")
    live.mount()
    until(lambda: leases(live), "a lease")
    before = live.store.object_keys("packs/")
    collect_all(live, "tree")
    assert not set(before) <= set(live.store.object_keys("packs/"))
    shutil.rmtree(live.tree)
    part.rename(live.tree)
    drop_the_cache(live)
    live.check()
    assert live.stats()["errors"] == 0
    unmount(live.place)


def test_a_mount_of_what_nobody_may_write_to(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file in its place: root may write anywhere.
    (live.base / "store/objects/leases").write_bytes(b"")
    live.mount()
    live.check()
    until(lambda: live.stats()["store_lease"]["reason"])
    assert live.overview().leased is False
    assert "lease" in live.log()
    unmount(live.place)


@pytest.mark.skipif(not ROOT, reason="a node server takes root")
def test_a_node_has_one_lease_of_each_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Site) as site:
        site.mount()
        one = site.add("one", {"file": os.urandom(100_000)})
        site.add("two", {"file": os.urandom(100_000)})
        snapshots = [site.store.repository.resolve(ref).hex() for ref in ("one", "two")]
        places = [site.show("one", "a"), site.show("one", "b"), site.show("two", "c")]

        def held() -> list[str]:
            return sorted(key.split("/")[1] for key in leases(site))

        until(lambda: held() == sorted(snapshots), "two leases")
        before = leases(site)
        assert all(mount["store_lease"]["reason"] == "" for mount in site.told()["mounts"])
        site.kill_server()
        collect_all(site, "one")
        drop_the_cache(site)
        assert (places[1] / "file").read_bytes() == (one / "file").read_bytes()
        assert leases(site) == before
        unmount(places[0])
        assert leases(site) == before
        unmount(places[1])
        until(lambda: held() == snapshots[1:], "that one is given back")
        unmount(places[2])
        until(lambda: leases(site) == [], "that all are given back")
        shutil.rmtree(one)
