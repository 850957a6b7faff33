"""The process that turns staged parts into checkpoints, although the trainer may be dead.

``python -m envstore.checkpoint.persister DIRECTORY`` serves one slot directory, and ``--watch
ROOT`` every one that appears below a root, with a process for each: for a sidecar or a node's
service. A trainer starts its own, see ``spawning``. Credentials come from this process's own
environment, never from a slot. SIGTERM and SIGINT: finish what is staged, then end; a second one
ends at once, and the slots stay.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys

if __name__ == "__main__":  # at the end, so that it can hide nothing
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from envstore.errors import EnvstoreError

_NICE = 10
_AT_ONCE = 1


def main(arguments: list[str]) -> int:
    """Run as the persister that ``arguments`` describe; returns an exit status."""
    options = _parse(arguments)
    for name in ("directory", "watch"):  # it leaves where it was started
        if getattr(options, name) is not None:
            setattr(options, name, os.path.abspath(getattr(options, name)))
    if options.detach and os.fork():
        os._exit(0)  # whoever started this need not, and cannot, wait for it
    from envstore.checkpoint import backstage

    backstage.settle_in(_NICE)
    try:
        backstage.confine(watching=options.watch is not None)
    except EnvstoreError as error:
        sys.stderr.write(f"envstore: {error}\n")
        return error.exit_code
    if options.watch is not None:
        from envstore.checkpoint.watching import watch

        return watch(options.watch, _passed_on(options))
    return backstage.serve(options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m envstore.checkpoint.persister",
        description="Bring staged checkpoints into their store, although the trainer may be dead.",
    )
    parser.add_argument("directory", nargs="?", help="the slot directory of one rank")
    parser.add_argument("--watch", metavar="ROOT", help="serve all slot directories below ROOT")
    parser.add_argument("--bandwidth", type=_positive, help="bytes a second to upload at most")
    parser.add_argument(
        "--linger",
        type=_seconds,
        default=None,
        help="seconds to keep slots for a trainer that comes back (ENVSTORE_SLOTS_LINGER, or 600)",
    )
    parser.add_argument(
        "--allow-store",
        metavar="PATTERN",
        action="append",
        default=[],
        help="URLs of stores that may be written to, as a shell pattern; may be repeated",
    )
    parser.add_argument("--store", default="", help="a store to open before the first save")
    parser.add_argument(
        "--distrust", action="store_true", help="others write into the directory (as with --watch)"
    )
    parser.add_argument("--detach", action="store_true", help="go on in the background")
    options = parser.parse_args(arguments)
    if (options.directory is None) == (options.watch is None):
        parser.error("give a slot directory, or --watch ROOT")
    if options.linger is None:
        text = os.environ.get("ENVSTORE_SLOTS_LINGER", "").strip()
        try:
            options.linger = _seconds(text) if text else None
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"ENVSTORE_SLOTS_LINGER: {error}")
    return options


def _passed_on(options: argparse.Namespace) -> list[str]:
    """Return the arguments of each process of ``--watch``."""
    found = ["--distrust", *(f"--allow-store={pattern}" for pattern in options.allow_store)]
    if options.bandwidth is not None:
        found.append(f"--bandwidth={options.bandwidth!r}")
    if options.linger is not None:
        found.append(f"--linger={options.linger!r}")
    return found


def _positive(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of 0 or more")
    return value


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(_AT_ONCE)
