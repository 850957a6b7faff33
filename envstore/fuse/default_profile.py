"""What every start of a Python environment reads, for those that nobody has profiled.

Known from the tree's names alone: the interpreter and its library, what its start-up and nearly
every program imports of the standard library, and the few files that `site` looks into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from envstore.fuse.tree import ROOT, Tree
from envstore.store.profiles import Range
from envstore.store.source import Kind

_LIBRARY = re.compile(rb"python3\.\d+t?")
_PYTHON = re.compile(rb"python(3(\.\d+)?t?)?")
_SHARED = re.compile(rb"libpython3(\.\d+)?.*\.so.*")

_HEAD = 4 << 20
"""Bytes of one file: what is loaded of a program comes first, what debuggers read last."""

_FIRST = (
    "encodings.__init__ encodings.aliases encodings.utf_8 encodings.latin_1 codecs io abc site os "
    "stat posixpath genericpath _collections_abc _sitebuiltins types warnings importlib.__init__ "
    "importlib._bootstrap importlib._bootstrap_external importlib.machinery importlib.util "
    "importlib._abc contextlib collections.__init__ collections.abc keyword operator reprlib "
    "functools enum re.__init__ re._compiler re._parser re._constants re._casefix sre_compile "
    "sre_parse sre_constants copyreg runpy pkgutil"
)
"""Modules in the order in which CPython's own start imports them."""

_SOON = (
    "typing copy weakref _weakrefset threading datetime _pydatetime struct string traceback "
    "linecache tokenize token textwrap inspect dis opcode _opcode_metadata ast "
    "importlib.metadata.__init__ importlib.abc importlib.resources.__init__ "
    "pathlib pathlib.__init__ pathlib._local pathlib._abc fnmatch glob ntpath urllib.__init__ "
    "urllib.parse ipaddress json.__init__ json.decoder json.encoder json.scanner "
    "logging.__init__ subprocess signal selectors socket select tempfile shutil random bisect "
    "hashlib heapq math numbers decimal _pydecimal fractions pickle _compat_pickle platform "
    "ctypes.__init__ ctypes._endian argparse gettext locale calendar time dataclasses bz2 lzma "
    "_compression gzip zipfile zipfile.__init__ zlib csv uuid getpass queue concurrent.__init__ "
    "concurrent.futures.__init__ concurrent.futures._base unittest.__init__ atexit "
    "email.__init__ email.message multiprocessing.__init__ multiprocessing.context "
    "multiprocessing.process multiprocessing.reduction secrets hmac base64 statistics timeit "
    "difflib pprint sysconfig sysconfig.__init__ _sysconfigdata ssl asyncio.__init__"
)
"""Modules that scientific programs import before long."""

_NATIVE = (
    b"math", b"_struct", b"_random", b"_bisect", b"_heapq", b"_datetime", b"_posixsubprocess",
    b"select", b"_socket", b"_pickle", b"_json", b"_hashlib", b"_blake2", b"_decimal", b"_ctypes",
    b"zlib", b"_bz2", b"_lzma", b"_opcode", b"array", b"grp", b"fcntl", b"_csv", b"_contextvars",
)  # fmt: skip


def default_ranges(tree: Tree) -> list[Range]:
    """Return what a start of the environment ``tree`` reads first; nothing for other trees."""
    found = list(_site_files(tree))
    homes = [
        home
        for lib in (b"lib", b"lib64")
        for home in _children(tree, _lookup(tree, lib))
        if _LIBRARY.fullmatch(tree.name(home)) and tree.kind(home) is Kind.DIRECTORY
    ]
    if any(_lookup(tree, b"encodings", home) is not None for home in homes):
        found = [*_interpreter(tree), *found]
        for home in homes:
            found += _standard_library(tree, home)
    sizes = {node: min(tree.stored_size(node), _HEAD) for node in found}
    return [Range(tree.path(node), 0, size) for node, size in sizes.items() if size]


def _site_files(tree: Tree) -> Iterator[int]:
    """Yield what `site` reads of an environment, whoever's interpreter it is."""
    yield from _file(tree, _lookup(tree, b"pyvenv.cfg"))
    for lib in _children(tree, _lookup(tree, b"lib")):
        if not _LIBRARY.fullmatch(tree.name(lib)):
            continue
        packages = _lookup(tree, b"site-packages", lib)
        for node in _children(tree, packages):
            if tree.name(node).endswith(b".pth"):
                yield from _file(tree, node)
        for name in ("_distutils_hack.__init__", "_virtualenv", "sitecustomize", "usercustomize"):
            if packages is not None:
                yield from _bytecode(tree, packages, tree.name(lib), name)


def _interpreter(tree: Tree) -> Iterator[int]:
    for node in _children(tree, _lookup(tree, b"bin")):
        if _PYTHON.fullmatch(tree.name(node)):
            yield from _file(tree, node)
    for node in _children(tree, _lookup(tree, b"lib")):
        if _SHARED.fullmatch(tree.name(node)):
            yield from _file(tree, node)


def _standard_library(tree: Tree, home: int) -> Iterator[int]:
    version = tree.name(home)
    for name in _FIRST.split():
        yield from _bytecode(tree, home, version, name)
    for node in _children(tree, _lookup(tree, b"lib-dynload", home)):
        if tree.name(node).partition(b".")[0] in _NATIVE:
            yield from _file(tree, node)
    for name in _SOON.split():
        yield from _bytecode(tree, home, version, name)


def _bytecode(tree: Tree, home: int, version: bytes, module: str) -> Iterator[int]:
    """Yield the compiled file of ``module``, ``package.__init__`` for a package's own."""
    *packages, name = module.encode().split(b".")
    directory: int | None = home
    for package in (*packages, b"__pycache__"):
        directory = _lookup(tree, package, directory)
    tag = b"cpython-" + version.removeprefix(b"python").replace(b".", b"")
    yield from _file(tree, _lookup(tree, b"%b.%b.pyc" % (name, tag), directory))


def _lookup(tree: Tree, name: bytes, directory: int | None = ROOT) -> int | None:
    return None if directory is None else tree.lookup(directory, name)


def _children(tree: Tree, directory: int | None) -> list[int]:
    if directory is None or tree.kind(directory) is not Kind.DIRECTORY:
        return []
    return [tree.child(directory, at) for at in range(tree.child_count(directory))]


def _file(tree: Tree, node: int | None) -> Iterator[int]:
    if node is not None and tree.kind(node) is Kind.FILE:
        yield node
