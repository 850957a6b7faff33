from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from envstore.errors import EnvstoreError, NotFoundError, UnsupportedFormatError, UsageError
from envstore.resolver import lockfile
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, PypiPackage
from envstore.resolver.lockfile import LockError, encode_lock, load_lock, lock_digest, parse_lock
from envstore.resolver.request import CondaRequest, PypiRequest, Request
from envstore.store.digest import digest
from tests.locks import conda, full_lock, local_lock, locks, wheel


def document(lock: Lock | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode_lock(lock or full_lock()))
    return found


def parse(value: Any) -> Lock:
    return parse_lock(json.dumps(value).encode(), "env.lock")


def refused(value: Any, **kwargs: Any) -> str:
    with pytest.raises(LockError) as caught:
        parse(value)
    assert "\n" not in str(caught.value)
    return caught.value.message


@pytest.mark.parametrize("make", [full_lock, local_lock, lambda: Lock("linux-64", ())])
def test_a_lock_survives_the_way_through_its_file(make: Callable[[], Lock]) -> None:
    data = encode_lock(make())
    assert parse_lock(data, "x") == make()
    assert encode_lock(parse_lock(data, "x")) == data
    assert lock_digest(make()) == digest(data)


@settings(max_examples=150, deadline=None)
@given(locks())
def test_any_lock_survives_the_way_through_its_file(lock: Lock) -> None:
    data = encode_lock(lock)
    assert parse_lock(data, "x") == lock
    assert encode_lock(parse_lock(data, "x")) == data


def test_every_field_of_the_full_lock_is_written() -> None:
    from dataclasses import fields

    written = document()
    for kind, build in (("conda", CondaPackage), ("pypi", PypiPackage)):
        names = {name for item in written["packages"] if item["kind"] == kind for name in item}
        assert names == {"kind"} | {field.name for field in fields(build)}
    assert set(written["request"]) == {field.name for field in fields(Request)}
    assert set(written["request"]["pypi"]) == {field.name for field in fields(PypiRequest)}
    assert set(written["request"]["conda"]) == {field.name for field in fields(CondaRequest)}
    assert set(written) == {"format", "version"} | {field.name for field in fields(Lock)}


def test_a_lock_is_written_for_people() -> None:
    lock = Lock("linux-64", (conda("zlib"), conda("abc")), virtual={"__b": "1", "__a": "0"})
    lines = encode_lock(lock).decode().split("\n")
    assert lines[:4] == [
        "{",
        '  "format": "envstore-lock",',
        '  "version": 1,',
        '  "platform": "linux-64",',
    ]
    assert lines[4:8] == ['  "virtual": {', '    "__a": "0",', '    "__b": "1"', "  },"]
    assert lines[-2:] == ["}", ""]
    # The order of packages has a meaning and stays.
    assert [line.split('"')[3] for line in lines if '"name"' in line] == ["zlib", "abc"]
    assert not any("build_number" in line or "depends" in line for line in lines)


def test_the_order_of_keys_does_not_change_a_lock() -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return [turned(item) for item in value] if isinstance(value, list) else value

    assert encode_lock(parse(turned(document()))) == encode_lock(full_lock())


def test_open_fields_are_passed_over() -> None:
    value = document()
    value["x-note"] = {"for": "people"}
    value["packages"][0]["x-why"] = None
    assert parse(value) == full_lock()


def edit(path: str, new: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in steps:
            value = value[step]
        value[last] = new

    return change


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in steps:
            value = value[step]
        del value[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("platform"), "env.lock: platform: is missing"),
        (without("packages"), "env.lock: packages: is missing"),
        (without("request"), "env.lock: request: is missing"),
        (edit("packages", {}), "env.lock: packages: must be a list, not an object"),
        (edit("packages.0", []), "env.lock: packages[0]: must be an object"),
        (edit("packages.0.kind", "deb"), "packages[0] (python).kind: must be one of conda, pypi"),
        (without("packages.1.sha256"), "packages[1] (libzlib).sha256: is missing"),
        (edit("packages.1.sha256", "A" * 64), "packages[1] (libzlib).sha256: must be 64 lower"),
        (edit("packages.1.sha256", ""), "packages[1] (libzlib).sha256: must be 64 lower"),
        (edit("packages.0.md5", "xyz"), "packages[0] (python).md5: must be 32"),
        (edit("packages.1.size", -1), "packages[1] (libzlib).size: must be from 0 to"),
        (edit("packages.1.size", 1 << 41), "packages[1] (libzlib).size: must be from 0 to"),
        (edit("packages.1.size", 1.5), ".size: must be a whole number, not a number"),
        (edit("packages.1.size", True), ".size: must be a whole number, not a truth value"),
        (edit("packages.1.size", None), ".size: must be a whole number, not null"),
        (edit("packages.1.version", 1), ".version: must be a string, not a number"),
        (edit("packages.1.version", "1/2"), ".version: is not a version"),
        (edit("packages.1.name", "../a"), "packages[1].name: must be of letters"),
        (edit("packages.1.name", "a/b"), "packages[1].name: must be of letters"),
        (edit("packages.1.name", "a..b"), "packages[1] (a..b).name: must be of letters"),
        (edit("packages.1.name", "numpy"), "packages[4] (numpy): a second conda package of this"),
        (edit("packages.1.sizes", 1), "packages[1] (libzlib).sizes: is not a field"),
        (edit("wheels", []), "env.lock: wheels: is not a field of this format"),
        (edit("packages.1.noarch", "perl"), ".noarch: must be python or generic"),
        (edit("packages.1.subdir", "../x"), ".subdir: is not a platform"),
        (edit("platform", "noarch"), "platform: is not a platform, such as linux-64"),
        (edit("packages.0.python_site_packages_path", "../x"), "must be a path below the prefix"),
        (edit("packages.0.python_site_packages_path", "/x"), "must be a path below the prefix"),
        (edit("packages.1.url", "ftp://a.example/b.conda"), ".url: must be a URL of https"),
        (edit("packages.1.url", "https://a.example/b.zip"), ".url: must end with .conda"),
        (edit("packages.1.url", "https://a.example/..%2fb.conda"), ".url: is not the name of"),
        (edit("packages.1.url", "https://a.example/a b.conda"), ".url: must be a URL"),
        (edit("packages.5.filename", "../pandas-2.2-py3-none-any.whl"), ".filename: is not the na"),
        (edit("packages.5.filename", "numpy-2.2-py3-none-any.whl"), "is not the name of a wheel"),
        (edit("packages.5.filename", "pandas-2.2.zip"), "is not the name of a wheel of pandas"),
        (edit("packages.5.name", "Pandas"), "packages[5] (Pandas).name: is not a normalised name"),
        (edit("packages.5.url", ""), "packages[5] (pandas): has neither a url nor a build"),
        (edit("packages.5.requested", 1), ".requested: must be true or false, not a number"),
        (edit("packages.5.requires", "numpy"), ".requires: must be a list, not a string"),
        (edit("packages.5.requires", ["a", 1]), ".requires[1]: must be a string"),
        (edit("packages.7.build", {}), "packages[7] (demo).build.source: is missing"),
        (edit("packages.7.build.source", "here"), ".build.source: must be a URL"),
        (edit("virtual", {"glibc": "1"}), "virtual.glibc: is not the name of a virtual"),
        (edit("variables", {"A B": "1"}), "variables.A B: is not the name of a variable"),
        (edit("variables", {"A": "\0"}), "variables.A: holds the control character U+0000"),
        (edit("sources.0.name", "a\x1b[2J"), "sources[0].name: holds the control character U+001B"),
        (edit("tools", {"uv": "\ud800"}), "tools.uv: holds U+D800, which is no character"),
        (edit("request.conda.priority", "any"), "request.conda.priority: must be strict or"),
        (edit("request.pypi.hashes", []), "request.pypi.hashes: must be an object, not a list"),
        (edit("packages.1.build", "a" * 300), ".build: is not a build string"),
        (edit("request.name", "a" * 70_000), "request.name: has 70000 characters"),
        (edit("packages.0.extra.a", 1 << 64), ".extra.a: is a number of more than 64 bits"),
    ],
)
def test_what_is_wrong_with_a_field_is_said(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    value = document()
    change(value)
    said = refused(value)
    assert message in said
    assert said.startswith("env.lock: ")


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ("https://me:word@a.example/x/b-1-0.conda", "a user name or password"),
        ("https://token@a.example/x/b-1-0.conda", "a user name or password"),
        ("https://a.example/t/to-123/x/b-1-0.conda", "a channel's token"),
        ("https://a.example/b-1-0.conda?X-Amz-Signature=1f", "parameter 'X-Amz-Signature'"),
        ("https://a.example/b-1-0.conda?a=1&x-amz-security-token=1f", "security-token"),
        ("https://a.example/b-1-0.conda?se=2026&sig=1f", "parameter 'sig'"),
        ("https://a.example/b-1-0.conda?access_token=1f", "parameter 'access_token'"),
        ("https://a.example/b-1-0.conda?API%5Fkey=1f", "parameter 'API_key'"),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "packages.1.url",
        "packages.0.channel",
        "packages.0.extra.license",
        "packages.7.direct",
        "packages.7.build.source",
        "request.conda.channels.0",
        "request.pypi.indexes.0",
        "request.pypi.default_index",
        "request.pypi.find_links.0",
        "request.pypi.requirements.0",
        "variables.OMP_NUM_THREADS",
    ],
)
def test_credentials_are_refused_everywhere(path: str, secret: str, said: str) -> None:
    value = document()
    text = f"demo @ {secret}" if "requirements" in path else secret
    edit(path, text)(value)
    message = refused(value)
    assert said in message
    assert "must hold no credentials" in message
    assert "word" not in message.replace("password", "")
    assert "1f" not in message
    assert "to-123" not in message


@pytest.mark.parametrize(
    "url",
    [
        "git+ssh://git@code.example/demo@main",
        "https://code.example/@scope/demo.tar.gz",
        "https://a.example/t/x.tar.gz?version=1",
        "git+https://code.example/demo@0123abcd#subdirectory=a",
    ],
)
def test_what_looks_like_credentials_and_is_none_is_taken(url: str) -> None:
    value = document()
    edit("packages.7.direct", url)(value)
    assert parse(value).pypi()[2].direct == url


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "env.lock, line 1, column 1: not valid JSON"),
        (
            b'{"format": "envstore-lock",\n  "version": 1,\n  oops}',
            "env.lock, line 3, column 3: no",
        ),
        (b'{"format": "envstore-lock", "version": 1, "a": "\xff"}', "env.lock, line 1: not UTF-8"),
        (b"[]", "env.lock is not a lock: not a JSON object"),
        (b"{}", 'env.lock is not a lock of envstore: no "format": "envstore-lock"'),
        (b'{"format": "pixi", "version": 6}', "env.lock is not a lock of envstore"),
        (b'{"format": "envstore-lock"}', "env.lock: version: must be a whole number"),
        (b'{"format": "envstore-lock", "version": true}', "version: must be a whole number"),
        (b'{"format": "envstore-lock", "version": 0}', "version: must be a whole number"),
        (b'{"version": 1, "version": 1}', "the field 'version' is there twice"),
        (b'{"version": NaN}', "NaN is not a number"),
        (b'{"version": 1e999}', "the number 1e999 is too large"),
        (b'{"version": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        (b"[" * 100_000, "too deeply nested"),
    ],
)
def test_what_is_no_lock_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(LockError) as caught:
        parse_lock(data, "env.lock")
    assert message in caught.value.message


def test_deep_values_are_refused() -> None:
    value = document()
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    value["packages"][0]["extra"]["deep"] = deep
    assert "nested more than 16 levels deep" in refused(value)


def test_a_second_interpreter_is_refused() -> None:
    python = LocalPython("3.11.2", "0" * 64, "lib/python3.11/site-packages")
    with pytest.raises(LockError, match="a second interpreter; the first is packages"):
        encode_lock(Lock("linux-64", (conda("python", "3.11.7"), python)))


def test_a_newer_version_is_refused_as_such() -> None:
    with pytest.raises(UnsupportedFormatError, match="version 2, this envstore reads up to 1"):
        parse({"format": "envstore-lock", "version": 2, "anything": []})


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (replace(conda("numpy"), sha256=""), "numpy 1.0 cannot be locked as it is: its sha256"),
        (replace(conda("numpy"), url=""), "numpy 1.0 cannot be locked as it is: it is not known"),
        (replace(wheel("demo"), sha256=""), "demo 1.0 cannot be locked as it is: its sha256"),
        (replace(wheel("demo"), url=""), "demo 1.0 cannot be locked as it is: it is not known"),
        (
            replace(full_lock().pypi()[2], filename="", sha256=""),
            "demo 1.2+local.1 cannot be locked as it is: its wheel is not built yet",
        ),
    ],
)
def test_an_incomplete_lock_is_not_written(
    package: CondaPackage | PypiPackage, message: str
) -> None:
    with pytest.raises(LockError) as caught:
        encode_lock(Lock("linux-64", (package,)))
    assert message in caught.value.message


def test_what_could_not_be_read_is_not_written() -> None:
    channels = CondaRequest(channels=("https://me:word@channel.example",))
    lock = Lock("linux-64", (), request=Request(conda=channels))
    with pytest.raises(LockError, match=r"request\.conda\.channels\[0\]: a URL holds a user name"):
        encode_lock(lock)


def test_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "envstore.lock"
    path.write_bytes(encode_lock(full_lock()))
    assert load_lock(path) == full_lock()
    with pytest.raises(NotFoundError, match="does not exist"):
        load_lock(tmp_path / "other")
    with pytest.raises(UsageError, match="is a directory"):
        load_lock(tmp_path)
    monkeypatch.setattr(lockfile, "MAX_BYTES", 100)
    with pytest.raises(EnvstoreError, match="too long for a lock"):
        load_lock(path)
    with pytest.raises(LockError, match="would be longer"):
        encode_lock(full_lock())
