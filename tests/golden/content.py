"""What the golden files hold, made from BLAKE3 output: the same with any version of anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from envstore.store.source import Kind, SourceEntry

MIB = 1 << 20
NS = 1_000_000_000


def noise(seed: str, size: int) -> bytes:
    """Return ``size`` incompressible bytes."""
    return blake3(seed.encode()).digest(length=size)


def prose(seed: str, size: int) -> bytes:
    """Return ``size`` bytes of text: words of a small vocabulary, in lines."""
    words = [bytes(97 + byte % 26 for byte in noise(f"word {i}", 2 + i % 9)) for i in range(256)]
    text = bytearray()
    for i, byte in enumerate(noise(f"prose {seed}", size // 3 + 1)):
        text += words[byte] + (b"\n" if i % 11 == 10 else b" ")
    return bytes(text[:size])


def tensors() -> bytes:
    """Return a safetensors file of three tensors, one of them longer than a piece."""
    sizes, at, header = (5 * MIB, 70_000, 3), 0, []
    for i, size in enumerate(sizes):
        header.append(
            f'"layer.{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{at},{at + size}]}}'
        )
        at += size
    text = ("{" + ",".join(header) + "}").encode()
    return len(text).to_bytes(8, "little") + text + noise("tensors", at)


def cut_files() -> dict[str, bytes]:
    """Return files whose cut points are pinned; tensors are looked for where the name says so."""
    return {
        "empty": b"",
        "one byte": b"x",
        "smallest chunk": noise("small", 16 << 10),
        "one more": noise("small", (16 << 10) + 1),
        "noise": noise("noise", 6 * MIB + 12_345),
        "prose": prose("prose", 4 * MIB + 54_321),
        "zeros": bytes(3 * MIB + 100),
        "ones": b"\1" * (MIB + 100),
        "holes": noise("a", MIB) + bytes(2 * MIB) + noise("b", 300_000),
        "late hole": noise("c", MIB + 17) + bytes(2 * MIB) + prose("d", 99_999),
        "model.safetensors": tensors(),
        "broken.safetensors": tensors()[:-1],
    }


def frames() -> list[list[bytes]]:
    """Return the chunks of each frame of the golden pack: stored raw, compressed, and mixed."""
    return [
        [noise("raw", 3_000)],
        [prose("one", 5_000), prose("two", 700), b""],
        [noise("three", 100), prose("four", 3_000), bytes(20_000)],
    ]


def numbers(width: int, count: int) -> bytes:
    """Return ``count`` numbers of ``width`` bytes, whose highest byte alone is not noise."""
    data = bytearray(noise(f"numbers {width}", width * count))
    for at in range(width - 1, len(data), width):
        data[at] = 0x3A + (data[at] & 3)
    return bytes(data)


def split_frames() -> list[bytes]:
    """Return the frames of codec 2 in the golden pack of a checkpoint, by width 1, 2, 4 and 8."""
    return [
        prose("split", 3_000),
        numbers(2, 3_000),
        numbers(4, 2_000),
        numbers(8, 1_500) + b"tail",
    ]


def difference() -> tuple[bytes, bytes]:
    """Return a frame of codec 3 and its anchor, the first one of the golden pack."""
    base = frames()[0][0]
    data = bytearray(base)
    data[::4] = noise("later", len(data[::4]))
    return bytes(data), base


class GoldenSource:
    """The tree of the golden store: one of each kind of entry, with fixed modes and times."""

    kind = "dir"
    root = Path("/golden")
    identity = "golden"

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.contents = {
            b"README": prose("readme", 4_000),
            b"bin/run": b"#!/bin/sh\nexec true\n",
            b"data/noise": noise("golden", 30_000),
            b"data/prose": prose("golden", 60_000),
            b"data/sparse": noise("start", 500) + bytes(3 * MIB - 500) + b"end",
            b"data/zeros": bytes(MIB),
            b"empty file": b"",
            b"names/caf\xe9": b"not UTF-8",
            b"names/" + b"n" * 255: b"long",
            b"twin": b"of two names",
        }

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``."""
        entries = [
            SourceEntry(path, Kind.DIRECTORY, mode, mtime)
            for path, mode, mtime in (
                (b"bin", 0o755, 1_000_000_000 * NS),
                (b"data", 0o2775, -NS),
                (b"empty", 0o700, 7),
                (b"names", 0o755, 0),
            )
        ]
        for i, (path, data) in enumerate(self.contents.items()):
            mode = 0o755 if path == b"bin/run" else 0o600 + i
            link = (1, 1) if path == b"twin" else None
            entries.append(
                SourceEntry(
                    path, Kind.FILE, mode, i * NS + 999, len(data), link=link, settled=False
                )
            )
        entries.append(SourceEntry(b"zz/twin", Kind.FILE, 0o600, 5, 12, link=(1, 1), settled=False))
        entries.append(SourceEntry(b"zz", Kind.DIRECTORY, 0o755, 8))
        for path, target in ((b"link", b"data/prose"), (b"names/dangling", b"../no\xffwhere")):
            entries.append(SourceEntry(path, Kind.SYMLINK, 0o777, 3 * NS, target=target))
        return entries

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return 0, entry.path

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        yield self.contents[entry.path]

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``."""
        return {"made by": "tests/golden/generate.py"}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0o751, 1_234_567_890 * NS + 1

    def close(self) -> None:
        """See ``Source.close``."""
