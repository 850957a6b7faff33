"""What was installed at one place is the same as what was installed at another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.resolver.condameta import lasting_history, lasting_installed, lasting_record
from envstore.resolver.portable import Portable
from envstore.resolver.prefix import PrefixSource
from envstore.resolver.restoring import Claim, restore, with_placeholder
from envstore.store.relocated import Relocated
from envstore.store.relocation import PLACEHOLDER, Mode, Relocation, plan
from envstore.store.source import DirectorySource, Kind, SourceEntry
from tests.channel.conda import Channel
from tests.channel.packing import SUBDIR
from tests.channel.solving import install
from tests.resolver.installs import SITE, empty_environment, module, read, run, wheel_of
from tests.stores import Store

SPECS = ["python", "hello-pkg", "binprefix", "shortprefix", "speedup", "settings", "legacy"]


class Installed:
    """The same packages at a short path, a long one, and one with blanks, from two caches."""

    def __init__(self, channel: Channel, folder: Path) -> None:
        # Too long for a shebang, not for the binary with the shortest placeholder.
        self.short, self.long = folder / "s", folder / ("long" * 20)
        self.blank = folder / "with a blank"
        for number, prefix in enumerate((self.short, self.long, self.blank)):
            specs = SPECS if prefix != self.long else [s for s in SPECS if s != "shortprefix"]
            install([channel.url], specs, prefix, folder / f"cache-{number % 2}", platform=SUBDIR)


@pytest.fixture(scope="module")
def installed(conda_channel: Channel, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(conda_channel, tmp_path_factory.mktemp("installed"))


def scanned(root: Path) -> tuple[PrefixSource, dict[bytes, SourceEntry]]:
    source = PrefixSource(root)
    return source, {entry.path: entry for entry in source.scan()}


def at(source: PrefixSource, entry: SourceEntry, prefix: Path) -> bytes:
    """Return a file as it is when mounted at ``prefix``."""
    data = read(source, entry)
    assert len(data) == entry.size
    if not entry.relocation:
        return data
    whole = Relocated(Relocation.decode(entry.relocation), os.fsencode(prefix))
    return whole.read(0, whole.size, lambda start, size: data[start : start + size])


def test_two_installs_at_two_paths_have_one_manifest(installed: Installed, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digests = {
        store.push(PrefixSource(path), "env").manifest
        for path in (installed.short, installed.blank)
    }
    assert len(digests) == 1


def test_what_is_too_long_for_a_shebang_is_the_same_too(installed: Installed) -> None:
    # shortprefix, with its placeholder of 80 characters, cannot be installed there.
    found = {}
    for prefix in (installed.short, installed.long):
        source, entries = scanned(prefix)
        found[prefix] = {
            path: (entry.relocation, hashlib.sha256(read(source, entry)).hexdigest())
            for path, entry in entries.items()
            if entry.kind is Kind.FILE and not path.startswith(b"conda-meta/shortprefix")
        }
        source.close()
    scripts = [p for p in found[installed.long] if p.startswith(b"bin/")]
    assert len(scripts) >= 8
    for path in found[installed.long]:
        assert found[installed.long][path] == found[installed.short][path], path


def test_it_is_what_the_installer_makes_at_any_prefix(installed: Installed) -> None:
    source, entries = scanned(installed.short)
    checked = set()
    for other in (installed.short, installed.long, installed.blank):
        for path, entry in entries.items():
            there = other / os.fsdecode(path)
            if entry.kind is Kind.FILE and entry.relocation and there.exists():
                assert at(source, entry, other) == there.read_bytes(), (path, other)
                checked.add(path)
    source.close()
    assert len(checked) >= 15
    assert {b"bin/hello", b"lib/libbp.so.1.0", b"bin/bpscript"} <= checked


def test_no_file_names_the_place_any_more(installed: Installed) -> None:
    source, entries = scanned(installed.short)
    for entry in entries.values():
        if entry.kind is Kind.FILE and not entry.path.endswith(b".pyc"):
            assert os.fsencode(installed.short) + b"/" not in read(source, entry), entry.path
    source.close()


def test_a_changed_file_is_kept_as_it_is(installed: Installed, tmp_path: Path) -> None:
    env = tmp_path / "env"
    shutil.copytree(installed.short, env, symlinks=True)
    old, new = os.fsencode(installed.short), os.fsencode(env)
    for path in env.rglob("*"):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if b"\0" not in data and old in data:
            path.write_bytes(data.replace(old, new))
    script = env / "bin/bpscript"
    script.write_bytes(script.read_bytes() + b"# changed\n")
    program = env / "lib/libbp.so.1.0"
    program.write_bytes(program.read_bytes() + new)
    source, entries = scanned(env)
    assert at(source, entries[b"bin/bpscript"], env) == script.read_bytes()
    assert PLACEHOLDER in read(source, entries[b"bin/bpscript"])
    assert read(source, entries[b"lib/libbp.so.1.0"]) == program.read_bytes()
    assert not entries[b"lib/libbp.so.1.0"].relocation
    (warning,) = [line for line in source.warnings if "bound to" in line]
    assert "lib/libbp.so.1.0" in warning
    assert str(env) in warning
    source.close()


def test_a_program_that_was_replaced_altogether_is_no_trouble(
    installed: Installed, tmp_path: Path
) -> None:
    env = tmp_path / "env"
    shutil.copytree(installed.short, env, symlinks=True)
    (env / "lib/libbp.so.1.0").write_bytes(b"\x7fELF\0 another")
    source, entries = scanned(env)
    assert read(source, entries[b"lib/libbp.so.1.0"]) == b"\x7fELF\0 another"
    # The others still hold the prefix they were installed at, which is not this one.
    assert not any("libbp" in line for line in source.warnings)
    source.close()


def test_an_unchanged_environment_is_scanned_without_opening_a_file(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, entries = scanned(installed.short)
    source.close()

    def refuse(*_: object) -> bytes:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Portable, "_bytes", refuse)
    source, again = scanned(installed.short)
    source.close()
    assert again == entries
    with pytest.raises(AssertionError, match="was opened"):
        read(source, again[b"lib/libbp.so.1.0"])


def test_what_is_remembered_may_be_damaged(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "cache"))
    source, entries = scanned(installed.short)
    source.close()
    (memory,) = (tmp_path / "cache/prefixes").iterdir()
    sound = memory.read_text()
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    rows = json.loads(sound)
    broken = {kind: {path: [row[0], 5] for path, row in rows[kind].items()} for kind in rows}
    for text in ("", "{", "[]", '{"claims": 1, "files": {}}', json.dumps(broken)):
        memory.write_text(text)
        source, again = scanned(installed.short)
        source.close()
        assert again == entries
        assert memory.read_text() == sound
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no directory")
    source, again = scanned(installed.short)
    source.close()
    assert again == entries


def test_a_record_that_changes_changes_what_is_stored(tmp_path: Path) -> None:
    env = tmp_path / "env"
    (env / "conda-meta").mkdir(parents=True)
    (env / "bin").mkdir()
    here = os.fsencode(env)
    placeholder = b"/placeholder" + b"/0123456789" * 40
    own = b"a\0" + placeholder + b"/share\0z"
    text = own.replace(placeholder, here)
    data = text[:-1] + bytes(len(placeholder) - len(here)) + b"z"
    assert len(data) == len(own)
    (env / "bin/tool").write_bytes(data)
    record = {
        "name": "tool", "version": "1", "build": "0", "paths_data": {"paths": [
            {"_path": "bin/tool", "prefix_placeholder": placeholder.decode(),
             "file_mode": "binary", "sha256": hashlib.sha256(own).hexdigest()}]},
    }  # fmt: skip
    path = env / "conda-meta/tool-1-0.json"
    path.write_text(json.dumps(record))
    source, entries = scanned(env)
    assert read(source, entries[b"bin/tool"]) == own
    first = entries[b"bin/tool"].signature
    path.write_text(json.dumps(record).replace(hashlib.sha256(own).hexdigest(), "0" * 64))
    source, entries = scanned(env)
    assert read(source, entries[b"bin/tool"]) == data
    assert entries[b"bin/tool"].signature != first
    path.write_text("{ broken")
    source, entries = scanned(env)
    assert read(source, entries[b"bin/tool"]) == data
    assert any("conda-meta/tool-1-0.json is not readable" in line for line in source.warnings)


# Virtual environments


def test_two_virtual_environments_at_two_paths_have_one_manifest(tmp_path: Path) -> None:
    wheel = wheel_of("pytest", tmp_path)
    store = Store(tmp_path / "store")
    digests = set()
    # The last component is in the prompt that activation sets.
    one, there = tmp_path / "one/env", tmp_path / "another/place/env"
    for path in (one, there):
        env = empty_environment(path)
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        run([uv, "pip", "install", "-q", "--offline", "--no-deps", "--link-mode", "copy",
             "--python", str(env / "bin/python"), str(wheel)])  # fmt: skip
        (env / "bin/absolute").symlink_to(env / "bin/pytest")
        (env / SITE / "local.pth").write_text(f"{env}/src\n")
        digests.add(store.push(PrefixSource(env), "env").manifest)
    assert len(digests) == 1
    source, entries = scanned(one)
    for path in (b"bin/activate", b"bin/pytest", b"pyvenv.cfg", f"{SITE}/local.pth".encode()):
        assert at(source, entries[path], there) == (there / os.fsdecode(path)).read_bytes()
    link = entries[b"bin/absolute"]
    assert (link.target, link.relocation) == (PLACEHOLDER + b"/bin/pytest", PLACEHOLDER)
    assert source.warnings == []
    source.close()


def test_an_environment_behind_a_link_is_known_by_both_names(tmp_path: Path) -> None:
    env = empty_environment(tmp_path / "real")
    (tmp_path / "link").symlink_to(env)
    module(env, "answer", "VALUE = 42")
    direct, entries = scanned(env)
    through, same = scanned(tmp_path / "link")
    assert read(direct, entries[b"bin/activate"]) == read(through, same[b"bin/activate"])
    assert PLACEHOLDER in read(direct, entries[b"bin/activate"])
    direct.close()
    through.close()


def test_bytecode_of_a_source_that_names_the_place_is_left_out(tmp_path: Path) -> None:
    env = empty_environment(tmp_path / "env")
    path = module(env, "__editable___thing_finder", f"MAPPING = {{'thing': '{env}/src/thing'}}")
    run([str(env / "bin/python"), "-m", "compileall", "-q", str(path.parent)])
    source, entries = scanned(env)
    assert f"{SITE}/{path.name}".encode() in entries
    assert not any(b"__editable__" in name for name in entries if name.endswith(b".pyc"))
    source.close()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    tree = DirectorySource(tmp_path, kind="env", normalise=True)
    script = tmp_path / "bin/script"
    script.write_text(f"#!{tmp_path}/bin/sh\n")
    (entry,) = (entry for entry in tree.scan() if entry.kind is Kind.FILE)
    fleeting = replace(entry, settled=False)
    portable = Portable(tree, tmp_path / "memory")
    (stored,) = portable.apply([fleeting])
    assert stored.relocation
    assert not stored.settled
    (memory,) = (tmp_path / "memory").iterdir() if (tmp_path / "memory").exists() else (None,)
    assert memory is None or "script" not in memory.read_text()


def test_what_names_the_system_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/script").write_text("#!/usr/bin/env sh\n")
    (tmp_path / "bin/link").symlink_to("/usr/bin/true")
    tree = DirectorySource(tmp_path, kind="env", normalise=True)
    entries = tree.scan()
    monkeypatch.setattr(tree, "root", Path("/usr"))
    assert Portable(tree, tmp_path / "memory").apply(entries) == entries


# The transformations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#!/p/env/bin/python\n", "#!@/bin/python\n"),
        ("VIRTUAL_ENV=/p/env\n", "VIRTUAL_ENV=@\n"),
        ("'/p/env' \"/p/env/x\" -I/p/env/include -L/p/env/lib", "'@' \"@/x\" -I@/include -L@/lib"),
        ("PATH=/a:/p/env/bin:/b file:///p/env/x", "PATH=/a:@/bin:/b file://@/x"),
        ("/p/env2 /p/env-2 /p/env.bak /data/p/env/x", None),
        ("nothing", None),
        (
            "#!/bin/sh\n'''exec' \"/p/env/bin/python3\" \"$0\" \"$@\" #'''\nx\n",
            "#!@/bin/python3\nx\n",
        ),
        ("#!/bin/sh\n'''exec' /p/env/bin/python \"$0\" \"$@\"\n' '''\nx\n", "#!@/bin/python\nx\n"),
        (
            "#!/bin/sh\n'''exec' '/p/env/bin/python' -E \"$0\" \"$@\"\n' '''\nx\n",
            "#!@/bin/python -E\nx\n",
        ),
    ],
)
def test_texts_get_the_placeholder(text: str, expected: str | None) -> None:
    found = with_placeholder(text.encode(), b"/p/env").decode().replace(PLACEHOLDER.decode(), "@")
    assert found == (text if expected is None else expected)


@pytest.mark.parametrize("prefix", [b"/e", b"/opt/some/where", b"/p" * 24])
def test_binaries_get_back_what_they_were(prefix: bytes) -> None:
    placeholder = b"/b" * 25
    own = b"\0".join(
        [b"\x7fELF", placeholder, placeholder + b"/lib:" + placeholder + b"/share", b"", b"",
         b"x=" + placeholder + b";", b"/e", b"", b"tail", b""]
    )  # fmt: skip
    claim = Claim(placeholder, True, hashlib.sha256(own).hexdigest(), "x-1")
    relocation = plan(own, placeholder, Mode.BINARY)
    assert relocation is not None
    reader = Relocated(relocation, prefix)
    there = reader.read(0, reader.size, lambda start, size: own[start : start + size])
    assert restore(there, claim, prefix) == own
    assert restore(there + b"!", claim, prefix) is None
    assert restore(there, replace(claim, placeholder=b"/b"), prefix) is None


def test_records_lose_what_is_true_at_one_place_only() -> None:
    record = {
        "name": "a", "version": "1", "build": "0", "fn": "a-1-0.conda",
        "extracted_package_dir": "/home/me/pkgs/a-1-0",
        "link": {"source": "/home/me/pkgs/a-1-0", "type": 1},
        "paths_data": {"paths": [
            {"_path": "bin/a", "sha256": "1" * 64, "sha256_in_prefix": "2" * 64,
             "size_in_bytes": 3, "prefix_placeholder": "/p"},
            {"_path": "lib/a", "sha256": "3" * 64, "size_in_bytes": 4},
            {"_path": "bin/e", "sha256": "4" * 64, "path_type": "unix_python_entry_point"},
        ]},
    }  # fmt: skip
    data = lasting_record(json.dumps(record).encode())
    assert b"/home/me" not in data
    assert json.loads(data)["paths_data"]["paths"] == [
        {"_path": "bin/a", "sha256": "1" * 64, "prefix_placeholder": "/p"},
        {"_path": "lib/a", "sha256": "3" * 64, "size_in_bytes": 4},
        {"_path": "bin/e", "path_type": "unix_python_entry_point"},
    ]
    assert lasting_record(data) == data
    for odd in (b"", b"[]", b"{", b'"x"', b"\xff"):
        assert lasting_record(odd) == odd
    for strange in ({}, {"paths_data": 1}, {"paths_data": {"paths": [1, {}]}, "link": 5}):
        json.loads(lasting_record(json.dumps(strange).encode()))


def test_histories_and_wheels_records_lose_them_too() -> None:
    history = b"==> 2026-01-02 03:04:05 <==\n# cmd: conda install\n+a::b\n"
    assert lasting_history(history) == history.replace(
        b"2026-01-02 03:04:05", b"1980-01-02 00:00:00"
    )
    record = b"../../../bin/tool,sha256=abc,12\r\npkg/bin/x,sha256=d,1\r\npkg/a.py,sha256=e,2\r\n"
    assert lasting_installed(record) == record.replace(b"sha256=abc,12", b",")


def test_what_is_pulled_runs_where_it_is_pulled_to(installed: Installed, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.push(PrefixSource(installed.blank), "env")
    there = tmp_path / "there"
    store.pull(there, "env")
    hello = run([str(there / "bin/hello"), "a"]).stdout
    assert hello == f"hello 1.1 from {there} ['a']\n"
    assert run([str(there / "bin/bpshow")]).stdout == f"{there}\n{there}/share:{there}/lib\n"
    # And what was pulled is, pushed again, what it was before.
    again = store.push(PrefixSource(there), "again")
    assert again.manifest == store.snapshot("env").manifest
