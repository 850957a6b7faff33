"""A real start of a real small environment: recorded, followed, repacked, and inherited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.cli.run import surroundings
from envstore.errors import NotFoundError
from envstore.fuse.recorder import read_recording
from envstore.fuse.run import Ran, run
from envstore.resolver.prefix import PrefixSource
from envstore.store.profiles import Profile, load_profile, new_profile, save_profile
from envstore.store.repack import repack
from tests.resolver.installs import SITE, TAG, compile_all, empty_environment, module
from tests.stores import Store
from tests.trees import noise

PACKAGES = 6
_CODE = "import " + ", ".join(f"package{number}.wanted" for number in reversed(range(PACKAGES)))


class Site:
    """A virtual environment of packages of which a start imports two modules each."""

    def __init__(self, base: Path) -> None:
        self.env = empty_environment(base / "env")
        for number in range(PACKAGES):
            module(self.env, f"package{number}/__init__", f"NUMBER = {number}\n")
            module(self.env, f"package{number}/wanted", f"from . import NUMBER\nX = {number}\n")
            for filler in range(4):
                # Bytecode that hardly compresses, so that the packages' frames lie apart.
                data = noise(f"{number} {filler}", 500_000).hex()
                module(self.env, f"package{number}/other{filler}", f"DATA = {data!r}\n")
        compile_all(self.env)
        self.store = Store(base / "store")
        self.push()

    def push(self) -> None:
        self.store.push(PrefixSource(self.env), "env")

    def start(self, *, record: bool = False) -> Ran:
        command = ["python", "-I", "-c", _CODE]
        ran = run(self.store.url, "env", command, surroundings("env"), record=record)
        assert ran.status == 0
        return ran

    def record(self) -> Profile:
        stats = self.start(record=True).stats
        assert stats is not None
        recorded = new_profile(read_recording(stats["recording"]), ["python"])
        objects = self.store.repository.objects
        return save_profile(objects, self.store.snapshot("env").manifest, "start", recorded)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "cache"))
    made = Site(tmp_path)
    yield made
    made.store.close()


def _cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / name))


def _fetched(ran: Ran) -> tuple[int, int]:
    assert ran.stats is not None
    return ran.stats["fetched"]["requests"], ran.stats["fetched"]["bytes"]


def test_a_start_and_its_profile(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = site.record()
    paths = [item.path.decode() for item in recorded.ranges]
    wanted = [f"{SITE}/package{number}/__pycache__/wanted.{TAG}.pyc" for number in range(PACKAGES)]
    assert [path for path in paths if path in wanted] == wanted[::-1]
    assert not any("other" in path for path in paths)
    assert "pyvenv.cfg" in paths
    # Whatever the cache holds, a recording sees the same.
    again = site.record()
    assert [item.path for item in again.ranges] == [item.path for item in recorded.ranges]
    assert all(item.seen == 2 for item in again.ranges)
    before = site.store.snapshot("env")
    done = repack(site.store.repository, site.store.repository.resolve("env"))
    assert done.after.requests == 1 < done.before.requests
    assert site.store.snapshot("env") == before
    _cold(monkeypatch, tmp_path, "repacked")
    requests, size = _fetched(site.start())
    # One for the tree's description, one for the profile, and at most one that came before it.
    assert requests <= 3
    assert size < done.before.bytes
    site.store.assert_sound()


def test_a_push_on_top_inherits(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.record()
    module(site.env, "package3/wanted", "from . import NUMBER\nX = 'changed'\n")
    site.push()
    _cold(monkeypatch, tmp_path, "inherited")
    ran = site.start()
    manifest = site.store.snapshot("env").manifest
    assert site.store.object_keys(f"profiles/{manifest.hex()}") == []
    assert ran.stats is not None
    # What is read was fetched ahead, the changed file too, for its path is as it was.
    assert ran.stats["prefetch"]["used_frames"] >= PACKAGES
    with pytest.raises(NotFoundError, match="no profile"):
        load_profile(site.store.repository.objects, manifest, "start")
