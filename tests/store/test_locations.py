from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import CorruptError
from envstore.store.binary import seal, unseal
from envstore.store.digest import digest
from envstore.store.frames import MAX_SIZE
from envstore.store.locations import (
    MAGIC,
    MAX_BODY,
    NOWHERE,
    FrameRef,
    Locations,
    locations_key,
    open_locations,
)
from tests.damage import assert_noticed

_NAME = digest(b"manifest")


def _locations(seed: int, frames: int, parts: int, refs: int) -> Locations:
    rng = random.Random(seed)
    packs = [rng.randbytes(32) for _ in range(3)]
    found = Locations()
    for _ in range(frames):
        raw = rng.randrange(1, MAX_SIZE)
        found.frames.append(
            FrameRef(
                rng.choice(packs), rng.randrange(2**32), rng.randrange(raw), raw,
                rng.randrange(2), rng.randbytes(32),
            )
        )  # fmt: skip
    for _ in range(parts if frames else 0):
        found.part_frames.append(rng.randrange(frames))
        found.part_offsets.append(rng.randrange(2**32))
    for _ in range(refs):
        hole = not frames or rng.random() < 0.2
        found.ref_frames.append(NOWHERE if hole else rng.randrange(frames))
        found.ref_offsets.append(rng.randrange(2**32))
    return found


def _open(data: bytes, like: Locations) -> Locations:
    return open_locations(data, _NAME, parts=len(like.part_frames), refs=len(like.ref_frames))


@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 5), st.integers(0, 60))
def test_locations_round_trip(seed: int, frames: int, parts: int, refs: int) -> None:
    found = _locations(seed, frames, parts, refs)
    assert _open(found.seal(), found) == found


def test_damaged_locations_are_refused() -> None:
    found = _locations(1, 5, 2, 40)
    assert_noticed(lambda data: _open(data, found), found.seal())


def test_locations_of_another_manifest_are_refused() -> None:
    found = _locations(1, 5, 2, 40)
    for parts, refs in ((1, 40), (3, 40), (2, 39), (2, 41)):
        with pytest.raises(CorruptError, match=f"locations of manifest {_NAME.hex()} do not"):
            open_locations(found.seal(), _NAME, parts=parts, refs=refs)


def _hostile(at: int, value: int, *, width: str = "I") -> bytes:
    """Return sealed locations of one frame, one part and one chunk with one number replaced."""
    like = _locations(2, 1, 1, 0)
    like.ref_frames.append(0)
    like.ref_offsets.append(7)
    body = bytearray(unseal(MAGIC, like.seal(), limit=MAX_BODY, what="it")[0])
    struct.pack_into(f"<{width}", body, at, value)
    return seal(MAGIC, bytes(body))


# The body: four counts, one pack, four columns of the frame, its codec and its digest.
_PACK_NUMBER, _STORED, _RAW = 48, 56, 60
_PART_FRAME = 64 + 1 + 32
_REF_FRAME = _PART_FRAME + 8


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (_PACK_NUMBER, 1), (_PACK_NUMBER, 2**32 - 1), (_STORED, MAX_SIZE + 1), (_STORED, 2**32 - 1),
        (_RAW, MAX_SIZE + 1), (_RAW, 2**32 - 1), (_PART_FRAME, 1), (_PART_FRAME, NOWHERE),
        (_REF_FRAME, 1), (_REF_FRAME, NOWHERE - 1), (0, 0), (0, 2), (0, 2**32 - 1), (4, 0), (4, 2),
        (4, 2**32 - 1), (8, 2), (12, 2),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused(at: int, value: int) -> None:
    with pytest.raises(CorruptError):
        open_locations(_hostile(at, value), _NAME, parts=1, refs=1)


def test_the_hostile_cases_start_from_sound_ones() -> None:
    for at, value in ((_PACK_NUMBER, 0), (_PART_FRAME, 0), (_REF_FRAME, 0), (_REF_FRAME, NOWHERE)):
        found = open_locations(_hostile(at, value), _NAME, parts=1, refs=1)
        assert len(found.frames) == 1


def test_key() -> None:
    assert locations_key(_NAME) == f"locations/{_NAME.hex()}"
