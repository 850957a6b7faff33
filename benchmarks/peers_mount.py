"""How envstore's peers start an environment cold: mounts, whole images, archives, installs.

Each is made as fast as its options allow. Images, archives and wheels are fetched by a plain GET
of a public object, which no program does with less effort than ``curl``.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks.artefacts import PUBLIC, Bench, Maker, Record, upload
from benchmarks.measure import BenchmarkError, run
from benchmarks.mounted import Available, serving
from benchmarks.peers import LEVEL, Squashfs
from benchmarks.starts import (
    PLAIN,
    PROFILED,
    REPACKED,
    EnvstoreStart,
    NodeStart,
    Start,
    plain_environment,
)
from benchmarks.workloads import pins

Command = list[str | Path]

_IN_STORE = "env"


class Starter(Protocol):
    """A way to start an environment on a node that has nothing of it."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    @property
    def artefact(self) -> str | None:
        """What it needs in the store, None if nothing."""
        ...

    def lacking(self) -> str | None:
        """Return why it cannot be measured here, None if it can."""
        ...

    def maker(self) -> Maker:
        """Return what makes its artefact."""
        ...

    def laid_out(self, start: Start) -> Any:
        """Return a context manager in which the node has what it had before; not timed."""
        ...

    def available(self, start: Start) -> Any:
        """Return a context manager that yields ``Available``; entering it is timed."""
        ...


def starters() -> dict[str, Starter]:
    """Return every way by its name, envstore's first and the floor last."""
    alone = ("--node", "off")
    off, none = (*alone, "--fast-path", "off"), ("--profile", "none")
    every: list[Starter] = [
        EnvstoreStart("envstore", PLAIN),
        EnvstoreStart("envstore-none", PLAIN, *none, *off),
        EnvstoreStart("envstore-profile", PROFILED, *off, follows=True),
        EnvstoreStart("envstore-repacked", REPACKED, *off, follows=True),
        EnvstoreStart("envstore-fast", REPACKED, *alone, "--fast-path", "on", follows=True),
        NodeStart("envstore-node", REPACKED, "--node", "on", follows=True),
        JuiceFS(),
        Rclone(),
        SquashfsImage(),
        TarArchive(),
        UvInstall(),
        Local(),
    ]
    return {starter.name: starter for starter in every}


def program(name: str) -> str | None:
    """Return the path of a program: beside the running interpreter, or in PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


class _Peer:
    """What all peers share: an artefact of their own, and programs that must be there."""

    programs: tuple[str, ...] = ()

    def lacking(self) -> str | None:
        absent = [name for name in self.programs if program(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def maker(self) -> Maker:
        return self.make

    def make(self, bench: Bench) -> Record:
        raise NotImplementedError

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        yield

    def command(self, name: str, *arguments: str | Path) -> Command:
        found = program(name)
        assert found is not None
        return [found, *arguments]


class JuiceFS(_Peer):
    """JuiceFS with its metadata in SQLite on the node, which costs no round trip: its best case."""

    name = artefact = "juicefs"
    programs = ("juicefs", "fusermount3")

    def make(self, bench: Bench) -> Record:
        bucket = bench.server.new_bucket()
        database = bench.home / "meta.db"
        meta = f"sqlite3://{database}"
        keys = self._keys(bench.server.environment)
        place = ["--storage", "s3", "--bucket", f"{bench.server.endpoint}/{bucket}", *keys]
        options = ["--compress", "zstd", "--trash-days", "0"]
        run(self.command("juicefs", "format", *place, *options, meta, "bench"))
        mountpoint = bench.home / "mnt"
        with serving(self._mount(bench.home, meta), mountpoint, plain_environment()):
            run(["cp", "-a", bench.environment.tree, mountpoint / _IN_STORE])
        shutil.rmtree(bench.home / "cache", ignore_errors=True)
        mountpoint.rmdir()
        # What it wrote last lies beside the database, which is copied for every run.
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return {"bucket": bucket, "database": str(database)}

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        # The metadata know where the data lie, and by which keys, which are new for every run.
        database = start.scratch / "meta.db"
        shutil.copy(start.record["database"], database)
        place = ["--bucket", f"{start.link.endpoint}/{start.record['bucket']}"]
        new = [*place, *self._keys(start.server.environment), f"sqlite3://{database}"]
        run(self.command("juicefs", "config", "--yes", *new), env=plain_environment())
        yield

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        meta = f"sqlite3://{start.scratch / 'meta.db'}"
        cached = [f"--{what}-cache=3600" for what in ("attr", "entry", "dir-entry", "open")]
        command = [*self._mount(start.scratch, meta), "--read-only", *cached]
        mountpoint = start.mountpoint
        with serving(command, mountpoint, plain_environment()) as pid:
            yield Available(mountpoint / _IN_STORE, pid)

    def _mount(self, home: Path, meta: str) -> Command:
        quiet: Command = [
            "--no-usage-report",
            "--no-syslog",
            "--no-bgjob",
            "--log",
            home / "juicefs.log",
        ]
        own: Command = ["--metrics", "127.0.0.1:0", "--cache-dir", home / "cache"]
        return self.command("juicefs", "mount", *quiet, *own, meta)

    @staticmethod
    def _keys(variables: dict[str, str]) -> list[str]:
        access, secret = variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]
        return ["--access-key", access, "--secret-key", secret]


class Rclone(_Peer):
    """``rclone mount`` of plain objects, with its cache of whole files."""

    name = artefact = "rclone"
    programs = ("rclone", "fusermount3")

    def make(self, bench: Bench) -> Record:
        bucket = bench.server.new_bucket()
        settings = self._settings(bench.home, bench.server.endpoint, bench.server.environment)
        many = ["--links", "--transfers", "16", "--checkers", "16", "--quiet"]
        tree, there = bench.environment.tree, f"w:{bucket}/{_IN_STORE}"
        run(self.command("rclone", *settings, "copy", *many, tree, there), env=plain_environment())
        return {"bucket": bucket}

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        self._settings(start.scratch, start.link.endpoint, start.server.environment)
        yield

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        settings: Command = ["--config", start.scratch / "rclone.conf"]
        cache: Command = ["--vfs-cache-mode", "full", "--cache-dir", start.scratch / "cache"]
        remembered = ["--dir-cache-time", "1h", "--attr-timeout", "60s"]
        options: Command = ["--read-only", "--links", *cache, *remembered]
        there = f"w:{start.record['bucket']}"
        command = self.command("rclone", *settings, "mount", *options, there)
        mountpoint = start.mountpoint
        with serving(command, mountpoint, plain_environment()) as pid:
            yield Available(mountpoint / _IN_STORE, pid)

    @staticmethod
    def _settings(home: Path, endpoint: str, variables: dict[str, str]) -> Command:
        path = home / "rclone.conf"
        path.write_text(
            "[w]\ntype = s3\nprovider = SeaweedFS\nforce_path_style = true\n"
            f"endpoint = {endpoint}\naccess_key_id = {variables['AWS_ACCESS_KEY_ID']}\n"
            f"secret_access_key = {variables['AWS_SECRET_ACCESS_KEY']}\n"
        )
        return ["--config", path]


class _Fetched(_Peer):
    """Something in the public bucket that is fetched whole."""

    def url(self, start: Start) -> str:
        return f"{start.link.endpoint}/{PUBLIC}/{start.record['key']}"

    def curl(self, *arguments: str | Path) -> Command:
        return self.command("curl", "--silent", "--show-error", "--fail", *arguments)

    def publish(self, bench: Bench, path: Path, name: str) -> Record:
        key = f"{bench.environment.name}.{name}"
        upload(bench.server, PUBLIC, [(key, path)])
        path.unlink()
        return {"bucket": PUBLIC, "key": key}


class SquashfsImage(_Fetched):
    """A whole squashfs image, fetched and mounted by the kernel through a loop device."""

    name = artefact = "squashfs"
    programs = ("mksquashfs", "curl", "mount", "umount")

    def lacking(self) -> str | None:
        return super().lacking() or ("only root can" if os.geteuid() != 0 else None)

    def make(self, bench: Bench) -> Record:
        image = bench.home / "image"
        run(Squashfs.command(bench.environment.tree, image))
        return self.publish(bench, image, "squashfs")

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        image, mountpoint = start.scratch / "image", start.mountpoint
        if not image.exists():
            run(self.curl("--output", image, self.url(start)), sync=False)
        with loop_mounted(image, mountpoint):
            yield Available(mountpoint)


class TarArchive(_Fetched):
    """An archive that is unpacked while it is fetched."""

    name = artefact = "tar"
    programs = ("tar", "zstd", "curl")

    def make(self, bench: Bench) -> Record:
        archive = bench.home / "archive"
        pack: Command = ["tar", "-C", bench.environment.tree, "-cf", "-", "."]
        run(pack, ["zstd", f"-{LEVEL}", "-T0", "-q", "-c"], output=archive)
        return self.publish(bench, archive, "tar.zst")

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        root = start.mountpoint
        root.mkdir()
        fetch, decompress = self.curl(self.url(start)), self.command("zstd", "-dcq")
        run(fetch, decompress, self.command("tar", "-C", root, "-xf", "-"), sync=False)
        yield Available(root)


class UvInstall(_Peer):
    """``uv pip install`` of the same versions, from a page of wheels in the public bucket."""

    name, artefact = "uv", "wheels"
    programs = ("uv",)

    def make(self, bench: Bench) -> Record:
        wanted = pins(bench.environment.tree)
        wheels = bench.wheels or self._fetched(bench, wanted)
        prefix = f"{bench.environment.name}-wheels"
        lines, files = [], []
        for wheel in _chosen(wheels, wanted):
            metadata = bench.home / f"{wheel.name}.metadata"
            metadata.write_bytes(_metadata(wheel))
            digest = hashlib.sha256(metadata.read_bytes()).hexdigest()
            files += [(f"{prefix}/{wheel.name}", wheel)]
            files += [(f"{prefix}/{wheel.name}.metadata", metadata)]
            name = html.escape(wheel.name)
            lines.append(f'<a href="{name}" data-core-metadata="sha256={digest}">{name}</a><br>')
        page = bench.home / "index.html"
        page.write_text("<!DOCTYPE html><html><body>\n" + "\n".join(lines) + "\n</body></html>\n")
        upload(bench.server, PUBLIC, [*files, (f"{prefix}/index.html", page)])
        (bench.home / "pins.txt").write_text("\n".join(wanted) + "\n")
        return {"bucket": PUBLIC, "key": f"{prefix}/index.html", "home": str(bench.home)}

    @contextmanager
    def laid_out(self, start: Start) -> Iterator[None]:
        shutil.copy(Path(start.record["home"]) / "pins.txt", start.scratch)
        yield

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        root = start.mountpoint
        variables = plain_environment() | {"UV_CACHE_DIR": str(start.scratch / "cache")}
        base = ["--no-config", "--offline", "--python", start.environment.interpreter]
        run(self.command("uv", "venv", "--quiet", *base, root), env=variables, sync=False)
        page = f"{start.link.endpoint}/{PUBLIC}/{start.record['key']}"
        source = ["--no-config", "--no-index", "--find-links", page, "--no-deps"]
        into: Command = ["--python", root / "bin" / "python", "-r", start.scratch / "pins.txt"]
        install = self.command("uv", "pip", "install", "--quiet", *source, *into)
        run(install, env=variables, sync=False)
        yield Available(root)

    def _fetched(self, bench: Bench, wanted: list[str]) -> Path:
        pip = [bench.environment.interpreter, "-I", "-m", "pip", "download", "--quiet"]
        run([*pip, "--no-deps", "--only-binary=:all:", "-d", bench.home, *wanted])
        return bench.home


class Local(_Peer):
    """The environment on local disk, with nothing of it in memory: the floor."""

    name, artefact = "local", None

    @contextmanager
    def available(self, start: Start) -> Iterator[Available]:
        yield Available(start.environment.tree)


@contextmanager
def loop_mounted(image: Path, mountpoint: Path) -> Iterator[None]:
    """Mount a squashfs image read-only by the kernel."""
    mountpoint.mkdir()
    run(["mount", "-t", "squashfs", "-o", "loop,ro", image, mountpoint], sync=False)
    try:
        yield
    finally:
        deadline = time.monotonic() + 10
        while subprocess.run(["umount", mountpoint], check=False, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{mountpoint} cannot be unmounted")
            time.sleep(0.1)


def _metadata(wheel: Path) -> bytes:
    name, version, _ = wheel.name.split("-", 2)
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"{name}-{version}.dist-info/METADATA")


def _chosen(wheels: Path, wanted: list[str]) -> list[Path]:
    """Return the wheels of exactly what is wanted, of all that lie in a directory."""
    names = {_normal(pin.replace("==", "-")) for pin in wanted}
    found = [
        path
        for path in wheels.glob("*.whl")
        if _normal("-".join(path.name.split("-")[:2])) in names
    ]
    if len(found) != len(names):
        raise BenchmarkError(f"{wheels} holds {len(found)} of the {len(names)} wheels needed")
    return sorted(found)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
