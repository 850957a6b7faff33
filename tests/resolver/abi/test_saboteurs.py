"""Three packages that spoil an environment: found before anybody mounts it, in a pushed lock.

Each comes as a wheel into a conda environment. What the check says is compared with what that
environment's own Python says when it imports them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envstore.resolver.libraries import AbiError
from envstore.resolver.lock import Lock, PypiPackage
from tests.channel.conda import Channel
from tests.channel.wheelmaking import make_wheel
from tests.resolver.abi.builds import TO_LIB, Build
from tests.resolver.locks import conda_lock, push
from tests.stores import Store

MACHINE = os.uname().machine
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    if shutil.which("gcc") is None:
        pytest.skip("needs a compiler")
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="module")
def base(conda_channel: Channel, tmp_path_factory: pytest.TempPathFactory) -> Lock:
    return conda_lock(conda_channel, "python", cache=tmp_path_factory.mktemp("solving"))


class Saboteur:
    """An environment of conda's Python and one wheel with an extension module."""

    def __init__(self, scratch: Path, base: Lock) -> None:
        self._base, self._scratch = base, scratch
        self.build = Build(scratch / "build")
        self._local: dict[str, Path] = {}
        self.lock = base

    def module(self, source: str, *options: str) -> bytes:
        return self.build.library("_module.so", source, *options).read_bytes()

    def wheel(self, name: str, files: dict[str, bytes]) -> None:
        filename = f"{name}-1.0-{TAG}-{TAG}-linux_{MACHINE}.whl"
        path = make_wheel(self._scratch, name, "1.0", files, tag=f"{TAG}-{TAG}-linux_{MACHINE}")
        assert path.name == filename
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._local[sha256] = path
        package = PypiPackage(name, "1.0", filename, path.as_uri(), sha256, path.stat().st_size)
        self.lock = replace(self.lock, packages=(*self.lock.packages, package))

    def push(self, store: Store, *, check_abi: bool = True) -> None:
        machine = self._scratch / "machine"
        push(store, self.lock, machine, local=self._local, check_abi=check_abi)

    def imported(self, store: Store, name: str) -> str:
        """Return what Python says when it imports ``name`` from what was pushed all the same."""
        self.push(store, check_abi=False)
        prefix = self._scratch / "prefix"
        store.pull(prefix, "env")
        done = subprocess.run(
            [prefix / "bin/python", "-c", f"import {name}"],
            env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert "ImportError" in done.stderr
        return done.stderr.replace(f"{prefix}/", "").strip().rpartition("ImportError: ")[2]


@pytest.fixture
def saboteur(tmp_path: Path, base: Lock) -> Saboteur:
    return Saboteur(tmp_path, base)


def test_a_missing_symbol_version(store: Store, saboteur: Saboteur) -> None:
    both = "ONE_1.0 { global: first; local: *; }; ONE_2.0 { second; } ONE_1.0;"
    given = "void first(){} void second(){}"
    library = saboteur.build.library("libone.so.1", given, script=both)
    wants = "void second(); void go(){ second(); }"
    module = saboteur.module(wants, str(library), "-Wl,-rpath,$ORIGIN/../one.libs")
    old = "ONE_1.0 { global: first; local: *; };"
    stale = saboteur.build.library("libone.so.1", given, script=old).read_bytes()
    saboteur.wheel("one", {"one.libs/libone.so.1": stale, "one/__init__.py": b""})
    saboteur.wheel("wantsone", {"wantsone/__init__.py": b"", "wantsone/_module.so": module})
    with pytest.raises(AbiError) as raised:
        saboteur.push(store)
    assert store.targets() == []
    (finding,) = raised.value.findings
    assert finding.code == "VERSION_MISSING"
    assert finding.package == "wantsone-1.0"
    assert finding.provider.endswith("libone.so.1 of one-1.0")
    said = saboteur.imported(store, "wantsone._module")
    assert finding.message in said


def test_a_missing_cuda_runtime(store: Store, saboteur: Saboteur) -> None:
    library = saboteur.build.library("libcudart.so.12", "void cudaFree(){}")
    module = saboteur.module("void cudaFree(); void go(){ cudaFree(); }", str(library))
    saboteur.wheel("gpu", {"gpu/__init__.py": b"", "gpu/_module.so": module})
    with pytest.raises(AbiError, match="nvidia-cuda-runtime-cu12") as raised:
        saboteur.push(store)
    (finding,) = raised.value.findings
    assert (finding.code, finding.package) == ("NEEDED_MISSING", "gpu-1.0")
    assert finding.message == saboteur.imported(store, "gpu._module")


def test_an_undefined_symbol(store: Store, saboteur: Saboteur) -> None:
    module = saboteur.module("void no_such_symbol(); void go(){ no_such_symbol(); }")
    saboteur.wheel("undefined", {"undefined/__init__.py": b"", "undefined/_module.so": module})
    with pytest.raises(AbiError, match="no_such_symbol") as raised:
        saboteur.push(store)
    (finding,) = raised.value.findings
    assert (finding.code, finding.package) == ("UNDEFINED_SYMBOL", "undefined-1.0")
    said = saboteur.imported(store, "undefined._module")
    assert said == f"{finding.path}: {finding.message}"


def test_what_pip_brings_finds_what_conda_brings(
    store: Store, base: Lock, conda_channel: Channel, tmp_path: Path
) -> None:
    lock = conda_lock(conda_channel, "python", "binprefix", cache=tmp_path / "solving")
    saboteur = Saboteur(tmp_path, lock)
    library = saboteur.build.library("libbp.so.1", "char *get_prefix(){ return 0; }")
    source = "char *get_prefix(); char *go(){ return get_prefix(); }"
    module = saboteur.module(source, str(library), TO_LIB.replace("../..", "../../.."))
    saboteur.wheel("usesconda", {"usesconda/__init__.py": b"", "usesconda/_module.so": module})
    saboteur.push(store)
    assert len(store.targets()) == 1
