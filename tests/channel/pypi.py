"""A Python package index in a directory: small distributions of every kind, and real wheels.

``build_index`` writes ``files/`` (which serves as find-links as it is) and ``simple/`` (PEP 503
and PEP 691), to be served by ``server.serving``.
"""

from __future__ import annotations

import hashlib
import html
import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from pathlib import Path

from tests.channel.interpreter import TAG
from tests.channel.packing import SUBDIR
from tests.channel.wheelhouse import link_or_copy, wheel
from tests.channel.wheelmaking import FAILING_BACKEND, make_sdist, make_wheel

MACHINE = {"linux-64": "x86_64", "linux-aarch64": "aarch64"}[SUBDIR]
NATIVE_TAG = f"{TAG}-{TAG}-manylinux_2_17_{MACHINE}"
LONG_AGO, LATER = "2025-01-01T00:00:00Z", "2025-07-01T00:00:00Z"

_NATIVE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(43); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, "43"}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "native_pkg", NULL, -1, methods};
PyMODINIT_FUNC PyInit_native_pkg(void) { return PyModule_Create(&module); }
"""


@dataclass(frozen=True, slots=True)
class Index:
    """An index in ``path``; ``files`` are the distributions by file name."""

    path: Path
    files: dict[str, Path]

    @property
    def find_links(self) -> Path:
        """The directory with all distributions in it."""
        return self.path / "files"

    def file(self, name: str, version: str) -> Path:
        """Return the one distribution of ``name`` and ``version``."""
        stem = f"{name.replace('-', '_')}-{version}"
        (found,) = (
            path
            for path in self.files.values()
            if path.name.startswith((f"{stem}-", f"{stem}.tar"))
        )
        return found


@dataclass(frozen=True, slots=True)
class Listing:
    """What an index says of its files, beyond and against what they are.

    ``hashes`` are wrong ones by file name, ``yanked`` reasons, ``uploaded`` times (RFC 3339);
    ``vanished`` files are listed and not there.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    yanked: Mapping[str, str] = field(default_factory=dict)
    uploaded: Mapping[str, str] = field(default_factory=dict)
    vanished: tuple[str, ...] = ()


def build_index(
    directory: Path, *, small: bool = True, real: Iterable[str] = (), native: bool = True
) -> Index:
    """Make an index of the small distributions and of the ``real`` wheels of these names."""
    files = directory / "files"
    files.mkdir(parents=True)
    if small:
        make_small(files)
    if small and native:
        make_native(files)
    for name in real:
        made = wheel(name)
        link_or_copy(made, files / made.name)
    listing = Listing(
        hashes={"wrong_hash-1.0-py3-none-any.whl": "0" * 64},
        yanked={"yanked_pkg-1.1-py3-none-any.whl": "it eats data"},
        uploaded={"leaf-1.1-py3-none-any.whl": LATER, "tool_pkg-2.0-py3-none-any.whl": LATER},
        vanished=("vanished-1.0-py3-none-any.whl",),
    )
    return write_index(directory, listing)


def make_small(files: Path) -> None:
    """Write the small distributions: pure, with data, from source, and with something wrong."""
    for version in ("1.0", "1.1"):
        make_wheel(files, "leaf", version, {"leaf.py": f"VERSION = {version!r}\n"})
    for version, requires in (("1.0", ["leaf"]), ("2.0", ["leaf >=1.1"])):
        make_wheel(
            files,
            "tool-pkg",
            version,
            {
                "tool_pkg/__init__.py": "",
                "tool_pkg/__main__.py": "import sys, leaf\n\n\ndef main():\n"
                f"    print('tool {version}', leaf.VERSION, sys.prefix, sys.argv[1:])\n",
                "tool_pkg/data/notes.txt": "notes\n",
            },
            requires=[*requires, "schemes; extra == 'fancy'", "nothing; python_version < '3'"],
            more="Provides-Extra: fancy\n",
            entry_points="[console_scripts]\ntool = tool_pkg.__main__:main\n\n"
            "[gui_scripts]\ntool-gui = tool_pkg.__main__:main\n",
        )
    make_wheel(
        files,
        "schemes",
        "1.0",
        {
            "schemes.py": "",
            "DATA/purelib/schemes_pure.py": "",
            "DATA/platlib/schemes_plat.py": "",
            "DATA/scripts/schemes-python": "#!python -E\nimport sys\nprint(sys.prefix)\n",
            "DATA/scripts/schemes-shell": "#!/bin/sh\necho shell\n",
            "DATA/data/share/schemes/data.txt": "data\n",
            "DATA/data/etc/schemes.conf": "conf\n",
            "DATA/headers/schemes.h": "/* header */\n",
        },
        executable=["DATA/scripts/schemes-python", "DATA/scripts/schemes-shell"],
    )
    make_sdist(files, "from-source", "1.0", {"from_source.py": "VALUE = 7\n"}, requires=["leaf"])
    make_sdist(files, "broken-source", "1.0", {}, backend=FAILING_BACKEND)
    for version in ("1.0", "1.1"):
        make_wheel(files, "yanked-pkg", version, {"yanked_pkg.py": f"VERSION = {version!r}\n"})
    for name in ("wrong-hash", "vanished"):
        make_wheel(files, name, "1.0", {f"{name.replace('-', '_')}.py": ""})
    make_wheel(files, "too-new", "1.0", {"too_new.py": ""}, requires_python=">=3.99")
    make_wheel(files, "foreign", "1.0", {"foreign.py": ""}, tag="cp311-cp311-win_amd64")
    make_wheel(files, "wants-old-leaf", "1.0", {}, requires=["leaf ==1.0"])
    make_wheel(files, "wants-new-leaf", "1.0", {}, requires=["leaf >=1.1"])
    make_wheel(files, "wants-missing", "1.0", {}, requires=["not-in-the-index"])
    make_wheel(files, "wants-numpy", "1.0", {"wants_numpy.py": ""}, requires=["numpy >=1.26"])
    make_wheel(files, "wants-new-numpy", "1.0", {}, requires=["numpy >=99"])
    # in conflict over a file: both bring shared/which.py
    for letter in "ab":
        make_wheel(files, f"clash-{letter}", "1.0", {"clash/which.py": f"WHICH = {letter!r}\n"})


def make_native(files: Path) -> None:
    """Write a wheel with an extension module."""
    include = sysconfig.get_path("include", vars={"installed_base": sys.base_prefix})
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    with tempfile.TemporaryDirectory() as work:
        made = Path(work, "native.so")
        command = ["gcc", "-O1", "-s", "-shared", "-fPIC", f"-I{include}", "-x", "c", "-"]
        subprocess.run([*command, "-o", made], input=_NATIVE.encode(), check=True, timeout=120)
        make_wheel(
            files,
            "native-pkg",
            "1.0",
            {f"native_pkg{suffix}": made.read_bytes()},
            tag=NATIVE_TAG,
            executable=[f"native_pkg{suffix}"],
        )


def write_index(directory: Path, listing: Listing | None = None) -> Index:
    """Write ``simple/`` of what is in ``files/``, and take away what is to have vanished."""
    listing = listing or Listing()
    found = {path.name: path for path in sorted((directory / "files").iterdir())}
    projects: dict[str, list[dict[str, object]]] = {}
    for path in found.values():
        name = path.name.split("-")[0].replace("_", "-").lower()
        projects.setdefault(name, []).append(_describe(path, listing))
    for name, files in projects.items():
        _write_project(directory / "simple" / name, name, files)
    names = "".join(f'<a href="{name}/">{name}</a>\n' for name in projects)
    (directory / "simple" / "index.html").write_text(f"<!DOCTYPE html>\n{names}")
    for name in listing.vanished:
        if name in found:
            found.pop(name).unlink()
    return Index(directory, found)


def _describe(path: Path, listing: Listing) -> dict[str, object]:
    data = path.read_bytes()
    said: dict[str, object] = {
        "filename": path.name,
        "url": f"../../files/{path.name}",
        "hashes": {"sha256": listing.hashes.get(path.name, hashlib.sha256(data).hexdigest())},
        "size": len(data),
        "upload-time": listing.uploaded.get(path.name, LONG_AGO),
        "yanked": listing.yanked.get(path.name, False),
    }
    if path.suffix == ".whl":
        text = _metadata(path)
        beside = path.parent.parent / "metadata" / f"{path.name}.metadata"
        beside.parent.mkdir(exist_ok=True)
        beside.write_bytes(text)
        said["core-metadata"] = {"sha256": hashlib.sha256(text).hexdigest()}
        wanted = BytesParser().parsebytes(text).get("Requires-Python")
        if wanted:
            said["requires-python"] = wanted
    return said


def _metadata(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return archive.read(name)


def _write_project(folder: Path, name: str, files: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    versions = {str(file["filename"]).removesuffix(".tar.gz").split("-")[1] for file in files}
    document = {
        "meta": {"api-version": "1.1"},
        "name": name,
        "versions": sorted(versions),
        "files": files,
    }
    (folder / "index.json").write_text(json.dumps(document))
    lines = []
    for file in files:
        extra = ""
        if file["yanked"]:
            extra += f' data-yanked="{html.escape(str(file["yanked"]))}"'
        if "requires-python" in file:
            extra += f' data-requires-python="{html.escape(str(file["requires-python"]))}"'
        hashes = file["hashes"]
        assert isinstance(hashes, dict)
        target = f"{file['url']}#sha256={hashes['sha256']}"
        lines.append(f'<a href="{target}"{extra}>{file["filename"]}</a><br>\n')
    (folder / "index.html").write_text(f"<!DOCTYPE html>\n{''.join(lines)}")
