"""What a store can hold that no writer would: numbers, names and counts that cannot be."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from envstore.checkpoint.table import parse_table
from envstore.errors import CorruptError, EnvstoreError
from envstore.store import canonical
from envstore.store.binary import U32, inflate, seal, unseal
from envstore.store.digest import digest
from envstore.store.entries import HOLE, Entry
from envstore.store.index import parse_segment
from envstore.store.manifest import (
    Root,
    build_parts,
    decode_part,
    open_root,
    read_entries,
)
from envstore.store.objects import open_objects
from envstore.store.parts import MAX_PATHS
from envstore.store.pull import pull
from envstore.store.refs import RefName, read_ref
from envstore.store.relocation import MAX_ENCODED, Mode, Relocation, plan
from envstore.store.source import Kind
from tests.fuzz.memory import CHUNK, forge, repository, root_of
from tests.memory import Memory

# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', r'{"a":"\ud800"}', r'{"\udfff":1}', '{"a":NaN}',
        '{"a":-Infinity}', '{"a":' + "9" * 21 + "}", '{"a":' + "9" * 5000 + "}",
        '{"a":' + "[" * 40 + "]" * 40 + "}", '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000,
        '﻿{"a":1}', "[]", "1", "",
    ],
)  # fmt: skip
def test_json_that_two_readers_could_take_for_two_things(text: str) -> None:
    with pytest.raises(CorruptError):
        canonical.decode(text.encode(), "an object")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_json_in_another_encoding(encoding: str) -> None:
    with pytest.raises(CorruptError):
        canonical.decode('{"a":1}'.encode(encoding), "an object")


def test_json_that_is_odd_and_sound() -> None:
    text = r'{"a":"\ud83d\ude00 [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[","b":-9223372036854775808}'
    assert canonical.decode(text.encode(), "it") == {"a": "😀 " + "[" * 40, "b": -(1 << 63)}


@pytest.mark.parametrize("sequence", [-1, 1 << 63, 10**19])
def test_refs_that_moved_more_often_than_any(sequence: int) -> None:
    name = RefName("default", "x", "latest")
    body = {
        "format": 1, "snapshot": "0" * 64, "sequence": sequence, "nonce": "n", "updated": "now",
    }  # fmt: skip
    with pytest.raises(CorruptError):
        read_ref(Memory({name.key: canonical.encode(body)}), name)


# --- memory -------------------------------------------------------------------------------------


def _peak(run: Callable[[], object], expected: type[Exception]) -> int:
    """Return the bytes that ``run`` took before it raised ``expected``."""
    tracemalloc.start()
    try:
        with pytest.raises(expected):
            run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_few_bytes_that_claim_to_become_many() -> None:
    # A frame header alone, which claims 2^40 bytes, in an envelope that claims 1 GiB.
    header = b"\x28\xb5\x2f\xfd\xe0" + (1 << 30).to_bytes(8, "little")
    sealed = b"ESTEST01" + U32.pack(1 << 30) + bytes(32) + header
    assert _peak(lambda: unseal(b"ESTEST01", sealed, limit=1 << 30, what="it"), CorruptError) < (
        1 << 20
    )
    assert _peak(lambda: inflate(header, 1 << 30, "it"), CorruptError) < 1 << 20


def test_what_zstd_can_become_at_most_is_still_taken() -> None:
    body = bytes(64 << 20)
    assert unseal(b"ESTEST01", seal(b"ESTEST01", body), limit=64 << 20, what="it")[0] == body


@pytest.mark.parametrize("counts", [(1 << 32) - 1, 1 << 31, 100_000_000])
def test_counts_that_are_not_there(counts: int) -> None:
    claimed = U32.pack(counts)
    assert _peak(lambda: parse_segment(claimed), CorruptError) < 1 << 20
    table = claimed + bytes(32) + bytes(8) + U32.pack(8) + claimed * 2
    assert _peak(lambda: parse_segment(U32.pack(1) + table), CorruptError) < 1 << 20
    assert _peak(lambda: decode_part(claimed), CorruptError) < 1 << 20


def test_long_paths_many_times() -> None:
    base = b"/".join([b"d" * 250] * 60)
    folders = [Entry(base[: 251 * at - 1], Kind.DIRECTORY) for at in range(1, 61)]
    files = [Entry(base + b"/%05d" % at, Kind.FILE) for at in range(5000)]
    parts = [decode_part(raw) for _, raw in build_parts([*folders, *files])]
    # Cut into many parts, as writers do, it is a tree like any other.
    assert sum(1 for _ in read_entries(parts)) == 5060
    joined = replace(
        parts[0],
        kinds=parts[0].kinds + bytes(5000),
        depths=parts[0].depths + array("H", [60] * 5000),
        names=parts[0].names + [b"x%05d" % at for at in range(5000)],
        sizes=parts[0].sizes + array("Q", [0] * 5000),
        counts=parts[0].counts + array("I", [0] * 5000),
    )
    with pytest.raises(CorruptError, match=str(MAX_PATHS)):
        list(read_entries([joined]))


def test_objects_that_a_table_does_not_refer_to() -> None:
    item: dict[str, Any] = {
        "name": "m", "kind": "k", "value": 1, "size": 0, "objects": 1_000_000, "tensors": [],
    }  # fmt: skip
    table = {"format": 1, "rank": 0, "world_size": 1, "facts": {}, "items": [item]}
    data = json.dumps(table).encode()
    assert _peak(lambda: parse_table(data, "state.json"), CorruptError) < 1 << 20


def test_keys_in_each_other_cost_no_more_than_they_are_long() -> None:
    value: Any = {f"leaf{at}": at for at in range(1000)}
    for _ in range(50):
        value = {"k" * 2000: value, "more": {"a": 1}}
    item = {"name": "m", "kind": "k", "value": value, "size": 0, "objects": 0, "tensors": []}
    table = {"format": 1, "rank": 0, "world_size": 1, "facts": {"x": value}, "items": [item]}
    tracemalloc.start()
    try:
        assert parse_table(json.dumps(table).encode(), "state.json").facts["x"] == value
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# --- relocations --------------------------------------------------------------------------------


def test_a_number_without_an_end() -> None:
    data = b"\1\0" + b"\xff" * (MAX_ENCODED - 2)
    assert _peak(lambda: Relocation.decode(data), CorruptError) < 1 << 20


@pytest.mark.parametrize("mode", Mode)
def test_a_prefix_in_more_places_than_a_plan_can_say(mode: Mode) -> None:
    data = b"/" * (4 * MAX_ENCODED)
    assert _peak(lambda: plan(data, b"/", mode), CorruptError) < 64 << 20


def test_a_first_line_without_an_end() -> None:
    data = b"#!" + b"x" * (4 * MAX_ENCODED)
    assert _peak(lambda: plan(data, b"/old", Mode.TEXT), CorruptError) < 8 << 20


# --- trees --------------------------------------------------------------------------------------


def _file(path: bytes, **more: Any) -> Entry:
    name = digest(CHUNK)
    return Entry(path, Kind.FILE, False, len(CHUNK), name, ((name, len(CHUNK)),), **more)


def _pull(entries: list[Entry], into: Path, **root: int) -> None:
    raws = [raw for _, raw in build_parts(entries)]
    objects, name = forge(raws, root_of(raws, **root))
    pull(repository(objects), name, into)


@pytest.mark.parametrize("mode", [0o10000, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_a_root_with_more_than_permission_bits(tmp_path: Path, mode: int) -> None:
    with pytest.raises(CorruptError, match="permission bits"):
        _pull([_file(b"a")], tmp_path / "copy", mode=mode)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o10644, 0o100644, 0o60644, 0o20644])
def test_an_entry_that_would_be_a_device(tmp_path: Path, mode: int) -> None:
    raws = [raw for _, raw in build_parts([_file(b"a", mode=mode, mtime_ns=0)])]
    with pytest.raises(CorruptError, match="permission bits"):
        decode_part(raws[0])


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_a_file_longer_than_any(size: int) -> None:
    entry = Entry(b"a", Kind.FILE, False, size, digest(b"x"), ((HOLE, 1 << 31),))
    (raw,) = [raw for _, raw in build_parts([entry])]
    with pytest.raises(CorruptError, match="longer than any"):
        decode_part(raw)


@pytest.mark.parametrize("mtime_ns", [-(1 << 63), (1 << 63) - 1, 0])
def test_times_of_all_sorts(tmp_path: Path, mtime_ns: int) -> None:
    _pull([_file(b"a", mode=0o644, mtime_ns=mtime_ns)], tmp_path / "copy")
    assert (tmp_path / "copy/a").read_bytes() == CHUNK


def test_roots_without_parts_of_many_entries() -> None:
    body = Root((), (1 << 64) - 1, 1 << 63, (1 << 64) - 1).encode()
    assert open_root(seal(b"ESMANI01", body), digest(body)).parts == ()


_PAIRS = [
    (b"Readme", b"readme"), ("é".encode(), b"e\xcc\x81"), (b"K", b"k"),
    (b"straSSe", "straße".encode()),
]  # fmt: skip


@pytest.mark.parametrize("names", _PAIRS)
def test_names_that_differ_little_are_two(tmp_path: Path, names: tuple[bytes, bytes]) -> None:
    _pull([_file(name) for name in sorted(names)], tmp_path / "copy")
    assert sorted(os.listdir(os.fsencode(tmp_path / "copy"))) == sorted(names)


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK])
def test_a_file_system_that_takes_two_names_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """None that folds case can be mounted everywhere: names are folded on the way to a real one."""
    for name in ("open", "mkdir", "symlink", "link", "chmod", "utime"):
        monkeypatch.setattr(os, name, _folding(getattr(os, name), at=1 if name == "symlink" else 0))
    first = {
        Kind.FILE: _file(b"A"),
        Kind.DIRECTORY: Entry(b"A", Kind.DIRECTORY),
        Kind.SYMLINK: Entry(b"A", Kind.SYMLINK, target=b"/etc"),
    }[kind]
    second = [Entry(b"a", Kind.DIRECTORY), _file(b"a/passwd")]
    with pytest.raises(EnvstoreError, match="'a' is there under another name"):
        _pull([first, *second], tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def _folding(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Return ``real`` for a file system that knows lower case only, below open directories."""

    def folded(*arguments: Any, **more: Any) -> Any:
        inside = more.get("dir_fd") is not None or more.get("dst_dir_fd") is not None
        if inside and isinstance(arguments[at], bytes):
            arguments = (*arguments[:at], arguments[at].lower(), *arguments[at + 1 :])
        return real(*arguments, **more)

    return folded


# --- servers ------------------------------------------------------------------------------------

_LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>
<IsTruncated>false</IsTruncated>%s</ListBucketResult>"""
_ENTRY = "<Contents><Key>%s</Key><Size>5</Size></Contents>"


class _Liar(BaseHTTPRequestHandler):
    """An S3 server that lists keys which are not where it was asked to look, or no keys."""

    keys = (
        "top/refs/a/b/c", "refs/outside/x/y", "top/packs/x", "top/refs/../../x", "top/refs//x",
        "top/refs/a/\u202eb/c", "top/refs/a/b\\c/d", "/etc/passwd", "top/refs/" + "x" * 950,
        "top/refs/folder/",
    )  # fmt: skip

    def do_GET(self) -> None:
        body = (_LISTING % "".join(_ENTRY % key for key in self.keys)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_lists_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Liar) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"s3://bucket/top?endpoint=http://127.0.0.1:{server.server_port}&region=x&path_style=1"
            objects = open_objects(url)
            try:
                assert [info.key for info in objects.list("refs/")] == ["refs/a/b/c"]
            finally:
                objects.close()
        finally:
            server.shutdown()
