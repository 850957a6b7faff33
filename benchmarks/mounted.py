"""Ways to use a stored tree as a directory: envstore's mount and those of its peers.

``prepare`` stores the tree once. ``mounted`` then makes it available on a machine that has
nothing of it yet, and takes it away again.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measure import BenchmarkError, filesystem_of, run
from benchmarks.peers import Borg, Casync, Restic, Squashfs, TarZstd
from benchmarks.results import OURS
from examples.client import Envstore, Mount, is_mounted
from examples.seaweed import S3Server

_PATIENCE = 120.0
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Available:
    """A tree in use: its root directory, and the process that serves it, if there is one."""

    root: Path
    pid: int | None = None
    mount: Mount | None = None


class Mounter(Protocol):
    """A way to use a stored tree. ``bucket`` is where it lies, None if it is on local disk."""

    name: str
    programs: tuple[str, ...]
    bucket: str | None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        """Store ``tree``, in ``home`` or on ``server``; not timed."""
        ...

    def mounted(self, scratch: Path) -> Any:
        """Return a context manager that yields ``Available`` once the tree answers.

        ``scratch`` is an empty directory for mount point and caches.
        """
        ...


def mounters() -> list[Mounter]:
    """Return every way, envstore first and local disk last."""
    return [EnvstoreMount(), Squashfuse(), ResticMount(), CasyncMount(), BorgMount(), TarUnpacked()]


class EnvstoreMount:
    """envstore's lazy mount of a snapshot in S3, with an empty cache."""

    name = OURS
    programs = ()
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        self._server, self.bucket = server, server.new_bucket()
        pusher = self.client(home)
        pusher.call("init")
        pusher.call("push", "bench", tree)

    def client(self, home: Path) -> Envstore:
        """Return a node of its own, whose cache lies in ``home``."""
        assert self.bucket is not None
        return Envstore(self._server.url(self.bucket), home, self._server.environment)

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        with self.client(scratch).mounted("bench", scratch / "mnt") as mount:
            yield Available(mount.path, mount.pid, mount)


class Squashfuse:
    """squashfuse over an image that is first fetched whole from S3."""

    name = "squashfuse (image from S3)"
    programs = ("mksquashfs", "squashfuse", "fusermount3")
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        image = home / "tree.squashfs"
        run(Squashfs.command(tree, image))
        self._server, self.bucket = server, server.new_bucket()
        upload(server, self.bucket, image)

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        assert self.bucket is not None
        image = scratch / "tree.squashfs"
        download(self._server, self.bucket, image)
        with serving(["squashfuse", "-f", image], scratch / "mnt") as pid:
            yield Available(scratch / "mnt", pid)


class ResticMount:
    """restic's own mount of its latest snapshot in S3."""

    name = "restic mount (S3)"
    programs = ("restic", "fusermount3")
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        self._home, self.bucket = home, server.new_bucket()
        self._repository = f"s3:{server.endpoint}/{self.bucket}"
        self._environment = {**server.environment, "PATH": "/usr/bin:/bin", "HOME": str(home)}
        (home / "password").write_text("benchmark\n")
        command = Restic.command(home, self._repository)
        run([*command, "init"], env=self._environment)
        run([*command, "backup", "--host", "bench", "."], env=self._environment, cwd=tree)

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        shutil.copy(self._home / "password", scratch / "password")
        command = [*Restic.command(scratch, self._repository), "mount"]
        with serving(command, scratch / "mnt", self._environment) as pid:
            yield Available(scratch / "mnt" / "snapshots" / "latest", pid)


class CasyncMount:
    """casync's own mount, from a store on local disk."""

    name = "casync mount (local store)"
    programs = ("casync", "fusermount3")
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        self._home = home
        Casync().store(home, tree)

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        store = f"--store={self._home / 'store.castr'}"
        command = ["casync", "mount", store, self._home / "tree.caidx"]
        with serving(command, scratch / "mnt") as pid:
            yield Available(scratch / "mnt", pid)


class BorgMount:
    """Borg's own mount, from a repository on local disk."""

    name = "borg mount (local store)"
    programs = ("borg", "fusermount3")
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        self._home, tool = home, Borg()
        tool.prepare(home)
        tool.store(home, tree)

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        command = ["borg", "mount", "-f", f"{self._home / 'repository'}::1"]
        with serving(command, scratch / "mnt", Borg.environment(scratch)) as pid:
            yield Available(scratch / "mnt", pid)


class TarUnpacked:
    """No mount: the archive is fetched whole from S3 and unpacked to local disk."""

    name = "tar | zstd (unpacked from S3)"
    programs = ("tar", "zstd")
    bucket: str | None = None

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        tool = TarZstd()
        tool.prepare(home)
        tool.store(home, tree)
        self._server, self.bucket = server, server.new_bucket()
        (archive,) = (home / "archives").iterdir()
        upload(server, self.bucket, archive.rename(home / "tree.tar.zst"))

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        assert self.bucket is not None
        archive, root = scratch / "tree.tar.zst", scratch / "mnt"
        download(self._server, self.bucket, archive)
        root.mkdir()
        unpack = ["tar", "-C", root, "-xf", "-"]
        run(["zstd", "-dcq", archive], unpack)
        yield Available(root)


class LocalDisk:
    """The tree where it is, on a file system of the machine's own."""

    programs = ()
    bucket: str | None = None

    def __init__(self, tree: Path) -> None:
        self.name = f"local disk ({filesystem_of(tree)})"
        self.tree = tree

    def prepare(self, tree: Path, home: Path, server: S3Server) -> None:
        pass

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Available]:
        yield Available(self.tree)


@contextmanager
def serving(
    command: Sequence[str | Path], mountpoint: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a program that mounts on ``mountpoint`` (made here) and serves it; yield its pid."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    log = mountpoint.with_name("server.log")
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, mountpoint],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            process_group=0,
        )
    try:
        deadline = time.monotonic() + _PATIENCE
        while not is_mounted(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(errors="replace").strip().splitlines()
                raise BenchmarkError(f"{Path(command[0]).name}: {' | '.join(text[-2:])}")
            time.sleep(_POLL)
        yield process.pid
    finally:
        if is_mounted(mountpoint):
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def upload(server: S3Server, bucket: str, path: Path) -> None:
    """Put a file into ``bucket`` under its own name, in parallel parts."""
    from boto3.s3.transfer import S3Transfer

    client = server.client()
    try:
        S3Transfer(client).upload_file(str(path), bucket, path.name)
    finally:
        client.close()


def download(server: S3Server, bucket: str, path: Path) -> None:
    """Fetch a file of that name from ``bucket``, in parallel parts."""
    from boto3.s3.transfer import S3Transfer

    client = server.client()
    try:
        S3Transfer(client).download_file(bucket, path.name, str(path))
    finally:
        client.close()
