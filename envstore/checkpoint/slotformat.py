"""What lies where in a slot, to the byte. ``docs/checkpoints-slots.md`` says it in words.

A slot is one file: a control page of 4096 bytes, the data, and a header in JSON. The control page
is made of words of 8 bytes in the byte order of the machine, which is little-endian wherever this
runs::

    word  0      "ESSLOT01"
          1      state: "writing", "wave", "staged", "durable" or "broken", zeros after it
          2      filled: offset in the slot below which all data is final
          3      taken: how many waves the persister needs no more
          4      sequence: which save this is, from 1; the greatest is the newest
          5      wave: which wave of that save lies here, from 0
          6      last: 1 if no wave follows, else 0
          7, 8   header: its offset and its length
          9-12   header: its BLAKE3
          13     check: the first 8 bytes of the BLAKE3 of word 0 and words 4 to 12

Words 1, 2 and 3 change while others look on, so each is stored by one aligned store of 8 bytes;
all other words change only while their writer holds the slot alone (``slotwriting``). A page of
zeros is a slot that was never used.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envstore.checkpoint.layout import CheckpointId, Orders, StagedFile
from envstore.errors import CorruptError
from envstore.store import canonical
from envstore.store.digest import digest

CONTROL_BYTES = 4096
MAX_HEADER = 64 << 20
ALIGNMENT = 64  # of segments: a cache line, and no loader of safetensors wants more
FORMAT = 1

MAGIC = b"ESSLOT01"
EMPTY = "empty"
WRITING, WAVE, STAGED, DURABLE, BROKEN = "writing", "wave", "staged", "durable", "broken"
STATES = (WRITING, WAVE, STAGED, DURABLE, BROKEN)

_FIXED = struct.Struct("=QQQQQ32s")  # sequence, wave, last, header offset and length, its digest
_WORD = {state: struct.unpack("=Q", state.encode().ljust(8, b"\0"))[0] for state in STATES}
_STATE = {word: state for state, word in _WORD.items()}
_STATE_AT, _FILLED_AT, _TAKEN_AT, _FIXED_AT, _CHECK_AT = 1, 2, 3, 4, 13
_MAX_WORD = 1 << 62
_FENCE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Control:
    """The words of a control page that stay as they are while a wave is in the slot."""

    sequence: int
    wave: int
    last: bool
    header_at: int
    header_bytes: int
    header_digest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a slot: what it holds, and what is to be done with it.

    ``files`` lists all files of the part with all their segments, in every wave of it. A segment
    that another wave carries has the offset 0.
    """

    orders: Orders
    files: tuple[StagedFile, ...]


class ControlWords:
    """The control page of a mapped slot: one aligned store or load of 8 bytes for each word."""

    def __init__(self, page: memoryview) -> None:
        self._bytes = page[:CONTROL_BYTES]
        self._words = self._bytes.cast("Q")

    def state(self, size: int) -> str:
        """Return the state; ``empty`` for a page of zeros, ``broken`` for what makes no sense.

        ``size`` is that of the slot.
        """
        if bytes(self._bytes) == bytes(CONTROL_BYTES):
            return EMPTY
        return _STATE.get(self._words[_STATE_AT], BROKEN) if self.read(size) else BROKEN

    def set_state(self, state: str) -> None:
        """Change the state, after all that was written before."""
        with _FENCE:  # what was written is released to other cores first
            pass
        with _FENCE:
            self._words[_STATE_AT] = _WORD[state]

    @property
    def filled(self) -> int:
        """Offset in the slot below which all data is final, as the page says it."""
        return int(self._words[_FILLED_AT])

    @filled.setter
    def filled(self, offset: int) -> None:
        with _FENCE:
            pass
        with _FENCE:
            self._words[_FILLED_AT] = offset

    @property
    def taken(self) -> int:
        """How many waves of this save the persister needs no more."""
        return int(self._words[_TAKEN_AT])

    @taken.setter
    def taken(self, waves: int) -> None:
        self._words[_TAKEN_AT] = waves

    def write(self, control: Control) -> None:
        """Write the words that stay; only while the slot is held alone and ``writing``."""
        fixed = _FIXED.pack(
            control.sequence,
            control.wave,
            int(control.last),
            control.header_at,
            control.header_bytes,
            control.header_digest,
        )
        self._bytes[:8] = MAGIC
        start = _FIXED_AT * 8
        self._bytes[start : start + len(fixed)] = fixed
        self._bytes[_CHECK_AT * 8 : _CHECK_AT * 8 + 8] = digest(MAGIC + fixed)[:8]

    def read(self, size: int) -> Control | None:
        """Return the words that stay if they are whole and lie within a slot of ``size`` bytes."""
        start = _FIXED_AT * 8
        fixed = bytes(self._bytes[start : start + _FIXED.size])
        check = bytes(self._bytes[_CHECK_AT * 8 : _CHECK_AT * 8 + 8])
        if bytes(self._bytes[:8]) != MAGIC or check != digest(MAGIC + fixed)[:8]:
            return None
        sequence, wave, last, at, length, name = _FIXED.unpack(fixed)
        if not 0 < sequence < _MAX_WORD or wave >= _MAX_WORD or last > 1:
            return None
        if length > MAX_HEADER or not CONTROL_BYTES <= at <= size - length:
            return None
        return Control(sequence, wave, last == 1, at, length, name)

    def release(self) -> None:
        """Give the views back, so that the mapping can be closed."""
        self._words.release()
        self._bytes.release()


def encode_header(header: Header) -> bytes:
    """Return the header as JSON. Metrics are texts, so that NaN and all digits survive."""
    orders = header.orders
    value = {
        "format": FORMAT,
        "store": orders.store,
        "run": orders.run,
        "checkpoint": [
            orders.checkpoint.step,
            orders.checkpoint.epoch,
            orders.checkpoint.attempt,
        ],
        "rank": orders.rank,
        "world_size": orders.world_size,
        "saved": orders.saved,
        "bases": list(orders.bases),
        "keep": orders.keep,
        "codec": orders.codec,
        "pin": orders.pin,
        "metrics": {name: repr(float(number)) for name, number in orders.metrics.items()},
        "lineage": dict(orders.lineage),
        "files": [[file.path, [list(one) for one in file.segments]] for file in header.files],
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_header(data: bytes, *, first: int, end: int, what: str) -> Header:
    """Return the header in ``data``, whose segments must lie in ``first`` to ``end``.

    Raises ``CorruptError`` naming ``what``.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptError(f"{what}: its header is not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{what}: its header is not a JSON object")
    if value.get("format") != FORMAT:
        raise CorruptError(
            f"{what}: its header has the format {value.get('format')!r}, not {FORMAT}",
            hint="another version of envstore wrote it",
        )

    def field(name: str, kind: type) -> Any:
        return canonical.field(value, name, kind, what)

    orders = Orders(
        store=field("store", str),
        run=field("run", str),
        checkpoint=CheckpointId(*_numbers(field("checkpoint", list), 3, what)),
        rank=field("rank", int),
        world_size=field("world_size", int),
        saved=field("saved", str),
        bases=tuple(_texts(field("bases", list), what)),
        keep=field("keep", str),
        codec=field("codec", str),
        pin=field("pin", str),
        metrics=_metrics(field("metrics", dict), what),
        lineage=_lineage(field("lineage", dict), what),
    )
    if not 0 <= orders.rank < orders.world_size:
        raise CorruptError(f"{what}: rank {orders.rank} of {orders.world_size} cannot be")
    return Header(orders, _files(field("files", list), first, end, what))


def _files(entries: list[Any], first: int, end: int, what: str) -> tuple[StagedFile, ...]:
    files: dict[str, StagedFile] = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            raise CorruptError(f"{what}: its header has a malformed file")
        path, segments = entry
        if not isinstance(path, str) or not _is_inside(path) or path in files:
            raise CorruptError(f"{what}: its header has the path {path!r}")
        pairs = []
        for segment in segments:
            start, length = _numbers(segment, 2, what)
            if start and not first <= start <= start + length <= end:
                raise CorruptError(f"{what}: a segment of {path} lies outside of the data")
            pairs.append((start, length))
        files[path] = StagedFile(path, tuple(pairs))
    return tuple(files.values())


def _is_inside(path: str) -> bool:
    """Whether ``path`` is relative, plain, and leads nowhere else."""
    return "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _numbers(value: Any, count: int, what: str) -> list[int]:
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(type(number) is int and 0 <= number < _MAX_WORD for number in value)
    ):
        raise CorruptError(f"{what}: its header has malformed numbers")
    return value


def _texts(values: Sequence[Any], what: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise CorruptError(f"{what}: its header has malformed text")
    return list(values)


def _metrics(values: Mapping[str, Any], what: str) -> dict[str, float]:
    try:
        return {
            name: float(text)
            for name, text in zip(values, _texts([*values.values()], what), strict=True)
        }
    except ValueError:
        raise CorruptError(f"{what}: its header has a malformed metric") from None


def _lineage(values: Mapping[str, Any], what: str) -> dict[str, str]:
    return dict(zip(values, _texts([*values.values()], what), strict=True))


def aligned(offset: int, to: int = ALIGNMENT) -> int:
    """Return the next multiple of ``to`` at or after ``offset``."""
    return -(-offset // to) * to
