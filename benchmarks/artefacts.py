"""What each peer needs in the store before a node can start cold: made once, then kept.

The server's data, and what lies beside it, stay in the work directory. A run measures with a copy
of the data in memory: the server is another machine, whose page cache nobody empties.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import BenchmarkError, bytes_on_disk
from benchmarks.workloads import Environment
from examples.seaweed import S3Server, running_s3

PUBLIC = "public"
"""The bucket that anybody may read."""

Record = dict[str, str]

_VOLUME = re.compile(r".+_\d+\.(dat|idx|vif)")
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory is what is wanted


@dataclass(frozen=True, slots=True)
class Bench:
    """Where things are made: the server that gets them, and directories that are kept.

    ``wheels`` holds the environment's wheels, None where they are still to be fetched.
    """

    environment: Environment
    server: S3Server
    home: Path
    wheels: Path | None
    say: Callable[[str], None]


Maker = Callable[[Bench], Record]


@dataclass(frozen=True, slots=True)
class Shelf:
    """The kept artefacts of all environments, below ``work``."""

    work: Path

    def record(self, environment: str, name: str) -> Record | None:
        """Return what was noted when the artefact was made, None if it has not been."""
        try:
            return dict(json.loads(self._note(environment, name).read_text()))
        except FileNotFoundError:
            return None

    def buckets(self, environments: Collection[str], names: Collection[str]) -> set[str]:
        """Return the buckets of those artefacts in those environments that have been made."""
        records = [self.record(place, name) for place in environments for name in names]
        return {record["bucket"] for record in records if record is not None}

    def home(self, environment: str, name: str) -> Path:
        """Return the directory of what is kept outside the server."""
        return self.work / "kept" / f"{environment}-{name}"

    def make(self, bench: Bench, name: str, maker: Maker) -> None:
        """Make an artefact and note it, in place of an older one if there is one.

        Nothing is noted of one that fails.
        """
        older = self.record(bench.environment.name, name)
        shutil.rmtree(bench.home, ignore_errors=True)
        bench.home.mkdir(parents=True)
        record = maker(bench)
        note = self._note(bench.environment.name, name)
        note.with_suffix(".new").write_text(json.dumps(record) + "\n")
        note.with_suffix(".new").replace(note)
        if older is not None and older["bucket"] not in (PUBLIC, record["bucket"]):
            client = bench.server.client()
            try:
                client.delete_bucket(Bucket=older["bucket"])  # this server takes what is in it, too
            finally:
                client.close()

    @contextmanager
    def making(self) -> Iterator[S3Server]:
        """Yield the server whose data are kept."""
        with running_s3(self.work / "s3", PUBLIC) as server:
            client = server.client()
            try:
                names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
                if PUBLIC not in names:
                    client.create_bucket(Bucket=PUBLIC)
            finally:
                client.close()
            yield server

    @contextmanager
    def measuring(self, buckets: Collection[str]) -> Iterator[S3Server]:
        """Yield a server with a copy of what is kept in ``buckets``, in memory.

        Raises ``BenchmarkError`` where there is not memory enough.
        """
        data = self.work / "s3"

        def others(folder: str, names: list[str]) -> list[str]:
            # The server keeps a bucket's objects in volumes: files that have its name.
            return [
                name
                for name in names
                if name.endswith(".sock")
                or (_VOLUME.fullmatch(name) and name.rpartition("_")[0] not in buckets)
            ]

        names = others("", [path.name for path in data.iterdir()])
        needed = bytes_on_disk(data) - sum(bytes_on_disk(data / name) for name in names)
        free = shutil.disk_usage(_MEMORY).free
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > min(free, memory) * 0.8:
            raise BenchmarkError(
                f"the S3 server's data ({needed:,} bytes) do not fit into memory: "
                "prepare fewer systems in another --work"
            )
        place = Path(tempfile.mkdtemp(prefix="envstore-bench-", dir=_MEMORY))
        try:
            shutil.copytree(data, place, dirs_exist_ok=True, ignore=others)
            with running_s3(place, PUBLIC) as server:
                yield server
        finally:
            shutil.rmtree(place)

    def _note(self, environment: str, name: str) -> Path:
        return self.work / "kept" / f"{environment}-{name}.json"


def upload(server: S3Server, bucket: str, files: Sequence[tuple[str, Path]]) -> None:
    """Put files into ``bucket`` under the given keys, large ones in parallel parts."""
    from boto3.s3.transfer import S3Transfer

    client = server.client()
    try:
        transfer = S3Transfer(client)
        for key, path in files:
            transfer.upload_file(str(path), bucket, key)
    finally:
        client.close()
