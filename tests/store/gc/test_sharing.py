"""What is live in two places is not for long."""

from __future__ import annotations

import contextlib
import random
import shutil
from array import array
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError
from envstore.store.digest import digest
from envstore.store.frames import Codec
from envstore.store.gc import sharing
from envstore.store.gc.columns import open_columns
from envstore.store.gc.sharing import Place, share_columns
from envstore.store.locations import FrameRef, Locations
from envstore.store.profiles import Range, new_profile, save_profile
from tests import trees
from tests.store.gc.collecting import gc, keys, remove, size
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

KIB = 1 << 10


def _tree(root: Path, own: str) -> Path:
    """Make a tree of which much is in all others."""
    root.mkdir()
    for number in range(12):
        name = f"all {number}" if number % 3 else f"{own} {number}"
        (root / f"file {number}").write_bytes(trees.noise(name, 90 * KIB))
    trees.settle(root)
    return root


def _strangers(store: Store, tmp_path: Path, count: int = 3) -> list[Path]:
    """Push trees by writers who see nothing of each other."""
    aside = tmp_path / "aside"
    aside.mkdir()
    roots = []
    for number in range(count):
        roots.append(_tree(tmp_path / f"tree {number}", f"own {number}"))
        store.push(roots[-1], f"ref{number}")
        for key in store.object_keys("index/"):
            shutil.move(store.path(key), aside)
        store.forget()
    for path in aside.iterdir():
        shutil.move(path, store.path(f"index/{path.name}"))
    return roots


def _same(store: Store, roots: list[Path], where: Path) -> None:
    store.assert_sound()
    for number, root in enumerate(roots):
        shutil.rmtree(where, ignore_errors=True)
        store.pull(where, f"ref{number}")
        assert trees.describe(where) == trees.describe(root)


def _fresh(roots: list[Path], place: Path) -> int:
    with Store(place) as fresh:
        for number, root in enumerate(roots):
            fresh.push(root, f"ref{number}")
        return size(fresh)


def test_one_copy_stays_of_what_strangers_have_stored(store: Store, tmp_path: Path) -> None:
    roots = _strangers(store, tmp_path)
    least = _fresh(roots, tmp_path / "fresh")
    assert size(store) > 1.5 * least
    gc(store, max_unused=0.01)
    assert size(store) <= 1.05 * least
    _same(store, roots, tmp_path / "out")
    again = keys(store)
    gc(store)
    assert keys(store) == again


def test_a_part_of_the_chunks_at_a_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "AT_ONCE", 30)
    roots = _strangers(store, tmp_path)
    least = _fresh(roots, tmp_path / "fresh")
    for _ in range(60):
        gc(store, max_unused=0.01)
        if size(store) <= 1.05 * least:
            break
    assert size(store) <= 1.05 * least
    _same(store, roots, tmp_path / "out")


def test_what_was_shared_goes_with_the_last_that_needs_it(store: Store, tmp_path: Path) -> None:
    roots = _strangers(store, tmp_path)
    gc(store)
    remove(store, "ref0", "ref1")
    gc(store, max_unused=0.01)
    store.assert_sound()
    store.pull(tmp_path / "out", "ref2")
    assert trees.describe(tmp_path / "out") == trees.describe(roots[2])
    assert size(store) <= 1.05 * _fresh(roots[2:], tmp_path / "fresh")


def test_a_tree_with_a_profile_keeps_its_own_copies(store: Store, tmp_path: Path) -> None:
    roots = _strangers(store, tmp_path, 2)
    # That of the smallest packs, which would otherwise have to give way.
    homes = {number: store.repository.located(store.snapshot(f"ref{number}").manifest)[1]
             for number in range(2)}  # fmt: skip
    packs = {number: {frame.pack for frame in home.frames} for number, home in homes.items()}
    for number in range(2):
        manifest = store.snapshot(f"ref{number}").manifest
        ranges = [Range(b"file 1", 0, 1000)]
        save_profile(store.repository.objects, manifest, "start", new_profile(ranges, []))
    gc(store)
    for number in range(2):
        _, home = store.repository.located(store.snapshot(f"ref{number}").manifest)
        assert {frame.pack for frame in home.frames} == packs[number]
    _same(store, roots, tmp_path / "out")


def test_copies_that_are_damaged_are_not_chosen(store: Store, tmp_path: Path) -> None:
    roots = _strangers(store, tmp_path, 2)
    sizes = {key: store.path(key).stat().st_size for key in store.object_keys("packs/")}
    largest = max(sizes, key=lambda key: (sizes[key], key))
    data = bytearray(store.path(largest).read_bytes())
    good = bytes(data)
    data[len(data) // 3] ^= 1
    store.path(largest).write_bytes(data)
    gc(store)
    # Whatever was led to it has its bytes: only what was there alone is lost for now.
    store.path(largest).write_bytes(good)
    _same(store, roots, tmp_path / "out")


def test_the_store_may_fail_while_it_shares(store: Store, tmp_path: Path) -> None:
    roots = _strangers(store, tmp_path)
    choose = random.Random(5)
    for _ in range(8):
        fault = store.faults.fail(
            "*", EnvstoreError("no"), skip=choose.randrange(90), times=1, after=True
        )
        with contextlib.suppress(EnvstoreError):
            gc(store)
        fault.remove()
        store.assert_sound()
    gc(store, max_unused=0.01)
    assert size(store) <= 1.05 * _fresh(roots, tmp_path / "fresh")
    _same(store, roots, tmp_path / "out")


def _frame(pack: int, offset: int, codec: int = 1) -> FrameRef:
    return FrameRef(digest(b"%d" % pack), offset, 500, 1000, codec, digest(b"%d" % offset))


def test_differences_keep_their_anchors_and_what_nothing_leads_to_goes() -> None:
    anchored = (_frame(1, 500, Codec.XOR), _frame(2, 0))
    manifest = digest(b"manifest")
    locations = Locations(
        frames=[_frame(1, 0), *anchored, _frame(3, 0)],
        part_frames=array("I", [0]),
        part_offsets=array("I", [0]),
        ref_frames=array("I", [1, 0, 3]),
        ref_offsets=array("I", [0, 10, 20]),
    )
    columns = open_columns(locations.seal(), manifest)
    new = _frame(4, 700)
    shared = {
        (digest(b"1"), 0): {
            0: (Place(_frame(1, 0), 0, 10), Place(new, 100, 10)),
            10: (Place(_frame(1, 0), 10, 10), Place(_frame(3, 0), 40, 10)),
        }
    }
    assert share_columns(columns, shared)
    assert columns.packs == [digest(b"1"), digest(b"2"), digest(b"3"), digest(b"4")]
    assert list(columns.offsets) == [500, 0, 0, 700]
    assert list(columns.codecs) == [Codec.XOR, 1, 1, 1]
    blocks = [(list(frames), list(places)) for frames, places in columns.blocks()]
    assert blocks == [([3], [100]), ([0, 2, 2], [0, 40, 20])]
    assert not share_columns(columns, shared)
