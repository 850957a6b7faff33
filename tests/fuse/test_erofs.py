"""Images of trees, read back by the kernel and by the checkers of those who made the format."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.fuse import erofs, overlay
from envstore.fuse.erofs import NotRepresentableError, ensure_image, find_image
from envstore.fuse.tree import Tree
from envstore.store.digest import digest
from envstore.store.entries import HOLE, MAX_HOLE, Entry
from envstore.store.source import Kind
from tests.fuse.images import MANIFEST, compare, mounted, written
from tests.manifests import file, folder, tree_of, trees

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount EROFS")


def link(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.SYMLINK, target=target)


def sized(path: bytes, size: int, **more: object) -> Entry:
    refs = [(HOLE, MAX_HOLE)] * (size // MAX_HOLE)
    if size % MAX_HOLE:
        refs.append((HOLE, size % MAX_HOLE))
    return file(path, size=size, digest=digest(b"%d" % size), refs=tuple(refs), **more)


def check(tree: Tree, image: Path) -> None:
    """Let the kernel and fsck.erofs have their say."""
    written(tree, image)
    done = subprocess.run(["fsck.erofs", image], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    with mounted(image) as top:
        compare(tree, top)


@given(trees())
def test_any_tree(entries: dict[bytes, Entry]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        check(tree_of(entries.values()), Path(directory) / "image")


@given(st.integers(0, 4095), st.integers(0, 140), st.booleans())
@settings(max_examples=60)
def test_whatever_lies_at_the_edge_of_a_block(length: int, files: int, kept: bool) -> None:
    # Inodes of every length before a directory and a link whose ends may cross into a block.
    entries = [link(b"a", b"t" * (length or 1)), folder(b"d")]
    entries += [file(b"d/%d" % number, b"x") for number in range(files)]
    entries += [link(b"z", b"u" * (4096 - (length or 1)))]
    if kept:
        entries = [replace(entry, mode=0o640, mtime_ns=10**18 + 7) for entry in entries]
    with tempfile.TemporaryDirectory() as directory:
        check(tree_of(entries, mode=0o755 if kept else 0), Path(directory) / "image")


def test_directories_of_many_blocks(tmp_path: Path) -> None:
    rng = random.Random(1)
    names = {bytes(rng.choices(range(33, 256), k=rng.randrange(1, 256))) for _ in range(10_000)}
    names = {name.replace(b"/", b"_") for name in names} - {b".", b".."}
    entries = [folder(b"many")] + [file(b"many/" + name, name[:3]) for name in names]
    entries += [file(b"%05d" % number) for number in range(10_000)]
    check(tree_of(entries), tmp_path / "image")


@pytest.mark.parametrize("length", [1, 254, 255])
def test_directories_that_fill_their_blocks_exactly(tmp_path: Path, length: int) -> None:
    for count in (1, 13, 14, 15, 16, 30, 31, 200):
        names = [b"%03d" % number + b"n" * (length - 3) for number in range(count)]
        check(tree_of([file(name) for name in names]), tmp_path / f"{length}-{count}")


def test_deep_paths(tmp_path: Path) -> None:
    path, entries = b"", []
    for level in range(60):
        path = path + b"/" + b"%03d" % level * 80 if path else b"top"
        entries.append(folder(path))
    check(tree_of([*entries, file(path + b"/bottom", b"!")]), tmp_path / "image")


def test_link_targets_up_to_the_longest(tmp_path: Path) -> None:
    lengths = [1, 60, 2047, 2048, 2049, 4030, 4063, 4064, 4065, 4095]
    check(tree_of([link(b"%d" % n, b"t" * n) for n in lengths]), tmp_path / "image")
    with pytest.raises(NotRepresentableError, match="4096 bytes"):
        written(tree_of([link(b"l", b"t" * 4096)]), tmp_path / "other")


def test_sizes_without_bytes(tmp_path: Path) -> None:
    sizes = [1, 4095, 4096, 4097, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 43, (1 << 43) + 1]
    tree = tree_of([sized(b"%d" % size, size) for size in sizes])
    check(tree, tmp_path / "image")
    assert (tmp_path / "image").stat().st_size < 16 << 10


def test_times_modes_and_hard_links(tmp_path: Path) -> None:
    kept = {"mode": 0o4711, "mtime_ns": -1}
    entries = [
        file(b"before 1970", b"a", **kept),
        file(b"late", b"a", mode=0, mtime_ns=2**62),
        folder(b"sticky", mode=0o1777, mtime_ns=999_999_999),
        file(b"sticky/first", b"linked", **kept),
        file(b"sticky/second", b"linked", link=b"sticky/first", **kept),
        file(b"third", b"linked", link=b"sticky/first", **kept),
        file(b"equal", b"linked", **kept),
    ]
    check(tree_of(entries, mode=0o700, mtime_ns=5), tmp_path / "image")


def test_an_empty_tree(tmp_path: Path) -> None:
    check(tree_of([]), tmp_path / "image")


def test_dump_reads_the_superblock(tmp_path: Path) -> None:
    image = written(tree_of([file(b"a", b"b"), folder(b"c")]), tmp_path / "image")
    said = subprocess.check_output(["dump.erofs", "-s", image], text=True)
    found = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    assert found["Filesystem inode count"].strip() == "3"
    assert found["Filesystem UUID"].strip() == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert "sb_csum" in found["Filesystem features"]
    blocks = int(found["Filesystem blocks"])
    assert blocks * 4096 < image.stat().st_size < (blocks + 1) * 4096


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    check(tree_of([file(b"n" * 255, b"x")]), tmp_path / "image")
    with pytest.raises(NotRepresentableError, match="256 bytes is too long for EROFS"):
        ensure_image(tree_of([file(b"n" * 256, b"x")]), MANIFEST, tmp_path / "images")
    assert os.listdir(tmp_path / "images") == []


def test_loop_devices_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of([file(b"a", b"b"), folder(b"c")])
    image = written(tree, tmp_path / "image")
    straight = overlay._open_erofs

    def only_devices(source: Path) -> int:
        if not source.is_relative_to("/dev"):
            raise overlay._CallError("needs a device", 15)
        return straight(source)

    monkeypatch.setattr(overlay, "_open_erofs", only_devices)
    with mounted(image) as top:
        compare(tree, top)
    assert str(image) not in subprocess.check_output(["losetup", "-a"], text=True)


@given(trees())
@settings(max_examples=20)
def test_equal_trees_give_equal_bytes(entries: dict[bytes, Entry]) -> None:
    def image(of: Iterable[Entry], path: Path) -> bytes:
        return written(tree_of(of), path).read_bytes()

    with tempfile.TemporaryDirectory() as name:
        one = image(entries.values(), Path(name) / "one")
        assert one == image(list(entries.values())[::-1], Path(name) / "two")


def test_images_are_written_once_and_mended(tmp_path: Path) -> None:
    tree = tree_of([file(b"%d" % number, b"%d" % number) for number in range(300)])
    path = ensure_image(tree, MANIFEST, tmp_path)
    good, made = path.read_bytes(), path.stat().st_ino
    assert ensure_image(tree, MANIFEST, tmp_path) == path
    assert find_image(MANIFEST, tmp_path) == path
    assert path.stat().st_ino == made
    for at in (0, 1024, 5000, len(good) // 4096 * 4096 - 1, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert find_image(MANIFEST, tmp_path) is None
        assert ensure_image(tree, MANIFEST, tmp_path).read_bytes() == good
    for cut in (0, 4096, len(good) - 4096, len(good) - 1):
        path.write_bytes(good[:cut])
        assert ensure_image(tree, MANIFEST, tmp_path).read_bytes() == good
    path.write_bytes(good + b"\0")
    assert find_image(MANIFEST, tmp_path) is None
    assert os.listdir(tmp_path) == [ensure_image(tree, MANIFEST, tmp_path).name]


def test_old_images_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of([file(b"a", b"b")])
    size = ensure_image(tree, MANIFEST, tmp_path).stat().st_size
    (tmp_path / ".killed.partial").write_bytes(bytes(size))
    os.utime(tmp_path / ".killed.partial", (0, 0))
    monkeypatch.setattr(erofs, "IMAGES_KEPT", 2 * size)
    names = [digest(b"%d" % number) for number in range(4)]
    for at, name in enumerate(names):
        path = ensure_image(tree, name, tmp_path)
        os.utime(path, (at + 1, at + 1))
    kept = [name for name in [MANIFEST, *names] if find_image(name, tmp_path)]
    assert kept == [MANIFEST, *names[2:]]
    assert not (tmp_path / ".killed.partial").exists()


def test_a_full_disk_leaves_no_half_image(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        tree = tree_of([file(b"%d" % number, b"%d" % number) for number in range(2000)])
        with pytest.raises(erofs.EnvstoreError, match="No space left"):
            ensure_image(tree, MANIFEST, tmp_path)
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_the_checkers_are_here() -> None:
    assert shutil.which("fsck.erofs")
    assert shutil.which("dump.erofs")
