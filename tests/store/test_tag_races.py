"""Of 32 who move one ref at once exactly one wins, and nobody's move is lost: on a real S3 server.

All have read the ref before any of them writes it: they meet at the door of the store. As threads
of one process they share a connection pool, as processes nothing.
``ENVSTORE_TEST_ROUNDS=100`` for as many rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from envstore.errors import ConflictError
from envstore.store.catalog import tag
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.push import push
from envstore.store.refs import RefName, read_ref
from envstore.store.repository import Repository
from envstore.store.snapshots import save_snapshot
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from tests.faulty import FaultyStore
from tests.s3server import S3Server

ROOT = Path(__file__).parents[2]
RACERS = 32
ROUNDS = int(os.environ.get("ENVSTORE_TEST_ROUNDS", "3"))
TARGET = RefName.parse("race")
_PATIENCE = 120.0

# One process forks the others, so that what they need is imported once.
_RACERS = """
import ctypes, json, multiprocessing, sys
from tests.store.test_tag_races import race, wanted

url, rounds, count, names = json.loads(sys.argv[1])

def run(racer, door, start, said):
    ctypes.CDLL(None).prctl(1, 9)  # whoever asked may be killed
    try:
        said.put(list(race(url, wanted(names, racer, rounds), door.wait, start.wait)))
    except BaseException:
        door.abort()
        start.abort()
        said.put([])
        raise

fork = multiprocessing.get_context("fork")
door, start = (fork.Barrier(count, timeout=120) for _ in range(2))
said = fork.SimpleQueue()
racers = [fork.Process(target=run, args=(i, door, start, said)) for i in range(count)]
for racer in racers:
    racer.start()
found = [said.get() for _ in racers]
for racer in racers:
    racer.join()
print(json.dumps(found))
"""


@contextmanager
def _opened(url: str, wrap: Callable[[ObjectStore], ObjectStore]) -> Iterator[Repository]:
    objects = open_objects(url)
    try:
        yield Repository(wrap(objects), init_store(objects)[0], None)
    finally:
        objects.close()


def wanted(names: list[str], racer: int, rounds: int) -> list[str]:
    """Return what one racer points the ref at, round by round: never what it points at already."""
    return [names[2 * racer + at % 2] for at in range(rounds)]


def race(
    url: str, names: list[str], door: Callable[[], object], start: Callable[[], object]
) -> Iterator[str]:
    """Move the ref to each of ``names``, beside others; yields what was won, or nothing.

    ``start`` returns when everybody has ended the round before, ``door`` when they all are about
    to write.
    """

    def gated(objects: ObjectStore) -> FaultyStore:
        store = FaultyStore(objects)
        store.fail("put_if", AssertionError(), key="refs/").before = door
        return store

    with _opened(url, gated) as repository:
        for name in names:
            start()
            try:
                tag(repository, f"@{name}", TARGET, force=True)
            except ConflictError:
                yield ""
            else:
                yield name


def _prepared(url: str, tmp_path: Path) -> list[str]:
    """Point the ref at a snapshot, and store two for each racer; returns their names."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content")
    stat_cache = StatCache(tmp_path / "stat.sqlite")
    source = DirectorySource(tmp_path / "tree")
    try:
        with _opened(url, lambda objects: objects) as repository:
            first = push(repository, source, TARGET, stat_cache).snapshot
            snapshot = repository.snapshot(first)
            return [
                save_snapshot(repository.objects, replace(snapshot, message=f"snapshot {i}")).hex()
                for i in range(2 * RACERS)
            ]
    finally:
        source.close()
        stat_cache.close()


def _judge(url: str, found: list[list[str]]) -> None:
    """Check that of each round one won, and that the ref says that all of these moves were made."""
    assert len(found) == RACERS
    for at, outcomes in enumerate(zip(*found, strict=True)):
        assert Counter(map(bool, outcomes)) == {True: 1, False: RACERS - 1}, (at, outcomes)
    with _opened(url, lambda objects: objects) as repository:
        ref = read_ref(repository.objects, TARGET)
        assert ref.sequence == 1 + ROUNDS
        assert ref.snapshot.hex() == "".join(outcomes[-1] for outcomes in found)
        assert list(repository.objects.list("sessions/")) == []


@pytest.mark.timeout(120 + 30 * ROUNDS)
def test_of_many_threads_one_wins(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url(s3_server.new_bucket())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        names = _prepared(url, tmp_path)
        door, start = Barrier(RACERS, timeout=_PATIENCE), Barrier(RACERS, timeout=_PATIENCE)

        def run(racer: int) -> list[str]:
            try:
                return list(race(url, wanted(names, racer, ROUNDS), door.wait, start.wait))
            except BaseException:
                door.abort()
                start.abort()
                raise

        with ThreadPoolExecutor(RACERS) as pool:
            _judge(url, list(pool.map(run, range(RACERS))))


@pytest.mark.timeout(120 + 30 * ROUNDS)
def test_of_many_processes_one_wins(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url(s3_server.new_bucket())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        order = json.dumps([url, ROUNDS, RACERS, _prepared(url, tmp_path)])
        done = subprocess.run(
            [sys.executable, "-c", _RACERS, order],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        _judge(url, json.loads(done.stdout))
