from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envstore.resolver.lock import (
    Build,
    CondaPackage,
    LocalPython,
    Lock,
    Package,
    PypiPackage,
    PythonFacts,
)
from envstore.resolver.packages.conda_archive import unpack_conda
from envstore.resolver.packages.generated import GeneratedFile, generate
from envstore.resolver.packages.wheel import unpack_wheel
from envstore.resolver.request import CondaRequest, Request
from tests.channel.conda import Channel
from tests.channel.interpreter import MINOR, SITE_PACKAGES, VERSION
from tests.channel.packing import SUBDIR
from tests.channel.wheelmaking import make_wheel
from tests.resolver.packages.layouts import locked, locked_wheel, materialise, served

UV = Path(sys.executable).with_name("uv")
PYTHON = PythonFacts(VERSION, SITE_PACKAGES)
NAMES = ["python", "greeting", "hello-pkg", "binprefix", "settings"]
WHEEL = PypiPackage("thing", "1.0", "thing-1.0-py3-none-any.whl", "", "ab" * 32)
INFO = f"{SITE_PACKAGES}/thing-1.0.dist-info"
LOCAL = LocalPython(VERSION, "cd" * 32, SITE_PACKAGES)

# Read by rattler in a process of its own, which may crash at its exit.
_READ = """
import json, sys, time
from pathlib import Path
from rattler import PrefixRecord
found = {}
for path in sorted(Path(sys.argv[1], "conda-meta").glob("*.json")):
    record = PrefixRecord.from_path(path)
    paths = {str(entry.relative_path): str(entry.path_type) for entry in record.paths_data.paths}
    found[record.name.normalized] = [
        str(record.version), record.url, record.file_name, record.channel, record.requested_specs,
        [str(file) for file in record.files], paths,
    ]
print(json.dumps(found))
sys.stdout.flush()
time.sleep(0.05)
"""


def files_of(lock: Lock, facts: list[dict[str, Any]]) -> dict[str, bytes]:
    made = generate(lock, facts)
    assert all(isinstance(file, GeneratedFile) and not file.relocation for file in made)
    found = {file.path.decode(): file.data for file in made}
    assert len(found) == len(made)
    return found


@pytest.fixture
def environment(conda_channel: Channel, tmp_path: Path) -> tuple[Lock, list[dict[str, Any]]]:
    packages: list[Package] = []
    facts = []
    for name in NAMES:
        package = conda_channel.package(name)
        packages.append(locked(package))
        unpacked = unpack_conda(package.path, tmp_path / name, locked(package), PYTHON)
        facts.append(unpacked.facts)
    specs = (f"python {MINOR}.*", "conda-forge::hello-pkg>=1", "settings")
    request = Request(conda=CondaRequest(specs=specs))
    variables = {"MODE": "fast", "TEXT": 'a "b" é'}
    return Lock(SUBDIR, tuple(packages), variables=variables, request=request), facts


def test_records_are_read_by_rattler(
    environment: tuple[Lock, list[dict[str, Any]]], tmp_path: Path
) -> None:
    lock, facts = environment
    files = files_of(lock, facts)
    for path, data in files.items():
        (tmp_path / "env" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / path).write_bytes(data)
    command = [sys.executable, "-c", _READ, tmp_path / "env"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert sorted(found) == sorted(NAMES)
    for package, known in zip(lock.conda(), facts, strict=True):
        version, url, name, channel, specs, paths, kinds = found[package.name]
        assert (version, url, name) == (package.version, package.url, package.filename)
        assert channel == "https://channel.example"
        assert paths == [path["_path"] for path in known["paths"]]
        assert sorted(kinds) == sorted(paths)
        assert specs == [spec for spec in lock.request.conda.specs if package.name in spec]
    assert "unix_python_entry_point" in files[f"conda-meta/{stem(lock, 'hello-pkg')}.json"].decode()


def stem(lock: Lock, name: str) -> str:
    (package,) = (one for one in lock.conda() if one.name == name)
    return f"{package.name}-{package.version}-{package.build}"


def test_a_record_says_what_the_lock_says(environment: tuple[Lock, list[dict[str, Any]]]) -> None:
    lock, facts = environment
    patched = replace(
        lock.conda()[1], depends=("other >=2",), channel="https://mirror.example/x/",
        md5="ef" * 16, extra={"license": "BSD", "timestamp": 5},
    )  # fmt: skip
    lock = replace(lock, packages=(lock.packages[0], patched, *lock.packages[2:]))
    record = json.loads(files_of(lock, facts)[f"conda-meta/{stem(lock, 'greeting')}.json"])
    assert record["depends"] == ["other >=2"]
    assert record["channel"] == "https://mirror.example/x/"
    assert (record["license"], record["timestamp"]) == ("BSD", 5)
    assert (record["md5"], record["sha256"]) == ("ef" * 16, patched.sha256)
    assert record["link"]["source"] == record["extracted_package_dir"]
    assert not Path(record["extracted_package_dir"]).exists()
    where = {path["_path"]: path for path in record["paths_data"]["paths"]}
    assert where["share/greeting/where.conf"]["file_mode"] == "text"
    assert "requested_spec" not in record
    assert record["requested_specs"] == []


def test_the_environment_is_frozen_and_remembers(
    environment: tuple[Lock, list[dict[str, Any]]],
) -> None:
    lock, facts = environment
    files = files_of(lock, facts)
    assert "envstore push" in json.loads(files["conda-meta/frozen"])["message"]
    state = json.loads(files["conda-meta/state"])
    assert state == {"version": 1, "env_vars": lock.variables}
    history = files["conda-meta/history"].decode().splitlines()
    assert history[0] == "==> 1980-01-02 00:00:00 <=="
    assert f"+https://channel.example/noarch::{stem(lock, 'greeting')}" in history
    (specs,) = (line for line in history if line.startswith("# update specs: "))
    assert ast.literal_eval(specs.partition(": ")[2]) == list(lock.request.conda.specs)
    assert f"lib/python{MINOR}/EXTERNALLY-MANAGED" in files


def test_pip_says_why_it_installs_nothing(tmp_path: Path) -> None:
    import configparser

    files = files_of(Lock(SUBDIR, (LOCAL,)), [{}])
    assert list(files) == [f"lib/python{MINOR}/EXTERNALLY-MANAGED"]
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(files[f"lib/python{MINOR}/EXTERNALLY-MANAGED"].decode())
    assert "envstore push" in parser["externally-managed"]["Error"]


def test_environments_get_only_what_concerns_them(
    environment: tuple[Lock, list[dict[str, Any]]],
) -> None:
    lock, facts = environment
    without_python = replace(lock, packages=lock.packages[1:2], variables={}, request=Request())
    files = files_of(without_python, facts[1:2])
    name = f"conda-meta/{stem(lock, 'greeting')}.json"
    assert sorted(files) == sorted([name, "conda-meta/history", "conda-meta/frozen"])
    assert b"update specs" not in files["conda-meta/history"]
    pip_only = Lock(SUBDIR, (LOCAL, WHEEL), variables={"A": "b"})
    assert not any("conda" in path for path in files_of(pip_only, [{}, {"dist_info": INFO}]))


@pytest.mark.parametrize(
    ("site_packages", "where"),
    [
        ("lib/python3.13t/site-packages", "lib/python3.13t"),
        ("local/lib/python3.13/dist-packages", "lib/python3.13"),
        ("lib/python3/dist-packages", "lib/python3.13"),
    ],
)
def test_the_mark_lies_in_the_standard_library(site_packages: str, where: str) -> None:
    python = LocalPython("3.13.1", "cd" * 32, site_packages)
    assert list(files_of(Lock(SUBDIR, (python,)), [{}])) == [f"{where}/EXTERNALLY-MANAGED"]


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HASHED = {"hash": f"sha256={'ab' * 32}", "hashes": {"sha256": "ab" * 32}}
BUILT = {"hash": f"sha256={'ef' * 32}", "hashes": {"sha256": "ef" * 32}}


@pytest.mark.parametrize(
    ("direct", "source", "wanted"),
    [
        (
            "https://files.example/thing-1.0-py3-none-any.whl#sha256=00",
            "",
            {"url": "https://files.example/thing-1.0-py3-none-any.whl", "archive_info": HASHED},
        ),
        (
            "https://files.example/thing.tar.gz#subdirectory=src/a&egg=thing",
            "https://files.example/thing.tar.gz",
            {
                "url": "https://files.example/thing.tar.gz",
                "subdirectory": "src/a",
                "archive_info": BUILT,
            },
        ),
        (
            f"git+https://git.example/a/thing@{COMMIT}",
            "",
            {
                "url": "https://git.example/a/thing",
                "vcs_info": {
                    "vcs": "git",
                    "commit_id": COMMIT,
                    "requested_revision": COMMIT,
                },
            },
        ),
        (
            "git+ssh://git@git.example/a/thing@feature/x",
            f"git+ssh://git@git.example/a/thing@{COMMIT}",
            {
                "url": "ssh://git@git.example/a/thing",
                "vcs_info": {
                    "vcs": "git",
                    "commit_id": COMMIT,
                    "requested_revision": "feature/x",
                },
            },
        ),
        ("git+https://git.example/a/thing@main", "", None),
        ("file:///src/thing", "", {"url": "file:///src/thing", "dir_info": {}}),
        (
            "file:///src/thing-1.0-py3-none-any.whl",
            "",
            {"url": "file:///src/thing-1.0-py3-none-any.whl", "archive_info": HASHED},
        ),
    ],
)
def test_wheels_asked_for_by_url_say_so(
    direct: str, source: str, wanted: dict[str, Any] | None
) -> None:
    build = Build(source, "ef" * 32) if source else None
    wheel = replace(WHEEL, direct=direct, build=build)
    files = files_of(Lock(SUBDIR, (LOCAL, wheel)), [{}, {"dist_info": INFO}])
    found = files.get(f"{INFO}/direct_url.json")
    assert (json.loads(found) if found else None) == wanted


def test_wheels_asked_for_by_name_say_so() -> None:
    lock = Lock(SUBDIR, (LOCAL, replace(WHEEL, requested=True)))
    assert files_of(lock, [{}, {"dist_info": INFO}])[f"{INFO}/REQUESTED"] == b""
    lock = Lock(SUBDIR, (LOCAL, WHEEL))
    assert not any("dist-info" in path for path in files_of(lock, [{}, {"dist_info": INFO}]))


def test_the_same_lock_gives_the_same_bytes(
    environment: tuple[Lock, list[dict[str, Any]]],
) -> None:
    lock, facts = environment
    again = [json.loads(json.dumps(one, sort_keys=True)) for one in facts]
    assert generate(lock, facts) == generate(lock, again)


def test_every_package_has_its_facts() -> None:
    with pytest.raises(ValueError, match="zip"):
        generate(Lock(SUBDIR, (LOCAL, WHEEL)), [{}])


def test_a_channel_is_taken_from_the_url() -> None:
    package = CondaPackage(
        "x", "1", "0", "noarch", "https://channel.example/a/b/noarch/x-1-0.conda", ""
    )
    facts = {"index": {}, "paths": []}
    record = json.loads(files_of(Lock(SUBDIR, (package,)), [facts])["conda-meta/x-1-0.json"])
    assert record["channel"] == "https://channel.example/a/b"
    assert record["build_number"] == 0


def test_uv_knows_the_environment_and_leaves_it_alone(
    conda_channel: Channel, tmp_path: Path
) -> None:
    prefix = tmp_path / "env"
    made = [conda_channel.package(name) for name in NAMES]
    packages = [locked(package) for package in made]
    unpacked = [
        unpack_conda(package.path, tmp_path / package.about.name, locked(package), PYTHON)
        for package in made
    ]
    thing = make_wheel(tmp_path, "thing", "1.0", {"thing.py": ""})
    wheel = replace(locked_wheel(thing), direct="https://files.example/thing.whl", sha256="ab" * 32)
    unpacked.append(unpack_wheel(thing, tmp_path / "thing", wheel, PYTHON))
    materialise(served(unpacked, str(prefix)), prefix)
    lock = Lock(SUBDIR, (*packages, wheel))
    for path, data in files_of(lock, [one.facts for one in unpacked]).items():
        (prefix / path).parent.mkdir(parents=True, exist_ok=True)
        (prefix / path).write_bytes(data)

    def uv(*command: str | Path) -> subprocess.CompletedProcess[str]:
        where = ["--python", prefix / "bin/python", "--cache-dir", tmp_path / "cache", "--offline"]
        return subprocess.run(
            [UV, "pip", *command, *where], capture_output=True, text=True, check=False
        )

    assert "hello-pkg==1.1\nthing @ https://files.example/thing.whl" in uv("freeze").stdout
    refused = uv("install", "--no-deps", thing)
    assert refused.returncode
    assert "envstore push" in refused.stderr
    program = (
        "import importlib.metadata as m; print(m.distribution('thing').read_text('INSTALLER'))"
    )
    said = subprocess.run([prefix / "bin/python", "-Ic", program], capture_output=True, check=True)
    assert said.stdout.strip() == b"envstore"
