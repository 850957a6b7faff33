"""Which frames are fetched before anybody asks for them, and what is said how often."""

from __future__ import annotations

import logging
from array import array

import pytest

from envstore.fuse.build import build_tree
from envstore.fuse.complaints import Complaints
from envstore.fuse.neighbourhood import WHOLE_BYTECODE, WHOLE_LIBRARY, WINDOW, Neighbourhood
from envstore.fuse.readahead import FIRST_WINDOW, MAX_WINDOW, WHOLE, Readahead
from envstore.fuse.tree import Tree
from envstore.store.digest import digest
from envstore.store.entries import Entry, sort_key
from envstore.store.locations import FrameRef
from envstore.store.manifest import Root, build_parts, decode_part
from envstore.store.source import Kind

MIB = 1 << 20
PACK = bytes(32)


class Laid:
    """Files one after the other in one pack, each in frames of its own of 1 MiB, stored as such."""

    def __init__(self, sizes: dict[str, int]) -> None:
        entries: dict[bytes, Entry] = {}
        self.frames: list[FrameRef] = []
        numbers: dict[bytes, list[int]] = {}
        offset = 0
        for text, size in sizes.items():
            path = text.encode()
            refs = []
            for start in range(0, size, MIB):
                length = min(MIB, size - start)
                name = digest(b"%b %d" % (path, start))
                refs.append((name, length))
                numbers.setdefault(path, []).append(len(self.frames))
                self.frames.append(FrameRef(PACK, offset, length, length, 0, name))
                offset += length
            whole = refs[0][0] if len(refs) == 1 else digest(path)
            entries[path] = Entry(path, Kind.FILE, size=size, digest=whole, refs=tuple(refs))
            parts = path.split(b"/")
            for depth in range(1, len(parts)):
                folder = b"/".join(parts[:depth])
                entries[folder] = Entry(folder, Kind.DIRECTORY)
        ordered = sorted(entries.values(), key=lambda entry: sort_key(entry.path))
        encoded = list(build_parts(ordered))
        root = Root(
            tuple(info for info, _ in encoded), len(ordered), len(sizes), sum(sizes.values())
        )
        self.tree: Tree = build_tree(root, [decode_part(raw) for _, raw in encoded])
        self.numbers = {path.decode(): found for path, found in numbers.items()}
        self.ref_frames = array(
            "I", (number for entry in ordered for number in numbers.get(entry.path, []))
        )

    def node(self, text: str) -> int:
        node = 1
        for name in text.encode().split(b"/"):
            found = self.tree.lookup(node, name)
            assert found is not None
            node = found
        return node


SITE = "lib/python3.12/site-packages"


@pytest.fixture(scope="module")
def laid() -> Laid:
    return Laid(
        {
            f"{SITE}/big/__pycache__/a.pyc": WHOLE_BYTECODE,
            f"{SITE}/big/__pycache__/b.pyc": MIB,
            f"{SITE}/big/core/huge.so": WHOLE_LIBRARY + MIB,
            f"{SITE}/big/lib/library.so.1": 3 * MIB,
            f"{SITE}/big/z.so": 2 * MIB,
            f"{SITE}/small/__pycache__/a.pyc": MIB,
            f"{SITE}/small/__pycache__/data.txt": MIB,
            f"{SITE}/small/sub/__pycache__/b.pyc": MIB,
            f"{SITE}/small/tests/__pycache__/c.pyc": MIB,
            f"{SITE}/single.pyc": MIB,
            "lib/python3.12/json/__pycache__/decoder.pyc": MIB,
            "lib/python3.12/json/__pycache__/encoder.pyc": MIB,
            "data/model.bin": 40 * MIB,
            "data/medium": WHOLE,
        }
    )


def test_a_small_package_comes_whole(laid: Laid) -> None:
    guess = Neighbourhood(laid.tree, laid.ref_frames, laid.frames)
    names = (f"{SITE}/small/__pycache__/a.pyc", f"{SITE}/small/sub/__pycache__/b.pyc")
    expected = sorted(laid.numbers[name][0] for name in names)
    for name in names:
        assert guess.plan(laid.node(name), laid.frames[laid.numbers[name][0]]) == expected
    standard = "lib/python3.12/json/__pycache__/"
    found = guess.plan(
        laid.node(standard + "encoder.pyc"),
        laid.frames[laid.numbers[standard + "encoder.pyc"][0]],
    )
    assert found == [laid.numbers[standard + name][0] for name in ("decoder.pyc", "encoder.pyc")]


def test_of_a_large_package_a_library_comes_whole(laid: Laid) -> None:
    guess = Neighbourhood(laid.tree, laid.ref_frames, laid.frames)
    name = f"{SITE}/big/lib/library.so.1"
    assert guess.plan(laid.node(name), laid.frames[laid.numbers[name][1]]) == laid.numbers[name]


def test_of_what_is_too_large_a_window_comes(laid: Laid) -> None:
    guess = Neighbourhood(laid.tree, laid.ref_frames, laid.frames)
    for name in (f"{SITE}/big/core/huge.so", f"{SITE}/big/__pycache__/a.pyc"):
        missed = laid.numbers[name][2]
        found = guess.plan(laid.node(name), laid.frames[missed])
        assert found == list(range(missed + 1, missed + 1 + WINDOW // MIB))


@pytest.mark.parametrize(
    "name",
    [
        f"{SITE}/single.pyc",
        f"{SITE}/small/__pycache__/data.txt",
        f"{SITE}/small/tests/__pycache__/c.pyc",
        "data/model.bin",
    ],
)
def test_of_everything_else_nothing_is_guessed(laid: Laid, name: str) -> None:
    guess = Neighbourhood(laid.tree, laid.ref_frames, laid.frames)
    assert guess.plan(laid.node(name), laid.frames[laid.numbers[name][0]]) == []


def test_a_file_of_moderate_size_comes_whole_when_it_is_missed(laid: Laid) -> None:
    guess = Readahead(laid.tree, laid.ref_frames)
    node = laid.node("data/medium")
    assert guess.plan(node, 0, 4096, missed=False) == []
    two = Laid({"a": MIB - 1, "b": MIB + 1})
    guess = Readahead(two.tree, two.ref_frames)
    assert guess.plan(two.node("b"), 0, 4096, missed=True) == []


def test_the_window_of_a_sequential_reader_grows(laid: Laid) -> None:
    guess = Readahead(laid.tree, laid.ref_frames)
    node, own = laid.node("data/model.bin"), laid.numbers["data/model.bin"]
    step = 128 << 10
    fetched: list[int] = []
    sizes = []
    for offset in range(0, 40 * MIB, step):
        found = guess.plan(node, offset, step, missed=False)
        if found:
            sizes.append(len(found))
        fetched += found
        # Never further ahead than the window, and in the end not behind the reader.
        assert all(number - own[0] <= (offset + step + MAX_WINDOW) // MIB for number in found)
    assert sizes[0] <= FIRST_WINDOW // MIB + 1
    assert max(sizes) > 2 * sizes[0]
    assert list(dict.fromkeys(fetched)) == own


def test_a_random_reader_is_not_fetched_for(laid: Laid) -> None:
    guess = Readahead(laid.tree, laid.ref_frames)
    node = laid.node("data/model.bin")
    for offset in (30 * MIB, 3 * MIB, 17 * MIB, 9 * MIB, 36 * MIB, 0):
        assert guess.plan(node, offset, 4096, missed=True) == []


def test_requests_that_overtake_each_other_are_one_stream(laid: Laid) -> None:
    guess = Readahead(laid.tree, laid.ref_frames)
    node = laid.node("data/model.bin")
    step = 128 << 10
    found = []
    for number in (0, 2, 1, 3, 5, 4, 6, 7):
        found += guess.plan(node, number * step, step, missed=False)
    assert found


def test_the_same_complaint_is_made_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    complaints = Complaints(logging.getLogger("test"), lambda: now)
    for number in range(5):
        complaints.say("the store is away", f"cannot read {number}")
    complaints.say("the disk is full", "cannot read 9")
    now = 31.0
    complaints.say("the store is away", "cannot read 7")
    assert [record.getMessage() for record in caplog.records] == [
        "cannot read 0: the store is away",
        "cannot read 9: the disk is full",
        "cannot read 7: the store is away (and 4 more times before)",
    ]


def test_many_different_complaints_are_not_all_remembered() -> None:
    complaints = Complaints(logging.getLogger("test"))
    for number in range(5000):
        complaints.say(f"frame {number} is damaged")
    assert len(complaints._last) <= 1000
