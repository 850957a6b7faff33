"""Reads every byte of a tree and says what it is: ``python -m tests.soak.reading DIR PAUSE``.

Half of the files after ``PAUSE`` seconds, when those who collect garbage had their time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tests.soak import trees


def main() -> int:
    """Print one object: ``seen``, or ``errno`` and ``error``."""
    root, pause = Path(sys.argv[1]), float(sys.argv[2])
    try:
        with open(root / trees.VERSION, "rb") as file:
            file.read()
        if pause:
            # Whatever reads a mount for minutes has long been told where everything lies.
            time.sleep(pause)
        found = {"seen": trees.seen(root)}
    except OSError as error:
        print(json.dumps({"errno": error.errno, "error": str(error)}))  # noqa: T201
        return os.EX_IOERR
    print(json.dumps(found))  # noqa: T201 - whoever started this reads it
    return 0


if __name__ == "__main__":
    sys.exit(main())
