"""A push, a gc or a repack that is killed at any moment breaks nothing, and the next one finishes.

Real processes of the real command line, each killed at a random moment of the time that the last
complete run of its kind took. One store sees all of them, so that what one kill leaves behind is
what the next command begins with. ``ENVSTORE_TEST_KILLS=500`` for as many moments in all.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.profiles import Range, new_profile, save_profile
from envstore.store.pull import pull
from envstore.store.push import push
from envstore.store.refs import RefName, list_refs, read_ref
from envstore.store.repository import Repository
from envstore.store.source import DirectorySource
from envstore.store.statcache import StatCache
from envstore.store.verify import verify
from tests import trees
from tests.s3server import S3Server
from tests.soak.template import Template

KILLS = int(os.environ.get("ENVSTORE_TEST_KILLS", "10"))
SEED = os.environ.get("ENVSTORE_TEST_SEED", "kills")
COMMANDS = ("push", "gc", "repack")
_SIZE = 700_000
_FILES = 10
_PATIENCE = 120.0


@dataclass
class _Rig:
    """A store, the trees that are pushed to it, and the commands that are killed."""

    root: Path
    url: str
    env: dict[str, str]
    template: Template
    rng: random.Random
    took: dict[str, float] = field(default_factory=dict)
    died: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def __post_init__(self) -> None:
        objects = open_objects(self.url, create=True)
        self.repository = Repository(objects, init_store(objects)[0], None)
        self.work = self.root / "work"
        self.work.mkdir()
        for name in ("old", "wide"):
            trees.plain(self.root / name, name, files=20)
        for at in range(_FILES):
            self._change(at)

    def close(self) -> None:
        self.repository.close()

    # Commands.

    def run(self, *arguments: str, after: float | None = None) -> int | None:
        """Run a command, kill it ``after`` so many seconds; returns how it ended."""
        self.number += 1
        out, err = (self.root / f"{kind} {self.number}" for kind in ("out", "err"))
        begun = time.monotonic()
        child = self.template.start("envstore", list(arguments), self.env, self.root, out, err)
        status = child.wait(_PATIENCE if after is None else after)
        if status is None:
            child.signal(signal.SIGKILL)
            status = child.wait(_PATIENCE)
        said = out.read_text() + err.read_text()
        assert status in (0, -signal.SIGKILL), (arguments, status, said)
        assert status == 0 or after is not None, (arguments, said)
        if status == 0:
            self.took[arguments[0]] = time.monotonic() - begun
        out.unlink()
        err.unlink()
        return status

    def arguments(self, command: str) -> list[str]:
        if command == "push":
            return ["push", "work", str(self.work)]
        return ["gc", "--grace", "0s"] if command == "gc" else ["repack", "wide"]

    # What they find to do.

    def _change(self, at: int) -> None:
        seed = self.rng.randbytes(8).hex()
        (self.work / f"file {at}").write_bytes(trees.noise(seed, self.rng.randrange(1, _SIZE)))

    def prepare(self, command: str) -> None:
        """Have something for ``command`` to do."""
        if command == "push":
            for at in self.rng.sample(range(_FILES), 3):
                self._change(at)
            (self.work / "new").write_text(self.rng.randbytes(8).hex())
            trees.settle(self.work)
        elif command == "repack":
            self._push_wide()

    def _push_wide(self) -> None:
        """Push a tree of which a profile touches a little here and there."""
        tree = self.root / "wide"
        for at in range(_FILES):
            data = trees.noise(self.rng.randbytes(8).hex(), _SIZE)
            (tree / f"large {at}").write_bytes(data)
        manifest = self.push(tree, "wide")
        ranges = [Range(b"large %d" % at, 300_000, 1000) for at in range(_FILES)]
        profile = new_profile(ranges, ["true"])
        save_profile(self.repository.objects, manifest, "start", profile, replace=True)

    def push(self, tree: Path, ref: str) -> bytes:
        """Push from this process; returns the manifest."""
        source = DirectorySource(tree)
        stat_cache = StatCache(self.root / "stat.sqlite")
        try:
            return push(self.repository, source, RefName.parse(ref), stat_cache).manifest
        finally:
            stat_cache.close()
            source.close()

    # What is there.

    def refs(self) -> dict[str, bytes]:
        """Return where every ref points."""
        objects = self.repository.objects
        return {str(name): read_ref(objects, name).snapshot for name in list_refs(objects)}

    def check(self, whole: bool = True) -> dict[str, bytes]:
        """Check every byte of every ref, and with ``whole`` the index; returns the refs."""
        refs = self.refs()
        report = verify(self.repository, sorted(refs.items()), read_data=True, whole=whole)
        assert report.problems == []
        return refs

    def manifest(self, snapshot: bytes) -> bytes:
        return self.repository.snapshot(snapshot).manifest

    def read_back(self, ref: str, tree: Path) -> None:
        """Check that ``ref`` is ``tree``, file by file."""
        place = self.root / "back"
        pull(self.repository, self.repository.resolve(ref), place)
        assert trees.describe(place) == trees.describe(tree)
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        place.rmdir()


def _kill_and_judge(rig: _Rig, command: str, share: float) -> None:
    rig.prepare(command)
    before = rig.refs()
    status = rig.run(*rig.arguments(command), after=share * rig.took[command])
    rig.died[command] += status != 0
    after = rig.check()
    others = {name: snapshot for name, snapshot in before.items() if name != "work:latest"}
    assert {name: after[name] for name in others} == others
    if command == "push":
        assert status != 0 or after["work:latest"] != before["work:latest"]
    else:
        assert after == before
    # The next one finishes, and what it says it did is done.
    rig.run(*rig.arguments(command))
    final = rig.check()
    assert {name: final[name] for name in others} == others
    if command == "push":
        rig.read_back("work", rig.work)
        if after["work:latest"] != before["work:latest"]:
            # The ref had moved before the kill: there was nothing left to do.
            assert final == after


@contextmanager
def _rig(tmp_path: Path, url: str, more: dict[str, str]) -> Iterator[_Rig]:
    home = tmp_path / "home"
    home.mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OPENBLAS_NUM_THREADS": "1",  # the template must not have threads
        "ENVSTORE_URL": url,
        "ENVSTORE_NODE_SOCKET": str(tmp_path / "node.sock"),
        **more,
    }
    with Template(env) as template:
        rig = _Rig(tmp_path, url, env, template, random.Random(f"{SEED} {url[:2]}"))
        try:
            yield rig
        finally:
            rig.close()


def _run_all(rig: _Rig, kills: int) -> None:
    old = rig.push(rig.root / "old", "old")
    for command in COMMANDS:  # and measure how long they take
        rig.prepare(command)
        rig.run(*rig.arguments(command))
    # Spread over the whole of each kind of run, and a little beyond.
    for at in range(kills):
        command = COMMANDS[at % len(COMMANDS)]
        share = (at // len(COMMANDS) + rig.rng.random()) / max(1, kills // len(COMMANDS)) * 1.02
        _kill_and_judge(rig, command, share)
    sys.stdout.write(f"seed {SEED}: {kills} kills, of which hit: {dict(rig.died)}; {rig.took}\n")
    assert rig.died.total() >= kills // 2
    rig.read_back("old", rig.root / "old")
    assert rig.manifest(rig.refs()["old:latest"]) == old
    # Nothing is left of all that died, once what it had declared is not kept any more.
    for name in list(list_refs(rig.repository.objects)):
        rig.repository.objects.delete(name.key)
    rig.run("gc", "--grace", "0s")
    for info in list(rig.repository.objects.list("sessions/")):
        rig.repository.objects.delete(info.key)
    rig.run("gc", "--grace", "0s")
    left = {info.key.partition("/")[0] for info in rig.repository.objects.list("")}
    assert left <= {"envstore.json", "gc", "probe"}


@pytest.mark.timeout(120 + 10 * KILLS)
def test_killed_on_a_disk(tmp_path: Path) -> None:
    with _rig(tmp_path, f"file://{tmp_path}/store", {}) as rig:
        _run_all(rig, KILLS // 2)


@pytest.mark.timeout(120 + 10 * KILLS)
def test_killed_on_s3(tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url(s3_server.new_bucket(), "store")
    with _rig(tmp_path, url, s3_server.env) as rig:
        _run_all(rig, KILLS // 2)
