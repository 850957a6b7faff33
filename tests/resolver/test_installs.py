"""What the pushed tree is for: equal installs are equal, and imports need no source."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

import pytest

from envstore.resolver.kinds import open_source
from envstore.store.source import Kind
from tests.resolver.installs import (
    HEADER,
    SITE,
    VERSION,
    Pushed,
    code_of,
    materialise,
    parts,
    read_all,
    release,
    run,
    wheel_of,
)
from tests.stores import Store

PACKAGES = ("click", "packaging", "pluggy", "iniconfig", "pygments")


@pytest.fixture(scope="module")
def installs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two installs of the same wheels by pip, into paths of different length."""
    wheels = tmp_path_factory.mktemp("wheels")
    files = [str(wheel_of(name, wheels)) for name in PACKAGES]
    made = []
    for name in ("one", "in/a/rather/longer/path/two"):
        env = tmp_path_factory.mktemp("env") / name
        run([sys.executable, "-m", "venv", str(env)])
        pip = [str(env / "bin/python"), "-m", "pip", "install", "--no-index", "--no-deps", "-q"]
        run([*pip, *files])
        made.append(env)
    return made[0], made[1]


@pytest.fixture(scope="module")
def pushed(installs: tuple[Path, Path]) -> Pushed:
    return read_all(installs[0])


@pytest.fixture
def mounted(pushed: Pushed, tmp_path: Path) -> Iterator[Path]:
    """What was pushed, read-only and somewhere else."""
    root = tmp_path / "elsewhere" / "mounted"
    materialise(pushed, root)
    yield root
    release(root)


def names_its_prefix(path: bytes) -> bool:
    """Tell files that hold the path they were installed to, or a digest of one that does."""
    return path == b"pyvenv.cfg" or path.startswith(b"bin/") or path.endswith(b"/RECORD")


def test_two_installs_by_pip_give_the_same_bytes(
    installs: tuple[Path, Path], pushed: Pushed
) -> None:
    other = read_all(installs[1])
    assert other.items.keys() == pushed.items.keys()
    assert other.omitted == pushed.omitted
    differ = {path for path, item in pushed.items.items() if other.items[path] != item}
    assert {path for path in differ if not names_its_prefix(path)} == set()
    one, two = (sorted((env / SITE).rglob("*.pyc")) for env in installs)
    assert len(one) == len(two) > 300
    # Without this, equality would mean nothing.
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, two, strict=True))


def test_bytecode_is_the_same_whether_it_was_there_or_not(
    installs: tuple[Path, Path], pushed: Pushed, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(installs[0], bare, symlinks=True)
    for cache in [*bare.rglob("__pycache__")]:
        shutil.rmtree(cache)
    # Another number of workers is another order of work and another history of each process.
    assert read_all(bare, workers=3).bytecode() == pushed.bytecode()


def test_what_was_pushed_is_pushed_again_unchanged(pushed: Pushed, mounted: Path) -> None:
    again = read_all(mounted)
    assert again.items == pushed.items
    assert again.warnings == []


def test_each_module_has_one_unchecked_pyc_with_relative_paths(pushed: Pushed) -> None:
    sources = {
        path
        for path in pushed.items
        if path.startswith(f"lib/{VERSION}/".encode()) and path.endswith(b".py")
    }
    bytecode = pushed.bytecode()
    assert len(bytecode) + len(pushed.omitted) == len(sources)
    for path, data in bytecode.items():
        folder, _, name = path.rpartition(b"/__pycache__/")
        source = b"%b/%b.py" % (folder, name.split(b".")[0])
        assert data[4:8] == (1).to_bytes(4, "little")
        assert {part.co_filename.encode() for part in parts(code_of(data))} == {source}
        sources.remove(source)
    assert len(sources) == len(pushed.omitted)


def test_modes_times_and_kinds_are_what_is_portable(pushed: Pushed) -> None:
    for path, item in pushed.items.items():
        allowed = {Kind.DIRECTORY: {0o755}, Kind.SYMLINK: {0o777}, Kind.FILE: {0o644, 0o755}}
        assert item.mode in allowed[item.kind], path
        assert item.mtime_ns == 0


REPORT = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import json, traceback
import click, iniconfig, packaging.version, pluggy, pygments.lexers.python
try:
    packaging.version.Version("none of the sort!")
except packaging.version.InvalidVersion:
    trace = traceback.format_exc()
prefix = sys.prefix
print(json.dumps({
    "sources": [p for p in opened if p.startswith(prefix) and p.endswith(".py")],
    "bytecode": sum(p.startswith(prefix) and p.endswith(".pyc") for p in opened),
    "prefix": prefix, "trace": trace, "modules": len(sys.modules),
    "files": [m.__file__ for m in sys.modules.values() if "site-packages" in str(
        getattr(m, "__file__", ""))],
    "code": click.command.__code__.co_filename,
}))
"""


def test_imports_read_bytecode_only_and_tracebacks_name_the_real_path(mounted: Path) -> None:
    python = str(mounted / "bin/python")
    facts = json.loads(run([python, "-I", "-W", "error", "-c", REPORT]).stdout)
    assert facts["prefix"] == str(mounted)
    # The traceback itself reads the lines it shows.
    shown = [path for path in facts["sources"] if f'File "{path}"' not in facts["trace"]]
    assert shown == []
    assert facts["bytecode"] > 30
    assert all(path.startswith(f"{mounted}/{SITE}/") for path in facts["files"])
    assert facts["code"] == f"{mounted}/{SITE}/click/decorators.py"
    version = f"{mounted}/{SITE}/packaging/version.py"
    assert f'File "{version}", line ' in facts["trace"]
    assert "raise InvalidVersion" in facts["trace"]


def test_python_says_that_the_bytecode_matches(mounted: Path) -> None:
    python = str(mounted / "bin/python")
    said = run([python, "-I", "-v", "-c", "import pluggy"]).stderr
    cache = f"{mounted}/{SITE}/pluggy/__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
    assert f"# {cache} matches {mounted}/{SITE}/pluggy/__init__.py" in said
    assert f"# code object from '{cache}'" in said
    assert "# wrote" not in said


def test_an_environment_goes_through_a_store(
    installs: tuple[Path, Path], pushed: Pushed, tmp_path: Path
) -> None:
    with Store(tmp_path / "store") as store:
        first = store.push(open_source(installs[0]))
        assert (first.kind, first.unchanged, first.warnings) == ("env", False, ())
        assert store.push(open_source(installs[0])).unchanged
        other = store.push(open_source(installs[1]), "other")
        # Scripts, RECORDs and pyvenv.cfg of the other path, and no bytecode.
        assert other.new_chunk_bytes < 500_000 < first.new_chunk_bytes
        assert store.snapshot().attributes["python"] == "{}.{}.{}".format(*sys.version_info)
        store.pull(tmp_path / "pulled")
    for path, data in pushed.bytecode().items():
        assert (tmp_path / "pulled" / path.decode()).read_bytes() == data
    assert not any((tmp_path / "pulled" / path.decode()).exists() for path in pushed.omitted)


def test_header_hash_is_that_of_the_source(pushed: Pushed) -> None:
    path = f"{SITE}/pluggy/__pycache__/_hooks.{sys.implementation.cache_tag}.pyc".encode()
    source = pushed.items[f"{SITE}/pluggy/_hooks.py".encode()].data
    assert pushed.items[path].data[:HEADER] == (
        MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(source)
    )
