"""Profiles: their bytes, how recordings merge, who may lose which race, and who inherits."""

from __future__ import annotations

import threading
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store import profiles
from envstore.store.binary import U32, U64, pack_array, seal
from envstore.store.digest import digest
from envstore.store.profiles import (
    MAGIC,
    MAX_RANGES,
    Profile,
    Range,
    file_ranks,
    find_profile,
    list_profiles,
    load_profile,
    merge,
    new_profile,
    open_profile,
    profile_key,
    remove_profile,
    save_profile,
)
from tests.damage import assert_noticed
from tests.stores import Store

MANIFEST = digest(b"manifest")

_names = st.binary(min_size=1, max_size=6).filter(lambda name: b"\0" not in name)


@st.composite
def _profiles(draw: st.DrawFn) -> Profile:
    """Draw a profile: files with ranges that do not overlap, in any order."""
    found = []
    for path in draw(st.lists(_names, max_size=4, unique=True)):
        at = draw(st.integers(0, 5))
        for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)))):
            found.append(Range(path, at + gap, length, draw(st.integers(1, 3))))
            at += gap + length
    order = draw(st.permutations(found))
    words = tuple(draw(st.lists(_names, max_size=3)))
    return Profile(tuple(order), draw(st.integers(0, 1 << 63)), words, draw(st.integers(1, 9)))


def _bytes(profile: Profile) -> set[tuple[bytes, int]]:
    return {
        (item.path, at)
        for item in profile.ranges
        for at in range(item.offset, item.offset + item.length)
    }


def profile(*ranges: tuple[str, int, int] | str, **facts: int) -> Profile:
    """Return a profile of ``(path, offset, length)`` or of whole little files."""
    rows = [(item, 0, 10) if isinstance(item, str) else item for item in ranges]
    found = [Range(path.encode(), offset, length) for path, offset, length in rows]
    return Profile(tuple(found), facts.get("created", 1), (b"cmd",), facts.get("recordings", 1))


@given(_profiles())
def test_round_trip(found: Profile) -> None:
    assert open_profile(found.seal(), "it") == found


def test_damage_is_noticed() -> None:
    found = profile("a", ("b/c", 4096, 12), ("a", 50, 1))
    assert_noticed(lambda data: open_profile(data, "it"), found.seal())


def _body(
    *,
    paths: bytes = b"a\0b",
    files: int = 2,
    count: int = 2,
    numbers: tuple[int, ...] = (0, 1),
    offsets: tuple[int, ...] = (0, 0),
    lengths: tuple[int, ...] = (1, 1),
    seen: tuple[int, ...] = (1, 1),
    text: int | None = None,
    command: bytes = b"",
    stray: bytes = b"",
) -> bytes:
    return b"".join(
        (
            U64.pack(1),
            U32.pack(1),
            U32.pack(len(command)),
            command,
            U32.pack(files),
            U32.pack(count),
            U32.pack(len(paths) if text is None else text),
            paths,
            pack_array(array("I", numbers)),
            pack_array(array("Q", offsets)),
            pack_array(array("Q", lengths)),
            pack_array(array("I", seen)),
            stray,
        )
    )


def test_what_a_hostile_writer_may_claim() -> None:
    assert len(open_profile(seal(MAGIC, _body()), "it").ranges) == 2
    for body in (
        _body(files=3),
        _body(files=1),
        _body(paths=b"a\0a"),
        _body(paths=b"a\0"),
        _body(numbers=(0, 2)),
        _body(lengths=(0, 1)),
        _body(seen=(0, 1)),
        _body(offsets=(0, (1 << 64) - 1), lengths=(1, 2)),
        _body(numbers=(0, 0), paths=b"a", files=1, offsets=(0, 3), lengths=(4, 1)),
        _body(count=MAX_RANGES + 1),
        _body(count=(1 << 32) - 1),
        _body(text=(1 << 32) - 1),
        _body(text=2),
        _body(command=bytes(5000)),
        _body(stray=b"x"),
        b"",
    ):
        with pytest.raises(CorruptError):
            open_profile(seal(MAGIC, body), "it")
    with pytest.raises(UnsupportedFormatError):
        open_profile(seal(b"ESPROF02", _body()), "it")
    claimed = bytearray(seal(MAGIC, _body()))
    claimed[8:12] = U32.pack((1 << 32) - 1)
    with pytest.raises(CorruptError, match="limit"):
        open_profile(bytes(claimed), "it")


@given(_profiles(), _profiles())
def test_a_merge_is_a_union_whichever_comes_first(one: Profile, two: Profile) -> None:
    merged = merge(one, two)
    assert _bytes(merged) == _bytes(one) | _bytes(two)
    assert merged.ranges == merge(two, one).ranges
    assert merged.recordings == one.recordings + two.recordings
    assert open_profile(merged.seal(), "it") == merged
    for item in merged.ranges:
        assert item.seen >= 1


def test_order_is_that_of_first_touch() -> None:
    assert merge(profile("a", "b", "c"), profile("a", "b", "c")).ranges == tuple(
        Range(path, 0, 10, 2) for path in (b"a", b"b", b"c")
    )
    start = [item.path for item in merge(profile("a", "b", "c", "d"), profile("a", "x")).ranges]
    assert start[0] == b"a"
    assert start.index(b"b") < start.index(b"x") < start.index(b"d")
    often = merge(profile("a", "b", recordings=9), profile("b", "a"))
    assert [item.path for item in often.ranges] == [b"a", b"b"]
    joined = merge(profile(("a", 0, 10), ("b", 0, 5)), profile(("a", 5, 10), ("a", 40, 1)))
    assert joined.ranges == (
        Range(b"a", 0, 15, 2),
        Range(b"a", 40, 1, 1),
        Range(b"b", 0, 5, 1),
    )


def test_too_much_is_left_out_where_few_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_RANGES", 4)
    first = profile("a", "b", "c", "d")
    merged = merge(first, profile("x", "b", "y", "d"))
    assert {item.path for item in merged.ranges} >= {b"b", b"d"}
    assert len(merged.ranges) == 4
    monkeypatch.setattr(profiles, "MAX_TEXT", 5)
    recorded = new_profile([Range(name * 2, 0, 1) for name in (b"a", b"b", b"c")], ["x" * 5000])
    assert [item.path for item in recorded.ranges] == [b"aa"]
    assert recorded.command == ()


def test_saved_listed_loaded_and_removed(store: Store) -> None:
    objects = store.repository.objects
    assert list_profiles(objects, MANIFEST) == []
    with pytest.raises(NotFoundError):
        load_profile(objects, MANIFEST, "start")
    for name in ("train", "start"):
        save_profile(objects, MANIFEST, name, profile(name))
    save_profile(objects, digest(b"other"), "other", profile("x"))
    assert list_profiles(objects, MANIFEST) == ["start", "train"]
    assert load_profile(objects, MANIFEST, "train") == profile("train")
    merged = save_profile(objects, MANIFEST, "train", profile("more"))
    assert _bytes(merged) == _bytes(profile("train", "more"))
    assert load_profile(objects, MANIFEST, "train") == merged
    save_profile(objects, MANIFEST, "train", profile("alone"), replace=True)
    assert load_profile(objects, MANIFEST, "train") == profile("alone")
    remove_profile(objects, MANIFEST, "train")
    assert list_profiles(objects, MANIFEST) == ["start"]
    with pytest.raises(NotFoundError):
        remove_profile(objects, MANIFEST, "train")


@pytest.mark.parametrize("name", ["", "none", "a/b", "..", ".hidden", "a..b", "x" * 129, "é"])
def test_names_that_no_profile_can_have(name: str) -> None:
    with pytest.raises(UsageError):
        profile_key(MANIFEST, name)


@pytest.mark.usefixtures("_no_fsync")
def test_of_recordings_saved_at_once_none_is_lost(store: Store) -> None:
    objects = store.repository.objects
    writers = 12
    barrier = threading.Barrier(writers)
    failed: list[BaseException] = []

    def save(number: int) -> None:
        barrier.wait()
        try:
            save_profile(objects, MANIFEST, "start", profile("all", f"only {number}"))
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    found = load_profile(objects, MANIFEST, "start")
    assert found.recordings == writers
    assert {item.path: item.seen for item in found.ranges} == {
        b"all": writers,
        **{b"only %d" % number: 1 for number in range(writers)},
    }


def test_an_unclear_answer(store: Store) -> None:
    objects = store.faults
    objects.fail("put_if", UnavailableError("lost"), key="profiles/", times=1, after=True)
    save_profile(objects, MANIFEST, "start", profile("a"))
    assert load_profile(objects, MANIFEST, "start") == profile("a")
    objects.fail("put_if", UnavailableError("gone"), key="profiles/", times=1)
    with pytest.raises(UnavailableError):
        save_profile(objects, MANIFEST, "start", profile("b"))


def test_who_always_loses_gives_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_PAUSE_SECONDS", 0)
    store.faults.fail("put_if", ConflictError("lost"), key="profiles/")
    with pytest.raises(ConflictError, match="changed all the time"):
        save_profile(store.faults, MANIFEST, "start", profile("a"))


def test_a_damaged_profile_is_replaced(store: Store) -> None:
    objects = store.repository.objects
    objects.put(profile_key(MANIFEST, "start"), b"no profile at all")
    with pytest.raises(CorruptError):
        load_profile(objects, MANIFEST, "start")
    save_profile(objects, MANIFEST, "start", profile("a"))
    assert load_profile(objects, MANIFEST, "start") == profile("a")


def test_a_snapshot_inherits(store: Store, tree: Path) -> None:
    objects = store.repository.objects
    pushed = [store.push(tree)]
    for number in range(5):
        (tree / "changing").write_text(str(number))
        pushed.append(store.push(tree))
    assert find_profile(store.repository, pushed[-1].snapshot) is None
    save_profile(objects, pushed[0].manifest, "start", profile("too far"))
    assert find_profile(store.repository, pushed[-1].snapshot) is None
    for name in ("train", "serve"):
        save_profile(objects, pushed[2].manifest, name, profile(name))
    both = find_profile(store.repository, pushed[-1].snapshot)
    assert both is not None
    assert (both.name, both.manifest) == ("serve+train", pushed[2].manifest)
    assert {item.path for item in both.profile.ranges} == {b"serve", b"train"}
    one = find_profile(store.repository, pushed[-1].snapshot, "train")
    assert one is not None
    assert one.profile == profile("train")
    assert find_profile(store.repository, pushed[-1].snapshot, "start") is None
    save_profile(objects, pushed[2].manifest, "start", profile("s"))
    start = find_profile(store.repository, pushed[-1].snapshot)
    assert start is not None
    assert (start.name, start.profile) == ("start", profile("s"))
    before = store.repository.snapshot(pushed[-1].snapshot)
    assert before.digest == pushed[-1].snapshot


def test_ranks_of_files() -> None:
    found = profile("a", ("big", 0, 100), ("half", 0, 30), ("big", 500, 100), ("half", 50, 30), "x")
    assert file_ranks(found, {b"big": 1000, b"half": 100, b"a": 5}) == {b"a": 0, b"half": 1}
    assert file_ranks(found, {b"a": 0}) == {}
