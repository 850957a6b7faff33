"""What the tests' own conda channel holds.

Names and versions, with what each is there for, are in ``RECIPES`` at the end.
"""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.channel.interpreter import MINOR, NEXT_MINOR, SITE_PACKAGES, TAG, VERSION, stage_python
from tests.channel.packing import JANUARY, MONTH, PLACEHOLDER, SHORT_PLACEHOLDER, About
from tests.channel.wheelhouse import (
    entry_points,
    is_pure,
    locked_version,
    unpack_as_conda,
    wheel,
)

PYTHON = f"python >={MINOR},<{NEXT_MINOR}.0a0"
PYTHON_ABI = f"python_abi {MINOR}.* *_{TAG}"
PURE: dict[str, Any] = {"subdir": "noarch", "noarch": "python", "build": "pyh0_0"}
GENERIC: dict[str, Any] = {"subdir": "noarch", "noarch": "generic"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A package: what it says of itself, and what writes its files.

    ``wheel`` says that a real wheel is fetched for it.
    """

    about: About
    fill: Callable[[Path], None]
    wheel: bool = False


def write(tree: Path, name: str, text: str | bytes, mode: int = 0o644) -> Path:
    """Write one file of a package, at a time that is the same in every run."""
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    os.utime(path, (JANUARY // 1000,) * 2)
    return path


def compile_c(tree: Path, name: str, source: str, *options: str | Path) -> Path:
    """Compile one C file into ``name`` below ``tree``, without what differs from run to run."""
    target = tree / name
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-O1", "-s", "-x", "c", "-", "-o", target, *options]
    subprocess.run(command, input=source.encode(), check=True, timeout=120)
    return target


def distribution(
    tree: Path, name: str, version: str, scripts: str = "", root: str = "site-packages"
) -> None:
    """Write the dist-info folder of a Python package."""
    folder = f"{root}/{name.replace('-', '_')}-{version}.dist-info"
    write(tree, f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    write(tree, f"{folder}/INSTALLER", "conda\n")
    write(tree, f"{folder}/RECORD", "")
    if scripts:
        write(tree, f"{folder}/entry_points.txt", f"[console_scripts]\n{scripts}\n")


def nothing(tree: Path) -> None:
    """Fill a package that only depends."""


def hello(version: str) -> Callable[[Path], None]:
    def fill(tree: Path) -> None:
        write(
            tree,
            "site-packages/hello_pkg/__init__.py",
            f"import sys\n\n__version__ = {version!r}\n\n\ndef main():\n"
            f"    print('hello', __version__, 'from', sys.prefix, sys.argv[1:])\n",
        )
        write(tree, "site-packages/hello_pkg/data.txt", f"data of {version}\n")
        write(
            tree,
            "python-scripts/hello-script",
            f"#!{PLACEHOLDER}/bin/python\nimport sys, hello_pkg\n"
            "print('script', hello_pkg.__version__, sys.executable)\n",
            0o755,
        )
        distribution(tree, "hello-pkg", version, "hello = hello_pkg:main")

    return fill


def greeting(version: str) -> Callable[[Path], None]:
    def fill(tree: Path) -> None:
        write(tree, "share/greeting/text", f"greetings, {version}\n")
        write(tree, "share/greeting/where.conf", f"here={PLACEHOLDER}/share/greeting\n")
        write(
            tree,
            "bin/greet",
            f"#!/bin/sh\n# of {version}\ncat '{PLACEHOLDER}/share/greeting/text'\n",
            0o755,
        )

    return fill


_LIBRARY = """
const char prefix[] = "{0}";
const char *paths = "{0}/share:{0}/lib";
const char *version = "{1}";
const char *get_prefix(void) {{ return prefix; }}
const char *get_paths(void) {{ return paths; }}
"""
_SHOW = """
#include <stdio.h>
const char *get_prefix(void);
const char *get_paths(void);
int main(void) { printf("%s\\n%s\\n", get_prefix(), get_paths()); return 0; }
"""


def prefixed(
    name: str, short: str, version: str, placeholder: str = PLACEHOLDER
) -> Callable[[Path], None]:
    """Return what fills a package with every kind of file that a prefix may be in."""

    def fill(tree: Path) -> None:
        soname = f"lib{short}.so.1"
        options = ("-shared", "-fPIC", f"-Wl,-soname,{soname}")
        library = compile_c(
            tree, f"lib/{soname}.0", _LIBRARY.format(placeholder, version), *options
        )
        (tree / f"lib/{soname}").symlink_to(f"{soname}.0")
        (tree / f"lib/lib{short}.so").symlink_to(soname)
        # The source comes on stdin, so what it is linked with must be said to be no C.
        linked = ("-x", "none", library, "-Wl,-rpath,$ORIGIN/../lib")
        compile_c(tree, f"bin/{short}show", _SHOW, *linked)
        script = f"import sys\nprint('script', sys.prefix, '{placeholder}')\n"
        write(tree, f"bin/{short}script", f"#!{placeholder}/bin/python\n{script}", 0o755)
        script = f'echo "shell $0" {placeholder}\n'
        write(tree, f"bin/{short}shell", f"#!{placeholder}/bin/{short}sh -e\n{script}", 0o755)
        (tree / f"bin/{short}sh").symlink_to("/bin/sh")
        conf = (
            f"[a]\nprefix={placeholder}\nlib={placeholder}/lib\ntwo={placeholder}:{placeholder}/x\n"
        )
        write(tree, f"share/{name}/conf.ini", conf)
        write(tree, f"share/{name}/plain.txt", "no prefix here\n")
        pc = f"prefix={placeholder}\nlibdir=${{prefix}}/lib\n"
        write(tree, f"lib/pkgconfig/{short}.pc", pc)
        (tree / f"share/{name}/relative").symlink_to(f"../../bin/{short}show")
        (tree / f"share/{name}/folder").symlink_to(f"../{name}")
        (tree / f"share/{name}/dangling").symlink_to("not/there")
        (tree / f"share/{name}/absolute").symlink_to(f"{placeholder}/share/{name}/plain.txt")

    return fill


_SPEEDUP = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, "42"}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_speedup", NULL, -1, methods};
PyMODINIT_FUNC PyInit__speedup(void) { return PyModule_Create(&module); }
"""


def speedup(tree: Path) -> None:
    """Fill a package with an extension module, and bytecode as conda packages ship it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    include = f"-I{sysconfig.get_path('include', vars={'installed_base': _base()})}"
    where = f"{SITE_PACKAGES}/speedup"
    compile_c(tree, f"{where}/_speedup{suffix}", _SPEEDUP, "-shared", "-fPIC", include)
    source = write(tree, f"{where}/__init__.py", "from speedup._speedup import answer\n")
    py_compile.compile(
        str(source),
        dfile=f"{PLACEHOLDER}/{where}/__init__.py",
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP,
    )
    distribution(tree, "speedup", "1.0", root=SITE_PACKAGES)


def _base() -> str:
    import sys

    return sys.base_prefix


def settings(tree: Path) -> None:
    """Fill a package with everything that activation obeys."""
    variables = {"SETTINGS_MODE": "fast", "SETTINGS_TEXT": "a b'c\"d $HOME `id` \\ é"}
    write(tree, "etc/conda/env_vars.d/settings.json", json.dumps(variables))
    write(
        tree,
        "etc/conda/activate.d/10_settings.sh",
        'export SETTINGS_BACKUP="${SETTINGS_HOME-}"\n'
        'export SETTINGS_HOME="$CONDA_PREFIX/share/settings"\n'
        f'export SETTINGS_RELOCATED="{PLACEHOLDER}/share"\n'
        'export SETTINGS_ORDER="${SETTINGS_ORDER-}1"\n',
    )
    write(
        tree,
        "etc/conda/activate.d/20_settings.sh",
        'export SETTINGS_ORDER="${SETTINGS_ORDER-}2"\n',
    )
    write(tree, "etc/conda/activate.d/30_settings.fish", "set -gx SETTINGS_FISH yes\n")
    write(
        tree,
        "etc/conda/deactivate.d/10_settings.sh",
        'if [ -n "$SETTINGS_BACKUP" ]; then export SETTINGS_HOME="$SETTINGS_BACKUP"\n'
        "else unset SETTINGS_HOME; fi\n"
        "unset SETTINGS_BACKUP SETTINGS_RELOCATED SETTINGS_ORDER\n",
    )
    write(tree, "share/settings/README", "settings\n")


def clobber(letter: str) -> Callable[[Path], None]:
    def fill(tree: Path) -> None:
        write(tree, "share/clobber/which.txt", f"{letter}\n")
        write(tree, f"share/clobber/{letter}.txt", f"only {letter}\n")

    return fill


def post_link(tree: Path) -> None:
    """Fill a package whose installation needs a script."""
    write(tree, "share/post-link/before.txt", "before\n")
    write(
        tree,
        "bin/.post-link-post-link.sh",
        '#!/bin/sh\nset -eu\necho "$PKG_NAME $PKG_VERSION" > "$PREFIX/share/post-link/made.txt"\n'
        'echo "$PREFIX" > "$PREFIX/share/post-link/prefix.txt"\n',
        0o755,
    )
    write(
        tree,
        "bin/.post-link-pre-unlink.sh",
        '#!/bin/sh\nrm -f "$PREFIX"/share/post-link/*\n',
        0o755,
    )


def post_link_fails(tree: Path) -> None:
    """Fill a package whose script fails."""
    write(tree, "share/post-link-fails/file", "file\n")
    write(
        tree,
        "bin/.post-link-fails-post-link.sh",
        '#!/bin/sh\necho "cannot do it" >> "$PREFIX/.messages.txt"\nexit 3\n',
        0o755,
    )


def text(name: str, said: str) -> Callable[[Path], None]:
    """Return what fills a package with one text file."""

    def fill(tree: Path) -> None:
        write(tree, name, said)

    return fill


def _of_wheel(name: str, *depends: str) -> Recipe:
    """Return the recipe of a real wheel made a conda package; the wheel is fetched if filled."""
    version = locked_version(name)
    pure = name not in _COMPILED

    def fill(tree: Path) -> None:
        made = wheel(name)
        assert is_pure(made) == pure
        unpack_as_conda(made, tree, "site-packages" if pure else SITE_PACKAGES)
        for script, (module, function) in entry_points(made).items():
            assert not pure, "a noarch package's entry points belong into its About"
            write(tree, f"bin/{script}", _SCRIPT.format(PLACEHOLDER, module, function), 0o755)

    if pure:
        about = About(name, version, depends=("python >=3.8", *depends), **PURE)
    else:
        build = f"py{TAG.removeprefix('cp')}h0_0"
        about = About(name, version, build, depends=(PYTHON, PYTHON_ABI, *depends))
    return Recipe(about, fill, wheel=True)


_COMPILED = {"numpy", "pandas", "scipy", "scikit-learn"}
_SCRIPT = """#!{}/bin/python
import sys

from {} import {} as main

if __name__ == "__main__":
    sys.exit(main())
"""

RECIPES = (
    Recipe(
        About("python", VERSION, "h0_cpython", depends=("__glibc >=2.17,<3.0.a0",)),
        stage_python,
    ),
    Recipe(
        About(
            "python_abi",
            MINOR,
            f"8_{TAG}",
            8,
            constrains=(f"python {MINOR}.* *_cpython",),
            **GENERIC,
        ),
        nothing,
    ),
    # noarch python with an entry point and a script; two versions, the newer needs a newer friend
    Recipe(
        About(
            "hello-pkg",
            "1.0",
            depends=("python >=3.8", "greeting >=1.0"),
            entry_points=("hello = hello_pkg:main",),
            **PURE,
        ),
        hello("1.0"),
    ),
    Recipe(
        About(
            "hello-pkg",
            "1.1",
            depends=("python >=3.8", "greeting >=2.0"),
            entry_points=("hello = hello_pkg:main",),
            timestamp=JANUARY + 6 * MONTH,
            **PURE,
        ),
        hello("1.1"),
    ),
    # noarch generic, with a prefix in text
    Recipe(About("greeting", "1.0", **GENERIC), greeting("1.0")),
    Recipe(About("greeting", "2.0", timestamp=JANUARY + 3 * MONTH, **GENERIC), greeting("2.0")),
    # prefixes in a library (alone, and in a list of paths), shebangs, text, symlinks
    Recipe(
        About("binprefix", "2.0", "h1_0", depends=(PYTHON,)), prefixed("binprefix", "bp", "2.0")
    ),
    Recipe(
        About("binprefix", "2.1", "h1_0", depends=(PYTHON,), timestamp=JANUARY + MONTH),
        prefixed("binprefix", "bp", "2.1"),
    ),
    # the same, in the older format and with room for 80 characters only
    Recipe(
        About("shortprefix", placeholder=SHORT_PLACEHOLDER, legacy=True),
        prefixed("shortprefix", "sp", "1.0", SHORT_PLACEHOLDER),
    ),
    Recipe(About("legacy", legacy=True), text("share/legacy/conf", f"prefix = {PLACEHOLDER}\n")),
    Recipe(About("speedup", build=f"py{TAG}_0", depends=(PYTHON, PYTHON_ABI)), speedup),
    Recipe(About("settings", **GENERIC), settings),
    # both bring share/clobber/which.txt
    Recipe(About("clobber-a", **GENERIC), clobber("a")),
    Recipe(About("clobber-b", **GENERIC), clobber("b")),
    Recipe(About("post-link"), post_link),
    Recipe(About("post-link-fails"), post_link_fails),
    # what no ordinary target has
    Recipe(About("needs-cuda", build="cuda12_0", depends=("__cuda >=12.0",)), nothing),
    Recipe(About("needs-new-glibc", depends=("__glibc >=2.99",)), nothing),
    # these two exclude each other
    Recipe(About("wants-old-greeting", depends=("greeting 1.*",), **GENERIC), nothing),
    Recipe(About("wants-new-greeting", depends=("greeting 2.*",), **GENERIC), nothing),
    Recipe(About("wants-missing", depends=("not-in-the-channel >=1",), **GENERIC), nothing),
    # real wheels, as conda packages
    _of_wheel("numpy"),
    _of_wheel("click"),
    _of_wheel("six"),
    _of_wheel("python-dateutil", "six >=1.5"),
    _of_wheel("tzdata"),
)
