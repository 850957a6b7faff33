"""The tools that envstore's pushes are compared with, each made to do the same: store a tree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from benchmarks.measure import Timing, bytes_on_disk, run
from examples.client import Envstore, envstore_command

LEVEL = "3"
"""The zstd level of every tool that lets us choose: envstore's own."""


class Storer(Protocol):
    """A tool that stores trees. ``home`` holds everything it writes, and is new each time."""

    name: str
    programs: tuple[str, ...]

    def prepare(self, home: Path) -> None:
        """Make an empty store in ``home``; not timed."""
        ...

    def store(self, home: Path, tree: Path) -> Timing:
        """Store ``tree``, as a further version of what was stored before."""
        ...

    def stored(self, home: Path) -> int:
        """Return the bytes that the store takes."""
        ...


def missing(tool: Storer) -> str | None:
    """Return why ``tool`` cannot be measured here, None if it can."""
    lacking = [program for program in tool.programs if shutil.which(program) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def storers() -> list[Storer]:
    """Return every tool, envstore first."""
    return [
        EnvstoreStorer(),
        EnvstoreStorer("dir"),
        Restic(),
        Borg(),
        Casync(),
        TarZstd(),
        Squashfs(),
    ]


class EnvstoreStorer:
    """envstore with its store in a directory; the kind is detected unless it is given."""

    programs = ()

    def __init__(self, kind: str | None = None) -> None:
        self.name = f"envstore --kind {kind}" if kind else "envstore"
        self._options = ("--kind", kind) if kind else ()

    def prepare(self, home: Path) -> None:
        self._client(home).call("init")

    def store(self, home: Path, tree: Path) -> Timing:
        command = [*envstore_command(), "push", *self._options, "bench", str(tree)]
        return run(command, env=self._client(home).environment())

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "store")

    def _client(self, home: Path) -> Envstore:
        return Envstore(str(home / "store"), home)


class Restic:
    """restic with its defaults: encrypted, zstd, packs of 16 MiB."""

    name = "restic"
    programs = ("restic",)

    def prepare(self, home: Path) -> None:
        (home / "password").write_text("benchmark\n")
        run([*self.command(home), "init"])

    def store(self, home: Path, tree: Path) -> Timing:
        return run([*self.command(home), "backup", "--host", "bench", "."], cwd=tree)

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "repository")

    @staticmethod
    def command(home: Path, repository: str | None = None) -> list[str]:
        """Return the start of every restic command line for the store in ``home``."""
        return [
            *("restic", "--quiet", "--repo", repository or str(home / "repository")),
            *("--password-file", str(home / "password"), "--cache-dir", str(home / "cache")),
        ]


class Borg:
    """Borg without encryption, with zstd as envstore has it."""

    name = "borg"
    programs = ("borg",)

    def __init__(self) -> None:
        self._archives = 0

    def prepare(self, home: Path) -> None:
        run(
            ["borg", "init", "--encryption", "none", home / "repository"],
            env=self.environment(home),
        )

    def store(self, home: Path, tree: Path) -> Timing:
        self._archives += 1
        archive = f"{home / 'repository'}::{self._archives}"
        command = ["borg", "create", "--compression", f"zstd,{LEVEL}", archive, "."]
        return run(command, env=self.environment(home), cwd=tree)

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "repository")

    @staticmethod
    def environment(home: Path) -> dict[str, str]:
        """Return the variables that keep Borg's own files in ``home`` and its questions away."""
        return {
            **os.environ,
            "BORG_BASE_DIR": str(home / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }


class Casync:
    """casync with its defaults: chunks of 64 KiB on average, each compressed with zstd."""

    name = "casync"
    programs = ("casync",)

    def prepare(self, home: Path) -> None:
        home.mkdir(exist_ok=True)

    def store(self, home: Path, tree: Path) -> Timing:
        store, index = home / "store.castr", home / "tree.caidx"
        # Its cache is what lets it know an unchanged tree again.
        options = [f"--store={store}", f"--cache={home / 'cache'}"]
        return run(["casync", "make", *options, index, tree])

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "store.castr") + bytes_on_disk(home / "tree.caidx")


class TarZstd:
    """One compressed archive for each version, on all processors."""

    name = "tar | zstd"
    programs = ("tar", "zstd")

    def prepare(self, home: Path) -> None:
        (home / "archives").mkdir(parents=True)

    def store(self, home: Path, tree: Path) -> Timing:
        archive = home / "archives" / f"{len(list((home / 'archives').iterdir()))}.tar.zst"
        pack = ["tar", "-C", tree, "-cf", "-", "."]
        return run(pack, ["zstd", f"-{LEVEL}", "-T0", "-q", "-c"], output=archive)

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "archives")


class Squashfs:
    """One image for each version, which squashfuse or the kernel can mount."""

    name = "squashfs"
    programs = ("mksquashfs",)

    def prepare(self, home: Path) -> None:
        (home / "images").mkdir(parents=True)

    def store(self, home: Path, tree: Path) -> Timing:
        image = home / "images" / f"{len(list((home / 'images').iterdir()))}.squashfs"
        return run(self.command(tree, image))

    def stored(self, home: Path) -> int:
        return bytes_on_disk(home / "images")

    @staticmethod
    def command(tree: Path, image: Path) -> list[str | Path]:
        """Return the command that makes ``image``."""
        compression = ("-comp", "zstd", "-Xcompression-level", LEVEL)
        return ["mksquashfs", tree, image, *compression, "-noappend", "-quiet", "-no-progress"]
