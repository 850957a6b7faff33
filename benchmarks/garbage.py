"""What garbage collection takes: a large store that is made up, collected by the real command.

``python -m benchmarks garbage``. The packs are sparse files of which only the index says what
they hold; snapshots come in families that share most of what they have, and of every third family
the refs are gone. Made in a few minutes, on a few hundred megabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cold_start import empty_directory
from benchmarks.measure import Timing, run
from envstore.store.binary import pack_array, seal
from envstore.store.creation import create_store
from envstore.store.frames import Codec, Frame
from envstore.store.gc.columns import Columns
from envstore.store.index import encode_segment, segment_key
from envstore.store.locations import locations_key
from envstore.store.manifest import ROOT_MAGIC, manifest_key
from envstore.store.packing import SEGMENT_PACKS
from envstore.store.packs import HEADER, Pack, pack_key
from envstore.store.refs import Ref, RefName
from envstore.store.snapshots import Snapshot, snapshot_key
from examples.client import envstore_command

CHUNK = 64 << 10
FRAME_CHUNKS = 20
VERSIONS = 10
"""Snapshots of one family; each leaves out another tenth of the family's frames."""
_DEAD_FRAMES = 40
"""One frame in so many is in no version: dead within a pack that is live."""
MOST_SECONDS, MOST_BYTES = 600.0, 1_000_000_000
_LARGE = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Made:
    """A store and what is in it."""

    url: str
    packs: int
    chunks: int
    snapshots: int
    references: int


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with status 2 when they make no sense."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks garbage", description="Measure garbage collection."
    )
    parser.add_argument("--packs", type=int, default=20_000, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--pack-chunks", type=int, default=500, metavar="N", help="in each [%(default)s]"
    )
    parser.add_argument(
        "--families", type=int, default=45, metavar="N", help="of 10 snapshots [%(default)s]"
    )
    parser.add_argument(
        "--work", type=Path, default=cache / "envstore-bench", help="what is kept [%(default)s]"
    )
    options = parser.parse_args(arguments)
    if options.pack_chunks % FRAME_CHUNKS or not options.families <= options.packs:
        parser.error(f"--pack-chunks must be a multiple of {FRAME_CHUNKS}, --families <= --packs")
    return options


def main(arguments: Sequence[str], console: Console, say: Callable[[str], None]) -> int:
    """Measure and print; returns 3 if a target was missed."""
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with empty_directory(options.work) as scratch:
        made = make_store(
            scratch / "store", options.packs, options.pack_chunks, options.families, say
        )
        rows: list[tuple[str, Timing, dict[str, int]]] = []
        for name, grace in (("mark and condemn", "24h"), ("mark and sweep", "0s")):
            say(name)
            answer = scratch / "answer"
            command = [*envstore_command(), "--store", made.url, "gc", "--grace", grace, "--json"]
            timing = run(command, output=answer)
            rows.append((name, timing, json.loads(answer.read_text())))
    console.print(
        f"{made.chunks:,} chunks in {made.packs:,} packs; {made.snapshots:,} live snapshots with "
        f"{made.references:,} references"
    )
    table = Table("run", "time", "CPU", "peak memory", "condemned", "freed", "kept")
    for name, timing, found in rows:
        sizes = [found[f"{what}_bytes"] / 1e9 for what in ("condemned", "freed", "kept")]
        table.add_row(
            name,
            f"{timing.seconds:.1f} s",
            f"{timing.cpu_seconds:.1f} s",
            f"{timing.peak_bytes / 1e6:.0f} MB",
            *(f"{size:.1f} GB" for size in sizes),
        )
    console.print(table)
    seconds = max(timing.seconds for _, timing, _ in rows)
    peak = max(timing.peak_bytes for _, timing, _ in rows)
    factor = _LARGE / made.chunks
    console.print(
        f"by the cost model {_LARGE:,} chunks would take {seconds * factor / 3600:.1f} h, "
        f"{8 * _LARGE / 1e9:.0f} GB of temporary files and about "
        f"{(peak + 200 * made.packs * factor) / 1e6:.0f} MB"
    )
    met = seconds <= MOST_SECONDS and peak <= MOST_BYTES
    console.print(
        f"target: at most {MOST_SECONDS:.0f} s and {MOST_BYTES / 1e6:.0f} MB: "
        f"{'met' if met else 'missed'}"
    )
    return 0 if met else 3


def make_store(
    root: Path, packs: int, pack_chunks: int, families: int, say: Callable[[str], None]
) -> Made:
    """Write a store of so many packs, whose every third family of snapshots has no refs."""
    url = create_store(f"file://{root}", probe=False).url
    rng = random.Random(1)
    shares = [list(range(at, packs, families)) for at in range(families)]
    live = references = 0
    for number, share in enumerate(shares):
        if number % 10 == 0:
            say(f"family {number} of {families}")
        made = [_pack(rng, pack_chunks) for _ in share]
        for pack in made:
            path = root / pack_key(pack.digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(pack.size)
        for at in range(0, len(made), SEGMENT_PACKS):
            name, data = encode_segment(made[at : at + SEGMENT_PACKS])
            _write(root, segment_key(name), data)
        for version in range(VERSIONS):
            count = _snapshot(root, made, version, number % 3 != 0 and f"family-{number}")
            if number % 3:
                live += 1
                references += count
    return Made(url, packs, packs * pack_chunks, live, references)


def _pack(rng: random.Random, chunks: int) -> Pack:
    sizes = array("I", [CHUNK] * FRAME_CHUNKS)
    size = CHUNK * FRAME_CHUNKS
    frames = tuple(
        Frame(Codec.RAW, size, size, rng.randbytes(32), sizes, rng.randbytes(32 * FRAME_CHUNKS))
        for _ in range(chunks // FRAME_CHUNKS)
    )
    # As long as it says, with about the table that it would have.
    return Pack(rng.randbytes(32), len(HEADER) + size * len(frames) + 40 * chunks, frames)


def _snapshot(root: Path, packs: Sequence[Pack], version: int, name: str | bool) -> int:
    """Write one version, with a ref if it has a name; returns its references."""
    numbers, offsets = array("I"), array("I")
    names = bytearray()
    for number, pack in enumerate(packs):
        for at, (frame, offset) in enumerate(zip(pack.frames, pack.offsets(), strict=True)):
            turn = number * len(pack.frames) + at
            if turn % VERSIONS != version and turn % _DEAD_FRAMES:
                numbers.append(number)
                offsets.append(offset)
                names += frame.digest
    count = len(numbers)
    size = array("I", [CHUNK * FRAME_CHUNKS]) * count
    places = [CHUNK * at for at in range(FRAME_CHUNKS)]
    refs = array("I", (frame for frame in range(count) for _ in places))
    columns = Columns(
        [pack.digest for pack in packs],
        numbers,
        offsets,
        size,
        size,
        bytearray(count),
        names,
        (memoryview(pack_array(array("I", [0]))), memoryview(bytes(4))),
        (memoryview(pack_array(refs)), memoryview(pack_array(array("I", places * count)))),
    )
    manifest = secrets.token_bytes(32)
    _write(root, locations_key(manifest), columns.seal())
    _write(root, manifest_key(manifest), seal(ROOT_MAGIC, bytes(1000)))
    made = Snapshot("dir", manifest, 1, CHUNK * len(refs), "2026-01-01T00:00:00Z")
    _write(root, snapshot_key(made.digest), made.encode())
    if name:
        ref = Ref(made.digest, 1, secrets.token_hex(16), "2026-01-01T00:00:00Z")
        where = RefName("default", str(name), f"v{version}")
        _write(root, where.key, ref.encode(where))
    return len(refs)


def _write(root: Path, key: str, data: bytes) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
