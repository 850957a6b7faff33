from __future__ import annotations

import json
import platform
import sys
import zipfile
from pathlib import Path

import pytest

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import PypiPackage
from envstore.resolver.pypi import solve
from envstore.resolver.request import PypiRequest
from envstore.resolver.stubs import Provided
from envstore.resolver.target import make_target
from tests.channel.pypi import Index
from tests.channel.server import serving
from tests.channel.wheelmaking import make_sdist, make_wheel
from tests.resolver.surroundings import _no_settings, cache, pip

__all__ = ["_no_settings", "cache"]


def run(
    request: PypiRequest, cache: Path, *, glibc: str = "2.36", where: str = "", **options: object
) -> dict[str, PypiPackage]:
    found = solve(
        request,
        make_target(where or None, glibc=glibc),
        platform.python_version(),
        interpreter=Path(sys.executable),
        cache=cache,
        **options,  # type: ignore[arg-type]
    )
    return {package.name: package for package in found}


def links(index: Index) -> tuple[str, ...]:
    return (index.find_links.as_uri(),)


def test_wheels_of_an_index_are_locked_with_all_that_is_known(
    wheel_index: Index, cache: Path
) -> None:
    with serving(wheel_index.path) as server:
        found = run(pip("Tool_Pkg[fancy] >=1", index=f"{server.url}/simple/"), cache)
        wheel = wheel_index.file("tool-pkg", "2.0")
        tool = found["tool-pkg"]
        assert tool.url == f"{server.url}/files/{wheel.name}"
        assert tool.filename == wheel.name
        # Metadata was enough: no wheel was fetched.
        assert not server.paths(".whl")
    assert set(found) == {"leaf", "schemes", "tool-pkg"}
    assert tool.version == "2.0"
    assert len(tool.sha256) == 64
    assert tool.requested
    assert not found["leaf"].requested
    assert tool.extras == ("fancy",)
    assert "leaf>=1.1" in tool.requires
    assert not any("nothing" in line for line in tool.requires)
    assert list(found) == sorted(found)


def test_directories_of_wheels_need_no_index(wheel_index: Index, cache: Path) -> None:
    found = run(pip("tool-pkg <2", links=links(wheel_index)), cache)
    wheel = wheel_index.file("tool-pkg", "1.0")
    assert found["tool-pkg"].url == wheel.as_uri()
    assert found["tool-pkg"].size == wheel.stat().st_size
    assert found["leaf"].version == "1.1"


def test_the_wheel_that_fits_best_is_taken(tmp_path: Path, cache: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for suffix in ("py3-none-any", f"{tag}-{tag}-manylinux_2_17_x86_64", "cp38-cp38-win_amd64"):
        make_wheel(tmp_path, "native", "1.0", {"native.py": ""}, tag=suffix)
    request = pip("native", links=(tmp_path.as_uri(),))
    assert "manylinux_2_17" in run(request, cache, where="linux-64")["native"].filename
    assert "none-any" in run(request, cache, where="linux-aarch64")["native"].filename


def test_another_target_gets_its_own_wheels(tmp_path: Path, cache: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for version, glibc in (("1.0", 17), ("2.0", 35)):
        suffix = f"{tag}-{tag}-manylinux_2_{glibc}_x86_64"
        make_wheel(tmp_path, "native", version, {"native.py": ""}, tag=suffix)
    request = pip("native", links=(tmp_path.as_uri(),))
    assert run(request, cache, where="linux-64", glibc="2.36")["native"].version == "2.0"
    assert run(request, cache, where="linux-64", glibc="2.28")["native"].version == "1.0"
    with pytest.raises(UnsatisfiableError, match="platform tag"):
        run(request, cache, where="linux-aarch64")


@pytest.mark.parametrize(
    ("lines", "error", "reason"),
    [
        (["wants-missing"], UnsatisfiableError, "not-in-the-index"),
        (["leaf >=7"], UnsatisfiableError, "leaf>=7"),
        (["wants-old-leaf", "wants-new-leaf"], UnsatisfiableError, "leaf==1.0"),
        (["too-new"], UnsatisfiableError, "3.99"),
        (["yanked-pkg >=1.1"], UnsatisfiableError, "yanked"),
        (["leaf >="], UsageError, "no requirement"),
        (["leaf @ file:///nowhere/leaf-1.0-py3-none-any.whl"], NotFoundError, "nowhere"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(
    wheel_index: Index, cache: Path, lines: list[str], error: type[EnvstoreError], reason: str
) -> None:
    with serving(wheel_index.path) as server, pytest.raises(error, match=reason) as caught:
        run(pip(*lines, index=f"{server.url}/simple/"), cache)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_yanked_wheels_are_taken_only_if_named(wheel_index: Index, cache: Path) -> None:
    warnings: list[str] = []
    with serving(wheel_index.path) as server:
        index = f"{server.url}/simple/"
        assert run(pip("yanked-pkg", index=index), cache)["yanked-pkg"].version == "1.0"
        assert not warnings
        found = run(pip("yanked-pkg ==1.1", index=index), cache, warnings=warnings)
    assert found["yanked-pkg"].version == "1.1"
    assert any("yanked" in warning for warning in warnings)


def test_constraints_overrides_and_times(wheel_index: Index, cache: Path) -> None:
    with serving(wheel_index.path) as server:
        base = {"default_index": f"{server.url}/simple/"}
        constrained = PypiRequest(("tool-pkg",), ("leaf <1.1",), **base)
        found = run(constrained, cache)
        assert (found["tool-pkg"].version, found["leaf"].version) == ("1.0", "1.0")
        forced = PypiRequest(("tool-pkg ==2.0",), overrides=("leaf ==1.0",), **base)
        assert run(forced, cache)["leaf"].version == "1.0"
        early = run(PypiRequest(("tool-pkg",), **base), cache, exclude_newer="2025-03-01T00:00:00Z")
        assert (early["tool-pkg"].version, early["leaf"].version) == ("1.0", "1.0")


@pytest.mark.parametrize("line", ["-r /etc/passwd", "leaf\n--no-index", "--index-url=x", ""])
def test_nothing_but_requirements_reaches_uv(cache: Path, line: str) -> None:
    for request in (
        PypiRequest((line,)),
        PypiRequest(("leaf",), constraints=(line,)),
        PypiRequest(("leaf",), overrides=(line,)),
    ):
        with pytest.raises(UsageError, match="is no requirement"):
            run(request, cache)


def test_hashes_that_are_asked_for_are_kept_to(wheel_index: Index, cache: Path) -> None:
    place = links(wheel_index)
    sha256 = run(pip("leaf ==1.1", links=place), cache)["leaf"].sha256

    def asked(line: str, *hashes: str, required: bool = True) -> PypiRequest:
        return PypiRequest(
            (line,),
            find_links=place,
            no_index=True,
            require_hashes=required,
            hashes={line: hashes} if hashes else {},
        )

    assert run(asked("leaf ==1.1", f"sha256:{sha256}"), cache)["leaf"].sha256 == sha256
    with pytest.raises(CorruptError, match=r"none of the 1 files of leaf 1\.1"):
        run(asked("leaf ==1.1", "sha256:" + "0" * 64), cache)
    with pytest.raises(UsageError, match=r"none for leaf==1\.1"):
        run(asked("leaf ==1.1"), cache)
    with pytest.raises(UsageError, match="not SHA-256"):
        run(asked("leaf ==1.1", "md5:" + "0" * 32, required=False), cache)
    tool = run(pip("tool-pkg ==1.0", links=place), cache)["tool-pkg"]
    with pytest.raises(UsageError, match=r"none for leaf==1\.1"):
        run(asked("tool-pkg ==1.0", f"sha256:{tool.sha256}"), cache)


def test_a_directory_has_no_hash(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\nversion = "1.0"\n')
    line = f"mine @ {tmp_path.as_uri()}"
    with pytest.raises(UsageError, match=r"there is none for mine \("):
        run(PypiRequest((line,), no_index=True, require_hashes=True), cache)


def test_requirements_that_name_a_file(wheel_index: Index, cache: Path) -> None:
    wheel = wheel_index.file("leaf", "1.0")
    found = run(pip(f"leaf @ {wheel.as_uri()}", links=links(wheel_index)), cache)
    assert found["leaf"].direct == wheel.as_uri()
    assert found["leaf"].url == wheel.as_uri()
    assert found["leaf"].build is None
    with serving(wheel_index.path) as server:
        url = f"{server.url}/files/{wheel.name}"
        found = run(pip(f"leaf @ {url}", links=links(wheel_index)), cache)
        assert found["leaf"].direct == url


def test_sources_are_taken_where_there_is_no_wheel(wheel_index: Index, cache: Path) -> None:
    found = run(pip("from-source", links=links(wheel_index)), cache)
    source = wheel_index.file("from-source", "1.0")
    package = found["from-source"]
    assert (package.url, package.filename, package.sha256) == ("", "", "")
    assert package.build is not None
    assert package.build.source == source.as_uri()
    with pytest.raises(UnsatisfiableError, match="from-source"):
        run(
            PypiRequest(
                ("from-source",),
                find_links=links(wheel_index),
                no_index=True,
                only_binary=(":all:",),
            ),
            cache,
        )


def test_versions_of_an_earlier_lock_stay_unless_named(wheel_index: Index, cache: Path) -> None:
    place = links(wheel_index)
    first = run(pip("tool-pkg", "leaf <1.1", links=place), cache)
    again = run(pip("tool-pkg", "leaf", links=place), cache, keep=list(first.values()))
    assert {name: item.version for name, item in again.items()} == {
        "leaf": "1.0",
        "tool-pkg": "1.0",
    }
    moved = run(pip("tool-pkg", "leaf", links=place), cache, keep=[first["tool-pkg"]])
    assert moved["leaf"].version == "1.1"
    assert moved["tool-pkg"].version == "1.0"


def test_what_is_provided_is_neither_fetched_nor_locked(wheel_index: Index, cache: Path) -> None:
    provided = [Provided("numpy", "1.26.4", "numpy"), Provided("leaf", "1.1", "leaf")]
    with serving(wheel_index.path) as server:
        index = f"{server.url}/simple/"
        found = run(pip("wants-numpy", "tool-pkg", index=index), cache, provided=provided)
        assert set(found) == {"wants-numpy", "tool-pkg"}
        assert found["wants-numpy"].requires == ("numpy>=1.26",)
        with pytest.raises(UnsatisfiableError, match=r"numpy==1\.26\.4\+conda") as caught:
            run(pip("wants-new-numpy", index=index), cache, provided=provided)
    assert "what conda installs" in str(caught.value)


def test_what_is_provided_needs_no_source(tmp_path: Path, cache: Path) -> None:
    make_sdist(tmp_path, "needs-numpy", "1.0", {}, requires=["numpy"])
    place = (tmp_path.as_uri(),)
    provided = [Provided("numpy", "1.26.4", "numpy")]
    for names in ((":all:",), ("numpy", "needs-numpy")):
        request = PypiRequest(("needs-numpy",), find_links=place, no_index=True, no_binary=names)
        assert list(run(request, cache, provided=provided)) == ["needs-numpy"]


def test_an_index_behind_a_password(
    wheel_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(wheel_index.path, user="me", password="hunter2") as server:
        request = pip("tool-pkg", index=f"{server.url}/simple/")
        with pytest.raises(AccessDeniedError, match="HTTP 401") as caught:
            run(request, tmp_path)
        assert "netrc" in str(caught.value)
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
        netrc.chmod(0o600)
        with monkeypatch.context() as patch:
            patch.setenv("NETRC", str(netrc))
            patch.setenv("UV_CACHE_DIR", str(tmp_path / "a"))
            found = run(request, tmp_path)
        with monkeypatch.context() as patch:
            login = {"127.0.0.1": {"BasicHTTP": {"username": "me", "password": "hunter2"}}}
            (tmp_path / "logins.json").write_text(json.dumps(login))
            patch.setenv("RATTLER_AUTH_FILE", str(tmp_path / "logins.json"))
            patch.setenv("UV_CACHE_DIR", str(tmp_path / "b"))
            assert run(request, tmp_path) == found
        with monkeypatch.context() as patch:
            patch.setenv("UV_DEFAULT_INDEX", f"{server.url_as('me', 'hunter2')}/simple/")
            patch.setenv("UV_CACHE_DIR", str(tmp_path / "c"))
            assert run(PypiRequest(("tool-pkg",)), tmp_path) == found
    assert "hunter2" not in repr(found)
    assert found["tool-pkg"].url.startswith(f"{server.url}/files/")


def test_an_index_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(UnavailableError, match="Connection refused"):
        run(pip("leaf", index="http://127.0.0.1:1/simple/"), cache)


def test_a_wheel_that_is_broken(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "leaf-1.0-py3-none-any.whl").write_bytes(b"not a zip archive")
    with pytest.raises(EnvstoreError) as caught:
        run(pip("leaf", links=(tmp_path.as_uri(),)), cache)
    assert "leaf" in str(caught.value)
    assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "leaf-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("leaf.py", "")
    with pytest.raises(EnvstoreError) as caught:
        run(pip("leaf", links=(tmp_path.as_uri(),)), cache)
    assert "\n" not in str(caught.value)
