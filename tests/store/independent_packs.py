"""What docs/format.md says beyond the way to one tree: cut points, packs, segments, samples.

Written from that document like ``independent_reader``, with its sections in comments.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from tests.store.independent_reader import Fields, digest, need, open_frame, unseal

KIB, MIB = 1 << 10, 1 << 20
GEAR = [int.from_bytes(hashlib.md5(bytes([b]) * 64).digest()[:8], "big") for b in range(256)]
S, L, MASK = 0x0000D90703537000, 0x0000D90F03530000, (1 << 64) - 1

SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


class Frame(NamedTuple):
    codec: int
    stored: int
    raw: int
    digest: bytes
    chunks: list[tuple[bytes, int]]


def read_table(at: Fields) -> list[Frame]:  # 6
    count, chunks = at.many("I", 2)
    codecs, stored, raw, counts = (at.many(code, count) for code in "BIII")
    names, sizes, digests = at.digests(count), at.many("I", chunks), at.digests(chunks)
    at.end()
    table, first = [], 0
    for i in range(count):
        last = first + counts[i]
        mine = list(zip(digests[first:last], sizes[first:last], strict=True))
        table.append(Frame(codecs[i], stored[i], raw[i], names[i], mine))
        need(sum(sizes[first:last]) == raw[i] and stored[i] <= raw[i], "frame")
        first = last
    need(first == chunks, "chunk counts")
    return table


def read_pack(data: bytes, name: bytes) -> tuple[list[Frame], dict[bytes, bytes]]:  # 7
    """Return the frames of a pack and its chunks by digest."""
    (length,) = struct.unpack("<I", data[-12:-8])
    sealed = data[-12 - length : -12]
    if data[:8] == b"ESPACK01":
        need(data[-8:] == b"ESPKEND1" and digest(data) == name, "pack")
        table = read_table(unseal(b"ESTABL01", sealed))
    else:
        need(data[:8] == b"ESPACK02" and data[-8:] == b"ESPKEND2", "pack")
        table = read_table(unseal(b"ESTABL01", sealed, name))
    at, found = 8, {}
    for frame in table:
        stored = data[at : at + frame.stored]
        content, start = open_frame(frame.codec, stored, frame.raw, frame.digest), 0
        at += frame.stored
        for chunk, size in frame.chunks:
            found[chunk] = content[start : start + size]
            need(digest(found[chunk]) == chunk, "chunk")
            start += size
    need(at == len(data) - 12 - length, "pack length")
    return table, found


def read_segment(data: bytes, name: bytes) -> dict[bytes, tuple[int, list[Frame]]]:  # 8
    """Return size and frames of each pack that a segment lists."""
    at, packs = unseal(b"ESINDX01", data, name), {}
    for _ in range(at.one("I")):
        pack, size, length = at.take(32), at.one("Q"), at.one("I")
        packs[pack] = size, read_table(Fields(at.take(length)))
    at.end()
    return packs


def read_sample(data: bytes, name: bytes) -> dict[int, bytes]:  # 8
    """Return the segment of each hook, by the hook's first 8 bytes."""
    at = unseal(b"ESSAMP01", data, name)
    segments, hooks = at.many("I", 2)
    names, heads, numbers = at.digests(segments), at.many("Q", hooks), at.many("I", hooks)
    at.end()
    need(list(heads) == sorted(set(heads)), "order")
    return {head: names[number] for head, number in zip(heads, numbers, strict=True)}


def cut(name: bytes, data: bytes) -> Iterator[tuple[int, bool]]:  # 5
    """Yield length, and whether it is a hole, of each reference of a file."""
    ends = tensor_ends(data) if name.endswith(b".safetensors") else None
    if len(data) <= 16 * KIB:
        yield from ((n, False) for n in [len(data)] if n)
    elif ends is not None:
        yield from ((b - a, False) for a, b in zip([0, *ends], ends, strict=False))
    else:
        blocks = (data[at : at + MIB] for at in range(0, len(data), MIB))
        for zero, run in groupby(blocks, key=lambda block: block == bytes(MIB)):
            stretch = b"".join(run)
            yield from [(len(stretch), True)] if zero else ((n, False) for n in fastcdc(stretch))


def fastcdc(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        length = first_cut(data[at : at + 256 * KIB])
        yield length
        at += length


def first_cut(d: bytes) -> int:
    n = len(d)
    if n <= 16 * KIB:
        return n
    c, h = min(n, 64 * KIB), 0
    for i in range(8192, n // 2):
        m = S if i < c // 2 else L
        h = (h << 2) + (GEAR[d[2 * i]] << 1) & MASK
        if not h & m << 1:
            return 2 * i
        h = h + GEAR[d[2 * i + 1]] & MASK
        if not h & m:
            return 2 * i + 1
    return n


def tensor_ends(data: bytes) -> list[int] | None:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= 3 * MIB or 8 + length > len(data):
        return None
    try:
        header = json.loads(data[8 : 8 + length])
        spans = sorted(tuple(v["data_offsets"]) for k, v in header.items() if k != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    at, base, ends = 0, 8 + length, [8 + length]
    for begin, end in spans:
        if begin < end:
            if begin != at:
                return None
            ends += [*range(base + begin + 4 * MIB, base + end, 4 * MIB), base + end]
            at = end
    return ends if base + at == len(data) else None


def part_starts(entries: Iterable[tuple[bytes, int, int]]) -> list[bytes]:  # 9
    """Return where parts begin, for ``(path, references, length of target and link)`` rows."""
    starts: list[bytes] = []
    count = refs = text = 0
    for path, held, extra in entries:
        cut = count >= 128 and zlib.crc32(path) % 512 == 0
        if not starts or cut or count >= 4096 or refs >= 16_384 or text >= MIB:
            starts.append(path)
            count = refs = text = 0
        count, refs, text = count + 1, refs + held, text + len(path) + extra
        while refs > 16_384:
            starts.append(path)
            count, refs, text = 1, refs - 16_384, 0
    return starts


def canonical(value: object) -> str:  # 1
    """Return ``value`` as canonical JSON."""
    if isinstance(value, dict):
        members = (f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, int):
        return str(value)
    assert isinstance(value, str)
    return (
        '"' + "".join(SHORT.get(c) or (c if c >= " " else f"\\u{ord(c):04x}") for c in value) + '"'
    )
