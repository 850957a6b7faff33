"""Environments of packages, mounted: the bytes that rattler installs, and programs that run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.fuse.background import start_mount
from envstore.fuse.keeping import MountRequest
from envstore.fuse.mount import unmount
from envstore.resolver.lock import Lock
from tests.channel.conda import Channel
from tests.resolver.locks import conda_lock, push
from tests.resolver.test_relocated_installs import PREFIXES, install_for
from tests.stores import Store

_NAMES = ["python", "hello-pkg", "binprefix", "shortprefix", "legacy", "settings"]


@pytest.fixture(scope="module")
def lock(conda_channel: Channel, tmp_path_factory: pytest.TempPathFactory) -> Lock:
    return conda_lock(conda_channel, *_NAMES, cache=tmp_path_factory.mktemp("solving"))


@pytest.fixture(scope="module")
def store(
    conda_channel: Channel, lock: Lock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """A store of ``env``, and of ``wide`` without what has room for 80 characters only."""
    base = tmp_path_factory.mktemp("pushed")
    wide = conda_lock(
        conda_channel, *(name for name in _NAMES if name != "shortprefix"), cache=base / "cache"
    )
    with Store(base / "store") as opened:
        push(opened, lock, base / "machine", "env")
        push(opened, wide, base / "machine", "wide")
        yield opened


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Mount points to be; what is mounted there is unmounted afterwards."""
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made: list[Path] = []
    yield made
    for place in made:
        if os.path.ismount(place):
            unmount(place)


def _mount(store: Store, ref: str, place: Path, places: list[Path], prefix: str = "") -> Path:
    place.mkdir()
    places.append(place)
    start_mount(MountRequest(store.url, ref, str(place), prefix=prefix), "off")
    return place


@pytest.mark.parametrize("prefix", PREFIXES, ids=map(len, PREFIXES))
def test_every_file_with_a_prefix_is_what_rattler_installs(
    conda_channel: Channel, store: Store, tmp_path: Path, places: list[Path], prefix: str
) -> None:
    ref, names = ("env", _NAMES) if len(prefix) <= 80 else ("wide", _NAMES[:3] + _NAMES[4:])
    packages = [conda_channel.package(name) for name in [*names, "greeting"]]
    installed = install_for(packages, tmp_path, prefix)
    place = _mount(store, ref, tmp_path / "place", places, prefix)
    compared = 0
    for facts in sorted((installed / "conda-meta").glob("*.json")):
        for entry in json.loads(facts.read_bytes())["paths_data"]["paths"]:
            path = entry["_path"]
            entry_point = entry["path_type"] == "unix_python_entry_point"
            if entry.get("prefix_placeholder") or entry_point:
                wanted = (installed / path).read_bytes()
                assert (place / path).stat().st_size == len(wanted), path
                assert (place / path).read_bytes() == wanted, path
                compared += 1
            if entry.get("prefix_placeholder"):
                digest = hashlib.sha256((place / path).read_bytes()).hexdigest()
                assert digest == entry["sha256_in_prefix"], path
    assert compared > 8


def test_programs_run_at_two_paths_at_once(
    store: Store, tmp_path: Path, places: list[Path]
) -> None:
    # The second is longer than a first line may be.
    (tmp_path / ("l" * 100)).mkdir()
    one, two = tmp_path / "one", tmp_path / ("l" * 100) / "two"
    for place in (one, two):
        _mount(store, "wide", place, places)
    for place in (one, two, one):
        assert _run(place, "python", "-c", "import sys; print(sys.prefix)") == f"{place}\n"
        assert str(place) in _run(place, "hello", "you")
        assert _run(place, "bpshow").startswith(f"{place}\n")
    assert len((two / "bin/hello").read_bytes()) > len((one / "bin/hello").read_bytes())


def test_a_path_without_room_names_the_package(
    store: Store, tmp_path: Path, places: list[Path]
) -> None:
    with pytest.raises(UsageError, match=r"shortprefix-1\.0\S* has room for 80 only"):
        _mount(store, "env", tmp_path / ("x" * 81), places)
    with pytest.raises(UsageError, match=r"shortprefix-1\.0\S* has room for 80 only"):
        store.pull(tmp_path / ("y" * 81), "env")
    assert not (tmp_path / ("y" * 81)).exists()


def _run(prefix: Path, *command: str) -> str:
    done = subprocess.run(
        [str(prefix / "bin" / command[0]), *command[1:]],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout
