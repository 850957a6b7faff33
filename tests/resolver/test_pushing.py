"""Pushing locks: each package once, the same bytes everywhere, and nothing half-done."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, NotFoundError
from envstore.resolver import compiler
from envstore.resolver.libraries import AbiError
from envstore.resolver.lock import Lock
from envstore.resolver.postlink import ScriptError
from envstore.resolver.request import Request
from envstore.resolver.resolving import resolve
from envstore.resolver.target import make_target
from tests.channel.conda import Channel
from tests.channel.pypi import Index
from tests.resolver.locks import conda_lock, listed_lock, push
from tests.resolver.surroundings import pip
from tests.stores import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="module")
def lock(conda_channel: Channel, tmp_path_factory: pytest.TempPathFactory) -> Lock:
    cache = tmp_path_factory.mktemp("solving")
    return conda_lock(conda_channel, "python", "hello-pkg", "binprefix", cache=cache)


def _run(prefix: Path, *command: str) -> str:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(prefix / "bin" / command[0]), *command[1:]],
        env=kept, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def test_what_was_pushed_runs_wherever_it_is_pulled_to(
    store: Store, lock: Lock, tmp_path: Path
) -> None:
    done = push(store, lock, tmp_path / "machine")
    assert done.packages == done.new_packages == len(lock.packages)
    assert done.downloaded_bytes == sum(package.size for package in lock.conda())
    prefix = tmp_path / "somewhere else"
    store.pull(prefix, "env")
    assert _run(prefix, "python", "-c", "import sys; print(sys.prefix)") == f"{prefix}\n"
    assert str(prefix) in _run(prefix, "hello", "you")
    assert _run(prefix, "bpshow").startswith(f"{prefix}\n")
    caches = [path for path in prefix.rglob("*.pyc") if "__pycache__" in path.parts]
    assert len(caches) > 100
    assert store.verify().problems == []
    assert list((tmp_path / "machine" / "archives").iterdir()) == []


def test_the_same_lock_gives_the_same_manifest_anywhere(lock: Lock, tmp_path: Path) -> None:
    manifests = set()
    for name in ("one", "the other"):
        with Store(tmp_path / name / "store") as store:
            done = push(store, lock, tmp_path / name / "machine")
            manifests.add(done.result.manifest)
    assert len(manifests) == 1


def test_an_interpreter_in_the_store_compiles_where_none_is_of_its_version(
    wheel_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = pip("leaf", links=(str(wheel_index.find_links),))
    lock = resolve(Request(pypi=wheels), make_target(), cache=tmp_path / "solving")
    bare = dataclasses.replace(lock, packages=lock.packages[:1])
    manifests = set()
    for name in ("here", "elsewhere"):
        with Store(tmp_path / name / "store") as store:
            push(store, bare, tmp_path / "machine", "bare")
            if name == "elsewhere":
                monkeypatch.setattr(compiler.platform, "python_version", lambda: "3.99.0")
                monkeypatch.setattr(compiler, "base_interpreter", lambda: Path("/nothing"))
            done = push(store, lock, tmp_path / name / "machine")
            assert done.new_packages == 1
            assert not any("bytecode" in warning for warning in done.result.warnings)
            manifests.add(done.result.manifest)
            assert store.verify().problems == []
            assert list((tmp_path / name / "machine" / "archives").iterdir()) == []
    assert len(manifests) == 1


def test_a_stored_package_under_the_key_of_another_is_stored_again(
    store: Store, lock: Lock, tmp_path: Path
) -> None:
    first = push(store, lock, tmp_path / "machine")
    keys = store.object_keys("packages/")
    objects = store.repository.objects
    everything = [objects.get(key) for key in keys]
    for key, data in zip(keys, [*everything[1:], everything[0]], strict=True):
        objects.put(key, data)
    again = push(store, lock, tmp_path / "machine", "other")
    assert again.new_packages == len(keys)
    assert again.result.manifest == first.result.manifest
    assert all("of another" in warning for warning in again.result.warnings[: len(keys)])


@pytest.mark.parametrize("said", ["sha256", "version", "build"])
def test_a_lock_that_lies_is_refused_whatever_is_stored(
    store: Store, conda_channel: Channel, tmp_path: Path, said: str
) -> None:
    lock = listed_lock(conda_channel, "greeting", "settings")
    push(store, lock, tmp_path / "machine")
    true, other = lock.conda()
    lie = {"sha256": {"sha256": other.sha256, "url": other.url, "size": other.size}}
    package = dataclasses.replace(true, **lie.get(said, {said: "9"}))
    for packages in ((package, other), (other, package), (package,)):
        with pytest.raises(EnvstoreError, match=r"instead of|archive of another package"):
            push(store, dataclasses.replace(lock, packages=packages), tmp_path / "machine", "lie")


def test_stored_packages_are_not_fetched_again(store: Store, lock: Lock, tmp_path: Path) -> None:
    first = push(store, lock, tmp_path / "first")
    phases: list[str] = []
    second = push(store, lock, tmp_path / "second", "other", phases=phases)
    assert second.new_packages == second.downloaded_bytes == 0
    assert second.result.manifest == first.result.manifest
    assert not {"download", "unpack", "read"} & set(phases)
    third = push(store, lock, tmp_path / "second", "other")
    assert third.result.unchanged
    assert third.result.uploaded_bytes == 0


def test_only_a_changed_package_is_fetched(
    store: Store, conda_channel: Channel, tmp_path: Path
) -> None:
    cache = tmp_path / "solving"
    old = conda_lock(conda_channel, "python", "hello-pkg ==1.0", cache=cache)
    new = conda_lock(conda_channel, "python", "hello-pkg", "binprefix", cache=cache)
    push(store, old, tmp_path / "machine")
    done = push(store, new, tmp_path / "machine")
    changed = [package for package in new.conda() if package not in old.packages]
    assert done.new_packages == len(changed) < len(new.packages)
    assert done.downloaded_bytes == sum(package.size for package in changed)


def test_a_lost_pack_is_made_again_from_the_archives(
    store: Store, lock: Lock, tmp_path: Path
) -> None:
    first = push(store, lock, tmp_path / "first")
    for key in store.object_keys("packs/"):
        store.repository.objects.delete(key)
    again = push(store, lock, tmp_path / "second", "other")
    assert again.new_packages == len(lock.packages)
    assert again.result.manifest == first.result.manifest
    assert store.verify_targets([("other", again.result.snapshot)]).problems == []


def test_a_damaged_package_object_is_made_again(store: Store, lock: Lock, tmp_path: Path) -> None:
    push(store, lock, tmp_path / "first")
    key = store.object_keys("packages/")[0]
    store.repository.objects.put(key, b"not that")
    again = push(store, lock, tmp_path / "second", "other")
    assert again.new_packages == 1
    assert any(key in warning for warning in again.result.warnings)
    assert store.verify().problems == []


def test_what_is_kept_of_a_push_that_failed(store: Store, lock: Lock, tmp_path: Path) -> None:
    """An archive that is gone fails the push, and moves nothing; then it goes on from there."""
    gone = dataclasses.replace(
        lock.conda()[-1], url=lock.conda()[-1].url.replace("/linux-64/", "/linux-00/")
    )
    broken = dataclasses.replace(lock, packages=(*lock.packages[:-1], gone))
    with pytest.raises(NotFoundError, match=lock.conda()[-1].name):
        push(store, broken, tmp_path / "machine")
    assert store.targets() == []
    assert store.object_keys("packages/") == []
    kept = list((tmp_path / "machine" / "archives").iterdir())
    assert not any(path.is_dir() for path in kept)
    push(store, lock, tmp_path / "machine")
    assert store.verify().problems == []


@pytest.mark.parametrize("name", ["wrong-sha256", "escaping", "truncated", "paths-wrong-sha256"])
def test_a_broken_archive_changes_nothing(
    store: Store, broken_channel: Channel, tmp_path: Path, name: str
) -> None:
    with pytest.raises(EnvstoreError, match=name):
        push(store, listed_lock(broken_channel, "sound", name), tmp_path / "machine")
    assert store.targets() == []
    assert store.object_keys("packages/") == []


def test_clobbered_paths_are_decided_by_the_order_of_the_lock(
    store: Store, conda_channel: Channel, tmp_path: Path
) -> None:
    for first, last in (("clobber-a", "clobber-b"), ("clobber-b", "clobber-a")):
        done = push(store, listed_lock(conda_channel, first, last), tmp_path / "machine", last)
        (warning,) = done.result.warnings
        assert warning.startswith("share/clobber/which.txt is in")
        assert warning.index(first) < warning.index(last)
        store.pull(tmp_path / last, last)
        where = tmp_path / last / "share/clobber"
        assert (where / "which.txt").read_text() == f"{last[-1]}\n"
        assert sorted(path.name for path in where.iterdir()) == ["a.txt", "b.txt", "which.txt"]


def test_post_link_scripts_run_once_and_their_changes_are_relocated(
    store: Store, conda_channel: Channel, tmp_path: Path
) -> None:
    lock = listed_lock(conda_channel, "post-link")
    done = push(store, lock, tmp_path / "machine")
    assert any("post-link scripts were run" in warning for warning in done.result.warnings)
    for name in ("here", "there, in a longer path"):
        store.pull(tmp_path / name, "env")
        made = tmp_path / name / "share/post-link"
        assert (made / "prefix.txt").read_text() == f"{tmp_path / name}\n"
        assert (made / "made.txt").read_text().startswith("post-link ")
    again = push(store, lock, tmp_path / "another", "other")
    assert again.result.manifest == done.result.manifest
    without = push(store, lock, tmp_path / "machine", "without", run_scripts=False)
    assert without.result.files == done.result.files - 2
    assert store.verify().problems == []


def test_a_post_link_script_that_fails_fails_the_push(
    store: Store, conda_channel: Channel, tmp_path: Path
) -> None:
    with pytest.raises(ScriptError, match=r"post-link-fails.*status 3: cannot do it"):
        push(store, listed_lock(conda_channel, "post-link-fails"), tmp_path / "machine")
    assert store.targets() == []


def test_libraries_that_do_not_fit_stop_a_push(store: Store, lock: Lock, tmp_path: Path) -> None:
    old = dataclasses.replace(lock, virtual={**lock.virtual, "__glibc": "2.5"})
    with pytest.raises(AbiError, match="GLIBC_2"):
        push(store, old, tmp_path / "machine")
    assert store.targets() == []
    done = push(store, old, tmp_path / "machine", check_abi=False)
    assert done.new_packages == 0
