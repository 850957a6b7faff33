from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterable
from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import CorruptError, UnsupportedFormatError
from envstore.store.digest import DIGEST_SIZE, EMPTY, digest
from envstore.store.entries import (
    HOLE,
    MAX_HOLE,
    Entry,
    composed_digest,
    composed_entry,
    sort_key,
)
from envstore.store.manifest import (
    MAX_PART_REFS,
    PartInfo,
    Root,
    build_parts,
    decode_part,
    manifest_key,
    open_root,
    read_entries,
)
from envstore.store.relocation import Mode, Relocation
from envstore.store.source import Kind
from tests.damage import assert_noticed, damages

_names = st.one_of(
    st.binary(min_size=1, max_size=6).filter(
        lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
    ),
    st.sampled_from([b"a", b"a.b", b"a-b", b"a\x01", b"b", b"...", b"n" * 255, b"\xff\xfe", b"\n"]),
)
_sizes = st.one_of(st.integers(1, 300), st.integers(1, 2**31))
_refs = st.lists(
    st.tuples(
        st.one_of(st.just(HOLE), st.integers(0, 50).map(lambda i: digest(b"%d" % i))), _sizes
    ),
    max_size=4,
).map(tuple)
_files = st.tuples(st.just("file"), st.booleans(), _refs, st.booleans())
_symlinks = st.tuples(
    st.just("symlink"),
    st.binary(min_size=1, max_size=20).filter(lambda target: b"\0" not in target),
)
_leaves = st.one_of(_files, _symlinks, st.just(("directory", {})))
_trees = st.recursive(
    st.dictionaries(_names, _leaves, max_size=5),
    lambda below: st.dictionaries(
        _names, st.one_of(_leaves, st.tuples(st.just("directory"), below)), max_size=5
    ),
    max_leaves=25,
)


def _file(path: bytes, refs: Iterable[tuple[bytes, int]] = (), **more: object) -> Entry:
    refs = tuple(refs)
    size = sum(size for _, size in refs)
    whole = digest(repr(refs).encode())
    if not size:
        whole = EMPTY
    elif len(refs) == 1 and refs[0][0] != HOLE:
        whole = refs[0][0]
    return Entry(path, Kind.FILE, False, size, whole, refs, **more)  # type: ignore[arg-type]


def _flatten(tree: dict[bytes, tuple], prefix: bytes = b"") -> list[Entry]:  # type: ignore[type-arg]
    found = []
    for name, item in tree.items():
        path = prefix + name
        if item[0] == "file" and item[3]:
            found.append(composed_entry(path, item[2], executable=item[1]))
        elif item[0] == "file":
            found.append(replace(_file(path, item[2]), executable=item[1]))
        elif item[0] == "symlink":
            found.append(Entry(path, Kind.SYMLINK, target=item[1]))
        else:
            found.append(Entry(path, Kind.DIRECTORY))
            found += _flatten(item[1], path + b"/")
    return sorted(found, key=lambda entry: sort_key(entry.path)) if not prefix else found


def _linked(entries: list[Entry]) -> list[Entry]:
    """Make some files further names of the first file."""
    first = next((entry for entry in entries if entry.kind is Kind.FILE), None)
    return [
        replace(first, path=entry.path, link=first.path)
        if first and entry.kind is Kind.FILE and entry is not first and len(entry.path) % 3 == 0
        else entry
        for entry in entries
    ]


def _with_modes(entries: list[Entry], seed: int) -> list[Entry]:
    rng = random.Random(seed)
    return [
        replace(entry, mode=rng.randrange(0o10000), mtime_ns=rng.randrange(-(2**63), 2**63))
        for entry in entries
    ]


def _read(parts: Iterable[tuple[PartInfo, bytes]]) -> list[Entry]:
    return list(read_entries(decode_part(raw) for _, raw in parts))


@given(_trees, st.booleans(), st.one_of(st.none(), st.integers(0, 99)))
@settings(max_examples=120)
def test_entries_round_trip(tree: dict, links: bool, seed: int | None) -> None:  # type: ignore[type-arg]
    entries = _flatten(tree)
    if links:
        entries = _linked(entries)
    if seed is not None:
        entries = _with_modes(entries, seed)
    parts = list(build_parts(entries))
    for info, raw in parts:
        assert info.digest == digest(raw)
        assert info.size == len(raw)
        assert info.entries == len(decode_part(raw).kinds)
        assert info.refs == len(decode_part(raw).ref_sizes)
    assert _read(parts) == entries


def _big_tree(folders: int, files: int, seed: int = 1) -> list[Entry]:
    rng = random.Random(seed)
    entries = [Entry(b"lib", Kind.DIRECTORY)]
    for _ in range(folders):
        folder = b"lib/" + rng.randbytes(5).hex().encode()
        entries.append(Entry(folder, Kind.DIRECTORY))
        for _ in range(files):
            refs = [(rng.randbytes(32), rng.randrange(1, 99)) for _ in range(rng.randrange(3))]
            entries.append(_file(folder + b"/" + rng.randbytes(6).hex().encode() + b".py", refs))
    return sorted(entries, key=lambda entry: sort_key(entry.path))


def test_a_change_in_one_directory_leaves_the_other_parts() -> None:
    entries = _big_tree(150, 60)
    parts = [info.digest for info, _ in build_parts(entries)]
    assert len(parts) > 10
    files = [i for i, entry in enumerate(entries) if entry.kind is Kind.FILE]
    at = files[len(files) // 3]
    new = _file(entries[at].path, [(digest(b"new"), 5)])
    changed = [*entries[:at], new, *entries[at + 1 :]]
    added = [*entries[: at + 1], replace(new, path=new.path + b"a"), *entries[at + 1 :]]
    removed = [*entries[:at], *entries[at + 1 :]]
    for other in (changed, added, removed):
        after = [info.digest for info, _ in build_parts(other)]
        assert 1 <= len(set(after) - set(parts)) <= 2


def test_parts_are_complete_in_themselves() -> None:
    entries = _big_tree(100, 60)
    at = 0
    for info, raw in build_parts(entries):
        part = decode_part(raw)
        assert part.base in (b"", entries[at].path.rpartition(b"/")[0])
        at += info.entries
    assert at == len(entries)


def test_parts_are_bounded_by_entries() -> None:
    # Paths whose checksum never ends in zeros must not make one endless part.
    paths = (b"%07d" % i for i in range(20_000))
    entries = [_file(path) for path in paths if zlib.crc32(path) & 0x1FF]
    parts = list(build_parts(entries))
    assert max(info.entries for info, _ in parts) <= 4096
    assert _read(parts) == entries


def test_parts_are_bounded_by_text() -> None:
    entries = [
        Entry(b"%05d" % i, Kind.SYMLINK, target=b"%05d" % i + b"t" * 4000) for i in range(2000)
    ]
    parts = list(build_parts(entries))
    assert max(len(raw) for _, raw in parts) < 2 << 20
    assert _read(parts) == entries


@pytest.mark.parametrize(
    "count", [MAX_PART_REFS - 1, MAX_PART_REFS, MAX_PART_REFS + 1, 3 * MAX_PART_REFS, 40_000]
)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_file_may_span_parts(count: int, before: int) -> None:
    refs = [(b"%032d" % i, i + 1) for i in range(count)]
    entries = [
        *(_file(b"a%d" % i, [(digest(b"x"), 1), (HOLE, 2)]) for i in range(before)),
        replace(_file(b"long", refs), executable=True),
        _file(b"m", [(digest(b"y"), 3)]),
        Entry(b"n", Kind.SYMLINK, target=b"long"),
    ]
    for tree in (entries, _with_modes(entries, 1)):
        parts = list(build_parts(tree))
        assert all(info.refs <= MAX_PART_REFS for info, _ in parts)
        assert _read(parts) == tree


@pytest.mark.parametrize("count", [2, MAX_PART_REFS, MAX_PART_REFS + 1, 2 * MAX_PART_REFS + 5])
def test_a_composed_file_is_named_by_all_its_references(count: int) -> None:
    refs = [(digest(b"%d" % number), number + 1) for number in range(count)]
    entries = [_file(b"a", refs[:2]), composed_entry(b"b", refs), _file(b"c", refs[:2])]
    assert entries[1].composed
    assert entries[1].digest == composed_digest(refs)
    rows = b"".join(name + struct.pack("<I", size) for name, size in refs)
    hashed = blake3(rows, derive_key_context="envstore composed file v1")
    assert entries[1].digest == hashed.digest()
    parts = list(build_parts(entries))
    assert _read(parts) == entries
    stored = sum(len(decode_part(raw).file_digests) for _, raw in parts)
    assert stored == 2 * DIGEST_SIZE


def test_a_file_of_one_chunk_or_none_is_not_composed() -> None:
    one = digest(b"1")
    assert composed_entry(b"x", [(one, 9)]) == _file(b"x", [(one, 9)])
    assert composed_entry(b"x", []) == _file(b"x")
    assert composed_entry(b"x", [(HOLE, 9)]).composed
    assert not composed_entry(b"x", [(one, 9)], executable=True).composed


def test_two_long_files_one_after_the_other() -> None:
    entries = [
        _file(name, [(name * 32, i + 1) for i in range(MAX_PART_REFS + 7)]) for name in (b"a", b"b")
    ]
    assert _read(build_parts(entries)) == entries


def test_holes_longer_than_one_reference() -> None:
    entries = [_file(b"sparse", [(HOLE, MAX_HOLE), (HOLE, MAX_HOLE), (HOLE, 5 << 20)])]
    assert _read(build_parts(entries)) == entries


def test_very_long_and_very_deep_paths() -> None:
    parts = [b"%02d" % i + b"d" * 248 for i in range(30)]
    paths = [b"/".join(parts[: i + 1]) for i in range(30)]
    entries = [Entry(path, Kind.DIRECTORY) for path in paths]
    entries.append(_file(paths[-1] + b"/file", [(digest(b"x"), 1)]))
    assert len(entries[-1].path) > 4096
    assert _read(build_parts(entries)) == entries


def test_an_empty_tree_has_no_part() -> None:
    assert list(build_parts([])) == []
    assert list(read_entries([])) == []


# Roots.

_infos = st.builds(
    PartInfo,
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
_counts = st.integers(0, 2**64 - 1)
_roots = st.builds(
    Root,
    st.lists(_infos, max_size=6).map(tuple),
    _counts,
    _counts,
    _counts,
    st.integers(0, 0o7777),
    st.integers(-(2**63), 2**63 - 1),
)
_ROOT = Root((PartInfo(digest(b"p"), 5, 6, 7), PartInfo(digest(b"q"), 8, 9, 1)), 15, 9, 99, 7, -5)


@given(_roots)
def test_roots_round_trip(root: Root) -> None:
    assert open_root(root.seal(), root.digest) == root
    assert manifest_key(root.digest) == f"manifests/{root.digest.hex()}"


def test_damaged_roots_are_refused() -> None:
    assert_noticed(lambda data: open_root(data, _ROOT.digest), _ROOT.seal())


def test_a_root_under_another_name_is_refused() -> None:
    with pytest.raises(CorruptError, match="does not match its name"):
        open_root(_ROOT.seal(), digest(b"other"))


# Hostile parts. A part has no checksum of its own: whoever writes one can name it in a root.


def _columns(raw: bytes) -> dict[int, bytes]:
    found, at = {}, 4
    for _ in range(struct.unpack_from("<I", raw)[0]):
        column, length = struct.unpack_from("<II", raw, at)
        found[column] = raw[at + 8 : at + 8 + length]
        at += 8 + length
    assert at == len(raw)
    return found


def _joined(columns: dict[int, bytes]) -> bytes:
    body = b"".join(
        struct.pack("<II", column, len(value)) + value for column, value in columns.items()
    )
    return struct.pack("<I", len(columns)) + body


_KIND, _DEPTH, _NAMES, _BASE, _SIZE, _COUNT, _REF_DIGEST, _REF_SIZE = range(1, 9)
_FILE_DIGEST, _TARGET, _MODE, _MTIME, _LINK, _RELOCATION = range(9, 15)

_VICTIM = [
    Entry(b"dir", Kind.DIRECTORY, mode=0o755, mtime_ns=1),
    _file(b"dir/file", [(digest(b"1"), 5), (digest(b"2"), 6)], mode=0o644, mtime_ns=2),
    Entry(b"dir/link", Kind.SYMLINK, target=b"/etc", mode=0o777, mtime_ns=3),
    _file(b"dir/twin", [(digest(b"1"), 5)], mode=0o600, mtime_ns=4, link=b"dir/file"),
    _file(b"last", mode=0o600, mtime_ns=5),
]


def _victim(changes: dict[int, bytes | None]) -> bytes:
    ((_, raw),) = build_parts(_VICTIM)
    columns = _columns(raw)
    for column, value in changes.items():
        if value is None:
            columns.pop(column, None)
        else:
            columns[column] = value
    return _joined(columns)


def test_the_victim_is_sound() -> None:
    assert list(read_entries([decode_part(_victim({}))])) == _VICTIM


def _u16(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def _records(*values: tuple[int, bytes]) -> bytes:
    return b"".join(struct.pack("<II", number, len(value)) + value for number, value in values)


_PLAN = Relocation(Mode.TEXT, 3, 11, (1,)).encode()
_TWIN_PLAN = Relocation(Mode.TEXT, 3, 5, (1,)).encode()

_HOSTILE: dict[str, dict[int, bytes | None]] = {
    "parent directory": {_NAMES: b"..\0file\0link\0twin\0last"},
    "parent directory below": {_NAMES: b"dir\0..\0link\0twin\0last"},
    "own directory": {_NAMES: b"dir\0.\0link\0twin\0last"},
    "no name": {_NAMES: b"dir\0\0link\0twin\0last"},
    "absolute": {_NAMES: b"/etc\0file\0link\0twin\0last"},
    "path for a name": {_NAMES: b"dir\0a/b\0link\0twin\0last"},
    "one name less": {_NAMES: b"dir\0file\0link\0twin"},
    "one name more": {_NAMES: b"dir\0file\0link\0twin\0last\0more"},
    "no names": {_NAMES: None},
    "same name twice": {_NAMES: b"dir\0file\0file\0twin\0last"},
    "unsorted": {_NAMES: b"dir\0z\0link\0twin\0last"},
    "unsorted at the top": {_NAMES: b"dir\0file\0link\0twin\0a"},
    "file and directory of one name": {_NAMES: b"dir\0file\0link\0twin\0dir"},
    "deeper than its directory": {_DEPTH: _u16(0, 2, 1, 1, 0)},
    "below a file": {_DEPTH: _u16(0, 1, 1, 2, 0), _NAMES: b"dir\0file\0link\0twin\0last"},
    "below a symbolic link": {_DEPTH: _u16(0, 1, 1, 2, 0)},
    "starts below": {_DEPTH: _u16(1, 1, 1, 1, 0)},
    "base that is not there": {_BASE: b"other", _DEPTH: _u16(1, 2, 2, 2, 1)},
    "base above the tree": {_BASE: b"..", _DEPTH: _u16(1, 2, 2, 2, 1)},
    "base at the root": {_BASE: b"/", _DEPTH: _u16(2, 3, 3, 3, 2)},
    "base with a zero byte": {_BASE: b"a\0b", _DEPTH: _u16(1, 2, 2, 2, 1)},
    "base with an empty step": {_BASE: b"a//b", _DEPTH: _u16(3, 4, 4, 4, 3)},
    "unknown kind": {_KIND: b"\1\0\3\0\0"},
    "unknown flag": {_KIND: b"\1\x20\2\0\0"},
    "composed directory": {_KIND: b"\x11\0\2\0\0"},
    "composed symbolic link": {_KIND: b"\1\0\x12\0\0"},
    "composed of one chunk": {_KIND: b"\1\0\2\x10\0"},
    "composed of nothing": {_KIND: b"\1\0\2\0\x10"},
    "continues itself": {_KIND: b"\1\x08\2\0\0"},
    "continued directory": {_KIND: b"\x09\0\2\0\0"},
    "a file more than sizes": {_KIND: b"\0\0\2\0\0"},
    "fewer depths": {_DEPTH: _u16(0, 1, 1, 1)},
    "odd depths": {_DEPTH: b"\0\0\1"},
    "no sizes": {_SIZE: None},
    "sizes that do not add up": {_SIZE: struct.pack("<3Q", 12, 5, 0)},
    "enormous size": {_SIZE: struct.pack("<3Q", 2**64 - 1, 5, 0)},
    "more chunks than there are": {_COUNT: struct.pack("<3I", 9, 1, 0)},
    "enormous count": {_COUNT: struct.pack("<3I", 2**32 - 1, 2**32 - 1, 2)},
    "fewer chunk names": {_REF_DIGEST: bytes(DIGEST_SIZE * 2)},
    "half a chunk name": {_REF_DIGEST: bytes(DIGEST_SIZE * 3 - 1)},
    "no file digest": {_FILE_DIGEST: None},
    "half a file digest": {_FILE_DIGEST: bytes(DIGEST_SIZE - 1)},
    "no target": {_TARGET: None},
    "empty target": {_TARGET: b""},
    "two targets": {_TARGET: b"a\0b"},
    "fewer modes": {_MODE: _u16(1, 2, 3)},
    "modes without times": {_MTIME: None},
    "hard link beyond the entries": {_LINK: struct.pack("<II", 5, 8) + b"dir/file"},
    "directory as a hard link": {_LINK: struct.pack("<II", 0, 8) + b"dir/file"},
    "symbolic link as a hard link": {_LINK: struct.pack("<II", 2, 8) + b"dir/file"},
    "link list cut off": {_LINK: struct.pack("<II", 3, 9) + b"dir/file"},
    "relocation of a directory": {_RELOCATION: _records((0, b"/x"))},
    "relocation of another size": {_RELOCATION: _records((3, _PLAN))},
    "relocation that is none": {_RELOCATION: _records((1, _PLAN + b"\0"))},
    "empty relocation": {_RELOCATION: _records((1, b""))},
    "relocation of no entry": {_RELOCATION: _records((5, _PLAN))},
    "link relocated to where it does not lead": {_RELOCATION: _records((2, b"/et"))},
    "link without a placeholder": {_RELOCATION: _records((2, b""))},
    "relocations out of order": {_RELOCATION: _records((3, _TWIN_PLAN), (1, _PLAN))},
    "relocated twice": {_RELOCATION: _records((1, _PLAN), (1, _PLAN))},
    "relocations cut off": {_RELOCATION: _records((1, _PLAN))[:-1]},
}


@pytest.mark.parametrize("case", _HOSTILE, ids=str)
def test_hostile_parts_are_refused(case: str) -> None:
    with pytest.raises(CorruptError):
        list(read_entries([decode_part(_victim(_HOSTILE[case]))]))


def test_relocations_are_read() -> None:
    column = _records((1, _PLAN), (2, b"/etc"), (3, _TWIN_PLAN))
    part = decode_part(_victim({_RELOCATION: column}))
    assert {number: plan.size for number, plan in part.plans.items()} == {1: 11, 3: 5}
    entries = list(read_entries([part]))
    relocations = [b"", _PLAN, b"/etc", _TWIN_PLAN, b""]
    assert [entry.relocation for entry in entries] == relocations
    ((_, again),) = build_parts(entries)
    assert again == _victim({_RELOCATION: column})


def test_a_relocation_is_that_of_a_file_over_several_parts() -> None:
    size = MAX_PART_REFS + 3
    plan = Relocation(Mode.BINARY, 3, size, (1,), (9,), package="p-1").encode()
    long = replace(_file(b"long", [(b"x" * 32, 1)] * size), relocation=plan)
    encoded = [raw for _, raw in build_parts([long, _file(b"z")])]
    assert list(read_entries(map(decode_part, encoded))) == [long, _file(b"z")]
    columns = _columns(encoded[1])
    assert _RELOCATION not in columns
    columns[_RELOCATION] = _records((0, plan))
    with pytest.raises(CorruptError, match="relocation of no entry"):
        decode_part(_joined(columns))


def test_relocations_count_as_text() -> None:
    plan = Relocation(Mode.TEXT, 1, 200_000, tuple(range(0, 200_000, 2))).encode()
    refs = [(b"x" * 32, 200_000)]
    entries = [replace(_file(b"%03d" % n, refs), relocation=plan) for n in range(30)]
    infos = [info for info, _ in build_parts(entries)]
    assert [info.entries for info in infos] == [11, 11, 8]
    assert max(info.size for info in infos) < 2 << 20


def test_an_entry_below_a_symbolic_link_is_refused_across_parts() -> None:
    one = [Entry(b"out", Kind.SYMLINK, target=b"/etc")]
    two = [_file(b"out/passwd", [(digest(b"x"), 1)])]
    parts = [decode_part(raw) for tree in (one, two) for _, raw in build_parts(tree)]
    with pytest.raises(CorruptError, match="not in a directory"):
        list(read_entries(parts))


def test_parts_in_another_order_are_refused() -> None:
    parts = [decode_part(raw) for _, raw in build_parts(_big_tree(80, 60))]
    assert len(parts) > 2
    with pytest.raises(CorruptError):
        list(read_entries([parts[0], *parts[:0:-1]]))
    with pytest.raises(CorruptError):
        list(read_entries([*parts, parts[-1]]))


def test_a_continued_file_needs_its_beginning() -> None:
    entries = [_file(b"long", [(b"x" * 32, 1)] * (MAX_PART_REFS + 3)), _file(b"z")]
    parts = [decode_part(raw) for _, raw in build_parts(entries)]
    assert parts[1].continued
    other = decode_part(next(iter(build_parts([_file(b"lone", [(b"x" * 32, 1)])])))[1])
    for wrong in (parts[1:], [other, *parts[1:]], parts[:1], [parts[0], parts[1], parts[1]]):
        with pytest.raises(CorruptError):
            list(read_entries(wrong))


def test_a_column_given_twice_is_refused() -> None:
    raw = _victim({})
    columns = _columns(raw)
    again = struct.pack("<II", _BASE, 1) + b"x"
    doubled = struct.pack("<I", len(columns) + 2) + raw[4:] + again + again
    with pytest.raises(CorruptError, match="twice"):
        decode_part(doubled)


@pytest.mark.parametrize("column", [0, 15, 0x7FFF])
def test_unknown_columns_are_not_ignored(column: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"column {column}"):
        decode_part(_victim({column: b"x"}))


@pytest.mark.parametrize("column", [0x8000, 0xFFFFFFFF])
def test_optional_columns_are_ignored(column: int) -> None:
    assert list(read_entries([decode_part(_victim({column: b"x"}))])) == _VICTIM


def _assert_safe(entries: list[Entry]) -> None:
    """Whoever writes these entries in order stays in his directory and overwrites nothing."""
    directories = {b""}
    seen: set[bytes] = set()
    for entry in entries:
        folder, _, name = entry.path.rpartition(b"/")
        assert folder in directories
        assert name not in (b"", b".", b"..")
        assert b"\0" not in entry.path
        assert entry.path not in seen
        seen.add(entry.path)
        if entry.kind is Kind.DIRECTORY:
            directories.add(entry.path)
        if entry.kind is Kind.SYMLINK:
            assert entry.target
            assert b"\0" not in entry.target
        assert entry.kind is not Kind.FILE or sum(size for _, size in entry.refs) == entry.size
    assert [sort_key(entry.path) for entry in entries] == sorted(
        sort_key(entry.path) for entry in entries
    )


def test_damaged_parts_never_lead_astray() -> None:
    ((_, raw),) = build_parts(_VICTIM)
    refused = 0
    for damaged in damages(raw):
        try:
            entries = list(read_entries([decode_part(damaged)]))
        except (CorruptError, UnsupportedFormatError):
            refused += 1
        else:
            _assert_safe(entries)
    assert refused > 100


@given(_trees, st.data())
@settings(max_examples=100)
def test_altered_columns_never_lead_astray(tree: dict, data: st.DataObject) -> None:  # type: ignore[type-arg]
    parts = list(build_parts(_linked(_flatten(tree))))
    if not parts:
        return
    columns = _columns(parts[0][1])
    for _ in range(data.draw(st.integers(1, 3))):
        column = data.draw(st.sampled_from(sorted(columns)))
        old = bytearray(columns[column])
        at = data.draw(st.integers(0, len(old)))
        old[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"../", b"\0", b"/", b"..", b"\1"]))
        )
        columns[column] = bytes(old)
    try:
        entries = list(read_entries([decode_part(_joined(columns))]))
    except (CorruptError, UnsupportedFormatError):
        return
    _assert_safe(entries)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(raw: bytes) -> None:
    try:
        entries = list(read_entries([decode_part(raw)]))
    except (CorruptError, UnsupportedFormatError):
        return
    _assert_safe(entries)
