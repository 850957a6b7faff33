"""Samples: a sparse index over many segments, so that a push never reads them all.

One chunk in 128, chosen by its digest, is a hook. A sample lists the hooks of the segments it
covers; a push that meets a hook loads the one segment that has it and so finds the neighbours,
which were stored together (sparse indexing, Lillibridge et al., FAST 2009). A terabyte of unique
data makes about 1.5 MB of samples.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from envstore.errors import CorruptError
from envstore.store.binary import U32, Cursor, pack_array, seal, unseal
from envstore.store.digest import DIGEST_SIZE, digest
from envstore.store.packs import Pack

MAGIC = b"ESSAMP01"
MAX_BODY = 1 << 30
RATE = 128


def sample_key(name: bytes) -> str:
    """Return the object key of a sample."""
    return f"samples/{name.hex()}"


def is_hook(chunk: bytes) -> bool:
    """Return whether the chunk with this digest is one of the sampled ones."""
    return chunk[0] < 256 // RATE


def _head(chunk: bytes) -> int:
    return int.from_bytes(chunk[:8], "big")


@dataclass(frozen=True, slots=True)
class Sample:
    """The segments covered, and the first 8 bytes of each hook with the segment's number.

    ``heads`` ascend; ``numbers`` index ``segments``.
    """

    segments: tuple[bytes, ...]
    heads: array[int]
    numbers: array[int]

    def find(self, chunk: bytes) -> bytes | None:
        """Return the segment that probably holds the hook ``chunk``."""
        head = _head(chunk)
        at = bisect_left(self.heads, head)
        if at < len(self.heads) and self.heads[at] == head:
            return self.segments[self.numbers[at]]
        return None

    def encode(self) -> tuple[bytes, bytes]:
        """Return the name and the bytes to store."""
        raw = b"".join(
            (
                U32.pack(len(self.segments)),
                U32.pack(len(self.heads)),
                b"".join(self.segments),
                pack_array(self.heads),
                pack_array(self.numbers),
            )
        )
        return digest(raw), seal(MAGIC, raw)


def build_sample(segments: Iterable[tuple[bytes, Sequence[Pack]]]) -> Sample:
    """Take the hooks of named segments."""
    names: list[bytes] = []
    hooks: dict[int, int] = {}
    for name, packs in segments:
        for pack in packs:
            for frame in pack.frames:
                for at in range(0, len(frame.digests), DIGEST_SIZE):
                    chunk = frame.digests[at : at + DIGEST_SIZE]
                    if is_hook(chunk):
                        hooks[_head(chunk)] = len(names)
        names.append(name)
    return _sorted(names, hooks)


def merge_samples(samples: Iterable[Sample]) -> Sample:
    """Return one sample that covers all that ``samples`` cover."""
    numbers: dict[bytes, int] = {}
    hooks: dict[int, int] = {}
    for sample in samples:
        for name in sample.segments:
            numbers.setdefault(name, len(numbers))
        for head, number in zip(sample.heads, sample.numbers, strict=True):
            hooks[head] = numbers[sample.segments[number]]
    return _sorted(list(numbers), hooks)


def _sorted(names: Sequence[bytes], hooks: dict[int, int]) -> Sample:
    heads = sorted(hooks)
    return Sample(tuple(names), array("Q", heads), array("I", (hooks[head] for head in heads)))


def open_sample(data: bytes, name: bytes) -> Sample:
    """Decode the stored sample called ``name``. Raises ``CorruptError``."""
    what = f"sample {name.hex()}"
    raw, found = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    if found != name:
        raise CorruptError(f"{what} does not match its name")
    cursor = Cursor(raw)
    segment_count, hook_count = cursor.u32(), cursor.u32()
    blob = bytes(cursor.take(segment_count * DIGEST_SIZE))
    heads, numbers = cursor.array(hook_count, 8), cursor.array(hook_count, 4)
    cursor.finish()
    if any(number >= segment_count for number in numbers):
        raise CorruptError(f"{what} names a segment it does not list")
    segments = tuple(blob[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE] for i in range(segment_count))
    return Sample(segments, heads, numbers)
