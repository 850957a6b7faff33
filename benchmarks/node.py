"""One S3 server with the tree stored in every tool's way: what ``mount`` and ``read`` work on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measure import BenchmarkError
from benchmarks.mounted import Mounter, mounters
from benchmarks.peers import missing
from examples.seaweed import S3Server, running_s3


@dataclass(slots=True)
class Node:
    """The server, the ways that work here, and why the others do not."""

    scratch: Path
    server: S3Server
    ready: dict[str, Mounter] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def empty_directory(self) -> Iterator[Path]:
        """Yield an empty directory that is gone afterwards."""
        path = self.scratch / "now"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)


@contextmanager
def prepared(context: Context) -> Iterator[Node]:
    """Start a server and store the tree with every tool that is there."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(context.scratch())
        server = stack.enter_context(running_s3(scratch / "s3"))
        node = Node(scratch, server)
        wanted = filter(lambda way: context.wants(way.name), mounters())
        for number, way in enumerate(wanted):
            why = missing(way)
            if why is None:
                context.say(f"storing the tree for {way.name}")
                home = scratch / f"home-{number}"
                home.mkdir()
                try:
                    way.prepare(context.tree, home, server)
                except BenchmarkError as error:
                    why = str(error)
            if why is None:
                node.ready[way.name] = way
            else:
                node.absent[way.name] = why
        yield node
