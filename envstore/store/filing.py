"""Files the contents of a source: each file becomes chunks, and those that are new are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from blake3 import blake3

from envstore.store.chunking import Chunk, Hole
from envstore.store.dedup import places_to_reuse
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks
from envstore.store.manifest import HOLE, MAX_HOLE, Entry, sort_key
from envstore.store.packing import PackWriter
from envstore.store.reading import Piece, read_files
from envstore.store.source import Kind, Source, SourceEntry
from envstore.store.statcache import Recipe


class Progress(Protocol):
    """Told how far a push is; bytes are those of the files."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """``phase`` is ``scan``, ``read``, ``store`` or ``commit``."""
        ...


def silent(phase: str, done: int, total: int) -> None:
    """A ``Progress`` that says nothing."""


@dataclass(slots=True)
class FiledTree:
    """A scanned tree on its way to a manifest.

    ``ranks`` are the places of the files that a start is known to read.
    """

    entries: list[SourceEntry]
    signature: bytes
    old: dict[bytes, tuple[bytes, Recipe]] = field(default_factory=dict)
    recipes: dict[bytes, Recipe] = field(default_factory=dict)
    read_bytes: int = 0
    fleeting: set[bytes] = field(default_factory=set)
    ranks: dict[bytes, int] = field(default_factory=dict)

    def chunks(self) -> Iterator[bytes]:
        """Return the digests of all chunks, holes included, some more than once."""
        return (name for recipe in self.recipes.values() for name, _ in recipe.refs)


def scan(source: Source) -> FiledTree:
    """Return the tree of ``source``, sorted, with nothing read of its files."""
    entries = sorted(source.scan(), key=lambda entry: sort_key(entry.path))
    whole = blake3(b"%b %d %d" % (source.kind.encode(), *source.root_attributes()))
    settled = True
    for entry in entries:
        whole.update(
            b"%d:%b%d:%b%b%d %d %d "
            % (
                len(entry.path), entry.path, len(entry.target), entry.target, entry.signature,
                entry.kind, entry.mode, entry.mtime_ns,
            )
        )  # fmt: skip
        if entry.relocation:
            whole.update(b"%d:%b" % (len(entry.relocation), entry.relocation))
        settled = settled and (entry.settled or entry.kind is not Kind.FILE)
    return FiledTree(entries, whole.digest() if settled else b"")


def store_files(
    source: Source, tree: FiledTree, known: KnownChunks, writer: PackWriter, progress: Progress
) -> None:
    """Fill ``tree.recipes`` with a recipe for every file, storing the chunks that are new.

    Called again when chunks turned out to be lost: it then reads only the files that need them.
    """
    wanted: list[SourceEntry] = []
    seen: set[tuple[int, int]] = set()
    for entry in tree.entries:
        if entry.kind is not Kind.FILE or (entry.link and entry.link in seen):
            continue
        if entry.link:
            seen.add(entry.link)
        recipe = tree.recipes.pop(entry.path, None) or _remembered(tree, entry)
        if recipe is not None and not _all_known(recipe, known.index):
            recipe = None
        if recipe is None:
            wanted.append(entry)
        else:
            tree.recipes[entry.path] = recipe
    last = len(tree.ranks)
    wanted.sort(key=lambda entry: (tree.ranks.get(entry.path, last), source.order(entry)))
    total = sum(entry.size for entry in wanted)
    refs: list[tuple[bytes, int]] = []
    pieces = read_files(source, wanted)
    early = False
    try:
        for piece in pieces:
            if early and piece.entry.path not in tree.ranks:
                # What a start reads is to be had without what it does not.
                writer.end_frame()
            early = piece.entry.path in tree.ranks
            refs += _store_piece(piece, known, writer)
            tree.read_bytes += sum(len(i.data) for i in piece.items if isinstance(i, Chunk))
            if piece.omitted:
                tree.recipes[piece.entry.path] = Recipe(b"")
                if not piece.lasting:
                    tree.fleeting.add(piece.entry.path)
            elif piece.whole is not None:
                tree.recipes[piece.entry.path] = Recipe(piece.whole, tuple(refs))
                refs = []
            progress("read", tree.read_bytes, total)
    finally:
        pieces.close()  # type: ignore[attr-defined]


def _remembered(tree: FiledTree, entry: SourceEntry) -> Recipe | None:
    """Return the recipe of a file that is as it was when it was read last."""
    signature, recipe = tree.old.get(entry.path, (b"", None))
    return recipe if signature == entry.signature and entry.settled else None


def _all_known(recipe: Recipe, index: DedupIndex) -> bool:
    return all(name == HOLE or index.find(name) is not None for name, _ in recipe.refs)


def _store_piece(piece: Piece, known: KnownChunks, writer: PackWriter) -> list[tuple[bytes, int]]:
    index = known.index
    chunks = [item for item in piece.items if isinstance(item, Chunk)]
    known.consider(chunks)
    places = iter(places_to_reuse(index, chunks))
    refs = []
    for item in piece.items:
        if isinstance(item, Hole):
            left = item.length
            while left:
                refs.append((HOLE, min(left, MAX_HOLE)))
                left -= refs[-1][1]
            continue
        # The same chunk may come twice in one piece: the second time it is no longer new.
        if next(places) is None and (index.find(item.digest) or (-1,))[0] not in index.own:
            writer.add(item.digest, item.data)
        refs.append((item.digest, len(item.data)))
    return refs


def entries_of(source: Source, tree: FiledTree) -> list[Entry]:
    """Return the manifest's entries; further names of a hard-linked file share its recipe."""
    first: dict[tuple[int, int], bytes] = {}
    found = []
    plain = source.kind != "dir"
    for entry in tree.entries:
        mode = None if plain else entry.mode
        mtime = None if plain else entry.mtime_ns
        if entry.kind is not Kind.FILE:
            found.append(
                Entry(
                    entry.path,
                    entry.kind,
                    target=entry.target,
                    mode=mode,
                    mtime_ns=mtime,
                    relocation=entry.relocation,
                )
            )
            continue
        link = first.setdefault(entry.link, entry.path) if entry.link else entry.path
        recipe = tree.recipes[link]
        if recipe.omitted:
            continue
        found.append(
            Entry(
                entry.path, entry.kind, bool(entry.mode & 0o111), recipe.size, recipe.digest,
                recipe.refs, b"", mode, mtime, b"" if link == entry.path else link,
                entry.relocation,
            )
        )  # fmt: skip
    return found
