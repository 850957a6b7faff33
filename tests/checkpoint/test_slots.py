"""Slots: their bytes, who may have which, and what a killed trainer leaves."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.checkpoint.errors import CheckpointError, SlotSpaceError
from envstore.checkpoint.layout import CheckpointId, Orders, RunName, StagedFile, Want
from envstore.checkpoint.slotformat import (
    CONTROL_BYTES,
    Header,
    decode_header,
    encode_header,
)
from envstore.checkpoint.slots import SlotDirectory, SlotTree, slot_directory
from envstore.checkpoint.slotwriting import SlotOwner
from envstore.errors import CorruptError, NotFoundError
from tests.checkpoint import slotfill

WORDS = 14 * 8
texts = st.text(max_size=12)
names = st.lists(
    st.text("abc.-_é\ud800", min_size=1, max_size=6).filter(lambda text: text not in (".", "..")),
    min_size=1,
    max_size=3,
).map("/".join)
counts = st.integers(0, 1 << 40)


@pytest.fixture
def slots(slots_root: Path) -> SlotDirectory:
    return SlotDirectory(slot_directory("file:///store", RunName("team", "llm"), 3))


def orders(step: int) -> Orders:
    return slotfill.orders("file:///store", step)


def files(step: int, size: int = 1000) -> dict[str, list[bytes]]:
    return {
        "state.json": [b"{%d}" % step],
        "model.safetensors": [slotfill.content(step, size), b"", slotfill.content(step + 1, 77)],
    }


def save(owner: SlotOwner, step: int, size: int = 1000) -> int:
    return slotfill.stage(owner, orders(step), files(step, size)).number


def store(slots: SlotDirectory, number: int) -> None:
    slot = slots.read_slot(number)
    assert slot is not None
    with slot:
        slot.mark_durable()


def growing(step: int) -> int:
    """Return a size that is often larger than any before."""
    return 1000 + step * 3001 % 300_000


def steps(slots: SlotDirectory, size: Callable[[int], int] = lambda _: 1000) -> dict[int, str]:
    """Return the step and the state of each slot that can be read, and look at their content."""
    found = {}
    for slot in slots.slots():
        with slot:
            step = slot.orders.checkpoint.step
            found[step] = slot.state
            if slot.complete:
                tree = SlotTree([slot])
                for path, segments in files(step, size(step)).items():
                    assert tree.read(path) == b"".join(segments)
    return found


# The bytes.


@given(
    st.builds(
        Orders,
        store=texts,
        run=texts,
        checkpoint=st.builds(CheckpointId, counts, counts, counts),
        rank=st.integers(0, 5),
        world_size=st.integers(6, 9),
        saved=texts,
        bases=st.lists(texts, max_size=3).map(tuple),
        keep=texts,
        codec=texts,
        pin=texts,
        metrics=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
        lineage=st.dictionaries(texts, texts, max_size=3),
    ),
    st.dictionaries(
        names,
        st.lists(st.tuples(st.integers(100, 200), st.integers(0, 50)), max_size=3).map(tuple),
        max_size=3,
    ),
)
def test_a_header_comes_back_as_it_was(orders: Orders, files: dict[str, tuple]) -> None:
    header = Header(orders, tuple(StagedFile(*item) for item in files.items()))
    assert decode_header(encode_header(header), first=100, end=250, what="it") == header


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"state.json"', b'"/state.json"'),
        (b'"state.json"', b'"../state.json"'),
        (b'"state.json"', b'"a/./b"'),
        (b'"state.json"', b'"a\\u0000"'),
        (b'"state.json"', b'""'),
        (b'"state.json"', b'"b"'),
        (b'"state.json"', b"7"),
        (b"[4096,10]", b"[4096,1000]"),
        (b"[4096,10]", b"[4095,1]"),
        (b"[4096,10]", b"[9999999,1]"),
        (b"[4096,10]", b"[4096,-1]"),
        (b"[4096,10]", b"[4096,true]"),
        (b"[4096,10]", b"[4096,1.5]"),
        (b"[4096,10]", b"[4096]"),
        (b"[4096,10]", b"{}"),
        (b"[[4096,10]]", b"null"),
        (b'"format":1', b'"format":2'),
        (b'"rank":0', b'"rank":1'),
        (b'"metrics":{}', b'"metrics":{"a":"b"}'),
        (b'"metrics":{}', b'"metrics":{"a":1}'),
        (b'"lineage":{}', b'"lineage":{"a":1}'),
        (b'"bases":[]', b'"bases":[1]'),
        (b'"checkpoint":[1,1,0]', b'"checkpoint":[1,1]'),
        (b'"saved"', b'"served"'),
        (b"{", b"[" * 100_000),
        (b"{", b""),
    ],
)
def test_a_header_that_would_lead_astray_is_refused(old: bytes, new: bytes) -> None:
    places = (StagedFile("state.json", ((4096, 10),)), StagedFile("b", ()))
    data = encode_header(Header(orders(1), places))
    assert old in data
    with pytest.raises(CorruptError):
        decode_header(data.replace(old, new, 1), first=4096, end=4200, what="it")


def test_no_changed_byte_makes_a_wrong_part(slots: SlotDirectory, owner: SlotOwner) -> None:
    number = save(owner, 1)
    slot = slots.read_slot(number)
    assert slot is not None
    with slot:
        start = slot.filled
    path = slots.slot_path(number)
    end = start + len(encode_header(Header(slot.orders, slot.files)))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for position in [*range(WORDS), *range(start, end)]:
            for flip in (0x01, 0x80, 0xFF):
                memory[position] ^= flip
                found = slots.read_slot(number)
                if found is not None:
                    assert position // 8 == 3, "only `taken` says nothing of a staged part"
                    with found:
                        assert found.files == slot.files
                memory[position] ^= flip
    assert steps(slots) == {1: "staged"}


@pytest.fixture(scope="module")
def garbage(tmp_path_factory: pytest.TempPathFactory) -> SlotDirectory:
    slots = SlotDirectory(tmp_path_factory.mktemp("root") / "run/00000")
    slots.create()
    return slots


@given(st.binary(max_size=WORDS), st.integers(0, 8))
def test_no_garbage_is_read(garbage: SlotDirectory, data: bytes, magic: int) -> None:
    page = (b"ESSLOT01"[:magic] + data).ljust(CONTROL_BYTES + 100, b"\0")
    garbage.slot_path(0).write_bytes(page)
    assert garbage.read_slot(0) is None


def test_what_is_no_slot_is_not_read(slots: SlotDirectory, owner: SlotOwner) -> None:
    save(owner, 1)
    slots.slot_path(5).write_bytes(b"short")
    slots.slot_path(6).symlink_to(slots.slot_path(0))
    os.mkfifo(slots.slot_path(7))
    slots.slot_path(8).mkdir()
    assert steps(slots) == {1: "staged"}


# Who may have which.


def test_the_newest_staged_is_kept_until_a_newer_one_is(
    slots: SlotDirectory, owner: SlotOwner
) -> None:
    first, second = save(owner, 1), save(owner, 2)
    assert {first, second} == {0, 1}
    assert owner.acquire(5000) is None, "the store has neither"
    store(slots, second)
    assert owner.acquire(5000) is None, "one is not stored, and the other the newest"
    store(slots, first)
    writer = owner.acquire(5000)
    assert writer is not None
    assert writer.number == first
    assert steps(slots) == {2: "durable"}, "nobody may have a slot that is being prepared"
    writer.abandon()
    assert save(owner, 3) == first, "nothing is lost with one that was given up"
    store(slots, first)
    assert save(owner, 4) == second
    assert steps(slots) == {3: "durable", 4: "staged"}


def test_a_slot_that_is_read_is_not_used_again(slots: SlotDirectory, owner: SlotOwner) -> None:
    first, second = save(owner, 1), save(owner, 2)
    reader = slots.read_slot(first)
    assert reader is not None
    reader.mark_durable()
    store(slots, second)
    assert owner.acquire(5000, timeout=0.05) is None
    reader.close()
    reader.close()
    assert save(owner, 3) == first


def test_one_slot_is_given_up_once_the_store_has_it(slots: SlotDirectory) -> None:
    owner = SlotOwner(slots, 1)
    save(owner, 1)
    assert owner.acquire(5000) is None
    store(slots, 0)
    assert save(owner, 2) == 0
    owner.close()


def test_a_refused_part_gives_its_slot_back(slots: SlotDirectory, owner: SlotOwner) -> None:
    save(owner, 1)
    save(owner, 2)
    slot = slots.read_slot(0)
    assert slot is not None
    with slot:
        slot.mark_broken()
    assert save(owner, 3) == 0


def test_a_reader_may_begin_before_all_is_there(slots: SlotDirectory, owner: SlotOwner) -> None:
    content = files(1)
    writer, header, end = slotfill.begin(owner, orders(1), content)
    slot = slots.read_slot(writer.number)
    assert slot is not None
    with slot:
        assert (slot.state, slot.filled, slot.complete) == ("writing", CONTROL_BYTES, False)
        with pytest.raises(CorruptError, match="no complete part"):
            SlotTree([slot])
        start, length = slot.files[0].segments[0]
        writer.view[start : start + length] = content["state.json"][0]
        writer.fill(start + length)
        assert slot.filled == start + length
        assert slot.view[start : slot.filled] == content["state.json"][0]
        slotfill.fill(writer, header, content)
        writer.finish()
        assert (slot.state, slot.filled, slot.complete) == ("staged", end, True)


def test_slots_grow_and_keep_what_is_in_them(slots: SlotDirectory, owner: SlotOwner) -> None:
    save(owner, 1)
    owner.reserve(300_000)
    assert [slots.slot_path(number).stat().st_size >= 300_000 for number in (0, 1)] == [True, True]
    assert steps(slots) == {1: "staged"}
    size = slots.slot_path(0).stat().st_size
    assert slots.slot_path(0).stat().st_blocks * 512 >= size, "there is memory for all of it"
    owner.reserve(5000)
    assert slots.slot_path(0).stat().st_size == size


def test_another_process_waits_for_the_trainer(slots: SlotDirectory, owner: SlotOwner) -> None:
    save(owner, 1)
    assert slots.trainer_alive()
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} saves"):
        SlotOwner(slots, patience=0)
    owner.close()
    again = SlotOwner(slots, patience=0)
    assert save(again, 2) == 1, "what another trainer staged stays"
    again.close()


_FORKED = """
import os, signal, sys, time
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
slots = SlotDirectory(sys.argv[1])
reading, writing = os.pipe()
trainer = os.fork()
if not trainer:
    owner = SlotOwner(slots)
    if os.fork():
        time.sleep(600)
    try:
        owner.acquire(5000)
    except CheckpointError as error:
        owner.close()
        os.write(writing, f"{os.getpid()} {error}".encode())
    time.sleep(600)
worker, error = os.read(reading, 1000).decode().split(" ", 1)
assert "forked" in error
assert slots.trainer_alive(), "although a child of fork closed it"
os.kill(trainer, signal.SIGKILL)
os.waitpid(trainer, 0)
assert not slots.trainer_alive(), "although a child of fork goes on"
os.kill(int(worker), signal.SIGKILL)
"""


def test_a_child_of_fork_is_not_the_trainer(slots: SlotDirectory) -> None:
    slots.create()
    run_alone(_FORKED, str(slots.path))


def run_alone(script: str, *arguments: str) -> None:
    """Run it in a process without threads, which may fork."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=root, check=True)


def test_nothing_is_removed_that_the_store_lacks(slots: SlotDirectory, owner: SlotOwner) -> None:
    save(owner, 1)
    assert not slots.remove(), "a trainer is there"
    owner.close()
    assert not slots.remove(), "a part is only there"
    reader = slots.read_slot(0)
    assert reader is not None
    reader.mark_durable()
    assert not slots.remove(), "somebody reads"
    reader.close()
    assert slots.remove()
    assert not slots.path.parent.exists()
    assert slots.slots() == []
    again = SlotOwner(slots)
    save(again, 1)
    again.close()


def test_a_directory_that_others_may_enter_is_refused(slots: SlotDirectory) -> None:
    slots.create()
    slots.path.chmod(0o755)
    with pytest.raises(CheckpointError, match="only user"):
        SlotOwner(slots)


def test_a_volume_that_is_too_small_is_an_error_with_its_numbers(tmp_path: Path) -> None:
    script = f"""
import os
from envstore.checkpoint.errors import SlotSpaceError
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.slotwriting import SlotOwner
from tests.checkpoint import slotfill
from tests.checkpoint.test_slots import save, steps
slots = SlotDirectory({str(tmp_path)!r} + "/run/00000")
owner = SlotOwner(slots)
assert save(owner, 1) == 0
try:
    owner.reserve(5 << 20)
except SlotSpaceError as error:
    print(error)
assert save(owner, 2) == 1
assert steps(slots) == {{1: "staged", 2: "staged"}}
print(*(os.stat(slots.slot_path(number)).st_size >> 20 for number in (0, 1)))
"""
    place = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    program = f'mount -t tmpfs -o size=8m,mode=700 none "{tmp_path}" && exec "$0" "$@"'
    found = subprocess.run(
        [*place, program, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ENVSTORE_SLOTS": str(tmp_path)},
        check=True,
    )
    error, sizes = found.stdout.splitlines()
    assert "no room for slot 1 of 2" in error
    assert " bytes more, and " in error
    assert " of 8388608 are free" in error
    assert "ENVSTORE_SLOTS" in error
    assert sizes == "5 0", "what could not be had is given back"


def test_more_than_the_memory_is_an_error_before_anything_is_killed(
    slots: SlotDirectory, owner: SlotOwner
) -> None:
    save(owner, 1)
    with pytest.raises(SlotSpaceError, match=r"bytes more, and [0-9]+ are left"):
        owner.reserve(1 << 50)
    assert steps(slots) == {1: "staged"}


# What is read.


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[SlotTree, dict[str, bytes]]]:
    run = tmp_path_factory.mktemp("root") / "run"
    found, content = [], {}
    for rank in (0, 1):
        slots = SlotDirectory(run / f"{rank:05d}")
        owner = SlotOwner(slots)
        mine = {f"ranks/{rank:05d}/{path}": parts for path, parts in files(rank).items()}
        two = slotfill.orders("file:///store", 1, rank=rank, world_size=2)
        slotfill.stage(owner, two, mine)
        owner.close()
        found += slots.slots()
        content |= {path: b"".join(parts) for path, parts in mine.items()}
    tree = SlotTree(found)
    yield tree, content
    tree.close()


@given(data=st.data())
def test_a_tree_reads_any_range(
    two_ranks: tuple[SlotTree, dict[str, bytes]], data: st.DataObject
) -> None:
    tree, content = two_ranks
    path = data.draw(st.sampled_from(sorted(content)))
    whole = content[path]
    wants = []
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, len(whole)))
        wants.append((start, end, Want(path, start, memoryview(bytearray(end - start)))))
    tree.read_into([want for _, _, want in wants])
    for start, end, want in wants:
        assert bytes(want.view) == whole[start:end]


def test_a_tree_knows_its_files_and_their_ends(
    two_ranks: tuple[SlotTree, dict[str, bytes]],
) -> None:
    tree, content = two_ranks
    assert tree.sizes == {path: len(data) for path, data in content.items()}
    with pytest.raises(NotFoundError, match="nowhere"):
        tree.read("nowhere")
    path = "ranks/00000/state.json"
    for start, length in ((-1, 1), (0, len(content[path]) + 1), (len(content[path]) + 1, 0)):
        with pytest.raises(CorruptError, match=r"state\.json"):
            tree.read_into([Want(path, start, memoryview(bytearray(length)))])


# What a killed trainer leaves.

_KILLED = """
import sys
from envstore.checkpoint.slots import SlotDirectory
from tests.checkpoint.test_slots import kill_trainers
kill_trainers(SlotDirectory(sys.argv[1]), int(sys.argv[2]))
"""


def test_killed_at_any_time_it_leaves_the_newest_part_that_was_staged(
    slots: SlotDirectory,
) -> None:
    run_alone(_KILLED, str(slots.path), "100")


def kill_trainers(slots: SlotDirectory, count: int) -> None:
    """Fork trainers that save without end, kill each at once, and look what it left."""
    chance = random.Random(7)
    last = 0
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            _train(slots, last + 1, writing)
        os.close(writing)
        with open(reading) as said:
            said.readline()
            time.sleep(chance.random() * 0.01)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = [int(line) for line in said if line.endswith("\n")]
        assert not slots.trainer_alive()
        left = steps(slots, growing)
        complete = [step for step, state in left.items() if state in ("staged", "durable")]
        assert max(complete) >= max(acknowledged, default=last), left
        last = max(complete)


def _train(slots: SlotDirectory, step: int, acknowledge: int) -> None:
    owner = SlotOwner(slots, patience=0)
    while True:
        for number in slots.numbers():
            slot = slots.read_slot(number)
            if slot is not None:
                with slot:
                    slot.mark_durable()
        save(owner, step, growing(step))
        os.write(acknowledge, b"%d\n" % step)
        step += 1
