"""Trees as a mount shows them, their images, and pulling them into a directory."""

from __future__ import annotations

import os
import tempfile
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from envstore.errors import EnvstoreError
from envstore.fuse.build import build_tree
from envstore.fuse.erofs import NotRepresentableError, find_image, write_image
from envstore.fuse.forest import Forest, Plot, told_size
from envstore.fuse.image import make_image, open_image
from envstore.fuse.tree import ROOT, Tree
from envstore.store.digest import EMPTY, digest
from envstore.store.entries import HOLE, Entry, sort_key
from envstore.store.locations import NOWHERE, Locations
from envstore.store.manifest import Part, Root, build_parts, decode_part
from envstore.store.pull import pull
from envstore.store.source import Kind
from tests.fuzz.harness import expect, target
from tests.fuzz.memory import CHUNK, forge, repository, root_of
from tests.fuzz.mutating import Plan
from tests.fuzz.targets.sealed import part_seeds

_MANIFEST = digest(b"manifest")


def _walk(tree: Tree) -> None:
    """Ask a tree for everything it has, as the kernel could."""
    seen = 0
    for node in range(ROOT, len(tree) + 1):
        found = tree.attributes(node)
        expect(
            found.size >= 0 and found.links >= 1 and ROOT <= tree.inode(node) <= len(tree), "a node"
        )
        kind = tree.kind(node)
        if kind is Kind.DIRECTORY:
            names = [tree.name(tree.child(node, at)) for at in range(tree.child_count(node))]
            expect(all(one < two for one, two in pairwise(names)), "names out of order")
            seen += len(names)
            for name in names[:100]:
                expect(not {b"", b".", b".."} & {name} and b"/" not in name, "a name that escapes")
                expect(tree.lookup(node, name) is not None, "a name that is not found")
        elif kind is Kind.SYMLINK:
            expect(tree.target(node), "a link to nothing")
        else:
            tree.content_key(node)
    expect(seen == len(tree) - 1, "nodes in no directory, or in two")


def _of(raws: list[bytes]) -> tuple[Root, list[Part]]:
    return root_of(raws), [decode_part(raw) for raw in raws]


@target("tree", part_seeds)
def tree(data: bytes) -> None:
    """A part by itself, and twice, as what a mount shows."""
    root, parts = _of([data])
    _walk(build_tree(root, parts))
    root, parts = _of([data, data])
    build_tree(root, parts)


@target("tree-at-a-prefix", part_seeds)
def tree_at_a_prefix(data: bytes) -> None:
    """The same with relocated files."""
    root, parts = _of([data])
    locations = Locations(
        ref_frames=array("I", [NOWHERE]) * root.parts[0].refs,
        ref_offsets=array("I", bytes(4 * root.parts[0].refs)),
    )
    fd = make_image(_MANIFEST, root, parts, locations, b"/new/prefix")
    try:
        _walk(open_image(fd).tree)
    finally:
        os.close(fd)


def _image_seeds() -> list[bytes]:
    found = []
    for raw in part_seeds()[:2]:
        root, parts = _of([raw])
        refs = root.parts[0].refs
        nowhere = Locations(
            ref_frames=array("I", [NOWHERE]) * refs, ref_offsets=array("I", bytes(4 * refs))
        )
        fd = make_image(_MANIFEST, root, parts, nowhere)
        try:
            found.append(os.pread(fd, os.fstat(fd).st_size, 0))
        finally:
            os.close(fd)
    return found


@target("tree-image", _image_seeds, words=(b"ESTREE02",))
def tree_image(data: bytes) -> None:
    """An image is made by a process that may be trusted; opening it must still not break."""
    import fcntl

    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, data)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        open_image(fd)
    finally:
        os.close(fd)


@target("erofs", part_seeds)
def erofs(data: bytes) -> None:
    """What the kernel is given to mount."""
    root, parts = _of([data])
    found = build_tree(root, parts)
    with tempfile.TemporaryFile() as out:
        try:
            write_image(found, _MANIFEST, cast(Any, out))
        except NotRepresentableError:
            return
        size = os.fstat(out.fileno()).st_size
        expect(size <= (8 << 20) + 64 * len(data), f"an image of {size} bytes")


@target("erofs-file", lambda: [b"", bytes(4096 + 40), b"ESEROF01" + bytes(32)])
def erofs_file(data: bytes) -> None:
    """An image that lies in a cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{_MANIFEST.hex()}.1"
        path.write_bytes(data)
        for name in list(Path(folder).iterdir()):
            expect(name.exists(), "a file that vanished")
        find_image(_MANIFEST, Path(folder))


@target("forest", lambda: [bytes(range(64)), b"\1\2\3" * 40])
def forest(data: bytes) -> None:
    """Node ids that the kernel never got, and memory of a server that was killed."""
    entry = Entry(b"f", Kind.FILE, False, 5, digest(b"x"), ((digest(b"x"), 5),))
    folder = Entry(b"d", Kind.DIRECTORY)
    raw = next(raw for _, raw in build_parts([folder, entry]))
    root, parts = _of([raw])
    one = build_tree(root, parts)
    told = memoryview(bytearray(data[: told_size(one)].ljust(told_size(one), b"\0"))).cast("I")
    made = Forest(bytes(32))
    made.plant(1, Plot(b"name", one, b"domain", told))
    for at in range(0, len(data), 8):
        node = int.from_bytes(data[at : at + 8], "little")
        for number in (node, node & 0xFFFFFFFF, 1 << 32 | node & 0xFF, 1 << 62 | node):
            if made.knows(number):
                made.attributes(number)
        made.lookup(ROOT, data[at : at + 8])
        made.lookup(1 << 32 | ((1 << 32) - 1), data[at : at + 2])


# --- pulling ------------------------------------------------------------------------------------

_NAMES = (
    b"a", b"A", b"b", b"\xc3\xa9", b"e\xcc\x81", b"x" * 255, b"x" * 256, b"con", b"\x1b[2J", b"\n",
    b"..", b".", b"", b"a/b", b"-rf", b"\xff",
)  # fmt: skip
_TARGETS = (
    b"a", b"..", b"../../../../tmp/fuzz-escaped", b"/tmp/fuzz-escaped", b".", b"a/../..",
    b"x" * 5000,
)  # fmt: skip


def _entries(plan: Plan) -> list[Entry]:
    """Make entries as the bytes say: any kind, name, place, link, mode and time."""
    found: list[Entry] = []
    folders = [b""]
    kept = bool(plan.number() & 1)
    while plan and len(found) < 40:
        kind, where, name = plan.number(), plan.number(), plan.number()
        parent = folders[where % len(folders)]
        last = _NAMES[name % len(_NAMES)] if name < 200 else plan.take(name % 9)
        path = parent + b"/" + last if parent else last
        more: dict[str, Any] = {}
        if kept:
            more = {"mode": plan.number(2), "mtime_ns": plan.number(8) - (1 << 63)}
        if kind % 4 == 0:
            folders.append(path)
            found.append(Entry(path, Kind.DIRECTORY, **more))
        elif kind % 4 == 1:
            found.append(
                Entry(path, Kind.SYMLINK, target=_TARGETS[plan.number() % len(_TARGETS)], **more)
            )
        else:
            found.append(_file(path, plan, kind, found, more))
    return found


def _file(path: bytes, plan: Plan, kind: int, found: list[Entry], more: dict[str, Any]) -> Entry:
    name = digest(CHUNK)
    refs: tuple[tuple[bytes, int], ...] = ((name, len(CHUNK)),)
    if kind & 4:
        refs += ((HOLE, plan.number(4)),)
    if kind & 8:
        refs = ()
    size = sum(size for _, size in refs)
    whole = digest(b"whole") if len(refs) > 1 else name if refs else EMPTY
    link = found[plan.number() % len(found)].path if kind & 16 and found else b""
    return Entry(path, Kind.FILE, bool(kind & 32), size, whole, refs, link=link, **more)


def _pull_seeds() -> list[bytes]:
    return [
        bytes((0, 0, 0, 2, 1, 0, 0, 1, 3, 1, 2, 4, 0)),
        bytes(range(60)),
        b"\1" + bytes(range(99)),
    ]


@target("pull", _pull_seeds)
def pull_of_a_tree(data: bytes) -> None:
    """A tree made as the bytes say; nothing may appear beside the destination."""
    plan = Plan(data)
    head = Plan(plan.take(17))
    entries = _entries(plan)
    if head.number() & 1:
        entries.sort(key=lambda entry: sort_key(entry.path))
    try:
        raws = [raw for _, raw in build_parts(entries)]
    except (OverflowError, ValueError, IndexError):
        return  # entries that cannot be written down
    mode, mtime_ns = (head.number(8), head.number(8) - (1 << 63)) if head.number() & 1 else (0, 0)
    objects, name = forge(raws, root_of(raws, mode, mtime_ns))
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "beside").write_bytes(b"untouched")
        try:
            pull(repository(objects), name, top / "tree")
        except EnvstoreError:
            expect(not os.path.lexists(top / "tree"), "half a tree is left")
            raise
        finally:
            left = set(os.listdir(top)) - {"tree"}
            _tidy(top)
            expect(left == {"beside"}, f"something beside the tree: {left}")
            expect((top / "beside").read_bytes() == b"untouched", "a file beside was changed")
            expect(not os.path.lexists("/tmp/fuzz-escaped"), "something was written elsewhere")


def _tidy(top: Path) -> None:
    """Let everything below be removed again."""
    for directory, folders, _ in os.walk(os.fsencode(top)):
        for name in folders:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
