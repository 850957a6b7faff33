"""Real wheels, of the versions and hashes in wheels.lock, fetched once and kept.

They are kept in ``~/.cache/envstore-tests``, or where ENVSTORE_TESTS_CACHE says; so are the conda
packages that the tests' channel is made of.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from tests.channel.packing import PLACEHOLDER

# Read when this is imported: the tests themselves run without such variables.
CACHE = Path(os.environ.get("ENVSTORE_TESTS_CACHE") or Path.home() / ".cache" / "envstore-tests")


@cache
def _locked() -> dict[str, tuple[str, frozenset[str]]]:
    """Return version and accepted SHA-256 digests by name, for this Python."""
    found = {}
    text = Path(__file__).with_name("wheels.lock").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line.partition(" --hash")[0])
        if requirement.marker is None or requirement.marker.evaluate():
            version = str(requirement.specifier).removeprefix("==")
            digests = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
            found[requirement.name] = (version, digests)
    return found


def locked_version(name: str) -> str:
    """Return the version of ``name`` that wheels.lock asks for."""
    return _locked()[name][0]


def locked_names() -> list[str]:
    """Return the names of all distributions in wheels.lock."""
    return sorted(_locked())


def wheel(name: str) -> Path:
    """Return the wheel of ``name``, checked, after fetching it if this machine never did."""
    version, digests = _locked()[name]
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"
    with open(folder / f".lock-{name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob(pattern):
            if hashlib.sha256(path.read_bytes()).hexdigest() in digests and _fits(path):
                return path
        with tempfile.TemporaryDirectory(dir=folder) as work:
            wanted = Path(work, "wanted.txt")
            lines = [f"{name}=={version}", *(f"--hash=sha256:{one}" for one in sorted(digests))]
            wanted.write_text(" ".join(lines) + "\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            options = ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
            subprocess.run([*command, *options, "-r", wanted, "-d", work], check=True, timeout=240)
            (made,) = Path(work).glob("*.whl")
            return made.rename(folder / made.name)


def wheels(*names: str) -> list[Path]:
    """Return the wheels of ``names``, of everything in wheels.lock if there are none."""
    return [wheel(name) for name in names or locked_names()]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` where that can be, else a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def is_pure(path: Path) -> bool:
    """Say whether a wheel fits every interpreter and platform."""
    return path.name.endswith("-none-any.whl")


def _fits(path: Path) -> bool:
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    return not parse_wheel_filename(path.name)[3].isdisjoint(sys_tags())


def unpack_as_conda(path: Path, tree: Path, site_packages: str) -> None:
    """Lay a wheel out below ``tree`` as a conda package holds it, its entry points aside."""
    inside = tree / site_packages
    places = {"purelib": inside, "platlib": inside, "data": tree, "scripts": tree / "bin"}
    if is_pure(path):
        places["scripts"] = tree / "python-scripts"
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if item.is_dir():
                continue
            data = archive.read(item)
            target = inside / item.filename
            scheme = re.match(r"[^/]+\.data/(\w+)/(.+)", item.filename)
            if scheme:
                target = places[scheme[1]] / scheme[2]
                if scheme[1] == "scripts" and data.startswith(b"#!python"):
                    data = f"#!{PLACEHOLDER}/bin/python".encode() + data.removeprefix(b"#!python")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod((item.external_attr >> 16) & 0o777 or 0o644)
    for metadata in inside.glob("*.dist-info"):
        (metadata / "INSTALLER").write_text("conda\n")


def entry_points(path: Path) -> dict[str, tuple[str, str]]:
    """Return a wheel's console scripts: module and function by name."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/entry_points.txt"):
                parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
                parser.read_string(archive.read(name).decode())
                if parser.has_section("console_scripts"):
                    found = {}
                    for script, said in parser.items("console_scripts"):
                        module, _, function = said.partition(":")
                        found[script] = (module.strip(), function.strip())
                    return found
    return {}
