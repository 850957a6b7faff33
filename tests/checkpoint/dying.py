"""A persister that kills itself at an exact point of its talk with the store.

python tests/checkpoint/dying.py DIRECTORY OPERATION KEY (before|after)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from envstore.checkpoint.service import Persister
from envstore.store.objects import open_objects
from tests.faulty import FaultyStore, Gate


def main(directory: str, operation: str, key: str, when: str) -> None:
    """Serve ``directory`` until death."""

    def opened(url: str) -> FaultyStore:
        store = FaultyStore(open_objects(url))
        gate = store.gate(operation, key=key, after=when == "after")
        threading.Thread(target=_die_at, args=(gate,), daemon=True).start()
        return store

    Persister(Path(directory), open_objects=opened).run()


def _die_at(gate: Gate) -> None:
    gate.wait_entered()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
