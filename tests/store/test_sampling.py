from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, UnavailableError
from envstore.store import frames, packs
from envstore.store.checking import Reading, check_store
from envstore.store.digest import digest
from envstore.store.objects import open_objects
from envstore.store.objects.limited import LimitedObjects, Limiter
from envstore.store.sampling import Journal, Sample
from tests.faulty import FaultyStore
from tests.stores import Store
from tests.trees import noise

pytestmark = pytest.mark.usefixtures("_no_fsync")

_PACKS = {digest(b"%d" % number): 1000 + number for number in range(300)}


def test_a_sample_has_its_share_of_the_bytes_and_follows_its_seed() -> None:
    total = sum(_PACKS.values())
    seen: set[bytes] = set()
    for seed in map(str, range(100)):
        chosen = Sample(0.05, seed).choose(_PACKS)
        assert 0.05 * total <= sum(_PACKS[name] for name in chosen) <= 0.05 * total + 1300
        assert chosen == Sample(0.05, seed).choose(_PACKS)
        seen.update(chosen)
    # One after the other they come by all but what chance leaves out.
    assert len(seen) > 0.95 * len(_PACKS)
    assert len(Sample(1e-9, "x").choose(_PACKS)) == 1
    assert Sample().choose(_PACKS) == sorted(_PACKS)
    assert Sample(0.5, "x").choose({}) == []


def test_what_was_read_is_remembered_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "state" / "store"
    one, two = list(_PACKS)[:2]
    journal = Journal(path)
    first = journal.begin(Sample(0.5, "seed"), resume=True)
    assert first.done == {}
    journal.add(one, 5)
    journal.add(two, 7)
    journal.close()
    # Killed while it wrote a line.
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path)
    run = again.begin(Sample(), resume=True)
    assert (run.sample, run.started, run.done) == (Sample(0.5, "seed"), first.started, {one: 5})
    again.add(two, 7)
    again.close()
    assert Journal(path).begin(Sample(), resume=True).done == {one: 5, two: 7}
    last = Journal(path)
    assert last.begin(Sample(), resume=False).done == {}
    last.end()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": 9, "share": 1, "seed": "", "started": ""}', "\xff"]
)
def test_a_memory_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "store"
    path.write_text(text)
    assert Journal(path).begin(Sample(), resume=True).done == {}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvstoreError, match="file"):
        Journal(tmp_path / "file" / "store").begin(Sample(), resume=False)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Some packs of 200 KB."""
    monkeypatch.setattr(frames, "TARGET_SIZE", 50_000)
    monkeypatch.setattr(packs, "TARGET_SIZE", 150_000)
    (tmp_path / "tree").mkdir()
    for number in range(6):
        (tmp_path / "tree" / f"{number}").write_bytes(noise(str(number), 200_000))
    with Store(tmp_path / "store", wrap=FaultyStore) as opened:
        opened.push(tmp_path / "tree")
        yield opened


def test_a_check_that_was_broken_off_goes_on(store: Store, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    fault = store.faults.fail("get_range", UnavailableError("gone"), key="packs/", skip=15)
    with pytest.raises(UnavailableError):
        check_store(store.repository, reading=Reading(True, journal=journal))
    fault.remove()
    report = check_store(store.repository, reading=Reading(True, journal=journal, resume=True))
    assert report.ok
    assert 0 < report.earlier_packs < report.packs
    assert report.data_packs == report.packs - report.earlier_packs
    assert report.earlier_bytes > 100_000
    assert not journal.exists()


def test_what_was_found_damaged_is_read_again(store: Store, tmp_path: Path) -> None:
    path = store.path(store.object_keys("packs/")[0])
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    journal = tmp_path / "journal"
    fault = store.faults.fail("list", UnavailableError("gone"), key="refs/", skip=1)
    with pytest.raises(UnavailableError):
        check_store(store.repository, reading=Reading(True, journal=journal))
    fault.remove()
    # The first look came to its end, so the next begins anew, and finds it as well.
    assert not check_store(store.repository, reading=Reading(True, journal=journal, resume=True)).ok


def test_data_is_read_once_and_in_pieces(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.store.examining.TAIL", 4096)
    monkeypatch.setattr("envstore.store.examining.PIECE", 100_000)
    sizes = {key: store.path(key).stat().st_size for key in store.object_keys("packs/")}
    store.faults.calls.clear()
    report = check_store(store.repository, reading=Reading(read_data=True))
    assert report.bytes_read == sum(sizes.values())
    largest = max(call.length for call in store.faults.calls if call.key.startswith("packs/"))
    # A frame of one chunk of up to 256 KiB is the least that can be asked for.
    assert largest <= 262_144 + 8


def test_nothing_is_read_faster_than_it_may_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that only waiting moves.
    now = [0.0]

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        now[0] += timeout or 0
        return False

    monkeypatch.setattr("envstore.store.objects.limited.time.monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Event, "wait", wait)
    limiter = Limiter(1000.0)
    inner = open_objects(store.url)
    objects = LimitedObjects(inner, limiter)
    key = store.object_keys("packs/")[0]
    size = objects.size(key)
    assert size is not None
    read = 0
    for _ in range(3):
        read += len(objects.get(key)) + len(objects.get_range(key, 5, 100))
        read += sum(map(len, objects.iter_range(key, 0, size)))
        views = [memoryview(bytearray(10)), memoryview(bytearray(20))]
        objects.get_range_into(key, 0, views)
        read += 30 + len(objects.get_versioned(key)[0])
    assert now[0] == pytest.approx(read / 1000)
    objects.close()
    inner.close()


def test_whoever_gives_up_waits_no_longer() -> None:
    limiter = Limiter(1.0)
    limiter.stop()
    with pytest.raises(UnavailableError):
        limiter.take(1 << 40)
