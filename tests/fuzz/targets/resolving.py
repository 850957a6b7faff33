"""Locks, the specification files of other tools, ELF files, and what is read of prefixes."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from envstore.resolver.abi.facts import ElfFacts, elf_facts, from_json, to_json
from envstore.resolver.activation import read_activation
from envstore.resolver.condameta import (
    claims,
    lasting_history,
    lasting_installed,
    lasting_record,
)
from envstore.resolver.interpreter import facts, find_interpreter
from envstore.resolver.lockfile import encode_lock, parse_lock
from envstore.resolver.packages.runpath import searching, with_path
from envstore.resolver.pylock import parse_pylock
from envstore.resolver.restoring import with_placeholder
from envstore.resolver.specs.reading import read_specs
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json
from tests.locks import full_lock

_PREFIX = b"/prefix/of/this"


@target(
    "lock", lambda: [encode_lock(full_lock())], mutate_json, (b'"x-', b"https://u:p@h/", b"\\u202e")
)
def lock(data: bytes) -> None:
    found = parse_lock(data, "env.lock")
    again = encode_lock(found)
    expect(encode_lock(parse_lock(again, "env.lock")) == again, "a lock is not read as written")


def _pylock_seeds() -> list[bytes]:
    return [
        b'lock-version = "1.0"\n[[packages]]\nname = "x"\nversion = "1"\n[[packages.wheels]]\n'
        b'url = "https://h/x-1-py3-none-any.whl"\nhashes = {sha256 = "'
        + b"0"
        * 64
        + b'"}\nsize = 5\n'
        b'[[packages]]\nname = "g"\nvcs = {type = "git", url = "https://h", commit-id = "abc"}\n'
        b'marker = "python_version >= \'3\'"\n[[packages]]\nname = "d"\n'
        b'directory = {path = "sub"}\n'
    ]


@target(
    "pylock",
    _pylock_seeds,
    words=(b"[[packages]]\n", b"[" * 40, b"marker = ", b"hashes = {sha256 = "),
)
def pylock(data: bytes) -> None:
    parse_pylock(data.decode("utf-8", "replace"), Path("/nowhere"), {"python_version": "3.11"})


_FILES = (
    "environment.yml", "requirements.txt", "pyproject.toml", "pixi.toml", "pylock.toml",
    "explicit.txt", "pixi.lock", "conda-lock.yml", "Pipfile", "setup.cfg",
)  # fmt: skip


def _spec_seeds() -> list[bytes]:
    return [
        b"\0name: x\nchannels: [conda-forge]\ndependencies:\n  - python=3.11  # [linux]\n"
        b"  - pip: [six]\n",
        b"\1six==1.0 --hash=sha256:"
        + b"0" * 64
        + b"\nnumpy>=1 ; python_version > '3'\n-c nothing.txt\n",
        b'\2[project]\nname = "x"\nversion = "1"\ndependencies = ["six"]\n'
        b'requires-python = ">=3.11"\n',
        b'\3[project]\nname = "x"\nchannels = ["conda-forge"]\nplatforms = ["linux-64"]\n'
        b'[dependencies]\npython = "3.11.*"\n[pypi-dependencies]\nsix = "*"\n',
        b"\4" + _pylock_seeds()[0],
        b"\6version: 6\nenvironments:\n  default:\n    channels:\n    - url: https://h/c/\n"
        b"    packages:\n      linux-64:\n      - conda: https://h/c/linux-64/x-1-0.conda\n"
        b"packages:\n- conda: https://h/c/linux-64/x-1-0.conda\n  sha256: " + b"0" * 64 + b"\n",
        b"\5@EXPLICIT\nhttps://h/linux-64/x-1-0.conda#" + b"0" * 64 + b"\n",
    ]


@target(
    "specification",
    _spec_seeds,
    words=(b"[" * 30, b"{" * 30, b"&a *a", b"- ", b"<<: ", b"!!python/"),
)
def specification(data: bytes) -> None:
    """The first byte chooses what the file is called."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILES[(data[0] if data else 0) % len(_FILES)]
        path.write_bytes(data[1:])
        read_specs([path], platform="linux-64", python="3.11")


# --- programs -----------------------------------------------------------------------------------


def _elf(order: str = "<") -> bytes:
    """Return a small library: one segment, a dynamic section, names, symbols and versions."""
    names = b"\0libc.so.6\0libm.so\0GLIBC_2.17\0$ORIGIN/../lib\0printf\0mine\0libx.so.1\0V1\0"
    at = {name: names.index(b"\0" + name + b"\0") + 1 for name in names.split(b"\0") if name}
    head = 64 + 2 * 56
    symbols = bytes(24) + struct.pack(order + "IBBH16x", at[b"printf"], 0x12, 0, 0)
    symbols += struct.pack(order + "IBBH16x", at[b"mine"], 0x12, 0, 7)
    versym = struct.pack(order + "3H", 0, 2, 1)
    verneed = struct.pack(order + "HHIII", 1, 1, at[b"libc.so.6"], 16, 0)
    verneed += struct.pack(order + "IHHII", 0, 0, 2, at[b"GLIBC_2.17"], 0)
    blobs, places = b"", []
    for blob in (symbols, names, versym, verneed):
        blobs += bytes(-len(blobs) % 8)
        places.append(head + len(blobs))
        blobs += blob
    blobs += bytes(-len(blobs) % 8)
    tags = [
        (1, at[b"libc.so.6"]), (1, at[b"libm.so"]), (14, at[b"libx.so.1"]),
        (29, at[b"$ORIGIN/../lib"]),
        (6, places[0]), (5, places[1]), (10, len(names)), (0x6FFFFFF0, places[2]),
        (0x6FFFFFFE, places[3]), (0x6FFFFFFF, 1), (0, 0),
    ]  # fmt: skip
    dynamic = b"".join(struct.pack(order + "QQ", *tag) for tag in tags)
    size = head + len(blobs) + len(dynamic)
    ident = b"\x7fELF\2" + (b"\1" if order == "<" else b"\2") + b"\1" + bytes(9)
    header = struct.pack(order + "HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack(order + "IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    where = head + len(blobs)
    section = struct.pack(
        order + "IIQQQQQQ", 2, 6, where, where, where, len(dynamic), len(dynamic), 8
    )
    return ident + header + load + section + blobs + dynamic


@target("elf", lambda: [_elf("<"), _elf(">")], words=(b"\x7fELF", b"\xff" * 8, b"\xfe\xff\xff\x6f"))
def elf(data: bytes) -> None:
    known = elf_facts(data)
    if known is not None:
        written = to_json({"lib/x.so": known})
        expect(from_json(json.loads(json.dumps(written)))["lib/x.so"] == known, "facts")
        known.offers()
    found = searching(data)
    if found is not None:
        changed = with_path(data, found, "$ORIGIN")
        expect(changed is None or len(changed) == len(data), "a file of another length")


def _facts_seeds() -> list[bytes]:
    known = elf_facts(_elf())
    assert isinstance(known, ElfFacts)
    return [json.dumps(to_json({"lib/x.so": known, "lib/y.so": known})).encode()]


@target("elf-facts", _facts_seeds, mutate_json)
def stored_elf_facts(data: bytes) -> None:
    """Facts as a stored package has them: any JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    for known in from_json(value).values():
        known.offers()


# --- prefixes -----------------------------------------------------------------------------------


def _record_seeds() -> list[bytes]:
    path = {
        "_path": "lib/a", "prefix_placeholder": "/opt/x", "sha256": "0" * 64, "file_mode": "text",
        "sha256_in_prefix": "1" * 64, "size_in_bytes": 5, "path_type": "hardlink",
    }  # fmt: skip
    record = {
        "name": "x", "version": "1", "build": "0", "fn": "x-1-0.conda", "link": {"source": "/a"},
        "extracted_package_dir": "/a", "paths_data": {"paths": [path], "paths_version": 1},
    }  # fmt: skip
    return [json.dumps(record).encode(), b"==> 2026-01-02 03:04:05 <==\n../../bin/x,sha256=a,5\n"]


@target("conda-meta", _record_seeds, mutate_json, (b"==> ", b"../", b"[[[["))
def conda_meta(data: bytes) -> None:
    lasting_record(data)
    lasting_history(data)
    lasting_installed(data)
    with_placeholder(data, _PREFIX)
    try:
        claims(data)
    except ValueError:
        return


def _activation_seeds() -> list[bytes]:
    return [b'{"env_vars":{"A":"b","C":"***unset***"}}', b'{"A":"b"}']


@target("prefix", lambda: [b"version = 3.11.4\nhome = /usr\n", b"\x7fELF\2\1\1" + bytes(60)])
def prefix_files(data: bytes) -> None:
    """The same bytes as an interpreter, and as what says of which version it is."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "lib/python3.11").mkdir(parents=True)
        (root / "conda-meta").mkdir()
        (root / "bin").mkdir()
        for name in (
            "pyvenv.cfg",
            "conda-meta/python-3.11.4-0.json",
            "bin/python3.11",
            "bin/python",
        ):
            (root / name).write_bytes(data)
        find_interpreter(root)
        facts(root)


@target("activation", _activation_seeds, mutate_json, (b"***unset***", b"\\u0000"))
def activation(data: bytes) -> None:
    """The same bytes as variables of a package and of the environment."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder)
        for name in (
            "etc/conda/env_vars.d/a.json",
            "conda-meta/state",
            "etc/conda/activate.d/a.sh",
        ):
            path = prefix / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        found = read_activation(prefix, "name", {"CONDA_SHLVL": "1", "CONDA_PREFIX": "/p"})
        for name, value in found.variables.items():
            expect("=" not in name and "\0" not in name + value, "a variable that is none")
