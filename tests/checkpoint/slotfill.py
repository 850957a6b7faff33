"""Stages plain bytes as a trainer would; run as a program, it is one that is killed at once.

    python tests/checkpoint/slotfill.py DIRECTORY JSON

with the orders' fields and ``{path: [size, seed]}`` in the JSON. It stages, starts a persister if
there is none, says so on standard output, and sleeps.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envstore.checkpoint.layout import CheckpointId, Orders, StagedFile
from envstore.checkpoint.slotformat import CONTROL_BYTES, Header, aligned, encode_header
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner, SlotWriter

SAVED = "2026-01-02T03:04:05+00:00"
Files = Mapping[str, Sequence[bytes]]


def orders(store: str, step: int, *, epoch: int = 1, rank: int = 0, **more: Any) -> Orders:
    """Return the orders of one rank's part of ``step``."""
    fields: dict[str, Any] = {"world_size": 1, "saved": SAVED, **more}
    return Orders(store, "team/llm", CheckpointId(step, epoch), rank, **fields)


def table(rank: int = 0, world_size: int = 1) -> bytes:
    """Return a ``state.json`` without items."""
    body = {"format": 1, "rank": rank, "world_size": world_size, "facts": {}, "items": []}
    return json.dumps(body).encode()


def content(seed: int, size: int) -> bytes:
    """Return bytes that compress to nothing less, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def state(sizes: Mapping[str, tuple[int, int]]) -> dict[str, list[bytes]]:
    """Return files of one segment each, of ``(size, seed)``, and a table."""
    files = {path: [content(seed, size)] for path, (size, seed) in sizes.items()}
    return {"state.json": [table()], **files}


def begin(owner: SlotOwner, orders: Orders, files: Files) -> tuple[SlotWriter, Header, int]:
    """Take a slot and write the plan of a part; nothing of the data is there yet."""
    at = CONTROL_BYTES
    placed = []
    for path, segments in files.items():
        places = []
        for segment in segments:
            places.append((at, len(segment)))
            at = aligned(at + len(segment))
        placed.append(StagedFile(path, tuple(places)))
    header = Header(orders, tuple(placed))
    data = encode_header(header)
    writer = owner.acquire(at + len(data), timeout=60)
    assert writer is not None
    writer.begin(data, at)
    return writer, header, at


def fill(writer: SlotWriter, header: Header, files: Files) -> None:
    """Write all the data of a part, segment by segment."""
    for file in header.files:
        for (start, length), segment in zip(file.segments, files[file.path], strict=True):
            writer.view[start : start + length] = segment
            writer.fill(start + length)


def stage(owner: SlotOwner, orders: Orders, files: Files) -> SlotWriter:
    """Stage a part, from the first byte to the last."""
    writer, header, _ = begin(owner, orders, files)
    fill(writer, header, files)
    writer.finish()
    return writer


def main(directory: str, text: str) -> None:
    """Be a trainer that stages one part and then does nothing."""
    from envstore.checkpoint.spawning import PersisterOptions, ensure_persister

    said = json.loads(text)
    slots = SlotDirectory(directory)
    owner = SlotOwner(slots)
    options = PersisterOptions(**said.get("options", {}))
    if said.get("persister", True):
        ensure_persister(Path(directory), options)
    stage(owner, orders(said["store"], said["step"]), state(said["files"]))
    sys.stdout.write("staged\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
