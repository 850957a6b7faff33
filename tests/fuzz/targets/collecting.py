"""What writers and collectors of garbage leave for each other, and what a machine remembers."""

from __future__ import annotations

import json
import tempfile
from array import array
from pathlib import Path

from envstore.store.binary import seal
from envstore.store.digest import digest
from envstore.store.doomed import MAGIC as LIST_MAGIC
from envstore.store.doomed import Condemned, encode_list, open_list
from envstore.store.frames import Codec
from envstore.store.gc import columns, moves
from envstore.store.locations import MAGIC as LOCATIONS_MAGIC
from envstore.store.locations import NOWHERE, FrameRef, Locations
from envstore.store.refs import Ref, RefName
from envstore.store.roots import parse_root
from envstore.store.sampling import Journal, Sample
from envstore.store.session_records import Record, parse_record
from envstore.store.smallobjects import SmallObjects
from envstore.store.witness import Witness
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json, unchecked
from tests.fuzz.targets.sealed import body_of
from tests.memory import Memory

_NAME = digest(b"name")
_HEX = _NAME.hex()


def _list_seeds() -> list[bytes]:
    entries = [Condemned(f"packs/aa/{'aa' * 32}", 3, 5.0), Condemned(f"locks/{_HEX}", 4, 6.0)]
    return [body_of(LIST_MAGIC, encode_list(entries, 7.0, bytes(16))[1])]


@target("gc-list", _list_seeds, words=(b"packs/aa/", b"\n", b"/../", b"refs/default/x/latest"))
def gc_list(data: bytes) -> None:
    """Who finishes a deletion deletes what is on it."""
    _, entries = open_list(seal(LIST_MAGIC, data), digest(data))
    for entry in entries:
        expect(".." not in entry.key.split("/"), "a key that climbs")
        expect(not entry.key.startswith(("refs/", "runs/", "envstore.json")), "a key that names")


def _session_seeds() -> list[bytes]:
    keys = (f"locks/{_HEX}",)
    open_, fenced = (
        Record(5, "push", "boot:1:2:3", 1_800_000_000, "ab" * 16, at, bool(at), (_NAME,), keys)
        for at in (0, 1_800_000_500)
    )
    return [open_.encode(), unchecked(open_.encode()), unchecked(fenced.encode())]


@target("session", _session_seeds, mutate_json)
def session(data: bytes) -> None:
    found = parse_record(data, "sessions/x")
    expect(parse_record(found.encode(), "again") == found, "a session is not read as written")
    found.is_over(1_800_000_000.0)


def _root_seeds() -> list[bytes]:
    body = {"format": 1, "snapshot": _HEX, "holder": "h", "until": 1_800_000_000}
    run = {"format": 1, "snapshot": _HEX, "checkpoint": "000000000005-00000001-0000", "rank": 1}
    return [json.dumps(one, sort_keys=True).encode() for one in (body, run)]


@target("root", _root_seeds, mutate_json)
def root(data: bytes) -> None:
    """The same bytes as all that can keep a snapshot alive, and as small objects to check."""
    keys = (
        "refs/a/b/c", f"leases/{_HEX}/0123456789abcdef", f"drafts/a/b/c/{_HEX}",
        "runs/a/b/parts/000000000005-00000001-0000/00001-of-00002", "runs/a/b/leases/x/y",
        "runs/a/b/pins/x", "sessions/" + "ab" * 16, "gc/state", f"gc/lists/{_HEX}",
        f"damaged/{_HEX}",
    )  # fmt: skip
    SmallObjects(Memory(dict.fromkeys(keys, data)), []).check()
    for key in keys:
        parse_root(key, data)


def _frames() -> tuple[FrameRef, FrameRef, FrameRef]:
    first = FrameRef(digest(b"p"), 8, 100, 200, Codec.ZSTD, digest(b"f"))
    moved = FrameRef(digest(b"q"), 80, 100, 200, Codec.ZSTD, digest(b"f"))
    other = FrameRef(digest(b"q"), 180, 60, 120, Codec.ZSTD, digest(b"g"))
    return first, moved, other


def _move_seeds() -> list[bytes]:
    first, moved, other = _frames()
    made = [moves.Move(first, moved), moves.Move(first, other, {0: 0, 50: 10})]
    return [body_of(moves.MAGIC, moves.encode_moves(made))]


@target("gc-moves", _move_seeds)
def gc_moves(data: bytes) -> None:
    found = moves.open_moves(seal(moves.MAGIC, data))
    expect(moves.open_moves(moves.encode_moves(found)) == found, "moves are not read as written")


def _column_seeds() -> list[bytes]:
    made = Locations(
        list(_frames()), array("I", (0,)), array("I", (0,)), array("I", (1, NOWHERE, 2)),
        array("I", (0, 0, 5)),
    )  # fmt: skip
    return [body_of(LOCATIONS_MAGIC, made.seal())]


@target("gc-columns", _column_seeds)
def gc_columns(data: bytes) -> None:
    """Locations as a collector reads them."""
    found = columns.open_columns(seal(LOCATIONS_MAGIC, data), _NAME)
    again = columns.open_columns(found.seal(), _NAME)
    expect(again.names == found.names and again.numbers == found.numbers, "not read as written")


def _remembered_seeds() -> list[bytes]:
    seen = {"refs/default/x/latest": [_HEX, 3, "ab", "2026-01-02T03:04:05+00:00"]}
    head = {"format": 1, "started": "now", "share": 0.5, "seed": "x"}
    return [
        json.dumps({"format": 1, "refs": seen}).encode(),
        json.dumps(head).encode() + b"\n" + _HEX.encode() + b" 100\n",
    ]


@target("remembered", _remembered_seeds, mutate_json, (b"\n", b" ", _HEX.encode()))
def remembered(data: bytes) -> None:
    """What ``verify`` and a witness of refs find in a user's own directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        now = Ref(_NAME, 2, "cd", "2026-01-02T03:04:06+00:00")
        Witness(path).judge({RefName("default", "x", "latest"): now})
        path = Path(folder) / "b"
        path.write_bytes(data)
        journal = Journal(path)
        try:
            run = journal.begin(Sample(), resume=True)
            expect(all(size >= 0 for size in run.done.values()), "a negative size")
        finally:
            journal.close()
