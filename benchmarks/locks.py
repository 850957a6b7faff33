"""Reads every specification and lock below a directory and says which could be, or why not.

``python -m benchmarks.locks DIRECTORY [--platform linux-64] [--python 3.12] [--glibc 2.28]``

The directory is one with other people's files; there is none in this repository. Nothing is
fetched. Files of a name that no specification has are passed over.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path

from envstore.errors import EnvstoreError
from envstore.resolver.lock import Lock
from envstore.resolver.specs import Prefix, detect_format, read_specs

_NAMES = re.compile(
    r".*\.lock|pixi\.toml|pyproject\.toml|pylock.*\.toml|.*\.ya?ml"
    r"|.*(requirements|constraints|lock|linux|spec).*\.(txt|in)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--platform", default="linux-64")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--glibc", default="2.28")
    chosen = parser.parse_args()
    reads, fails = Counter[str](), Counter[str]()
    for parent, directories, names in os.walk(chosen.directory):
        directories.sort()
        for name in sorted(filter(_NAMES.fullmatch, names)):
            path = Path(parent, name)
            form, said = read(path, chosen.platform, chosen.python, chosen.glibc)
            if not form:
                continue
            (fails if said.startswith("no: ") else reads)[form] += 1
            print(f"{form:16} {path.relative_to(chosen.directory)}: {said}")
    print()
    for form in sorted({*reads, *fails}):
        print(f"{form:16} {reads[form]} of {reads[form] + fails[form]}")
    print(f"{'all':16} {reads.total()} of {reads.total() + fails.total()}")


def read(path: Path, platform: str, python: str, glibc: str) -> tuple[str, str]:
    """Return a file's format and what is in it, or why it cannot be read."""
    form, warnings = "", list[str]()
    start = time.perf_counter()
    try:
        form = detect_format(path)
        if not form:
            return "", ""
        found = read_specs([path], platform=platform, python=python, glibc=glibc, warnings=warnings)
    except EnvstoreError as error:
        return form or "unknown", f"no: {error}".replace(str(path), path.name)
    took = time.perf_counter() - start
    assert not isinstance(found, Prefix)
    if isinstance(found, Lock):
        built = sum(package.build is not None for package in found.pypi())
        said = f"{len(found.conda())} conda packages, {len(found.pypi())} of PyPI"
        said += f" ({built} to be built)" if built else ""
    else:
        said = f"{len(found.conda.specs)} specs, {len(found.pypi.requirements)} requirements"
    return form, f"{said}, {len(warnings)} warnings, {took:.2f} s"


if __name__ == "__main__":
    main()
