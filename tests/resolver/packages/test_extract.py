from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError
from envstore.resolver.packages import extract
from envstore.resolver.packages.extract import PackageError, Tree, check_name, unpacking
from envstore.store.source import Kind

PARTS = st.one_of(
    st.sampled_from([b"..", b".", b"", b"a", b"a b", b"\xff", b"c:", b"C:x", b"\\", b"x\0y", b"/"]),
    st.binary(max_size=6),
)


@given(st.lists(PARTS, max_size=6).map(b"/".join))
def test_a_name_that_is_taken_lies_below_the_root(name: bytes) -> None:
    try:
        path = check_name(name)
    except ValueError:
        return
    root = b"/some/root"
    assert os.path.normpath(os.path.join(root, path)) == root + b"/" + path
    assert path == name.removesuffix(b"/")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"/etc/passwd", "absolute"),
        (b"//x", "absolute"),
        (b"..", "leads out"),
        (b"../x", "leads out"),
        (b"a/../../x", "leads out"),
        (b"a/..", "leads out"),
        (b"", "empty part"),
        (b"a//b", "empty part"),
        (b"a/./b", "empty part"),
        (b"a//", "empty part"),
        (b"a\0b", "zero byte"),
        (b"a\\..\\b", "not a path of this system"),
        (b"C:/x", "not a path of this system"),
        (b"c:x", "not a path of this system"),
        (b"x" * 256, "more than 255"),
        (b"/".join([b"x" * 100] * 11), "more than 1024"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_name(name)


@pytest.mark.parametrize(
    "name", [b"a", b"a/b", b"a/", "ä/ö".encode(), b"\xff", b"...", b" ", b"x/a:b"]
)
def test_odd_names_that_are_harmless_are_taken(name: bytes) -> None:
    assert check_name(name) == name.removesuffix(b"/")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree", 1000)


def test_files_are_written_hashed_and_listed(tree: Tree) -> None:
    found = tree.add_file(b"bin/run", [b"#!", b"/bin/sh"], True, 1_500_000_000_123_456_789)
    assert (found.size, found.digest) == (9, hashlib.sha256(b"#!/bin/sh").digest())
    tree.add_file(b"share/text", [], False)
    tree.add_link(b"bin/link", b"run")
    entries = tree.finish({b"bin/run": b"plan"})
    assert [(e.path, e.kind, e.executable, e.size, e.target, e.relocation) for e in entries] == [
        (b"bin", Kind.DIRECTORY, False, 0, b"", b""),
        (b"bin/link", Kind.SYMLINK, False, 0, b"run", b""),
        (b"bin/run", Kind.FILE, True, 9, b"", b"plan"),
        (b"share", Kind.DIRECTORY, False, 0, b"", b""),
        (b"share/text", Kind.FILE, False, 0, b"", b""),
    ]
    run = tree.root / "bin/run"
    assert run.read_bytes() == b"#!/bin/sh"
    assert (run.stat().st_mode & 0o777, run.stat().st_mtime_ns) == (
        0o755,
        1_500_000_000_123_456_789,
    )
    assert os.readlink(tree.root / "bin/link") == "run"
    assert (tree.root / "share/text").stat().st_mode & 0o777 == 0o644


def test_a_second_file_of_the_same_name_is_refused(tree: Tree) -> None:
    tree.add_file(b"a/file", [b"1"], False)
    for add in (
        lambda: tree.add_file(b"a/file", [b"2"], False),
        lambda: tree.add_link(b"a/file", b"x"),
        lambda: tree.add_hard_link(b"a/file", b"a/file"),
        lambda: tree.add_file(b"a", [b"2"], False),
    ):
        with pytest.raises(ValueError, match="twice"):
            add()
    with pytest.raises(ValueError, match="something else"):
        tree.add_directory(b"a/file")
    tree.add_directory(b"a")
    assert (tree.root / "a/file").read_bytes() == b"1"


def test_names_that_differ_in_case_only_are_two(tree: Tree) -> None:
    tree.add_file(b"README", [b"1"], False)
    tree.add_file(b"readme", [b"2"], False)
    assert {path.name for path in tree.root.iterdir()} == {"README", "readme"}


def test_nothing_is_written_through_links_or_files(tree: Tree, tmp_path: Path) -> None:
    tree.add_link(b"out", os.fsencode(tmp_path))
    tree.add_file(b"file", [], False)
    for path in (b"out/x", b"out/a/x", b"file/x"):
        for add in (
            lambda path=path: tree.add_file(path, [b"x"], False),
            lambda path=path: tree.add_directory(path),
            lambda path=path: tree.add_link(path, b"y"),
        ):
            with pytest.raises(ValueError, match="which is no directory"):
                add()
    assert {path.name for path in tmp_path.iterdir()} == {"tree"}


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"a", b".."),
        (b"a/b", b"../.."),
        (b"a/b", b"x/../../../y"),
        (b"a/b", b""),
        (b"a", b"x\0y"),
        (b"a", b"x" * 2000),
    ],
)
def test_links_out_of_the_package_and_to_nowhere_are_refused(
    tree: Tree, path: bytes, target: bytes
) -> None:
    with pytest.raises(ValueError, match="is a link"):
        tree.add_link(path, target)


@pytest.mark.parametrize("target", [b"..", b"../x", b"/bin/sh", b"./y", b"x/../y", b"not/there"])
def test_links_that_packages_have_are_taken(tree: Tree, target: bytes) -> None:
    tree.add_link(b"a/b", target)
    assert tree.finish({})[1].target == target


def test_hard_links_are_the_same_file(tree: Tree) -> None:
    tree.add_file(b"a/first", [b"content"], True)
    tree.add_link(b"a/link", b"first")
    tree.add_hard_link(b"b/second", b"a/first")
    tree.add_hard_link(b"b/link", b"a/link")
    entries = {entry.path: entry for entry in tree.finish({})}
    assert (tree.root / "b/second").read_bytes() == b"content"
    assert entries[b"b/second"].executable
    assert entries[b"b/second"].size == 7
    assert entries[b"b/link"].target == b"first"


@pytest.mark.parametrize("target", [b"/etc/passwd", b"../x", b"not/there", b"folder", b""])
def test_hard_links_to_anything_else_are_refused(tree: Tree, target: bytes) -> None:
    tree.add_directory(b"folder")
    with pytest.raises(ValueError, match=r"hard link|absolute|leads out|empty"):
        tree.add_hard_link(b"x", target)
    assert b"x" not in tree.found


def test_what_an_archive_becomes_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "FREE", 10_000)
    monkeypatch.setattr(extract, "MAX_RATIO", 10)
    monkeypatch.setattr(extract, "MAX_ENTRIES", 3)
    small = Tree(tmp_path / "small", 100)
    small.expect(10_000, "a")
    with pytest.raises(ValueError, match="with b it becomes more than"):
        small.expect(1, "b")
    large = Tree(tmp_path / "large", 5000)
    large.expect(30_000, "a")
    large.expect(20_000, "b")
    with pytest.raises(ValueError, match="becomes more than"):
        large.expect(1, "c")
    many = Tree(tmp_path / "many", 5000)
    for name in "abc":
        many.expect(0, name)
    with pytest.raises(ValueError, match="more than 3 members"):
        many.expect(0, "d")


def test_moving_and_pruning_leave_what_is_wanted(tree: Tree) -> None:
    tree.add_file(b"from/deep/file", [b"x"], False)
    tree.add_link(b"from/link", b"deep")
    tree.add_directory(b"kept/empty")
    tree.add_directory(b"dropped/empty")
    tree.add_file(b"gone/file", [b"y"], False)
    tree.move(b"from/deep/file", b"to/file")
    tree.move(b"from/link", b"to/link")
    tree.remove(b"gone/file")
    tree.prune([b"kept/empty"])
    entries = [entry.path for entry in tree.finish({})]
    assert entries == [b"kept", b"kept/empty", b"to", b"to/file", b"to/link"]
    on_disk = {path.relative_to(tree.root).as_posix() for path in tree.root.rglob("*")}
    assert on_disk == {"kept", "kept/empty", "to", "to/file", "to/link"}


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(EnvstoreError, match=r"cannot unpack a\.whl"), unpacking("a.whl"):
        Tree(tmp_path, 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NoSpaceError),
        (OSError(errno.EACCES, "Permission denied"), AccessDeniedError),
        (OSError(errno.EIO, "Input/output error"), EnvstoreError),
        (ValueError("x is odd"), PackageError),
    ],
)
def test_what_goes_wrong_names_the_archive(error: Exception, kind: type[EnvstoreError]) -> None:
    with pytest.raises(kind, match=r"a\.whl") as caught, unpacking("a.whl"):
        raise error
    assert "\n" not in str(caught.value)
