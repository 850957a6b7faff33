"""Writes the corpus anew: ``python -m tests.fuzz.seeds``. What real encoders make, by target.

Inputs that were found to break something (``crash-*``) stay.
"""

from __future__ import annotations

import hashlib

from tests.fuzz.harness import load_targets

_LONGEST = 8 << 10


def main() -> None:
    """Write every target's seeds that are not too long to be kept."""
    for target in load_targets().values():
        target.corpus.mkdir(parents=True, exist_ok=True)
        for path in target.corpus.glob("seed-*"):
            path.unlink()
        for data in target.seeds():
            if len(data) <= _LONGEST:
                name = f"seed-{hashlib.sha256(data).hexdigest()[:8]}"
                (target.corpus / name).write_bytes(data)


if __name__ == "__main__":
    main()
