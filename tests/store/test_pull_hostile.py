"""Stores whose names and checksums are right, and which lie: nothing is written outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError
from envstore.store import pull as pull_module
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry, sort_key
from envstore.store.frames import encode_frame
from envstore.store.locations import NOWHERE, FrameRef, Locations, locations_key
from envstore.store.manifest import Root, build_parts, manifest_key
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import PackBuilder, pack_key
from envstore.store.pull import pull
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind
from tests import trees
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


class _Forge:
    """Writes a snapshot of arbitrary entries; ``content`` is one chunk anyone may refer to."""

    content = b"stolen content" * 100

    def __init__(self, store: Store) -> None:
        self.objects: ObjectStore = store.repository.objects
        self.name = digest(self.content)

    def file(self, path: bytes, **more: object) -> Entry:
        size = len(self.content)
        refs = ((self.name, size),)
        return Entry(path, Kind.FILE, False, size, self.name, refs, **more)  # type: ignore[arg-type]

    def save(
        self,
        entries: list[Entry],
        *,
        ordered: bool = True,
        offset: int = 0,
        part_offset: int = 0,
        change: Callable[[Root], Root] = lambda root: root,
        frame: int = 0,
    ) -> bytes:
        if ordered:
            entries = sorted(entries, key=lambda entry: sort_key(entry.path))
        parts = list(build_parts(entries))
        builder = PackBuilder()
        builder.add(*encode_frame([(self.name, self.content)]))
        for info, raw in parts:
            builder.add(*encode_frame([(info.digest, raw)]))
        finished = builder.finish()
        assert finished is not None
        pack, data = finished
        self.objects.put(pack_key(pack.digest), data)
        locations = Locations()
        for row, at in zip(pack.frames, pack.offsets(), strict=True):
            locations.frames.append(
                FrameRef(pack.digest, at, row.stored, row.raw, row.codec, row.digest)
            )
        for number in range(len(parts)):
            locations.part_frames.append(number + 1)
            locations.part_offsets.append(part_offset)
        for entry in entries:
            for name, _ in entry.refs:
                locations.ref_frames.append(NOWHERE if name == HOLE else frame)
                locations.ref_offsets.append(offset)
        root = change(
            Root(
                tuple(info for info, _ in parts),
                len(entries),
                sum(entry.kind is Kind.FILE for entry in entries),
                sum(entry.size for entry in entries),
            )
        )
        self.objects.put(manifest_key(root.digest), root.seal())
        self.objects.put(locations_key(root.digest), locations.seal())
        snapshot = Snapshot("dir", root.digest, root.files, root.logical, "now")
        return save_snapshot(self.objects, snapshot)


@pytest.fixture
def forge(store: Store) -> _Forge:
    return _Forge(store)


def _but_for_the_lease(found: dict[bytes, trees.Facts]) -> dict[bytes, trees.Facts]:
    """Leave out what a lease of the snapshot leaves behind in the store's directory."""
    left = (b"store/objects/leases", b"store/objects/.locks")
    return {path: facts for path, facts in found.items() if not path.startswith(left)}


def _refused(store: Store, snapshot: bytes, tmp_path: Path) -> str:
    """Pull and return the error, having checked that nothing was left or touched anywhere."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "outside").write_text("precious")
    (place / "secret").mkdir()
    before = _but_for_the_lease(trees.describe(tmp_path, times=False))
    with pytest.raises(CorruptError) as caught:
        pull(store.repository, snapshot, place / "copy")
    assert _but_for_the_lease(trees.describe(tmp_path, times=False)) == before
    return str(caught.value)


def test_the_forge_makes_sound_snapshots(store: Store, forge: _Forge, tmp_path: Path) -> None:
    folder = Entry(b"dir", Kind.DIRECTORY)
    name = forge.save([folder, forge.file(b"dir/a"), forge.file(b"dir/b", link=b"dir/a")])
    pull(store.repository, name, tmp_path / "copy")
    assert (tmp_path / "copy/dir/a").read_bytes() == forge.content
    assert (tmp_path / "copy/dir/a").samefile(tmp_path / "copy/dir/b")


@pytest.mark.parametrize("target", [b"../outside", b"/etc", b"..", b"."])
def test_entries_below_a_symbolic_link(
    store: Store, forge: _Forge, tmp_path: Path, target: bytes
) -> None:
    link = Entry(b"link", Kind.SYMLINK, target=target)
    name = forge.save([link, forge.file(b"link/file")])
    _refused(store, name, tmp_path)


def test_a_symbolic_link_and_a_directory_of_one_name(
    store: Store, forge: _Forge, tmp_path: Path
) -> None:
    entries = [
        Entry(b"x", Kind.SYMLINK, target=b"../secret"),
        Entry(b"x", Kind.DIRECTORY),
        forge.file(b"x/file"),
    ]
    _refused(store, forge.save(entries, ordered=False), tmp_path)
    _refused_again = forge.save([entries[1], entries[0], entries[2]], ordered=False)
    with pytest.raises(CorruptError):
        pull(store.repository, _refused_again, tmp_path / "place" / "copy")


@pytest.mark.parametrize(
    "path",
    [b"..", b"../outside", b"../copy2", b".", b"", b"/absolute", b"a/../../outside", b"a//b"],
)
def test_paths_that_lead_elsewhere(
    store: Store, forge: _Forge, tmp_path: Path, path: bytes
) -> None:
    entries = [Entry(b"a", Kind.DIRECTORY), forge.file(path)]
    _refused(store, forge.save(entries), tmp_path)


def test_directories_that_lead_elsewhere(store: Store, forge: _Forge, tmp_path: Path) -> None:
    entries = [Entry(b"..", Kind.DIRECTORY), forge.file(b"../outside")]
    _refused(store, forge.save(entries), tmp_path)


def test_a_file_twice(store: Store, forge: _Forge, tmp_path: Path) -> None:
    _refused(store, forge.save([forge.file(b"a"), forge.file(b"a")]), tmp_path)


def test_entries_out_of_order(store: Store, forge: _Forge, tmp_path: Path) -> None:
    entries = [forge.file(b"b"), forge.file(b"a")]
    assert "order" in _refused(store, forge.save(entries, ordered=False), tmp_path)


@pytest.mark.parametrize(
    "link",
    [
        b"../outside", b"/etc/passwd", b"outside", b"dir/../../outside", b"b", b"dir", b"later",
        b"symlink", b"c", b"../../../../../../../../etc/passwd",
    ],
)  # fmt: skip
def test_hard_links_to_anything_but_an_earlier_file(
    store: Store, forge: _Forge, tmp_path: Path, link: bytes
) -> None:
    entries = [
        Entry(b"a", Kind.SYMLINK, target=b"../outside"),
        forge.file(b"b", link=link),
        Entry(b"dir", Kind.DIRECTORY),
        forge.file(b"later"),
        Entry(b"symlink", Kind.SYMLINK, target=b"../outside"),
    ]
    if link == b"c":  # a further name of a further name
        entries[1:2] = [forge.file(b"b"), forge.file(b"c", link=b"b"), forge.file(b"d", link=b"c")]
    assert "further name" in _refused(store, forge.save(entries), tmp_path)


def test_a_hard_link_with_other_content(store: Store, forge: _Forge, tmp_path: Path) -> None:
    other = replace(forge.file(b"b", link=b"a"), size=9, refs=((HOLE, 9),))
    assert "further name" in _refused(store, forge.save([forge.file(b"a"), other]), tmp_path)


def test_chunks_that_are_not_where_the_locations_say(
    store: Store, forge: _Forge, tmp_path: Path
) -> None:
    for number, change in enumerate(({"offset": 1}, {"frame": 1}, {"offset": 2**32 - 1})):
        name = forge.save([forge.file(b"a" * (number + 1))], **change)  # type: ignore[arg-type]
        with pytest.raises(CorruptError, match="is not where its locations say"):
            pull(store.repository, name, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("offset", [1, 50, 2**32 - 1])
def test_parts_that_are_not_where_the_locations_say(
    store: Store, forge: _Forge, tmp_path: Path, offset: int
) -> None:
    name = forge.save([forge.file(b"a")], part_offset=offset)
    assert "does not match its digest" in _refused(store, name, tmp_path)


def test_chunks_that_are_nowhere(store: Store, forge: _Forge, tmp_path: Path) -> None:
    name = forge.save([forge.file(b"a")], frame=NOWHERE)
    assert "nowhere" in _refused(store, name, tmp_path)


@pytest.mark.parametrize("refs", [0, 2, 1000])
def test_roots_that_miscount_chunks(store: Store, forge: _Forge, tmp_path: Path, refs: int) -> None:
    def change(root: Root) -> Root:
        return replace(root, parts=(replace(root.parts[0], refs=refs),))

    _refused(store, forge.save([forge.file(b"a")], change=change), tmp_path)


def test_roots_that_miscount_entries(store: Store, forge: _Forge, tmp_path: Path) -> None:
    def change(root: Root) -> Root:
        return replace(root, parts=(replace(root.parts[0], entries=7),))

    assert "root" in _refused(store, forge.save([forge.file(b"a")], change=change), tmp_path)


def test_sizes_that_do_not_add_up(store: Store, forge: _Forge, tmp_path: Path) -> None:
    entry = replace(forge.file(b"a"), size=1 << 40)
    assert "add up" in _refused(store, forge.save([entry]), tmp_path)


def test_no_name_is_ever_followed(
    store: Store, forge: _Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Should a link come to stand where a file was made, the content must not go through it.
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious" * 200)
    make_file = pull_module._make_file

    def replaced(folder: int, name: bytes, size: int) -> None:
        make_file(folder, name, size)
        os.unlink(name, dir_fd=folder)
        os.symlink(os.fsencode(outside), name, dir_fd=folder)

    monkeypatch.setattr(pull_module, "_make_file", replaced)
    with pytest.raises(EnvstoreError):
        pull(store.repository, forge.save([forge.file(b"a")]), tmp_path / "copy")
    assert outside.read_bytes() == b"precious" * 200
