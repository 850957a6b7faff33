"""Environments to push, and what becomes of them.

env = empty_environment(tmp_path / "env")
path = module(env, "answer", "VALUE = 42\\n")
pushed = read_all(env)
materialise(pushed, tmp_path / "copy")
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import marshal
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

from envstore.resolver.prefix import PrefixSource
from envstore.store.source import Kind, OmitEntry, SourceEntry

VERSION = f"python3.{sys.version_info.minor}"
TAG = sys.implementation.cache_tag
SITE = f"lib/{VERSION}/site-packages"
HEADER = 16


@dataclass(frozen=True)
class Item:
    """What a snapshot says of one path."""

    kind: Kind
    mode: int
    mtime_ns: int
    target: bytes
    data: bytes


@dataclass
class Pushed:
    """What a source handed over."""

    items: dict[bytes, Item] = field(default_factory=dict)
    omitted: set[bytes] = field(default_factory=set)
    lasting: set[bool] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def bytecode(self) -> dict[bytes, bytes]:
        """Return every ``.pyc`` by path."""
        return {path: item.data for path, item in self.items.items() if path.endswith(b".pyc")}


def empty_environment(root: Path) -> Path:
    """Make a virtual environment with nothing in it and return its path."""
    run([sys.executable, "-m", "venv", "--without-pip", str(root)])
    return root


def module(env: Path, name: str, source: str | bytes) -> Path:
    """Write a module into site-packages and return its path."""
    path = env / SITE / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return path


def cache_of(source: Path, suffix: str = "") -> Path:
    """Return where the bytecode of ``source`` lies."""
    return source.parent / "__pycache__" / f"{source.stem}.{TAG}{suffix}.pyc"


def compile_all(env: Path, *options: str) -> None:
    """Compile everything as an installer does: time stamps and absolute paths."""
    run([str(env / "bin/python"), *options, "-m", "compileall", "-q", str(env / "lib")])


def read_all(env: Path, **options: float) -> Pushed:
    """Scan and read an environment as a push does."""
    source = PrefixSource(env, **options)  # type: ignore[arg-type]
    try:
        return read_source(source)
    finally:
        source.close()


def read_source(source: PrefixSource) -> Pushed:
    """Scan and read ``source`` as a push does."""
    pushed = Pushed()
    entries = sorted(source.scan(), key=source.order)
    assert len({entry.path for entry in entries}) == len(entries)
    source.expect([entry for entry in entries if entry.kind is Kind.FILE])
    for entry in entries:
        try:
            data = read(source, entry) if entry.kind is Kind.FILE else b""
        except OmitEntry as omission:
            pushed.omitted.add(entry.path)
            pushed.lasting.add(omission.lasting)
            continue
        pushed.items[entry.path] = Item(entry.kind, entry.mode, entry.mtime_ns, entry.target, data)
    pushed.warnings = list(source.warnings)
    return pushed


def read(source: PrefixSource, entry: SourceEntry) -> bytes:
    """Return the whole content of ``entry``."""
    return b"".join(source.read(entry))


def materialise(pushed: Pushed, root: Path) -> None:
    """Write what was handed over as a tree that cannot be written to."""
    folders = [root]
    root.mkdir(parents=True)
    for path, item in sorted(pushed.items.items(), key=lambda pair: pair[0].count(b"/")):
        full = root / os.fsdecode(path)
        if item.kind is Kind.DIRECTORY:
            full.mkdir()
            folders.append(full)
        elif item.kind is Kind.SYMLINK:
            os.symlink(item.target, os.fsencode(full))
        else:
            full.write_bytes(item.data)
            full.chmod(item.mode & 0o555)
            os.utime(full, ns=(item.mtime_ns, item.mtime_ns))
    for folder in reversed(folders):
        folder.chmod(0o555)


def release(root: Path) -> None:
    """Make a read-only tree writable, so that it can be removed."""
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o755)


def code_of(bytecode: bytes) -> CodeType:
    """Return the code object in a ``.pyc``."""
    code = marshal.loads(bytecode[HEADER:])
    assert isinstance(code, CodeType)
    return code


def parts(code: CodeType) -> list[CodeType]:
    """Return a code object and all code objects within it."""
    found = [code]
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += parts(const)
    return found


def wheel_of(name: str, folder: Path) -> Path:
    """Put an installed distribution back into a wheel; needs no network."""
    dist = importlib.metadata.distribution(name)
    stem = f"{dist.name.replace('-', '_')}-{dist.version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    rows = []
    skipped = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    record = f"{stem}.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in dist.files or ():
            inside = str(file)
            if inside.startswith("..") or inside.endswith(".pyc") or file.name in skipped:
                continue
            data = Path(str(file.locate())).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{inside},sha256={digest},{len(data)}")
            archive.writestr(inside, data)
            if inside.endswith(".dist-info/METADATA"):
                record = inside.replace("METADATA", "RECORD")
        archive.writestr(record, "\n".join([*rows, f"{record},,", ""]))
    return wheel


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | variables,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done
