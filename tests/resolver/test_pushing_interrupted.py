"""A push of a lock that is killed at any moment leaves the store valid, and the next one finishes.

The pushing process kills itself when it has told its progress so and so often.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from envstore.resolver.lockfile import encode_lock
from tests.channel.conda import Channel
from tests.resolver.locks import conda_lock, push
from tests.stores import Store

ROOT = Path(__file__).parents[2]
ROUNDS = 5

_PUSH = """
import os, signal, sys
from pathlib import Path

from envstore.resolver.lockfile import load_lock
from envstore.resolver.pushing import Places, push_lock
from envstore.store.refs import RefName
from tests.stores import Store

root, machine, lock = map(Path, sys.argv[1:4])
doom = int(sys.argv[4])
seen = 0

def progress(phase, done, total):
    global seen
    seen += 1
    if seen == doom:
        os.kill(os.getpid(), signal.SIGKILL)

with Store(root) as store:
    places = Places(machine / "pending", machine / "archives")
    push_lock(store.repository, load_lock(lock), RefName.parse("env"), places, progress=progress)
print(seen)
"""


def _killed(root: Path, machine: Path, lock: Path, doom: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", _PUSH, root, machine, lock, str(doom)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_push_of_a_lock_killed_at_any_moment(conda_channel: Channel, tmp_path: Path) -> None:
    lock = conda_lock(conda_channel, "python", "hello-pkg", "binprefix", cache=tmp_path / "cache")
    file = tmp_path / "envstore.lock"
    file.write_bytes(encode_lock(lock))
    with Store(tmp_path / "undisturbed") as store:
        whole = push(store, lock, tmp_path / "undisturbed").result
    code, told = _killed(tmp_path / "counted", tmp_path / "counted", file, 0)
    assert code == 0
    moments = random.Random("locks").sample(range(1, int(told)), min(ROUNDS, int(told) - 1))
    place = tmp_path / "store"
    for number, doom in enumerate(moments):
        machine = tmp_path / f"machine {number % 2}"
        code, _ = _killed(place, machine, file, doom)
        assert code in (-9, 0)
        with Store(place) as store:
            assert store.verify().problems == []
            assert all(key.count("/") == 2 for key in store.object_keys("packages/"))
    with Store(place) as store:
        again = push(store, lock, tmp_path / "machine 0").result
        assert again.manifest == whole.manifest
        assert store.verify().problems == []
    assert list((tmp_path / "machine 0" / "archives").iterdir()) == []
