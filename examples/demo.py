"""Shows a real environment go into a store and come back through a lazy mount.

Usage: python examples/demo.py [--store file|s3] [--work DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client import CommandError, Envstore
from prefix import BuildError, build_prefix, clean_environment
from rich.console import Console
from rich.table import Table
from rich.text import Text
from seaweed import S3Server, ServerError, running_s3

HERE = Path(__file__).resolve().parent
REF = "demo"
MB = 1_000_000


class DemoError(Exception):
    """Something the demo needs is missing or did not do what it should."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this run keeps its store, and the server's address and bucket if it is in S3."""

    url: str
    server: S3Server | None = None
    bucket: str = ""
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Findings:
    """What the demo measured; sizes in bytes, times in seconds."""

    first: dict[str, Any]
    again: dict[str, Any]
    usage: dict[str, Any]
    seconds: dict[str, float]
    fetched: int = 0
    requests: int = 0
    counted_by: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Push a real environment, mount it with an empty cache, and run in it."
    )
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "envstore-demo",
        help="keeps the environment between runs [%(default)s]",
    )
    options = parser.parse_args()
    console = Console()
    # Both end the demo through every `finally`, even where a shell has it ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        demonstrate(console, options.store, options.work.expanduser().resolve())
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left mounted or running")
        return 130
    except (DemoError, CommandError, BuildError, ServerError, OSError) as error:
        console.print(Text("demo failed: ", "bold red").append(str(error), "not bold default"))
        return 1
    return 0


def demonstrate(console: Console, kind: str, work: Path) -> None:
    """Go through all steps and print the table."""
    check_machine()
    work.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)

    started = time.monotonic()
    environment, kept = build_prefix(HERE / "demo-requirements.txt", work, say)
    built = time.monotonic() - started
    say(f"environment: {environment}{' (from an earlier run)' if kept else ''}")
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(scratch(work))
        place = stack.enter_context(store(kind, run))
        say(f"store: {place.url}")
        found = push_twice(place, run, environment, say)
        if not kept:
            found.seconds = {"build the environment": built, **found.seconds}
        run_from_mount(place, run, found, say)
        found.usage = Envstore(place.url, run / "pusher", place.variables).call("du")
    console.print(table(found, kind))


def check_machine() -> None:
    """See that mounting can work here. Raises ``DemoError``."""
    if not os.path.exists("/dev/fuse"):
        raise DemoError("/dev/fuse does not exist: load the fuse module, or give it to a container")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise DemoError("fusermount3 is not installed: run make setup, or install fuse3")


@contextlib.contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """Yield a directory for this run alone: no store or cache of an earlier run is in it."""
    path = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def store(kind: str, run: Path) -> Iterator[Place]:
    """Make an empty store, with a server of its own if it is to be in S3."""
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            server = stack.enter_context(running_s3(run / "s3"))
            bucket = server.new_bucket()
            place = Place(server.url(bucket), server, bucket, server.environment)
        else:
            place = Place(str(run / "store"))
        Envstore(place.url, run / "pusher", place.variables).call("init")
        yield place


def push_twice(place: Place, run: Path, environment: Path, say: Any) -> Findings:
    """Push the environment, and push it again unchanged."""
    pusher = Envstore(place.url, run / "pusher", place.variables)
    say("pushing")
    first = pusher.call("push", REF, environment)
    say("pushing again")
    again = pusher.call("push", REF, environment)
    if again["digest"] != first["digest"] or not again["unchanged"]:
        raise DemoError("the second push of the same environment gave another snapshot")
    seconds = {"push": first["seconds"], "push again": again["seconds"]}
    return Findings(first, again, {}, seconds)


def run_from_mount(place: Place, run: Path, found: Findings, say: Any) -> None:
    """Mount the environment on what might be another machine, and run the script in it."""
    # Another home is another node: nothing that the push left in its cache is there.
    node = Envstore(place.url, run / "node", place.variables)
    output = run / "output"
    output.mkdir()
    before = place.server.served(place.bucket) if place.server else None
    say("mounting with an empty cache")
    mountpoint = run / "mnt"
    with node.mounted(REF, mountpoint) as mount:
        found.seconds["mount"] = mount.seconds
        say("fitting a model with the mounted interpreter")
        started = time.monotonic()
        run_script(mountpoint, output)
        found.seconds["run the script"] = time.monotonic() - started
        counts = mount.stats()["store"]
        found.fetched, found.requests, found.counted_by = counts["bytes"], counts["requests"], ""
        if place.server and before is not None:
            served = place.server.served(place.bucket) - before
            found.fetched, found.requests = served.sent, served.requests
            found.counted_by = ", as the S3 server counted"
        started = time.monotonic()
        node.unmount(mountpoint)
        found.seconds["unmount"] = time.monotonic() - started
    found.result = json.loads((output / "result.json").read_text())
    for place_of_origin in (found.result["prefix"], *found.result["loaded_from"]):
        if not Path(place_of_origin).is_relative_to(mountpoint):
            raise DemoError(f"{place_of_origin} was used, which is not in the mount")
    if not (output / "predictions.parquet").stat().st_size:
        raise DemoError("the script wrote an empty Parquet file")


def run_script(mountpoint: Path, output: Path) -> None:
    """Run the script with the interpreter in the mount. Raises ``DemoError``."""
    command = [mountpoint / "bin" / "python3", "-I", HERE / "fit_model.py", output]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise DemoError(f"the script failed with status {done.returncode}: {' | '.join(last)}")


def table(found: Findings, kind: str) -> Table:
    """Return everything that was found, for people."""
    first, again, result = found.first, found.again, found.result
    logical, stored = first["logical_bytes"], found.usage["stored_bytes"]
    shown = Table(
        title=f"An environment in a {'SeaweedFS S3 bucket' if kind == 's3' else 'file:// store'}",
        title_justify="left",
        show_header=False,
    )
    shown.add_column(style="bold")
    shown.add_column(justify="right")
    shown.add_column()

    def size(number: int) -> str:
        return f"{number / MB:,.1f} MB"

    shown.add_row("files", f"{first['files']:,}", "with the bytecode compiled for them")
    shown.add_row("logical bytes", size(logical), "")
    shown.add_row("stored bytes", size(stored), f"{stored / logical:.1%} of the logical bytes")
    shown.add_section()
    shown.add_row("first push uploaded", size(first["uploaded_bytes"]), calls(first["requests"]))
    again_bytes = f"{again['uploaded_bytes']:,} bytes"
    shown.add_row("second push uploaded", again_bytes, calls(again["requests"]))
    share = f"{found.fetched / logical:.1%} of the logical bytes"
    shown.add_row("fetched for the run", size(found.fetched), share)
    shown.add_row("", "", f"{found.fetched / stored:.1%} of the stored bytes")
    shown.add_row("", "", f"{calls(found.requests)}{found.counted_by}")
    shown.add_section()
    for step, seconds in found.seconds.items():
        shown.add_row(step, f"{seconds:.2f} s", "")
    shown.add_section()
    shown.add_row("the script's result", f"{result['accuracy']:.1%}", "of the test set right")
    return shown


def calls(number: int) -> str:
    """Return ``1 request`` or ``n requests``."""
    return f"{number:,} request{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
