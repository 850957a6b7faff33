"""A channel of as many ordinary Python packages as a test wants, and of newer versions of some."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

from tests.channel.conda import Channel, write_repodata
from tests.channel.content import PURE, distribution, write
from tests.channel.packing import JANUARY, MONTH, About, Package, pack
from tests.trees import noise, prose

_MODULES = 8


def build_many(directory: Path, count: int, *, newer: Collection[int] = ()) -> Channel:
    """Make packages ``part-0`` ... of modules and data, about 60 KiB each, and ``all-parts``.

    ``all-parts`` depends on all of them, and each of them on Python, which must come from
    another channel. Those in ``newer`` are there in version 1.1 as well as in 1.0.
    """
    packages = []
    with tempfile.TemporaryDirectory(prefix="envstore-many-") as work:
        for number in range(count):
            for version in ("1.0", "1.1") if number in newer else ("1.0",):
                tree = Path(work, f"{number}-{version}")
                packages.append(_part(directory, tree, number, version))
        names = tuple(f"part-{number}" for number in range(count))
        about = About("all-parts", depends=("python", *names), **PURE)
        Path(work, "none").mkdir()
        path = pack(directory / "noarch", Path(work, "none"), about)
        packages.append(Package.of(about, path))
    return write_repodata(directory, packages)


def _part(directory: Path, tree: Path, number: int, version: str) -> Package:
    name = f"part_{number}"
    where = f"site-packages/{name}"
    write(tree, f"{where}/__init__.py", f"VERSION = {version!r}\n")
    for module in range(_MODULES):
        text = prose(f"{number} {module}", 3000).decode()
        write(
            tree,
            f"{where}/module{module}.py",
            f"TEXT = {text!r}\n\n\ndef length():\n    return len(TEXT)\n",
        )
    write(tree, f"{where}/data.bin", noise(f"{number} {version}", 40_000))
    distribution(tree, f"part-{number}", version, f"part-{number} = {name}.module0:length")
    about = About(
        f"part-{number}",
        version,
        depends=("python >=3.8",),
        entry_points=(f"part-{number} = {name}.module0:length",),
        timestamp=JANUARY + (MONTH if version == "1.1" else 0),
        **PURE,
    )
    return Package.of(about, pack(directory / "noarch", tree, about))
