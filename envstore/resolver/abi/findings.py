"""What a check found, and how much of it stops a push."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from envstore.resolver.abi.search import Tree

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not fit, with the first file it was met in and how many there are.

    ``code`` is one of NEEDED_MISSING, NEEDED_NOT_ON_PATH, HOST_LIBRARY, VERSION_MISSING,
    UNDEFINED_SYMBOL, GLIBC_TOO_NEW, ARCH_MISMATCH, DUPLICATE_SONAME, CUDA_MISMATCH. ``subject``
    is the library, version or symbol it is about, ``message`` what the loader says or would say,
    ``provider`` who has what is wanted, ``hint`` what to change.
    """

    level: str
    code: str
    path: str
    package: str
    subject: str
    message: str
    provider: str = ""
    hint: str = ""
    files: int = 1

    @property
    def line(self) -> str:
        """What to tell in one line: whose file it is, which, and what is wrong with it."""
        return ": ".join(part for part in (self.package, self.path, self.message) if part)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        return {name: getattr(self, name) for name in self.__slots__}


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Tell what befalls many files of a package for the same reason once; errors come first."""
    groups: dict[tuple[str, ...], Finding] = {}
    for item in findings:
        key = item.level, item.code, item.package, item.subject
        old = groups.get(key)
        groups[key] = item if old is None else replace(old, files=old.files + 1)
    return sorted(
        groups.values(),
        key=lambda item: (item.level != ERROR, item.package, item.code, item.subject, item.path),
    )


_MODULE = re.compile(r"lib/python3\.\d+t?/(.*/)?(?!lib)[^/]*\.so")
_TAG = re.compile(r"\.(?:cpython-(\d+t?)|(pypy\d+))[^/.]*\.so$")
_PUBLIC = re.compile(r"s?bin/[^/]+|lib(64)?/[^/]+")
_SIDE_SHOW = re.compile(
    r"(^|/)(plugins?|drivers|tests?|testing|testdata|test_data|examples)/"
    r"|numba/np/ufunc/(tbb|omp)pool"
    r"|cupy_backends/cuda/libs/(cudnn|nccl|cutensor|cusparselt)"
    r"|(^|/)libmkl_"
    r"|(^|/)libcufile_rdma"
)
_DIGITS = re.compile(r"\d+")


def is_vital(path: str) -> bool:
    """Whether a file is surely meant to be loaded: an extension module, a program, a library
    in the place for all.

    Others may be plug-ins, or one of several variants of which a package picks one.
    """
    if _SIDE_SHOW.search(path):
        return False
    return bool(_MODULE.fullmatch(path) or _PUBLIC.fullmatch(path))


def is_side_show(path: str) -> bool:
    """Whether a package does without this file where it cannot be loaded."""
    return _SIDE_SHOW.search(path) is not None


def python_tag(path: str) -> str | None:
    """Return ``311`` of ``x.cpython-311-x86_64-linux-gnu.so``, ``None`` without such a tag."""
    match = _TAG.search(path)
    return (match[1] or match[2]) if match else None


def variants(tree: Tree) -> dict[str, list[str]]:
    """Return the files whose names differ from others beside them by numbers only."""
    groups: dict[str, list[str]] = {}
    for path in tree.files:
        folder, _, name = path.rpartition("/")
        stem, dot, rest = name.partition(".")
        groups.setdefault(f"{folder}/{_DIGITS.sub('#', stem)}{dot}{rest}", []).append(path)
    return {path: group for group in groups.values() if len(group) > 1 for path in group}
