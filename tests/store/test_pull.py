from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError, NotFoundError, UnavailableError, UsageError
from envstore.store import pull as pull_module
from envstore.store.digest import digest
from envstore.store.entries import HOLE, NORMAL_MTIME_NS, Entry, sort_key
from envstore.store.frames import encode_frame
from envstore.store.locations import NOWHERE, FrameRef, Locations, locations_key
from envstore.store.manifest import Root, build_parts, manifest_key
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import PackBuilder, pack_key
from envstore.store.pull import pull
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind
from tests import trees
from tests.faulty import FaultyStore
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        yield opened


def _faulty(store: Store) -> FaultyStore:
    objects = store.repository.objects
    assert isinstance(objects, FaultyStore)
    return objects


def _holes(path: Path | str) -> bool:
    st = os.stat(path)
    return st.st_blocks * 512 < st.st_size


def test_every_byte_mode_time_and_link_comes_back(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    trees.fill(tree)
    pushed = store.push(tree)
    result = store.pull(copy)
    assert trees.describe(copy) == trees.describe(tree)
    assert (result.files, result.logical_bytes) == (pushed.files, pushed.logical_bytes)
    for name in ("only a hole", "holes", "hole first", "dense zeros"):
        assert _holes(copy / "sparse" / name)


def test_a_normalised_tree_has_plain_modes_and_one_time(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    trees.fill(tree)
    store.push(tree, kind="env", normalise=True)
    store.pull(copy)
    left, right = trees.describe(tree), trees.describe(copy)
    assert set(left) == set(right)
    for path in set(right) - {b"."}:
        old, new = left[path], right[path]
        assert (new.kind, new.size, new.digest, new.target) == (
            old.kind, old.size, old.digest, old.target,
        )  # fmt: skip
        assert (new.mtime_ns, new.names) == (NORMAL_MTIME_NS, ())
        if new.kind == "directory":
            assert new.mode == 0o755
        elif new.kind == "file":
            assert new.mode == (0o755 if old.mode & 0o111 else 0o644)


def test_more_than_four_gigabytes(store: Store, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    tree.mkdir()
    with open(tree / "huge", "wb") as file:
        file.truncate(trees.HUGE_SIZE)
        for at, data in {
            0: b"start",
            (4 << 30) + 3: b"beyond",
            trees.HUGE_SIZE - 7: b"the end",
        }.items():
            file.seek(at)
            file.write(data)
    pushed = store.push(tree)
    assert pushed.logical_bytes == trees.HUGE_SIZE
    assert pushed.stored_bytes < 1 << 20
    store.pull(copy)
    assert _holes(copy / "huge")
    with open(tree / "huge", "rb") as old, open(copy / "huge", "rb") as new:
        assert os.fstat(new.fileno()).st_size == trees.HUGE_SIZE
        at = 0
        while True:
            # Compare wherever either of them holds data.
            starts = []
            for file in (old, new):
                try:
                    starts.append(os.lseek(file.fileno(), at, os.SEEK_DATA))
                except OSError:
                    continue
            if not starts:
                break
            at = min(starts)
            piece = os.pread(old.fileno(), 1 << 20, at)
            assert os.pread(new.fileno(), 1 << 20, at) == piece
            at += len(piece)


def test_an_empty_tree(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    store.push(tmp_path / "tree")
    store.pull(tmp_path / "copy")
    assert trees.describe(tmp_path / "copy") == trees.describe(tmp_path / "tree")


def test_one_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(trees.noise(1, 300_000))
    store.push(tmp_path / "model.bin")
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.bin").read_bytes() == trees.noise(1, 300_000)
    assert os.listdir(tmp_path / "copy") == ["model.bin"]


def test_few_and_large_requests(store: Store, tmp_path: Path) -> None:
    trees.plain(tmp_path / "tree", 1, files=600, size=40_000)
    store.push(tmp_path / "tree")
    result = store.pull(tmp_path / "copy")
    assert result.requests <= 12
    assert result.fetched_bytes < 1.1 * sum(
        path.stat().st_size for path in (store.root / "objects" / "packs").rglob("*")
        if path.is_file()
    )  # fmt: skip


# Destinations.


@pytest.fixture
def small(store: Store, tmp_path: Path) -> Store:
    trees.plain(tmp_path / "tree", "small", files=12)
    store.push(tmp_path / "tree")
    return store


def test_into_an_empty_directory(small: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    before = copy.stat().st_ino
    small.pull(copy)
    assert trees.describe(copy) == trees.describe(tmp_path / "tree")
    # The directory itself stays: it may be a mount point, or somebody's working directory.
    assert copy.stat().st_ino == before


def test_into_the_working_directory(
    small: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    small.pull(Path("."))
    assert trees.describe(Path(".")) == trees.describe(tmp_path / "tree")


def test_into_a_very_long_name(small: Store, tmp_path: Path) -> None:
    small.pull(tmp_path / ("x" * 255))
    assert trees.describe(tmp_path / ("x" * 255)) == trees.describe(tmp_path / "tree")


@pytest.mark.parametrize("what", ["file", "full directory", "symlink", "dangling", "no parent"])
def test_destinations_in_use_are_left_alone(small: Store, tmp_path: Path, what: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    target = place / "target"
    if what == "file":
        target.write_text("mine")
    elif what == "full directory":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif what == "symlink":
        (place / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    elif what == "dangling":
        target.symlink_to("nowhere")
    else:
        target = place / "no" / "parent"
    before = trees.describe(place)
    with pytest.raises(UsageError, match=str(target if what != "no parent" else place / "no")):
        small.pull(target)
    assert trees.describe(place) == before


def _break_pack(store: Store) -> None:
    for key in store.object_keys("packs/"):
        path = store.path(key)
        data = bytearray(path.read_bytes())
        data[20] ^= 0xFF
        path.write_bytes(data)


def _lose_packs(store: Store) -> None:
    for key in store.object_keys("packs/"):
        store.path(key).unlink()


def _lose_locations(store: Store) -> None:
    for key in store.object_keys("locations/"):
        store.path(key).unlink()


def _cut_the_wire(store: Store) -> None:
    # The first range holds the manifest's parts.
    _faulty(store).fail("get_range", UnavailableError("gone"), skip=1)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_break_pack, CorruptError),
        (_lose_packs, NotFoundError),
        (_lose_locations, NotFoundError),
        (_cut_the_wire, UnavailableError),
    ],
)
def test_a_failed_pull_leaves_no_trace(
    small: Store,
    tmp_path: Path,
    damage: Callable[[Store], None],
    error: type[EnvstoreError],
    existing: bool,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        (place / "copy").mkdir()
    before = trees.describe(place, times=False)
    damage(small)
    with pytest.raises(error):
        small.pull(place / "copy")
    assert trees.describe(place, times=False) == before
    assert set(os.listdir(tmp_path)) == {"place", "store", "tree"}


def test_a_write_that_fails_is_told_and_leaves_no_trace(small: Store, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    code = """
import resource, signal, sys
from pathlib import Path
from envstore.errors import EnvstoreError
from envstore.store.pull import pull
from envstore.store.repository import Repository

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with Repository.open(sys.argv[1]) as repository:
    try:
        pull(repository, repository.resolve("tree"), Path(sys.argv[2]))
    except EnvstoreError as error:
        sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, small.url, str(place / "copy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"cannot write {place}/copy: File too large" in done.stderr
    assert os.listdir(place) == []


# Hostile stores: everything below has right names and checksums, and lies.


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
            locations.part_offsets.append(0)
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


def _refused(store: Store, snapshot: bytes, tmp_path: Path) -> str:
    """Pull and return the error, having checked that nothing was left or touched anywhere."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "outside").write_text("precious")
    (place / "secret").mkdir()
    before = trees.describe(tmp_path, times=False)
    with pytest.raises(CorruptError) as caught:
        pull(store.repository, snapshot, place / "copy")
    assert trees.describe(tmp_path, times=False) == before
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
