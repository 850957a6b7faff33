from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.errors import EnvstoreError, UsageError
from envstore.resolver import resolving
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, PypiPackage
from envstore.resolver.request import CondaRequest, PypiRequest, Request, SourceFile
from envstore.resolver.resolving import resolve
from envstore.resolver.target import Target, make_target
from tests.channel.conda import Channel, build_channel, write_repodata
from tests.channel.content import GENERIC
from tests.channel.packing import About, Package
from tests.channel.pypi import Index
from tests.channel.server import serving
from tests.channel.wheelhouse import locked_version
from tests.resolver.surroundings import _no_settings, cache, conda, pip, versions

__all__ = ["_no_settings", "cache"]

VERSION = platform.python_version()
TARGET = make_target()


def run(request: Request, cache: Path, target: Target = TARGET, **options: object) -> Lock:
    return resolve(request, target, cache=cache, **options)  # type: ignore[arg-type]


def links(index: Index) -> tuple[str, ...]:
    return (index.find_links.as_uri(),)


def test_pip_around_what_conda_provides(
    numpy_channel: Channel, real_index: Index, cache: Path
) -> None:
    with serving(real_index.path) as server:
        request = Request(
            conda=CondaRequest(("python", "numpy"), (numpy_channel.url,)),
            pypi=pip("pandas", "scikit-learn", "click", index=f"{server.url}/simple/"),
        )
        lock = run(request, cache)
        assert run(request, cache) == lock
        assert not [path for path in server.paths() if "numpy-" in path]
    found = {type(item): set[str]() for item in lock.packages}
    for item in (*lock.conda(), *lock.pypi()):
        found[type(item)].add(item.name)
    assert {"python", "numpy"} <= found[CondaPackage]
    assert {"pandas", "scikit-learn", "scipy", "click"} <= found[PypiPackage]
    assert "numpy" not in found[PypiPackage]
    pandas = next(item for item in lock.pypi() if item.name == "pandas")
    assert any(line.startswith("numpy>=") for line in pandas.requires)
    assert not any("+conda" in line for line in pandas.requires)
    assert lock.tools.keys() == {"envstore", "py-rattler", "uv"}
    kinds = [isinstance(item, PypiPackage) for item in lock.packages]
    assert kinds == sorted(kinds)


def test_pip_that_wants_another_version_than_conda_gave(
    numpy_channel: Channel, wheel_index: Index, cache: Path
) -> None:
    request = Request(
        conda=CondaRequest(("numpy",), (numpy_channel.url,)),
        pypi=pip("wants-new-numpy", links=links(wheel_index)),
    )
    wanted = rf"numpy==?>?.*{locked_version('numpy')}\+conda"
    with pytest.raises(UnsatisfiableError, match=wanted) as caught:
        run(request, cache)
    assert "ask conda for another version" in str(caught.value)


def test_without_channels_the_interpreter_is_this_one(wheel_index: Index, cache: Path) -> None:
    lock = run(Request(pypi=pip("tool-pkg", links=links(wheel_index))), cache)
    python = lock.packages[0]
    assert isinstance(python, LocalPython)
    assert python.version == VERSION
    assert versions(lock) == {"python": VERSION, "leaf": "1.1", "tool-pkg": "2.0"}
    assert lock.tools.keys() == {"envstore", "uv"}
    assert lock.virtual == TARGET.virtual


def test_rattler_is_not_even_imported_without_conda(wheel_index: Index, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from envstore.resolver.resolving import resolve\n"
        "from envstore.resolver.request import PypiRequest, Request\n"
        "from envstore.resolver.target import make_target\n"
        "request = Request(pypi=PypiRequest(('leaf',), find_links=(sys.argv[1],), no_index=True))\n"
        "lock = resolve(request, make_target(), cache=Path(sys.argv[2]))\n"
        "assert lock.pypi()\n"
        "assert 'rattler' not in sys.modules and 'yaml' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, *links(wheel_index), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)


def test_an_interpreter_of_a_channel_where_one_is_named(
    conda_channel: Channel, wheel_index: Index, cache: Path
) -> None:
    wheels = pip("leaf", links=links(wheel_index))
    request = Request(conda=CondaRequest((), (conda_channel.url,)), pypi=wheels)
    lock = run(request, cache)
    assert [item.name for item in lock.conda()] == ["python"]
    assert lock.local_python() is None
    local = run(request, cache, python_from="local")
    assert local.local_python() is not None
    assert not local.conda()
    named = run(request, cache, python=Path(sys.executable))
    assert named.local_python() == local.local_python()


def test_a_channel_that_is_gone_is_no_obstacle(
    wheel_index: Index, tmp_path: Path, cache: Path
) -> None:
    channels = ((tmp_path / "nothing").as_uri(),)
    request = Request(conda=CondaRequest((), channels), pypi=pip("leaf", links=links(wheel_index)))
    warnings: list[str] = []
    lock = run(request, cache, warnings=warnings)
    assert lock.local_python() is not None
    assert "the interpreter comes from this machine" in warnings[0]
    with pytest.raises(EnvstoreError, match="nothing"):
        run(request, cache, python_from="conda")


def test_the_interpreter_is_one_that_is_asked_for(
    conda_channel: Channel, wheel_index: Index, cache: Path
) -> None:
    wheels = pip("leaf", links=links(wheel_index))
    local = Request(python=">=3.99", pypi=wheels)
    with pytest.raises(UnsatisfiableError, match=rf"is Python {VERSION}, and python>=3\.99"):
        run(local, cache)
    remote = replace(local, conda=CondaRequest(("greeting",), (conda_channel.url,)))
    with pytest.raises(UnsatisfiableError, match=r"python >=3\.99"):
        run(remote, cache)
    minor = VERSION.rpartition(".")[0]
    fitting = replace(remote, python=f"=={minor}.*,!={minor}.99")
    assert versions(run(fitting, cache))["python"] == VERSION
    with pytest.raises(UsageError, match="no set of Python versions"):
        run(replace(remote, python="three"), cache)


def test_a_program_and_conda_packages_contradict_each_other(
    conda_channel: Channel, cache: Path
) -> None:
    request = conda("greeting", channels=(conda_channel.url,))
    with pytest.raises(UsageError, match="the interpreter comes from conda"):
        run(request, cache, python=Path(sys.executable))


def test_conda_alone_needs_no_python(conda_channel: Channel, cache: Path) -> None:
    lock = run(conda("greeting", channels=(conda_channel.url,)), cache)
    assert versions(lock) == {"greeting": "2.0"}
    assert lock.tools.keys() == {"envstore", "py-rattler"}


def test_nothing_asked_for_is_nothing_found(cache: Path) -> None:
    with pytest.raises(UsageError, match="asks for nothing"):
        run(Request(), cache)


def test_what_the_request_says_besides_is_kept(conda_channel: Channel, cache: Path) -> None:
    request = replace(
        conda("needs-cuda", channels=(conda_channel.url,)),
        variables={"A": "1"},
        virtual={"__cuda": "12.4"},
        sources=(SourceFile("environment.yml", "ab" * 32),),
        platforms=(TARGET.platform,),
    )
    lock = run(request, cache)
    assert lock.variables == {"A": "1"}
    assert lock.virtual["__cuda"] == "12.4"
    assert lock.sources == request.sources
    assert lock.request == request
    assert lock.platform == TARGET.platform
    with pytest.raises(UnsatisfiableError, match="__cuda"):
        run(request, cache, make_target(cuda="11.8"))
    with pytest.raises(UsageError, match="is for linux-s390x"):
        run(replace(request, platforms=("linux-s390x",)), cache)


def test_wheels_for_another_platform_around_its_conda_packages(
    tmp_path: Path, wheel_index: Index, cache: Path
) -> None:
    about = About("python", "3.12.4", "0_cpython", subdir="linux-aarch64")
    channel = write_repodata(
        tmp_path / "channel", [Package(about, tmp_path / about.filename, "ab" * 32, "cd" * 16, 7)]
    )
    request = Request(
        conda=CondaRequest(("python",), (channel.url,)),
        pypi=pip("leaf", "native-pkg", links=links(wheel_index)),
    )
    target = make_target("linux-aarch64")
    leaf = replace(request, pypi=pip("leaf", links=links(wheel_index)))
    assert versions(run(leaf, cache, target)) == {"python": "3.12.4", "leaf": "1.1"}
    with pytest.raises(UnsatisfiableError, match="native-pkg"):
        run(request, cache, target)
    with pytest.raises(UsageError, match="does not run on linux-aarch64"):
        run(Request(pypi=leaf.pypi), cache, target)


def test_wheels_are_chosen_for_the_usual_python_only(
    tmp_path: Path, wheel_index: Index, cache: Path
) -> None:
    about = About("python", "3.13.1", "0_cp313t", **GENERIC)
    channel = write_repodata(
        tmp_path / "channel", [Package(about, tmp_path / about.filename, "ab" * 32, "cd" * 16, 7)]
    )
    request = Request(
        conda=CondaRequest(("python",), (channel.url,)),
        pypi=pip("leaf", links=links(wheel_index)),
    )
    with pytest.raises(UsageError, match="0_cp313t"):
        run(request, cache)


def test_a_free_threaded_interpreter_of_this_machine_is_refused(
    wheel_index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = LocalPython(VERSION, "ab" * 32, "lib/python3.13t/site-packages")
    monkeypatch.setattr(resolving, "described", lambda program, directory: found)
    with pytest.raises(UsageError, match="free-threaded"):
        run(Request(pypi=pip("leaf", links=links(wheel_index))), cache)


def test_updating_one_package_leaves_the_others(
    conda_channel: Channel, wheel_index: Index, cache: Path
) -> None:
    def asking(*specs: str, lines: tuple[str, ...]) -> Request:
        return Request(
            conda=CondaRequest(specs, (conda_channel.url,)),
            pypi=pip(*lines, links=links(wheel_index)),
        )

    old = run(asking("python", "hello-pkg 1.0.*", "greeting 1.*", lines=("leaf <1.1",)), cache)
    now = asking("python", "hello-pkg", "greeting", lines=("leaf", "tool-pkg"))
    kept = run(now, cache, keep=old.packages)
    assert versions(kept) == {**versions(old), "tool-pkg": "1.0"}
    moving = [item for item in kept.packages if getattr(item, "name", "") != "leaf"]
    moved = versions(run(now, cache, keep=moving))
    assert moved == {**versions(kept), "leaf": "1.1"}
    moving = [item for item in kept.packages if getattr(item, "name", "") != "greeting"]
    assert versions(run(now, cache, keep=moving)) == {**versions(kept), "greeting": "2.0"}
    assert versions(run(now, cache))["hello-pkg"] == "1.1"


def test_the_same_moment_gives_the_same_lock(
    conda_channel: Channel, wheel_index: Index, cache: Path, tmp_path: Path
) -> None:
    # An index says when it first saw a package; this channel's would say that it was today.
    channel = write_repodata(tmp_path / "channel", list(conda_channel.packages.values()))
    with serving(wheel_index.path) as server:
        request = Request(
            conda=CondaRequest(("python", "hello-pkg"), (channel.url,)),
            pypi=pip("tool-pkg", index=f"{server.url}/simple/"),
            exclude_newer="2025-04-15T00:00:00Z",
        )
        lock = run(request, cache)
        assert versions(lock)["tool-pkg"] == "1.0"
        assert versions(lock)["hello-pkg"] == "1.0"
        assert run(request, tmp_path / "another cache") == lock


def test_sources_are_built_and_locked(wheel_index: Index, cache: Path) -> None:
    told: list[str] = []
    request = Request(pypi=pip("from-source", links=links(wheel_index)))
    lock = run(request, cache, progress=lambda phase, done, total: told.append(phase))
    package = next(item for item in lock.pypi() if item.name == "from-source")
    assert package.filename == "from_source-1.0-py3-none-any.whl"
    assert package.build is not None
    assert len(package.build.sha256) == 64
    assert package.requested
    assert "build" in told
    with pytest.raises(EnvstoreError, match="libnowhere") as caught:
        run(Request(pypi=pip("broken-source", links=links(wheel_index))), cache)
    assert "log: " in str(caught.value)


def test_no_login_is_in_a_lock(
    conda_channel: Channel, wheel_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    with (
        serving(conda_channel.path, user="me", password="hunter2") as channel,
        serving(wheel_index.path, user="me", password="hunter2") as index,
    ):
        request = Request(
            conda=CondaRequest(("python",), (channel.url,)),
            pypi=PypiRequest(("tool-pkg", "from-source"), indexes=(f"{index.url}/simple/",)),
        )
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{index.url_as('me', 'hunter2')}/simple/")
        lock = run(request, tmp_path / "cache")
    assert set(versions(lock)) == {"python", "leaf", "tool-pkg", "from-source"}
    assert "hunter2" not in repr(lock)


def test_a_file_of_names_decides_what_conda_provides(
    tmp_path: Path, wheel_index: Index, cache: Path
) -> None:
    channel = build_channel(tmp_path / "channel", ["greeting", "python"])
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"greeting": "leaf"}))
    request = Request(
        conda=CondaRequest(("python", "greeting"), (channel.url,)),
        pypi=pip("tool-pkg", links=links(wheel_index)),
    )
    assert "leaf" in versions(run(request, cache))
    assert "leaf" not in versions(run(request, cache, names=names))
