"""A collector in a process of its own that stops itself right before it deletes a key.

Arguments: the URL of a store, the key, and for how many seconds the store is to take a deletion.
"""

from __future__ import annotations

import os
import signal
import sys

from envstore.errors import EnvstoreError
from envstore.store import doomed
from envstore.store.doomed import Condemned
from envstore.store.gc import sweeping
from envstore.store.gc.owner import Change, Ownership
from envstore.store.gc.sweeping import Swept, sweep
from envstore.store.objects import open_objects
from tests.faulty import FaultyStore


def stop() -> None:
    """Stop this process, until it is continued and has a line to read."""
    os.kill(os.getpid(), signal.SIGSTOP)
    # The thread that asks for it may be the last one to stop.
    sys.stdin.readline()


def main(url: str, key: str, seconds: float) -> None:
    """Condemn ``key`` and sweep it, stopping once the lease was looked at."""
    sweeping.DELETION_SECONDS = seconds  # type: ignore[misc]
    objects = FaultyStore(open_objects(url))
    objects.call_before("delete", stop, key=key)
    owner = Ownership.take(objects)
    assert isinstance(owner, Ownership)
    row = Condemned(key, 1, doomed.LEASE_SECONDS)
    swept = Swept()
    with owner:
        owner.change(lambda found: Change(1, [row], found.deleting))
        try:
            sweep(owner, objects, [row], swept, lambda *_: None)
        except EnvstoreError as error:
            sys.stdout.write(type(error).__name__)
    sys.stdout.write(" ".join(swept.deleted))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
