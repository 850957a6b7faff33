"""A writer in a process of its own, that stops where it is told to and says how it ended.

Arguments: the URL of a store, and the key before which to wait for a line on standard input.
"""

from __future__ import annotations

import sys

from envstore.store.config import load_config
from envstore.store.objects import open_objects
from envstore.store.refs import RefName, move_ref
from envstore.store.repository import Repository
from envstore.store.sessions import SessionLostError, writing
from envstore.store.snapshots import Snapshot, save_snapshot
from tests.faulty import FaultyStore


def say(line: str) -> None:
    """Tell the test something."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(url: str, wait_at: str) -> None:
    """Store a snapshot and point a ref at it, stopping on the way."""
    objects = FaultyStore(open_objects(url))
    repository = Repository(objects, load_config(objects), None)

    def hold() -> None:
        say(f"at {wait_at}")
        sys.stdin.readline()

    try:
        with writing(repository, "test") as (session, inside):
            say(session.key)
            name = save_snapshot(inside.objects, Snapshot("dir", bytes(32), 0, 0, "now"))
            say(name.hex())
            objects.call_before("put_if", hold, key=wait_at, times=1)
            move_ref(inside.objects, RefName.parse("it"), name, None)
    except SessionLostError:
        say("lost")
    else:
        say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
