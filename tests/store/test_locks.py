from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError, UsageError
from envstore.store import locks
from envstore.store.binary import seal
from envstore.store.digest import digest
from envstore.store.locks import load_lock_bytes, lock_key, save_lock
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_objects(str(tmp_path / "store"), create=True)


def test_a_lock_comes_back_under_the_digest_of_its_bytes(objects: ObjectStore) -> None:
    data = b'{"packages": []}\n' * 1000
    name = save_lock(objects, data)
    assert name == digest(data)
    assert load_lock_bytes(objects, name) == data
    assert (objects.size(lock_key(name)) or 0) < 1000


def test_a_lock_that_is_there_is_not_sent_again(objects: ObjectStore) -> None:
    save_lock(objects, b"{}\n")
    sent = objects.traffic.bytes_out
    save_lock(objects, b"{}\n")
    assert objects.traffic.bytes_out == sent


def test_a_missing_lock_is_named(objects: ObjectStore) -> None:
    with pytest.raises(NotFoundError, match="lock " + "00" * 32):
        load_lock_bytes(objects, bytes(32))


def test_a_lock_under_another_name_is_refused(objects: ObjectStore) -> None:
    objects.put(lock_key(bytes(32)), seal(locks.MAGIC, b"{}\n"))
    with pytest.raises(CorruptError, match="does not match its name"):
        load_lock_bytes(objects, bytes(32))


def test_a_damaged_lock_is_refused(objects: ObjectStore) -> None:
    name = save_lock(objects, b"{}\n" * 100)
    data = bytearray(objects.get(lock_key(name)))
    data[20] ^= 1
    objects.put(lock_key(name), bytes(data))
    with pytest.raises(CorruptError, match="checksum"):
        load_lock_bytes(objects, name)


def test_a_lock_of_a_newer_format_is_refused(objects: ObjectStore) -> None:
    objects.put(lock_key(digest(b"x")), seal(b"ESLOCK02", b"x"))
    with pytest.raises(UnsupportedFormatError):
        load_lock_bytes(objects, digest(b"x"))


def test_a_lock_that_is_too_long_is_refused(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_lock(objects, b"x" * 100)
    monkeypatch.setattr(locks, "MAX_BODY", 99)
    with pytest.raises(UsageError, match="100 bytes"):
        save_lock(objects, b"x" * 100)
    with pytest.raises(CorruptError, match="claims 100 bytes"):
        load_lock_bytes(objects, name)
