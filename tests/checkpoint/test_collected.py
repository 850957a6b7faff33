"""What becomes of checkpoints while garbage is collected: nothing is built on what is doomed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from envstore.checkpoint import recipes
from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem
from envstore.checkpoint.hashing import HashPool
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.checkpoint.uploading import Knowledge, PartUpload, save_part_snapshot
from envstore.store.doomed import read_doomed
from envstore.store.roots import closure
from envstore.store.sessions import writing
from tests import trees
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.slotfill import content, orders, stage, state
from tests.checkpoint.talker import Talker, assert_holds, run_of, serving
from tests.checkpoint.test_uploading import _placed, _there
from tests.garbage import condemn, delete_condemned
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        monkeypatch.setenv("ENVSTORE_URL", opened.url)
        monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "node"))
        yield opened


@pytest.fixture
def hashes() -> Iterator[HashPool]:
    pool = HashPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("deleted", [False, True])
def test_a_persister_forgets_what_is_doomed_or_gone(
    store: Store, slots: SlotDirectory, owner: SlotOwner, deleted: bool
) -> None:
    files = state({"m": (300_000, 1)})
    with serving(slots.path), Talker(slots.path) as talker:

        def save(step: int) -> int:
            wanted = orders(store.url, step)
            writer = stage(owner, wanted, files)
            talker.ask("staged", slot=writer.number, id=str(wanted.checkpoint))
            return int(talker.hear("durable", id=str(wanted.checkpoint))["sent"])

        first = save(1)
        assert save(2) < 50_000 < first
        run = run_of(store.repository)
        keys: set[str] = set()
        for step in (1, 2):
            commit = run.find(step)
            keys |= closure(store.repository, commit.snapshot)
            assert run.remove(commit)
        condemn(store.repository, *keys)
        if deleted:
            delete_condemned(store.repository)
        assert save(3) > 300_000
        if not deleted:
            delete_condemned(store.repository)
        assert save(4) < 50_000
    for step in (3, 4):
        assert_holds(store.repository, step, files)
    assert store.object_keys("sessions/") == []


def test_earlier_waves_are_claimed_by_who_goes_on_with_them(
    store: Store, hashes: HashPool, tmp_path: Path
) -> None:
    first, second = content(1, 200_000), content(2, 200_000)
    one, view = _placed({"m": [first, b""]})
    # The plan is that of the whole part, whichever wave is there.
    two, later = _placed({"m": [b"", second]})
    one[0] = one[0].__class__("m", (one[0].segments[0], (0, len(second))))
    two[0] = two[0].__class__("m", ((0, len(first)), two[0].segments[1]))
    recipe = recipes.Recipe(one)
    with writing(store.repository, "first wave") as (_, inside):
        with PartUpload(Knowledge(inside), hashes, recipe) as upload:
            upload.add(one, view, _there)
            upload.flush()
        recipes.keep(tmp_path / "waves-0", 7, 1, recipe)
    condemn(store.repository, *store.object_keys("packs/"))
    knowledge = Knowledge(store.repository)
    with writing(store.repository, "second wave") as (_, inside):
        knowledge.use(inside)
        found = recipes.kept(tmp_path / "waves-0", 7, 1, two)
        with PartUpload(knowledge, hashes, found) as upload:
            upload.add(two, later, _there)
            root = upload.finish()
        name = save_part_snapshot(inside, root, orders(store.url, 1))
    assert read_doomed(store.repository.objects).keys() == frozenset()
    assert store.verify_targets([("it", name)]).ok


def test_a_merge_claims_its_parts(store: Store) -> None:
    run = RunStore(store.repository, RUN)
    run.open_epoch("job", 2, lambda _: None)
    id = CheckpointId(5, 1)
    parts = [make_part(store.repository, id, rank, 2) for rank in (0, 1)]
    keys = set()
    for part in parts:
        run.put_part(part)
        keys |= closure(store.repository, part.snapshot)
    condemn(store.repository, *keys, "packs/aa/x")
    commit = run.try_commit(id)
    assert commit is not None
    assert read_doomed(store.repository.objects).keys() == {"packs/aa/x"}
    assert store.verify_targets([("it", commit.snapshot)]).ok


def test_a_change_of_a_tree_claims_what_it_begins_with(store: Store) -> None:
    fsspec.register_implementation("envstore", EnvstoreFileSystem, clobber=True)
    fs = fsspec.filesystem("envstore", store=store.url)
    try:
        for name in ("one", "two"):
            with fs.open(f"team/data/v1/{name}", "wb") as file:
                file.write(trees.noise(name, 100_000))
        name = store.repository.resolve("team/data:v1")
        condemn(store.repository, *closure(store.repository, name))
        fs.cp_file("team/data/v1/one", "team/other/v1/one")
        with fs.open("team/data/v1/three", "wb") as file:
            file.write(b"three")
        assert read_doomed(store.repository.objects).keys() == frozenset()
        assert fs.cat("team/data/v1/one") == trees.noise("one", 100_000)
    finally:
        EnvstoreFileSystem.clear_instance_cache()
    assert store.verify(whole=False).ok
