"""What each peer needs in the store before a node can start cold: made once, then kept.

The server's data, and what lies beside it, stay in the work directory. A run measures with a copy
of the data in memory: the server is another machine, whose page cache nobody empties.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import BenchmarkError, bytes_on_disk
from benchmarks.workloads import Environment
from examples.seaweed import S3Server, running_s3

PUBLIC = "public"
"""The bucket that anybody may read."""

Record = dict[str, str]

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

    def home(self, environment: str, name: str) -> Path:
        """Return the directory of what is kept outside the server."""
        return self.work / "kept" / f"{environment}-{name}"

    def forget(self, environment: str, name: str) -> None:
        """Have the artefact made again next time; what the server holds of it stays there."""
        self._note(environment, name).unlink(missing_ok=True)

    def make(self, bench: Bench, name: str, maker: Maker) -> None:
        """Make an artefact and note it; nothing is noted of one that fails."""
        shutil.rmtree(bench.home, ignore_errors=True)
        bench.home.mkdir(parents=True)
        record = maker(bench)
        note = self._note(bench.environment.name, name)
        note.with_suffix(".new").write_text(json.dumps(record) + "\n")
        note.with_suffix(".new").replace(note)

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
    def measuring(self) -> Iterator[S3Server]:
        """Yield a server with a copy of the kept data, in memory. Raises ``BenchmarkError``."""
        data = self.work / "s3"
        needed = bytes_on_disk(data)
        free = shutil.disk_usage(_MEMORY).free
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > min(free, memory) * 0.8:
            raise BenchmarkError(
                f"the S3 server's data ({needed:,} bytes) do not fit into memory: "
                "prepare fewer systems in another --work"
            )
        place = Path(tempfile.mkdtemp(prefix="envstore-bench-", dir=_MEMORY))
        try:
            shutil.copytree(
                data, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock")
            )
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
