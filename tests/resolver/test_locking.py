from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import CorruptError, NotFoundError, UsageError
from envstore.resolver.completing import ARCHIVES, Means, complete
from envstore.resolver.lock import Build, LocalPython, Lock
from envstore.resolver.lockfile import encode_lock
from envstore.resolver.locking import Wishes
from envstore.resolver.request import Request
from envstore.resolver.target import make_target
from envstore.resolver.update import Change, changes, resolve_again, same_but_for_tools
from tests.channel.conda import Channel
from tests.locks import conda, full_lock, local_lock, sha256, wheel


def silent(phase: str, done: int, total: int) -> None:
    pass


def means(cache: Path) -> Means:
    return Means(make_target("linux-64"), cache, (), None, [], silent)


def test_what_is_wished_comes_before_what_is_written() -> None:
    request = full_lock().request
    wishes = Wishes(
        channels=("mine",),
        default_index="https://mine.example/simple",
        indexes=("https://more.example/simple",),
        find_links=("file:///more",),
        exclude_newer="2026-06-01T00:00:00Z",
    )
    changed = wishes.change(request)
    assert changed.conda.channels == ("mine", *request.conda.channels)
    assert changed.pypi.default_index == "https://mine.example/simple"
    assert changed.pypi.indexes[0] == "https://more.example/simple"
    assert changed.pypi.find_links[0] == "file:///more"
    assert changed.exclude_newer == "2026-06-01T00:00:00Z"
    assert Wishes().change(request) == request


def test_the_target_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDA_OVERRIDE_CUDA", raising=False)
    lock = Lock("linux-aarch64", (), virtual={"__glibc": "2.17", "__linux": "4.1"})
    assert Wishes().target_again(lock).virtual == lock.virtual
    assert Wishes().target_again(lock).platform == "linux-aarch64"
    found = Wishes(glibc="2.35", cuda="12.4").target_again(lock).virtual
    assert found == {"__glibc": "2.35", "__linux": "4.1", "__cuda": "12.4"}
    # What the specification asked for then is not what it may ask for now.
    asked = replace(lock, request=Request(virtual={"__glibc": "2.17"}))
    assert Wishes().target_again(asked).virtual == {"__linux": "4.1"}
    with_cuda = replace(lock, virtual={"__cuda": "12.4"})
    assert Wishes(cuda="none").target_again(with_cuda).virtual == {}


def test_wishes_that_change_nothing_of_a_lock_are_refused() -> None:
    lock = full_lock()
    for wishes in (
        Wishes(channels=("mine",)),
        Wishes(exclude_newer="2026-01-01T00:00:00Z"),
        Wishes(indexes=("https://a.example",)),
        Wishes(platform="linux-aarch64"),
        Wishes(glibc="2.28"),
        Wishes(cuda="none"),
        Wishes(python="3.1"),
        Wishes(python="3.12"),
        Wishes(interpreter=Path("/usr/bin/python3")),
    ):
        with pytest.raises(UsageError):
            wishes.refuse_for(lock)
    Wishes(platform="linux-64", python="3.11").refuse_for(lock)
    Wishes(python="3.11.7", glibc="2.28").refuse_for(replace(lock, tools={"uv": "1"}))
    Wishes(interpreter=Path("/usr/bin/python3")).refuse_for(local_lock())
    # The interpreter that it leaves open comes from a channel.
    Wishes(channels=("mine",)).refuse_for(Lock("linux-64", (wheel("six"),)))


def test_changes_are_told_by_name() -> None:
    old = Lock(
        "linux-64",
        (
            conda("a", "1"), conda("b", "1", "h0_0"), conda("gone", "2"), conda("same"),
            wheel("a", "3"), wheel("rebuilt", "1"),
        ),
    )  # fmt: skip
    new = Lock(
        "linux-64",
        (
            conda("a", "1.1"), conda("b", "1", "h1_0"), conda("same"), conda("fresh", "4"),
            wheel("a", "3"), wheel("rebuilt", "1", sha256=sha256("other")),
        ),
    )  # fmt: skip
    was, now = old.pypi()[1].sha256[:12], sha256("other")[:12]
    assert changes(old, new) == (
        Change("conda", "a", "1", "1.1"),
        Change("conda", "b", "1 h0_0", "1 h1_0"),
        Change("conda", "fresh", "", "4"),
        Change("conda", "gone", "2", ""),
        Change("pypi", "rebuilt", f"1 {was}", f"1 {now}"),
    )
    assert changes(new, new) == ()


def test_another_interpreter_is_a_change() -> None:
    old = local_lock()
    python = LocalPython("3.11.9", sha256("p"), "lib/python3.11/site-packages")
    new = replace(old, packages=(python, *old.packages[1:]))
    assert changes(old, new) == (Change("python", "python", "3.11.2", "3.11.9"),)


def test_what_made_a_lock_is_no_difference() -> None:
    lock = full_lock()
    assert same_but_for_tools(lock, replace(lock, tools={}))
    assert not same_but_for_tools(lock, replace(lock, virtual={}))


def test_only_what_is_there_can_be_updated(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothere is not in this environment"):
        resolve_again(full_lock(), ["nothere"], Wishes(), tmp_path, [], progress=silent)
    with pytest.raises(UsageError, match="does not say what was asked for"):
        resolve_again(Lock("linux-64", (conda("a"),)), [], Wishes(), tmp_path, [], progress=silent)


def test_a_complete_lock_costs_nothing(tmp_path: Path) -> None:
    lock = full_lock()
    assert complete(lock, means(tmp_path)).lock == lock
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_urls_is_completed_from_the_archives(
    conda_channel: Channel, tmp_path: Path
) -> None:
    names = ("python", "python_abi", "greeting", "hello-pkg", "legacy")
    packages = [conda_channel.package(name) for name in names]
    bare = [
        conda(
            package.about.name,
            package.about.version,
            package.about.build,
            subdir=package.about.subdir,
            url=conda_channel.package_url(name),
            sha256="" if name == "greeting" else package.sha256,
            md5=package.md5,
            size=0,
        )
        for name, package in zip(names, packages, strict=True)
    ]
    found = complete(Lock("linux-64", tuple(bare)), means(tmp_path)).lock
    assert [item.sha256 for item in found.conda()] == [package.sha256 for package in packages]
    assert [item.size for item in found.conda()] == [package.size for package in packages]
    for item, package in zip(found.conda(), packages, strict=True):
        assert item.depends == tuple(package.about.depends)
    assert {item.name: item.noarch for item in found.conda()}["hello-pkg"] == "python"
    assert found.virtual["__glibc"]
    assert "envstore" in found.tools
    encode_lock(found)
    # What was fetched stays for the push, which finds it by its digest.
    kept = {path.name.partition(".")[0] for path in (tmp_path / ARCHIVES).iterdir()}
    assert kept >= {package.sha256 for package in packages}


def test_an_archive_that_is_another_package_is_refused(
    conda_channel: Channel, tmp_path: Path
) -> None:
    there = conda_channel.package("settings")
    copy = tmp_path / "linux-64" / "other-1.0-0.conda"
    copy.parent.mkdir()
    copy.write_bytes(there.path.read_bytes())
    lying = conda("other", "1.0", "0", url=copy.as_uri(), sha256="", md5=there.md5, size=0)
    with pytest.raises(CorruptError, match=r"other-1\.0-0\.conda holds settings"):
        complete(Lock("linux-64", (lying,)), means(tmp_path / "cache"))


def test_one_archive_may_lie_at_two_places(conda_channel: Channel, tmp_path: Path) -> None:
    there = conda_channel.package("settings")
    copy = tmp_path / "mirror" / there.about.filename
    copy.parent.mkdir()
    copy.write_bytes(there.path.read_bytes())
    known = {"url": copy.as_uri(), "sha256": there.sha256, "size": 0}
    one = conda("settings", "1.0", there.about.build, **known)
    two = replace(one, name="other", url=conda_channel.package_url("settings"))
    with pytest.raises(CorruptError, match="holds settings"):
        complete(Lock("linux-64", (one, two)), means(tmp_path / "cache"))
    assert complete(Lock("linux-64", (one,)), means(tmp_path / "cache")).lock.conda()[0].noarch


def test_a_digest_that_is_wrong_is_refused(conda_channel: Channel, tmp_path: Path) -> None:
    url = conda_channel.package_url("settings")
    lying = conda("settings", url=url, sha256="", md5="0" * 32, size=0)
    with pytest.raises(CorruptError, match="md5"):
        complete(Lock("linux-64", (lying,)), means(tmp_path))


def test_a_wheel_that_was_built_elsewhere_is_not_built_again(tmp_path: Path) -> None:
    python = LocalPython("3.11.2", sha256("p"), "lib/python3.11/site-packages")
    built = wheel("made", url="", build=Build("file:///gone/made-1.0.tar.gz", sha256("m")))
    lock = Lock("linux-64", (python, built), tools={"envstore": "1"})
    found = complete(lock, means(tmp_path))
    assert found.lock == lock
    assert found.local == {}
    # Where it was built it is found again, unless it was damaged.
    path = tmp_path / "built" / "wheels" / built.sha256 / built.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert complete(lock, means(tmp_path)).local == {}
    path.write_bytes(built.filename.encode())
    assert complete(lock, means(tmp_path)).local == {built.sha256: path}
