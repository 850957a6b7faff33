"""A Python interpreter of this machine as a package, for environments without a conda one.

Taken is the base installation behind a program: the program itself, its standard library (without
test suites, IDLE, static libraries and any bytecode), its headers, and those shared libraries of
its own prefix that its files are linked to. Not taken is what was installed into it. The result
runs at any path: search paths of its ELF files become relative, and where its build configuration
names the old prefix it names the ``PLACEHOLDER`` instead, relocated as in any other package.

What it still wants from the machine (libssl and its like, for a distribution's own Python) is
what a check of the environment's ELF files says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError
from envstore.resolver.lock import LocalPython
from envstore.resolver.packages.runpath import Searching, searching, with_path
from envstore.resolver.packages.unpacked import Unpacked, UnpackedEntry
from envstore.store.relocation import PLACEHOLDER, Mode, plan
from envstore.store.source import Kind

_PATIENCE = 60.0
_FIRST_MINOR = 8

_ASK = """
import json, os, platform, sys, sysconfig
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": platform.python_version(),
    "minor": "%d.%d" % sys.version_info[:2],
    "flags": getattr(sys, "abiflags", ""),
    "program": getattr(sys, "_base_executable", sys.executable) or sys.executable,
    "prefix": sys.base_prefix,
    "stdlib": os.path.dirname(os.__file__),
    "include": sysconfig.get_path("include"),
    "config": sysconfig.get_config_h_filename(),
    "tk": "_tkinter" in sys.builtin_module_names,
}))
"""
_ASK_AGAIN = """
import json, site, sys, sysconfig
print(json.dumps([sys.prefix, site.getsitepackages(), sysconfig.get_path("purelib")]))
"""

_NOT_TAKEN = frozenset(
    {
        "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib",
        "turtledemo", "EXTERNALLY-MANAGED", "sitecustomize.py", "usercustomize.py",
    }
)  # fmt: skip
_TK = ("tkinter", "turtle.py")
_TK_DATA = re.compile(r"(tcl|tk|itcl|tdbc|thread)\d*(\.\d+)*")
_NOT_TAKEN_ENDS = (".pyc", ".pyo", ".a", ".o", ".orig")
_NOT_TAKEN_MODULES = ("_test", "_xxtest", "_ctypes_test", "xxlimited", "xxsubtype")
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
# Below these lies much more than Python, so not every path that begins so is Python's.
_SHARED_PREFIXES = ("/", "/usr", "/usr/local", "/opt", "/opt/local")


@dataclass(frozen=True, slots=True)
class _Base:
    """A base installation: where it is, and what it says of itself.

    ``names`` are all paths by which it knows its prefix; some may be links.
    """

    program: Path
    prefix: Path
    stdlib: Path
    version: str
    minor: str
    flags: str
    include: Path
    config: Path
    has_tk: bool
    names: tuple[bytes, ...]

    @property
    def library(self) -> str:
        """The standard library, relative to the prefix."""
        return os.path.relpath(self.stdlib, self.prefix)


@dataclass(slots=True)
class _Tree:
    """What is taken so far: contents and link targets by path relative to the prefix."""

    base: _Base
    files: dict[str, Path | bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    programs: set[str] = field(default_factory=set)


def describe_interpreter(python: Path | None = None) -> LocalPython:
    """Return what the interpreter behind ``python`` is as a package.

    ``None`` is the one this program runs on. Raises as ``unpack_interpreter``.
    """
    with tempfile.TemporaryDirectory(prefix="envstore-python-") as scratch:
        return unpack_interpreter(python, Path(scratch) / "python")[0]


def unpack_interpreter(python: Path | None, into: Path) -> tuple[LocalPython, Unpacked]:
    """Copy the base installation behind ``python`` to ``into`` and say what it is.

    The digest is over paths, kinds, executable bits, link targets and contents, so the same
    interpreter has the same one on every machine where it is installed at the same place, and
    a distribution's own on every machine of that release. Runs the interpreter, once where it
    is and once where it was put, both times isolated from the user's settings.

    Raises ``NotFoundError``, ``UsageError`` (no CPython of version 3.8 or newer, does not run,
    or is built so that it cannot run elsewhere), ``AccessDeniedError``.
    """
    base = _ask_base(Path(python) if python is not None else Path(sys.executable))
    try:
        entries, digest = _write(_taken(base), into)
    except OSError as error:
        raise _untakeable(base, error) from error
    site_packages = _ask_site_packages(base, into)
    found = LocalPython(base.version, digest, site_packages)
    return found, Unpacked(into, entries, {"interpreter": {"version": base.version}})


def fingerprint(python: Path) -> str:
    """Return what changes whenever a file of the interpreter behind ``python`` does.

    It costs a fraction of ``describe_interpreter``: contents are told by sizes, times and inode
    numbers. Raises as ``unpack_interpreter``.
    """
    base = _ask_base(python)
    try:
        tree = _taken(base)
        seen: list[object] = [repr(base), sorted(tree.links.items()), sorted(tree.programs)]
        for name, source in sorted(tree.files.items()):
            if isinstance(source, bytes):
                seen.append((name, hashlib.sha256(source).hexdigest()))
            else:
                at = source.stat()
                identity = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
                seen.append((name, str(source), at.st_mode, *identity))
        digest = hashlib.sha256(repr(seen).encode())
        digest.update(Path(__file__).read_bytes())  # another version may take other things
    except OSError as error:
        raise _untakeable(base, error) from error
    return digest.hexdigest()


def _taken(base: _Base) -> _Tree:
    tree = _Tree(base)
    _take_program(tree)
    _take_library(tree)
    _take_headers(tree)
    _take_configuration(tree)
    _take_shared_libraries(tree)
    return tree


def _untakeable(base: _Base, error: OSError) -> EnvstoreError:
    what = f"cannot take the Python of {base.prefix}: {error.filename}: {error.strerror}"
    if isinstance(error, PermissionError):
        return AccessDeniedError(what, hint="check permissions")
    return EnvstoreError(what)


def _ask_base(program: Path) -> _Base:
    if not program.exists():
        raise NotFoundError(f"no such interpreter: {program}", hint="--python names one")
    said = _run(program, _ASK, f"{program} is no Python interpreter that runs here")
    if said.get("implementation") != "cpython":
        raise UsageError(f"{program} is {said.get('implementation')}; only CPython can be taken")
    if tuple(map(int, said["minor"].split("."))) < (3, _FIRST_MINOR):
        raise UsageError(f"{program} is Python {said['version']}; 3.{_FIRST_MINOR} is the oldest")
    prefix, stdlib = Path(said["prefix"]).resolve(), Path(said["stdlib"]).resolve()
    if not stdlib.is_relative_to(prefix):
        raise UsageError(f"{program}: its standard library {stdlib} is not below {prefix}")
    return _Base(
        Path(said["program"]).resolve(), prefix, stdlib, said["version"], said["minor"],
        said["flags"], Path(said["include"]), Path(said["config"]),
        said["tk"] or any((stdlib / "lib-dynload").glob("_tkinter.*")),
        tuple(dict.fromkeys((os.fsencode(prefix), os.fsencode(said["prefix"])))),
    )  # fmt: skip


def _ask_site_packages(base: _Base, into: Path) -> str:
    """Return where the interpreter at ``into`` looks for packages, relative to there."""
    program = into / "bin" / f"python{base.minor}"
    trouble = f"the Python of {base.prefix} does not run from another place"
    prefix, places, preferred = _run(program, _ASK_AGAIN, trouble, moved=True)
    if os.path.realpath(prefix) != os.path.realpath(into):
        raise UsageError(f"{trouble}: there it takes {prefix} for its prefix")
    chosen = preferred if preferred in places else places[0]
    return str(os.path.relpath(chosen, prefix))


def _run(program: Path, script: str, trouble: str, *, moved: bool = False) -> Any:
    """Return what ``script`` prints as JSON when ``program`` runs it."""
    variables = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    options = ["-I", "-B"]
    if moved:
        variables.pop("LD_LIBRARY_PATH", None)
    else:
        # What is installed there could print, or take long.
        options.append("-S")
    try:
        done = subprocess.run(
            [program, *options, "-c", script],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"it ends with status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it says nothing for {_PATIENCE:g} seconds"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except ValueError:
        reason = "it prints something else than it is asked for"
    raise UsageError(f"{trouble}: {reason}", hint="name another interpreter with --python")


def _take_program(tree: _Tree) -> None:
    base = tree.base
    name = f"bin/python{base.minor}"
    tree.files[name] = base.program
    tree.programs.add(name)
    for other in {"python3", "python", f"python{base.minor}{base.flags}"}:
        if f"bin/{other}" != name:
            tree.links[f"bin/{other}"] = f"python{base.minor}"


def _take_library(tree: _Tree) -> None:
    base = tree.base
    left_out = _NOT_TAKEN if base.has_tk else _NOT_TAKEN | set(_TK)
    _take_directory(tree, base.stdlib, base.library, left_out)
    if base.has_tk and str(base.prefix) not in _SHARED_PREFIXES:
        for path in (base.prefix / "lib").iterdir():
            if path.is_dir() and _TK_DATA.fullmatch(path.name):
                _take_directory(tree, path, f"lib/{path.name}", frozenset())


def _take_directory(tree: _Tree, directory: Path, at: str, left_out: frozenset[str]) -> None:
    """Take everything below ``directory``, but nothing called as in ``left_out``."""
    with os.scandir(directory) as listing:
        items = sorted(listing, key=lambda item: item.name)
    for item in items:
        path, name = Path(item.path), f"{at}/{item.name}"
        if item.name in left_out or item.name.endswith(_NOT_TAKEN_ENDS):
            continue
        if directory.name == "lib-dynload" and item.name.startswith(_NOT_TAKEN_MODULES):
            continue
        if item.is_symlink():
            _take_link(tree, path, name)
        elif item.is_dir():
            _take_directory(tree, path, name, left_out)
        elif item.is_file():
            tree.files[name] = path


def _take_link(tree: _Tree, path: Path, name: str) -> None:
    """Take a link as one if it stays in its directory, else as the file it leads to."""
    target = os.readlink(path)
    if "/" not in target and (path.parent / target).is_file():
        tree.links[name] = target
    elif path.is_file():
        tree.files[name] = path.resolve()


def _take_headers(tree: _Tree) -> None:
    base = tree.base
    if base.include.is_dir():
        at = f"include/{base.include.name}"
        _take_directory(tree, base.include, at, frozenset())
        if base.config.is_file():
            # On Debian the one among the headers leads to another, beside all headers.
            tree.files[f"{at}/pyconfig.h"] = base.config


def _take_configuration(tree: _Tree) -> None:
    base = tree.base
    program = base.prefix / "bin" / f"python{base.minor}-config"
    if program.is_file():
        tree.files[f"bin/{program.name}"] = program.resolve()
        tree.programs.add(f"bin/{program.name}")
    descriptions = base.prefix / "lib" / "pkgconfig"
    if descriptions.is_dir():
        for path in sorted(descriptions.glob(f"python-{base.minor}*.pc")):
            tree.files[f"lib/pkgconfig/{path.name}"] = path.resolve()
    for name, source in list(tree.files.items()):
        if isinstance(source, Path) and _is_configuration(name):
            data = source.read_bytes()
            for prefix in base.names:
                data = _with_placeholder(data, prefix)
            tree.files[name] = data


def _is_configuration(name: str) -> bool:
    directory, _, last = name.rpartition("/")
    return (
        last.startswith(("_sysconfigdata", "_sysconfig_vars", "build-details"))
        or directory.rpartition("/")[2].startswith("config-")
        or last.endswith(("-config", ".pc"))
    )


def _with_placeholder(data: bytes, prefix: bytes) -> bytes:
    """Return a text with the placeholder where it names ``prefix``."""
    if b"\0" in data:
        return data
    whole = re.escape(prefix) + rb"(?![\w.-])"
    if os.fsdecode(prefix) in _SHARED_PREFIXES:
        # Only Python's own directories, and values that are nothing but the prefix or one
        # directory of it: /usr/bin/install stays what it is.
        own = rb"(?:/(?:bin|include|lib|lib64)(?:/python3[\w.]*)?)?(?=['\"\n]|$)"
        python = rb"/(?:bin|include|lib|lib64)/python3(?=[\w./])"
        whole = rb"(?<![\w./-])" + re.escape(prefix) + rb"(?=" + own + rb"|" + python + rb")"
    return re.sub(whole, PLACEHOLDER, data)


def _take_shared_libraries(tree: _Tree) -> None:
    """Make every ELF file look for libraries of the prefix relative to itself; take those."""
    waiting = [
        name for name in tree.files if name in tree.programs or re.search(r"\.so(\.|$)", name)
    ]
    while waiting:
        name = waiting.pop()
        source = tree.files[name]
        if not isinstance(source, Path):
            continue
        data = source.read_bytes()
        found = searching(data)
        if found is None or not found.path:
            continue
        directory = os.path.dirname(name)
        relative = []
        wanted = set(found.needed)
        for place in found.path.split(":"):
            inside = _inside(tree.base, place, source)
            if inside is None:
                relative.append(place)
                continue
            here = sorted(lib for lib in wanted if (tree.base.prefix / inside / lib).is_file())
            wanted.difference_update(here)
            for library in here:
                if f"{inside}/{library}" not in tree.files:
                    tree.files[f"{inside}/{library}"] = tree.base.prefix / inside / library
                    tree.programs.add(f"{inside}/{library}")
                    waiting.append(f"{inside}/{library}")
            if place.startswith("$"):
                relative.append(place)
            elif here:
                relative.append(_origin(directory, inside))
        if relative != found.path.split(":"):
            tree.files[name] = _redirected(tree, name, data, found, relative)


def _inside(base: _Base, place: str, source: Path) -> str | None:
    """Return an entry of a search path relative to the prefix, ``None`` if it is not below."""
    origin = str(source.resolve().parent)
    real = os.path.realpath(place.replace("${ORIGIN}", origin).replace("$ORIGIN", origin))
    if not os.path.isabs(place) and "ORIGIN" not in place:
        return None
    if real in _SYSTEM_LIBRARIES or not Path(real).is_relative_to(base.prefix):
        return None
    return os.path.relpath(real, base.prefix)


def _origin(directory: str, inside: str) -> str:
    way = os.path.relpath(inside, directory)
    return "$ORIGIN" if way == "." else f"$ORIGIN/{way}"


def _redirected(tree: _Tree, name: str, data: bytes, found: Searching, places: list[str]) -> bytes:
    """Return an ELF file that looks in ``places``."""
    changed = with_path(data, found, ":".join(places))
    if changed is not None:
        return changed
    # The shortest there is: the libraries beside the file, by links.
    changed = with_path(data, found, "$ORIGIN")
    if changed is None:
        raise UsageError(
            f"{tree.base.program} cannot be moved: {name} looks for libraries in {found.path}",
            hint="name another interpreter with --python",
        )
    directory = os.path.dirname(name)
    for place in places:
        if place.startswith("$ORIGIN/"):
            inside = os.path.normpath(f"{directory}/{place.removeprefix('$ORIGIN/')}")
            for library in found.needed:
                if f"{inside}/{library}" in tree.files:
                    tree.links[f"{directory}/{library}"] = os.path.relpath(
                        f"{inside}/{library}", directory
                    )
    return changed


def _write(tree: _Tree, into: Path) -> tuple[tuple[UnpackedEntry, ...], str]:
    """Write the tree; return its entries and their digest."""
    digest = hashlib.sha256()
    entries = []
    directories: set[str] = set()
    for name in [*tree.files, *tree.links]:
        directories.update(str(parent) for parent in list(Path(name).parents)[:-1])
    for name in sorted(directories):
        (into / name).mkdir(parents=True, exist_ok=True)
    for name in sorted([*tree.files, *tree.links, *directories]):
        entry, content = _write_entry(tree, into, name)
        entries.append(entry)
        parts = (entry.path, b"%d %d" % (entry.kind, entry.executable), entry.target, content)
        digest.update(b"\0".join(parts) + b"\n")
    return tuple(entries), digest.hexdigest()


def _write_entry(tree: _Tree, into: Path, name: str) -> tuple[UnpackedEntry, bytes]:
    """Write one file or link; return its entry and what stands for its content in the digest."""
    path = os.fsencode(name)
    if name in tree.links:
        os.symlink(tree.links[name], into / name)
        target = os.fsencode(tree.links[name])
        return UnpackedEntry(path, Kind.SYMLINK, target=target), b""
    if name not in tree.files:
        return UnpackedEntry(path, Kind.DIRECTORY), b""
    source = tree.files[name]
    data = source if isinstance(source, bytes) else source.read_bytes()
    executable = name in tree.programs or (
        isinstance(source, Path) and bool(source.stat().st_mode & 0o111)
    )
    (into / name).write_bytes(data)
    os.chmod(into / name, 0o755 if executable else 0o644)
    relocation = plan(data, PLACEHOLDER, Mode.TEXT, "python") if PLACEHOLDER in data else None
    encoded = relocation.encode() if relocation is not None else b""
    content = hashlib.sha256(data).hexdigest().encode()
    return UnpackedEntry(path, Kind.FILE, executable, len(data), b"", encoded), content
