from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, ConflictError, NoSpaceError, UnavailableError
from envstore.store.objects import ObjectStore, open_objects
from envstore.store.objects.probe import ProbeResult, probe_conditional_put
from tests.faulty import FaultyStore
from tests.s3server import S3Server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultyStore]:
    with closing(open_objects(str(tmp_path / "objects"), create=True)) as objects:
        yield FaultyStore(objects)


def failed(result: ProbeResult) -> list[str]:
    return [check.name for check in result.checks if not check.ok]


def test_a_directory_passes(store: FaultyStore) -> None:
    result = probe_conditional_put(store, rounds=2)
    assert result.ok
    assert failed(result) == []
    assert len(result.checks) == 7
    assert result.leftovers == ()
    assert list(store.list("")) == []
    # Two races a round among 32, a stale version a round, one missing key.
    assert store.count("put_if", "probe/") == 2 * (2 * 32 + 1) + 1


def test_a_real_s3_server_passes(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    with closing(open_objects(s3_server.url(s3_server.new_bucket(), "p"))) as objects:
        result = probe_conditional_put(objects)
        assert result.ok, result
        assert list(objects.list("")) == []


class Lenient(FaultyStore):
    """A store that breaks the rules of ``put_if`` in ways seen in real servers."""

    def __init__(self, inner: ObjectStore, rule: str) -> None:
        super().__init__(inner)
        self.rule = rule
        self.two = threading.Barrier(2)
        self.lucky = 2

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        if self.rule == "ignores conditions":
            self.inner.put(key, data)
            return self.inner.get_versioned(key)[1]
        if self.rule == "checks, then writes":
            current = None if self.inner.size(key) is None else self.inner.get_versioned(key)[1]
            if current != version:
                raise ConflictError(key)
            with self._lock:
                self.lucky -= 1
                late = self.lucky < 0
            if late:
                raise ConflictError(key)
            self.two.wait()  # both have looked, now both write
            self.inner.put(key, data)
            return self.inner.get_versioned(key)[1]
        if self.rule == "takes any version of a missing key" and self.inner.size(key) is None:
            return self.inner.put_if(key, data, None)
        if self.rule == "takes a stale version" and b"must not" in data and self.inner.size(key):
            return self.inner.put_if(key, data, self.inner.get_versioned(key)[1])
        if self.rule == "refuses everybody":
            raise ConflictError(key)
        if self.rule == "says yes and stores nothing":
            return "version"
        if self.rule == "stores another's bytes":
            return self.inner.put_if(key, data + b"!", version)
        return super().put_if(key, data, version)


CREATE = "32 writers create one object"


@pytest.mark.parametrize(
    ("rule", "check", "seen"),
    [
        ("ignores conditions", CREATE, "32 won"),
        ("checks, then writes", CREATE, "2 won"),
        (
            "takes any version of a missing key",
            "a version of a missing object loses",
            "it was stored",
        ),
        ("takes a stale version", "a stale version loses", "it was stored"),
        ("refuses everybody", CREATE, "nobody's write was stored"),
        ("says yes and stores nothing", CREATE, "nobody's write was stored"),
        ("stores another's bytes", CREATE, "1 won, but the object holds what another one wrote"),
    ],
)
def test_a_store_that_breaks_a_rule_fails(
    store: FaultyStore, rule: str, check: str, seen: str
) -> None:
    result = probe_conditional_put(Lenient(store.inner, rule))
    assert not result.ok
    assert failed(result) == [check]
    assert next(found.detail for found in result.checks if not found.ok).startswith(seen)
    assert list(store.list("")) == []


def test_a_writer_without_an_answer_that_had_won_is_the_winner(store: FaultyStore) -> None:
    store.fail("put_if", UnavailableError("no answer"), times=1, skip=5)
    store.fail("put_if", UnavailableError("no answer"), times=10, skip=10, after=True)
    result = probe_conditional_put(store)
    assert result.ok, result
    assert any("no answer" in check.detail for check in result.checks)


def test_an_unreachable_store_cannot_be_probed(store: FaultyStore) -> None:
    store.fail("*", UnavailableError("gone"))
    with pytest.raises(UnavailableError, match="gone"):
        probe_conditional_put(store)


def test_a_full_store_cannot_be_probed_and_keeps_nothing(store: FaultyStore) -> None:
    store.fail("put_if", NoSpaceError("full"), skip=32)
    with pytest.raises(NoSpaceError, match="full"):
        probe_conditional_put(store)
    assert list(store.inner.list("")) == []


def test_who_may_not_delete_is_told_what_is_left(store: FaultyStore) -> None:
    store.fail("delete", AccessDeniedError("append only"))
    result = probe_conditional_put(store)
    assert result.ok
    assert {info.key for info in store.inner.list("probe/")} < set(result.leftovers)
