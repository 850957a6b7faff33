"""Several snapshots under one root: names, ids, what is shared, and what outlives a server."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.fuse.forest import OBJECTS, SECRET_SIZE, Forest, Plot, told_size
from envstore.fuse.tree import ROOT, Tree
from envstore.store.entries import Entry
from envstore.store.source import Kind
from tests.manifests import file, folder, must_find, tree_of, trees

SECRET = bytes(range(SECRET_SIZE))


def memory(tree: Tree) -> memoryview:
    return memoryview(bytearray(told_size(tree))).cast("I")


def plot_of(slot: int, tree: Tree, domain: bytes = b"one") -> Plot:
    return Plot(b"%d-snapshot" % slot, tree, domain, memory(tree))


def planted(*plots: Plot, secret: bytes = SECRET) -> Forest:
    forest = Forest(secret)
    for slot, plot in enumerate(plots, 1):
        forest.plant(slot, plot)
    return forest


def reach(forest: Forest, name: bytes, path: bytes = b"") -> int:
    """Return the id of a path as the kernel finds it."""
    found = ROOT
    for step in [name, *(path.split(b"/") if path else [])]:
        child = forest.lookup(found, step)
        assert child is not None, (name, path)
        found = child
    return found


@dataclass(frozen=True)
class Found:
    """One path of one snapshot, and what may tell files apart."""

    slot: int
    path: bytes
    id: int
    what: tuple[object, ...]


def identity(plot: Plot, slot: int, node: int) -> tuple[object, ...]:
    """Return what two nodes have in common exactly if they have one id."""
    tree = plot.tree
    facts = tree.attributes(node)
    if tree.kind(node) is Kind.FILE and facts.links == 1:
        return plot.domain, tree.content_key(node), facts.mode, facts.size, facts.mtime_ns
    return slot, tree.inode(node)


def survey(forest: Forest, plots: list[Plot]) -> list[Found]:
    """Look up everything, by name and by listing, and compare with the trees themselves."""
    found = []
    names = [name for name, _ in forest.listing(ROOT, 0)]
    assert names == [name for plot in plots for name in (plot.name, plot.name + OBJECTS)]
    for slot, plot in enumerate(plots, 1):
        tree = plot.tree
        for node in range(ROOT, len(tree) + 1):
            path = tree.path(node)
            identifier = reach(forest, plot.name, path)
            assert forest.kind(identifier) is tree.kind(node)
            ours, theirs = forest.attributes(identifier), tree.attributes(node)
            assert ours.inode == identifier
            assert (ours.mode, ours.links, ours.size) == (theirs.mode, theirs.links, theirs.size)
            assert ours.mtime_ns == theirs.mtime_ns
            if tree.kind(node) is Kind.SYMLINK:
                assert forest.target(identifier) == tree.target(node)
            if tree.kind(node) is Kind.DIRECTORY:
                listing = list(forest.listing(identifier, 0))
                assert len(listing) == tree.child_count(node)
                for start in range(len(listing) + 1):
                    assert list(forest.listing(identifier, start)) == listing[start:]
                assert [child for _, child in listing] == [
                    forest.lookup(identifier, name) for name, _ in listing
                ]
                assert forest.lookup(identifier, b"not there" * 20) is None
                assert forest.lasting(identifier)
            found.append(Found(slot, path, identifier, identity(plot, slot, node)))
    return found


def check_places(forest: Forest, plots: list[Plot], found: list[Found]) -> None:
    """See that every id leads to what it was given for."""
    for one in found:
        slot, node = forest.place(one.id)
        assert identity(plots[slot - 1], slot, node) == one.what


_PLOTS = st.lists(st.tuples(trees(), st.sampled_from([b"one", b"two"])), min_size=1, max_size=4)


@settings(max_examples=150)
@given(_PLOTS, st.booleans(), st.randoms(use_true_random=False))
def test_against_the_trees_themselves(
    made: list[tuple[dict[bytes, Entry], bytes]], again: bool, random: object
) -> None:
    if again:
        made = [*made, made[0]]
    plots = [
        plot_of(slot, tree_of(entries.values()), domain)
        for slot, (entries, domain) in enumerate(made, 1)
    ]
    forest = planted(*plots)
    found = survey(forest, plots)
    for one in found:
        for other in found:
            assert (one.id == other.id) == (one.what == other.what)
    check_places(forest, plots, found)
    assert len({one.id for one in found} | {ROOT}) == len({one.id for one in found}) + 1
    # Another server with the same memory knows every id before it is asked for a name.
    check_places(planted(*plots), plots, found)


def test_ids_are_the_same_after_a_snapshot_has_gone_and_come_back() -> None:
    entries = [folder(b"d"), file(b"d/f", b"content"), file(b"other", b"more")]
    plots = [plot_of(1, tree_of(entries)), plot_of(2, tree_of(entries[:2]))]
    forest = planted(*plots)
    found = survey(forest, plots)
    shared = reach(forest, plots[0].name, b"d/f")
    assert shared == reach(forest, plots[1].name, b"d/f")
    forest.fell(1)
    assert [name for name, _ in forest.listing(ROOT, 0)] == [plots[1].name, plots[1].name + OBJECTS]
    assert forest.lookup(ROOT, plots[0].name) is None
    assert not forest.lasting(ROOT)
    # What the other has, too, is still there, and nothing else.
    assert forest.place(shared)[0] == 2
    for one in found:
        if one.slot == 1 and one.id != shared:
            for ask in (forest.place, forest.kind, forest.attributes):
                with pytest.raises(KeyError):
                    ask(one.id)
    plots[0] = plot_of(1, plots[0].tree)
    forest.recall(plots[0])
    forest.plant(1, plots[0])
    check_places(forest, plots, found)
    forest.fell(2)
    forest.plant(2, plots[1])
    assert survey(forest, plots) == found


def test_what_makes_a_file_another() -> None:
    base = file(b"f", b"content", mode=0o644, mtime_ns=5)
    others = {
        "content": file(b"f", b"CONTENT", mode=0o644, mtime_ns=5),
        "size": file(b"f", b"contents", mode=0o644, mtime_ns=5),
        "mode": file(b"f", b"content", mode=0o640, mtime_ns=5),
        "time": file(b"f", b"content", mode=0o644, mtime_ns=6),
        "cut": file(b"f", b"content", chunk=3, mode=0o644, mtime_ns=5),
    }
    for what, other in others.items():
        plots = [plot_of(1, tree_of([base])), plot_of(2, tree_of([other]))]
        forest = planted(*plots)
        one, two = (reach(forest, plot.name, b"f") for plot in plots)
        assert one != two, what
        assert forest.place(one) != forest.place(two), what
    plots = [plot_of(1, tree_of([base]), b"one"), plot_of(2, tree_of([base]), b"two")]
    forest = planted(*plots)
    assert reach(forest, plots[0].name, b"f") != reach(forest, plots[1].name, b"f")


def test_ids_cannot_be_told_without_the_secret() -> None:
    tree = tree_of([file(b"f", b"content")])
    ids = {
        reach(planted(plot_of(1, tree), secret=bytes([n]) * SECRET_SIZE), b"1-snapshot", b"f")
        for n in range(5)
    }
    assert len(ids) == 5


@given(st.data())
@settings(max_examples=100)
def test_garbage_in_the_memory_of_told_ids_is_harmless(data: st.DataObject) -> None:
    tree = tree_of(data.draw(trees()).values())
    plot = plot_of(1, tree)
    found = survey(planted(plot), [plot])
    full = data.draw(st.booleans())
    for at in range(len(plot.told)):
        if full or data.draw(st.booleans()):
            plot.told[at] = data.draw(
                st.one_of(st.integers(1, len(tree) + 2), st.integers(1, 2**32 - 1))
            )
    forest = planted(plot)
    for one in found:
        try:
            slot, node = forest.place(one.id)
        except KeyError:
            continue
        assert identity(plot, slot, node) == one.what
    survey_again = [reach(forest, plot.name, one.path) for one in found]
    assert survey_again == [one.id for one in found]
    for identifier in survey_again:
        if not full or identifier >> 62 == 0:
            try:
                forest.place(identifier)
            except KeyError:
                assert all(plot.told), "there was a place to note it"


@given(st.integers(0, 2**64 - 1))
def test_ids_that_nobody_was_told(number: int) -> None:
    plot = plot_of(1, tree_of([file(b"f", b"content")]))
    forest = planted(plot)
    with pytest.raises(KeyError):
        forest.place((number & (2**64 - 1)) | 1 << 62)
    slot, node = number >> 32 & 0xFF, number & 0xFFFF_FFFF
    if slot != 1 or not 1 <= node <= 2:
        with pytest.raises(KeyError):
            forest.place(slot << 32 | node)


def test_objects_by_content() -> None:
    entries = [
        file(b"one chunk", b"abc"),
        file(b"many", b"content"),
        file(b"empty"),
        folder(b"d"),
        file(b"d/same", b"abc"),
    ]
    plot = plot_of(1, tree_of(entries))
    forest = planted(plot, plot_of(2, tree_of([file(b"elsewhere", b"other")])))
    top = reach(forest, plot.name + OBJECTS)
    assert forest.kind(top) is Kind.DIRECTORY
    assert stat.S_ISDIR(forest.attributes(top).mode)
    shelves = list(forest.listing(top, 0))
    assert [name for name, _ in shelves] == [b"%02x" % n for n in range(256)]
    assert list(forest.listing(top, 250)) == shelves[250:]
    for path in (b"one chunk", b"many", b"d/same"):
        node = must_find(plot.tree, path)
        key = plot.tree.content_key(node).hex().encode()
        shelf = forest.lookup(top, key[:2])
        assert shelf is not None
        assert forest.kind(shelf) is Kind.DIRECTORY
        assert list(forest.listing(shelf, 0)) == []
        assert forest.lookup(shelf, key) == reach(forest, plot.name, path)
        other = forest.lookup(top, b"%02x" % (int(key[:2], 16) ^ 1))
        assert other is not None
        assert forest.lookup(other, key) is None
    elsewhere = forest.place(reach(forest, b"2-snapshot", b"elsewhere"))
    key = forest.tree(2).content_key(elsewhere[1]).hex().encode()
    shelf = forest.lookup(top, key[:2])
    assert shelf is not None
    assert forest.lookup(shelf, key) is None, "each snapshot has its own objects only"


@pytest.mark.parametrize(
    "name",
    [b"", b" ", b"  ", b"AB", b"Ab", b"a", b"abc", b"+1", b"0x", b"1_", b"..", b".", b"\xff\xff",
     b"zz", b"\n0", b" a", " é".encode(), b"0" * 255],
)  # fmt: skip
def test_names_that_are_no_shelf(name: bytes) -> None:
    plot = plot_of(1, tree_of([file(b"f", b"content")]))
    forest = planted(plot)
    assert forest.lookup(reach(forest, plot.name + OBJECTS), name) is None


def test_names_that_are_no_object() -> None:
    plot = plot_of(1, tree_of([file(b"f", b"content")]))
    forest = planted(plot)
    key = plot.tree.content_key(must_find(plot.tree, b"f")).hex().encode()
    shelf = forest.lookup(reach(forest, plot.name + OBJECTS), key[:2])
    assert shelf is not None
    for name in (
        b"", b" " * 64, key.upper(), key[:63], key + b"0", key[:62] + b"  ", key[:2] + b" " * 62,
        b"../" + key,
        key[:2] + b"\xff" * 62, key[:-1] + b"\n", b"f", key[:2], b"x" * 64, b".." * 32,
        key[:2] + bytes(62), os.urandom(64),
    ):  # fmt: skip
        assert forest.lookup(shelf, name) is None, name
    assert forest.lookup(shelf, key) is not None


def test_a_snapshot_by_itself() -> None:
    tree = tree_of([folder(b"d"), file(b"d/f", b"content"), file(b"g", b"content")])
    forest = Forest(b"", tree)
    for node in range(ROOT, len(tree) + 1):
        assert forest.place(node) == (0, node)
        assert forest.attributes(node).inode == node
    assert forest.lookup(ROOT, b"d") == tree.lookup(ROOT, b"d")
    assert forest.lookup(ROOT, b"1-snapshot" + OBJECTS) is None
    assert forest.lasting(ROOT)
    assert [name for name, _ in forest.listing(ROOT, 0)] == [b"d", b"g"]
