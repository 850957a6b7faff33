"""Manifests of made-up trees, as a push would store them, and strategies that make them up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import strategies as st

from envstore.fuse.build import build_tree
from envstore.fuse.tree import ROOT, Tree
from envstore.store.digest import EMPTY, digest
from envstore.store.entries import HOLE, Entry, composed_entry, sort_key
from envstore.store.manifest import Part, PartInfo, Root, build_parts, decode_part
from envstore.store.source import Kind

_NAME = st.one_of(
    st.sampled_from([b"a", b"b", b"a.b", b"a-b", b"a!", b"B", b"\xff\xfe", b"x" * 255]),
    st.binary(min_size=1, max_size=6).filter(
        lambda name: name not in (b".", b"..") and not {0, 47} & set(name)
    ),
)
_CONTENT = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=4
)  # chunk number, size, hole


_MODE = st.one_of(st.sampled_from([0o644, 0o755]), st.integers(0, 0o7777))
_TIME = st.one_of(st.sampled_from([0, 1]), st.integers(-(2**62), 2**62))


def manifest(
    entries: Iterable[Entry], *, mode: int = 0, mtime_ns: int = 0
) -> tuple[Root, list[Part]]:
    """Return what a push of these entries would store."""
    entries = sorted(entries, key=lambda entry: sort_key(entry.path))
    encoded = list(build_parts(entries))
    infos: list[PartInfo] = [info for info, _ in encoded]
    files = [entry for entry in entries if entry.kind is Kind.FILE]
    root = Root(tuple(infos), len(entries), len(files), sum(f.size for f in files), mode, mtime_ns)
    return root, [decode_part(raw) for _, raw in encoded]


def tree_of(entries: Iterable[Entry], *, mode: int = 0, mtime_ns: int = 0) -> Tree:
    root, parts = manifest(entries, mode=mode, mtime_ns=mtime_ns)
    return build_tree(root, parts)


def file(path: bytes, content: bytes = b"", *, chunk: int = 4, **more: object) -> Entry:
    """Return a file cut into chunks of ``chunk`` bytes."""
    pieces = [content[at : at + chunk] for at in range(0, len(content), chunk)]
    refs = tuple((digest(piece), len(piece)) for piece in pieces)
    whole = digest(content) if content else EMPTY
    entry = Entry(path, Kind.FILE, size=len(content), digest=whole, refs=refs)
    return replace(entry, **more)  # type: ignore[arg-type]


def folder(path: bytes, **more: object) -> Entry:
    return replace(Entry(path, Kind.DIRECTORY), **more)  # type: ignore[arg-type]


def find(tree: Tree, path: bytes) -> int | None:
    node: int | None = ROOT
    for name in path.split(b"/") if path else ():
        assert node is not None
        node = tree.lookup(node, name)
    return node


def must_find(tree: Tree, path: bytes) -> int:
    node = find(tree, path)
    assert node is not None
    return node


@st.composite
def trees(draw: st.DrawFn) -> dict[bytes, Entry]:
    """Entries by path: files, links and directories; with or without modes, times, hard links."""
    kept = draw(st.booleans())
    entries: dict[bytes, Entry] = {}
    folders = [b""]
    for _ in range(draw(st.integers(0, 30))):
        parent = draw(st.sampled_from(folders))
        name = draw(_NAME)
        path = parent + b"/" + name if parent else name
        if path in entries:
            continue
        mode = draw(_MODE) if kept else None
        mtime = draw(_TIME) if kept else None
        what = draw(st.sampled_from(Kind))
        firsts = [e for e in entries.values() if e.kind is Kind.FILE and not e.link]
        if kept and firsts and draw(st.booleans()):
            first = draw(st.sampled_from(firsts))
            entries[path] = replace(first, path=path, link=first.path)
            continue
        if what is Kind.DIRECTORY:
            entry = Entry(path, what)
            folders.append(path)
        elif what is Kind.SYMLINK:
            entry = Entry(path, what, target=draw(st.binary(min_size=1, max_size=9)))
            entry = replace(entry, target=entry.target.replace(b"\0", b"0"))
        else:
            refs = tuple(
                (HOLE if hole else digest(b"%d %d" % (number, size)), size)
                for number, size, hole in draw(_CONTENT)
            )
            size = sum(size for _, size in refs)
            whole = digest(b"".join(name + b"%d" % size for name, size in refs)) if refs else EMPTY
            if len(refs) == 1 and refs[0][0] != HOLE:
                whole = refs[0][0]
            executable = not kept and draw(st.booleans())
            entry = Entry(path, what, executable, size, whole, refs)
            if draw(st.booleans()):
                entry = composed_entry(path, refs, executable=executable)
        entries[path] = replace(entry, mode=mode, mtime_ns=mtime)
    return entries


def inode_of(entries: dict[bytes, Entry], path: bytes) -> bytes:
    """Return the path of the file that stands for the one at ``path`` and all like it."""
    entry = entries[path]
    linked = {other.link for other in entries.values() if other.link}
    if entry.kind is not Kind.FILE or entry.link or path in linked:
        return entry.link or path
    alike = [
        other.path
        for other in entries.values()
        if other.kind is Kind.FILE
        and not other.link
        and other.path not in linked
        # Whether it is composed says how a file came to be, not what is in it.
        and replace(other, path=path, digest=entry.digest, composed=entry.composed) == entry
    ]
    return min(alike, key=sort_key)
