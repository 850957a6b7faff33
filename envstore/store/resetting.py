"""Makes ``gc/state`` anew when it, or a list that it names, cannot be read any more.

As long as it cannot, nobody can write: what is about to be deleted is not known. Nothing is lost
with it but what collectors had found; they find it again. But one of them may be deleting just now
what it has on its list, so it is waited for until none can be at work any more.
"""

from __future__ import annotations

import time

from envstore.errors import ConflictError, NotFoundError, UnavailableError
from envstore.store.doomed import (
    LEASE_SECONDS,
    SLACK_SECONDS,
    STATE_KEY,
    State,
    list_key,
    open_list,
    parse_state,
    put_state,
    settle,
)
from envstore.store.objects.base import ObjectStore
from envstore.store.problems import DAMAGE
from envstore.store.session_records import PREFIX, read_record

QUIET_SECONDS = LEASE_SECONDS + SLACK_SECONDS
"""How long the state must not have moved, so that nobody can own it."""
_PAUSE = 1.0


def reset_state(objects: ObjectStore) -> bool:
    """Begin anew with nothing doomed if what is cannot be read; returns whether that was so.

    One request, and one for each list, if all is well. Else it takes two minutes, less where
    it can be read that no collector is at work. Raises ``ConflictError`` if somebody else is doing
    the same, and the errors of the store.
    """
    found = _damaged(objects)
    if found is None:
        return False
    state, version = found
    quiet = time.monotonic()
    while not _is_free(objects, state, quiet):
        time.sleep(_PAUSE)
        again = _damaged(objects)
        if again is None:
            return False  # a collector at work has written it anew
        if again[1] != version:
            quiet = time.monotonic()
            state, version = again
    # Before names may be written anew: see there. What cannot be read was quiet for long enough.
    if state is None:
        objects.settle(0.0)
    else:
        settle(objects, state)
    try:
        put_state(objects, State(epoch=_next_epoch(objects, state)), version)
    except DAMAGE as error:
        raise UnavailableError(f"{STATE_KEY} cannot be written: {error.message}") from error
    except ConflictError:
        raise ConflictError(f"{STATE_KEY} is changed by somebody else", hint="try again") from None
    return True


def _damaged(objects: ObjectStore) -> tuple[State | None, str] | None:
    """Return the state if that can be read, and its version; ``None`` if all is well."""
    try:
        data, version = objects.get_versioned(STATE_KEY)
    except NotFoundError:
        return None
    try:
        state = parse_state(data)
    except DAMAGE:
        return None, version
    try:
        for name in (state.condemned, state.deleting):
            if name is not None:
                # From the store: what this process has read before says nothing of it.
                open_list(objects.get(list_key(name)), name)
    except DAMAGE:
        return state, version
    return None


def _is_free(objects: ObjectStore, state: State | None, quiet: float) -> bool:
    """Whether no collector can be at work, the state having been as it is since ``quiet``."""
    if state is not None and (state.owner is None or state.owner.is_dead(objects.now())):
        return True
    return time.monotonic() - quiet >= QUIET_SECONDS


def _next_epoch(objects: ObjectStore, state: State | None) -> int:
    """Return an epoch beyond all that there were: epochs are counted, and never as many as seconds.

    A writer at work must not take for swept what is condemned from here on.
    """
    latest = max(int(objects.now()), state.epoch if state is not None else 0)
    for info in objects.list(PREFIX):
        try:
            latest = max(latest, read_record(objects, info.key).record.epoch)
        except DAMAGE:
            continue
    return latest + 1
