"""Reads a ``file://`` store with nothing but docs/format.md: no line of envstore is used.

The numbers in comments are sections of that document.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from blake3 import blake3

FILE, DIRECTORY, LINK, EXECUTABLE, CONTINUED, COMPOSED = 0, 1, 2, 4, 8, 16
HOLE, NOWHERE = bytes(32), 0xFFFFFFFF


@dataclass
class Item:
    kind: int
    executable: bool
    mode: int | None
    mtime_ns: int | None
    link: bytes = b""
    target: bytes = b""
    size: int = 0
    digest: bytes = b""
    content: bytearray = field(default_factory=bytearray)
    refs: list[tuple[bytes, int]] = field(default_factory=list)
    relocation: bytes = b""
    composed: bool = False


def need(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def digest(data: bytes) -> bytes:
    return blake3(data).digest()


def numbers(code: str, data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // struct.calcsize(f'<{code}')}{code}", data)


def split(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


class Fields:
    """Takes the fields of section 1 off a byte string."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        need(self.at + size <= len(self.data), "truncated")
        self.at += size
        return self.data[self.at - size : self.at]

    def many(self, code: str, count: int) -> tuple[int, ...]:
        return numbers(code, self.take(count * struct.calcsize(f"<{code}")))

    def one(self, code: str) -> int:
        return self.many(code, 1)[0]

    def digests(self, count: int) -> list[bytes]:
        return split(self.take(32 * count))

    def end(self) -> None:
        need(self.at == len(self.data), "stray bytes")


def inflate(data: bytes, size: int) -> bytes:
    need(zstandard.get_frame_parameters(data).content_size == size, "content size")
    return zstandard.ZstdDecompressor().decompress(data, size, allow_extra_data=False)


def unseal(magic: bytes, data: bytes, name: bytes | None = None) -> Fields:  # 3
    found, length, checksum = struct.unpack_from("<8sI32s", data)
    body = inflate(data[44:], length)
    need(found == magic and digest(body) == checksum and name in (None, checksum), "envelope")
    return Fields(body)


def join(stored: bytes, raw: int) -> bytes:  # 6, codec 2
    at, content = Fields(stored), bytearray(raw)
    width = at.one("B")
    need(width in (1, 2, 4, 8), "width")
    for i, length in enumerate(at.many("I", width)):
        held = len(content[i::width])
        plane = at.take(length)
        need(length <= held, "plane")
        content[i::width] = plane if length == held else inflate(plane, held)
    at.end()
    return bytes(content)


def open_frame(codec: int, stored: bytes, raw: int, name: bytes) -> bytes:  # 6
    need(codec in (0, 1, 2), "codec")
    data = stored if codec == 0 else inflate(stored, raw) if codec == 1 else join(stored, raw)
    need(len(data) == raw and digest(data) == name, "frame digest")
    return data


def composed(refs: list[tuple[bytes, int]]) -> bytes:  # 9
    rows = b"".join(name + struct.pack("<I", size) for name, size in refs)
    return blake3(rows, derive_key_context="envstore composed file v1").digest()


class Tree:
    """The tree of ``refs/namespace/name/tag``; ``starts`` are the paths at which parts begin."""

    def __init__(self, store: Path, ref: str) -> None:
        self.store, self.items, self.frames, self.starts = store, {}, {}, []
        config, self.ref = (
            json.loads(self.load("envstore.json")),
            json.loads(self.load(ref)),
        )
        name = self.ref["snapshot"]
        data = self.load("snapshots", name)  # 11
        need(digest(data).hex() == name, "snapshot")
        self.snapshot = json.loads(data)
        need(config["format"] == self.ref["format"] == self.snapshot["format"] == 1, "format")
        name = self.snapshot["manifest"]
        at = unseal(b"ESMANI01", self.load("manifests", name), bytes.fromhex(name))  # 9
        totals, self.mode, self.mtime_ns = at.many("Q", 3), at.one("Q"), at.one("q")
        count = at.one("I")
        parts = [at.digests(count), *(at.many("I", count) for _ in range(3))]
        at.end()
        at = unseal(b"ESLOCA01", self.load("locations", name))  # 10
        packs, frames, *counts = at.many("I", 4)
        need(counts == [count, sum(parts[3])], "locations")
        names = at.digests(packs)
        rows = zip(*(at.many(code, frames) for code in "IIIIB"), at.digests(frames), strict=True)
        self.table = [(names[row[0]], *row[1:]) for row in rows]
        places, self.places = ([at.many("I", n), at.many("I", n)] for n in counts)
        at.end()
        self.number = 0
        for part, size, entries, refs, *place in zip(*parts, *places, strict=True):
            self.read_part(Fields(self.chunk(part, size, *place)), entries, refs)
        files = [item for item in self.items.values() if item.kind == FILE]
        need(totals == (len(self.items), len(files), sum(item.size for item in files)), "totals")
        for item in files:
            need(len(item.content) == item.size, "size")
            if item.composed:
                item.digest = composed(item.refs)
            else:
                need(digest(item.content) == item.digest, "file")

    def load(self, *key: str) -> bytes:
        return self.store.joinpath(*key).read_bytes()

    def stored(self, row: tuple[bytes, int, int, int, int, bytes]) -> bytes:
        with open(self.store / "packs" / row[0].hex()[:2] / row[0].hex(), "rb") as file:
            file.seek(row[1])
            return file.read(row[2])

    def chunk(self, name: bytes, size: int, frame: int, offset: int) -> bytes:
        if frame not in self.frames:
            row = self.table[frame]
            content = self.stored(row)
            if row[4] == 3:  # 6, codec 3
                anchor = struct.unpack("<32sIIIB32s", content[:77])
                need(anchor == self.table[frame + 1], "anchor")
                base = open_frame(anchor[4], self.stored(anchor), *anchor[3::2])
                difference = join(content[77:], row[3])
                content = bytes(a ^ b for a, b in zip(difference, base, strict=True))
                need(digest(content) == row[5], "frame digest")
                self.frames[frame] = content
            else:
                self.frames[frame] = open_frame(row[4], content, *row[3::2])
        data = self.frames[frame][offset : offset + size]
        need(len(data) == size and digest(data) == name, "chunk")
        return data

    def read_part(self, at: Fields, entries: int, ref_count: int) -> None:  # 9
        columns: dict[int, bytes] = {}
        for _ in range(at.one("I")):
            column, length = at.many("I", 2)
            need((1 <= column <= 14 or column >= 0x8000) and column not in columns, "column")
            columns[column] = at.take(length)
        at.end()
        column = lambda code, number: numbers(code, columns.get(number, b""))  # noqa: E731
        texts = lambda n: columns[n].split(b"\0") if n in columns else []  # noqa: E731
        kinds, depths, names = columns[1], column("H", 2), texts(3)
        need(len(kinds) == len(depths) == len(names) == entries, "entries")
        files, targets = iter(zip(column("Q", 5), column("I", 6), strict=True)), iter(texts(10))
        refs = list(zip(split(columns.get(7, b"")), column("I", 8), strict=True))
        need(len(refs) == ref_count, "references")
        rest, digests = iter(refs), iter(split(columns.get(9, b"")))
        modes, mtimes = column("H", 11) or [None] * entries, column("q", 12) or [None] * entries
        links, relocations = self.records(columns, 13), self.records(columns, 14)
        stack = columns[4].split(b"/") if 4 in columns else []
        for i, (kind, name) in enumerate(zip(kinds, names, strict=True)):
            need(kind < 32 and kind & 3 != 3 and name not in (b"", b".", b".."), "entry")
            stack[depths[i] :] = [name]
            need(kind < 16 or kind & 3 == FILE, "composed")
            path, last = b"/".join(stack), next(reversed(self.items), b"")
            if kind & CONTINUED:
                need(i == 0 and path == last, "continuation")
            else:
                need(path.replace(b"/", b"\0") > last.replace(b"/", b"\0"), "order")
                parent = path.rpartition(b"/")[0]
                need(not parent or self.items[parent].kind == DIRECTORY, "directory")
                self.items[path] = Item(
                    kind & 3, bool(kind & EXECUTABLE), modes[i], mtimes[i], links.get(i, b"")
                )
                self.items[path].relocation = relocations.get(i, b"")
            item = self.items[path]
            if not i:
                self.starts.append(path)
            if kind & 3 == LINK:
                item.target = next(targets)
            elif kind & 3 == FILE:
                size, count = next(files)
                mine = [next(rest) for _ in range(count)]
                if not kind & CONTINUED:
                    plain = count == 1 and mine[0][1] == size and mine[0][0] != HOLE
                    item.size, item.composed = size, bool(kind & COMPOSED)
                    if item.composed:
                        need(size and not plain, "composed")
                    else:
                        item.digest = (
                            mine[0][0] if plain else next(digests) if size else digest(b"")
                        )
                need(item.size == size, "size")
                self.fill(item, mine)

    @staticmethod
    def records(columns: dict[int, bytes], number: int) -> dict[int, bytes]:
        at, found, last = Fields(columns.get(number, b"")), {}, -1
        while at.at < len(at.data):
            entry, length = at.many("I", 2)
            need(entry > last, "records out of order")
            found[entry] = at.take(length)
            last = entry
        return found

    def fill(self, item: Item, refs: list[tuple[bytes, int]]) -> None:
        for name, size in refs:
            place = self.places[0][self.number], self.places[1][self.number]
            self.number += 1
            if name == HOLE:
                need(place == (NOWHERE, 0), "hole")
            item.refs.append((name, size))
            item.content += bytes(size) if name == HOLE else self.chunk(name, size, *place)
