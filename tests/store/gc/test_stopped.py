"""A collector that is stopped between its look at the lease and the deletion hits nothing new."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from envstore.errors import UnavailableError
from envstore.store import doomed
from envstore.store.gc.owner import Ownership
from envstore.store.gc.sweeping import finish
from envstore.store.objects import file as files
from envstore.store.objects import open_objects
from envstore.store.resetting import reset_state
from tests.faulty import FaultyStore
from tests.s3server import S3Server

KEY = "packs/00/" + 64 * "0"
OTHER = "packs/01/" + 64 * "1"
LATER = doomed.LEASE_SECONDS + doomed.SLACK_SECONDS + 5


@contextmanager
def stopped(url: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Yield a collector that is about to delete ``KEY``, and has stopped."""
    command = [sys.executable, "-m", "tests.store.gc.stopping", url, KEY, str(seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            yield process
        finally:
            process.kill()


def go_on(process: subprocess.Popen[str]) -> str:
    """Let it run to its end; returns what it said."""
    process.send_signal(signal.SIGCONT)
    return process.communicate("\n")[0]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[tuple[str, FaultyStore]]:
    """A store's URL, and the store as somebody sees it to whom the lease is long over."""
    url = f"file://{tmp_path / 'store'}"
    with closing(FaultyStore(open_objects(url, create=True))) as objects:
        objects.put(KEY, b"old")
        yield url, objects


def test_a_server_refuses_a_deletion_that_comes_late(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket(), "some/prefix")
    with closing(FaultyStore(open_objects(url, create=True))) as objects:
        objects.put(KEY, b"old")
        with stopped(url, 1) as process:
            begun = time.monotonic()
            objects.skew = LATER
            assert doomed.claim(objects, [KEY]).keys() == frozenset()
            assert objects.size(KEY) is None
            objects.put(KEY, b"new")
            # The server counts whole seconds.
            time.sleep(max(0.0, begun + 2.5 - time.monotonic()))
            assert go_on(process) == "TooLateError"
        assert objects.get(KEY) == b"new"
        state, _ = doomed.read_state(objects)
        assert (state.owner, state.deleting) == (None, None)


def test_whoever_follows_waits_for_one_that_is_stopped(
    directory: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, objects = directory
    objects.skew = LATER
    with monkeypatch.context() as patch, stopped(url, 30) as process:
        patch.setattr(files, "_SETTLE_SECONDS", 0.0)
        with pytest.raises(UnavailableError, match=r"stopped and holds .*/\.locks/gc"):
            doomed.claim(objects, [KEY])
        with pytest.raises(UnavailableError, match="stopped and holds"):
            Ownership.take(objects)
        # Nobody has done anything, and whoever needs another key is not hindered.
        assert doomed.claim(objects, [OTHER]).keys() == {KEY}
        assert objects.get(KEY) == b"old"
        objects.skew = 0.0
        assert go_on(process) == KEY
    assert objects.size(KEY) is None
    doomed.claim(objects, [KEY])
    objects.put(KEY, b"new")
    with closing(open_objects(url)) as plain:
        owner = Ownership.take(plain)
        assert isinstance(owner, Ownership)
        with owner:
            assert finish(owner, plain).deleted == set()
    assert objects.get(KEY) == b"new"


def test_one_that_is_killed_while_it_is_stopped_hinders_nobody(
    directory: tuple[str, FaultyStore],
) -> None:
    url, objects = directory
    with stopped(url, 30) as process:
        process.kill()
        process.wait()
        assert doomed.claim(objects, [KEY]).keys() == frozenset()
        objects.put(KEY, b"new")
    assert objects.get(KEY) == b"new"


def test_nor_is_the_state_made_anew_while_one_is_stopped(
    directory: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, objects = directory
    objects.skew = LATER
    with monkeypatch.context() as patch, stopped(url, 30) as process:
        state, _ = doomed.read_state(objects)
        assert state.deleting is not None
        objects.delete(doomed.list_key(state.deleting))
        patch.setattr(files, "_SETTLE_SECONDS", 0.0)
        with pytest.raises(UnavailableError, match="stopped and holds"):
            reset_state(objects)
        process.kill()
        process.wait()
        assert reset_state(objects)
    assert doomed.read_doomed(objects).keys() == frozenset()
    assert objects.get(KEY) == b"old"


def test_what_had_no_answer_is_waited_for(
    directory: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, objects = directory
    waited: list[float] = []
    monkeypatch.setattr(objects, "settle", waited.append)
    rows = [doomed.Condemned(KEY, 1, objects.now())]
    for owner, skew in (
        (None, 10),
        (None, LATER),
        (doomed.Owner("f" * 32, "elsewhere", int(objects.now()) - 61), 0),
    ):
        objects.skew = 0.0
        _, version = doomed.read_state(objects)
        name = doomed.write_list(objects, rows)
        doomed.put_state(objects, doomed.State(1, deleting=name, owner=owner), version)
        objects.skew = skew
        doomed.claim(objects, [KEY])
    assert doomed.SLACK_SECONDS - 15 < waited[0] <= doomed.SLACK_SECONDS - 9
    assert waited[1:] == [0.0, 0.0]
