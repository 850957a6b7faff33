"""One session for all files that are written at the same time, and not for ever."""

from __future__ import annotations

import pytest

from envstore.checkpoint.adapters import sharing
from envstore.checkpoint.adapters.sharing import Sharing
from envstore.store.session_records import PREFIX
from envstore.store.sessions import SessionLostError
from tests.stores import Store


def test_files_that_overlap_share_a_session_that_ends_with_the_last(store: Store) -> None:
    shared = Sharing(store.repository)
    one, two = shared.hold(), shared.hold()
    assert one.session is two.session
    one.release()
    one.release()
    two.session.check()
    assert len(store.object_keys(PREFIX)) == 1
    two.release()
    assert store.object_keys(PREFIX) == []
    with shared.hold().session as again:
        assert again is not two.session


def test_files_that_overlap_without_end_do_not_hold_one_session(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Sharing(store.repository)
    old = shared.hold()
    monkeypatch.setattr(sharing, "MAX_SECONDS", -1.0)
    new = shared.hold()
    assert new.session is not old.session
    # Whoever is in the old one goes on.
    old.session.check()
    old.release()
    with pytest.raises(SessionLostError):
        old.session.check()
    new.session.check()
    new.release()
    assert store.object_keys(PREFIX) == []


def test_nobody_joins_a_session_that_is_lost(store: Store) -> None:
    shared = Sharing(store.repository)
    old = shared.hold()
    store.repository.objects.delete(old.session.key)
    with pytest.raises(SessionLostError):
        old.session.declare([bytes(32)])
    new = shared.hold()
    assert new.session is not old.session
    old.release()
    new.session.check()
    new.release()
    assert store.object_keys(PREFIX) == []
