"""Writes the golden files anew: ``python -m tests.golden.generate``.

They pin the format. A change of them is a change of the format, and needs another version number
and a reader for the old one; run this only then, or to add to them. ``STORE`` and ``PACK_1`` have
packs of version 1, which nothing writes any more: they stay as they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

from envstore.store.anchors import encode_difference
from envstore.store.chunking import Chunk, Cutter, Hole
from envstore.store.config import init_store
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry, composed_entry
from envstore.store.frames import Codec, encode_frame
from envstore.store.locations import FrameRef
from envstore.store.objects import open_objects
from envstore.store.objects.body import joined
from envstore.store.packs import Pack, PackBuilder
from envstore.store.parts import build_parts
from envstore.store.push import PushOptions, push
from envstore.store.refs import RefName
from envstore.store.repository import Repository
from envstore.store.samples import build_sample, sample_key
from envstore.store.source import WINDOW, Kind
from envstore.store.statcache import StatCache
from tests.golden.content import GoldenSource, cut_files, difference, frames, noise, split_frames

HERE = Path(__file__).parent
STORE = HERE / "store"
CUTS = HERE / "cuts.json"
PACK_1 = HERE / "pack"
PACK_2 = HERE / "pack-2"
CHECKPOINT_PACK = HERE / "pack-checkpoint"
COMPOSED = HERE / "part-composed"
MIB = 1 << 20
# Whatever pack it is: nothing but that frame of it is read.
_ANCHORS = digest(b"the pack of the anchor")
CREATED = "2026-01-02T03:04:05+00:00"
REF = "golden/tree:v1"
MESSAGE = "The golden tree, ünchanged."


def cut(name: str, data: bytes) -> list[list[object]]:
    """Return ``[length, BLAKE3]`` of every chunk, ``[length, "hole"]`` of every hole, in order."""
    windows = (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))
    found: list[list[object]] = []
    for item in Cutter().cut(windows, len(data), tensors=name.endswith(".safetensors")):
        if isinstance(item, Hole):
            found.append([item.length, "hole"])
        elif isinstance(item, Chunk):
            found.append([len(item.data), item.digest.hex()])
        else:
            found.append([len(data), item.hex()])
    return found


def store(root: Path) -> None:
    """Push the golden tree into a new store at ``root``, everything random or dated being fixed."""
    objects = open_objects(f"file://{root}", create=True)
    with (
        # Some of these few chunks must be in the sample.
        patch("envstore.store.samples.RATE", 4),
        patch("envstore.store.config.uuid.uuid4", lambda: "01234567-89ab-4cde-8f01-23456789abcd"),
        patch("envstore.store.refs.secrets.token_hex", lambda size: "5a" * size),
        patch("envstore.store.push.datetime") as pushed,
        patch("envstore.store.refs.datetime") as moved,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for clock in (pushed, moved):
            clock.now.return_value.isoformat.return_value = CREATED
        config, _ = init_store(objects)
        repository = Repository(objects, config, None)
        stat_cache = StatCache(Path(scratch) / "stat.sqlite")
        options = PushOptions(message=MESSAGE)
        push(repository, GoldenSource(), RefName.parse(REF), stat_cache, options=options)
        stat_cache.close()
        segments = [
            (name, repository.segment(name))
            for name in (bytes.fromhex(info.key[6:]) for info in objects.list("index/"))
        ]
        name, data = build_sample(segments).encode()
        objects.put(sample_key(name), data)
    for hidden in (".tmp", ".locks"):
        shutil.rmtree(root / hidden, ignore_errors=True)


def pack() -> bytes:
    """Return the golden pack."""
    builder = PackBuilder()
    for contents in frames():
        builder.add(*encode_frame([(digest(data), data) for data in contents]))
    return _finished(builder)[1]


def _finished(builder: PackBuilder) -> tuple[Pack, bytes]:
    finished = builder.finish()
    if finished is None:
        raise AssertionError("no frames")
    return finished[0], joined(finished[1])


def anchor() -> FrameRef:
    """Return where the golden difference says that its anchor is."""
    _, base = difference()
    row, data = encode_frame([(digest(base), base)])
    return FrameRef(_ANCHORS, 8, len(data), len(base), row.codec, row.digest)


def checkpoint_pack() -> bytes:
    """Return the golden pack of a checkpoint: raw frames, split ones, and a difference."""
    builder = PackBuilder()
    for contents in ([noise("large", 3_000)], [noise("a", 300), noise("b", 1), noise("c", 40)]):
        chunks = [(digest(data), data) for data in contents]
        builder.add(*encode_frame(chunks, codec=Codec.RAW))
    for data in split_frames():
        builder.add(*encode_frame([(digest(data), data)], codec=Codec.SPLIT))
    data, base = difference()
    found = encode_difference(digest(data), data, anchor(), base)
    if found is None:
        raise AssertionError("no difference")
    builder.add(*found)
    return _finished(builder)[1]


def composed_part() -> bytes:
    """Return a manifest part with composed files: plain, executable, with a hole, and no file."""
    refs = [(digest(noise(f"chunk {n}", 10)), 10 + n) for n in range(4)]
    entries = [
        composed_entry(b"all", refs),
        composed_entry(b"one", refs[:1]),
        composed_entry(b"run", [*refs[:2], (HOLE, MIB)], executable=True),
        Entry(b"whole", Kind.FILE, size=21, digest=digest(b"whole"), refs=tuple(refs[:2])),
        composed_entry(b"zeros", [(HOLE, 2 * MIB)]),
    ]
    ((_, raw),) = build_parts(entries)
    return raw


if __name__ == "__main__":
    PACK_2.write_bytes(pack())
    CHECKPOINT_PACK.write_bytes(checkpoint_pack())
    COMPOSED.write_bytes(composed_part())
    cuts = {name: cut(name, data) for name, data in cut_files().items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in cuts.items())
    CUTS.write_text(f"{{\n{lines}\n}}\n")
