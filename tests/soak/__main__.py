"""The soak and fault rig: ``python -m tests.soak --seconds 1800 --workers 8 --kill-every 2``.

Workers push, tag, remove, mount, pull, verify, train and collect garbage against one real S3
server through a network that breaks, while their processes and the server are killed. A ledger
outside of the store says what was acknowledged. Exit status 1, and the logs are kept, if anything
of it is lost or damaged, if an error is not a clear line about what was injected, or if garbage
stays.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

_APART = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main() -> int:
    """Parse the command line; where possible go on in name spaces of our own."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--seconds", type=float, default=1800, help="how long [%(default)s]")
    parser.add_argument("--workers", type=int, default=8, help="how many [%(default)s]")
    parser.add_argument(
        "--kill-every", type=float, default=2, metavar="SECONDS", help="[%(default)s]; 0: never"
    )
    parser.add_argument("--seed", type=int, help="of all that is chosen [a random one]")
    parser.add_argument(
        "--store", choices=("s3", "file"), default="s3", help="a server or a disk [%(default)s]"
    )
    parser.add_argument(
        "--without",
        action="append",
        choices=("gc", "verify", "mount", "train", "network", "disk"),
        default=[],
        help="leave this out, to find what is to blame; may be repeated",
    )
    parser.add_argument("--dir", type=Path, help="where to work [a new one in /var/tmp]")
    parser.add_argument("--keep", action="store_true", help="keep everything also on success")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 30)
    if not options.inside and os.geteuid() == 0 and shutil.which("unshare"):
        tried = subprocess.run([*_APART, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            words = [*sys.argv[1:], "--inside", f"--seed={options.seed}"]
            # Whatever becomes of the rig, its processes and mounts end with it.
            os.execvp(_APART[0], [*_APART, sys.executable, "-m", "tests.soak", *words])
    from tests.soak.rig import soak

    return soak(options)


if __name__ == "__main__":
    sys.exit(main())
