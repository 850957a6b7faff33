"""A trainer to be killed: ``python -m benchmarks.checkpoint_trainer STORE RUN MIB [STEPS]``.

With 0 STEPS it begins its first step and saves nothing.

Prints a line of JSON for each thing that happened, with the clock that all processes share. The
state of a step follows from its number alone, so that whoever restores it can tell it is right.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def fill(state: dict[str, dict[str, Any]], step: int) -> None:
    """Make ``state`` that of ``step``."""
    for place, group in enumerate(state.values()):
        for number, tensor in enumerate(group.values()):
            count = tensor.numel()
            tensor.view(-1).copy_(_sequence(count, step, place, number))


def _sequence(count: int, step: int, place: int, number: int) -> Any:
    import torch

    return torch.arange(count, dtype=torch.float32).mul_(0.001 * (place + 1)).add_(step + number)


def blank(mib: int) -> dict[str, dict[str, Any]]:
    """Return a state of so many MiB, all zero."""
    import torch

    return {
        name: {f"layer{i}": torch.zeros(mib * (1 << 18) // 8) for i in range(4)}
        for name in ("model", "optim")
    }


def main() -> None:
    """Restore, then save every step, until killed or done."""

    def say(what: str, **more: object) -> None:
        sys.stdout.write(json.dumps({"what": what, "at": time.monotonic(), **more}) + "\n")
        sys.stdout.flush()

    store, name, mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 1 << 30
    from envstore import checkpoint

    say("imported")
    run = checkpoint.Run(name, store=store, keep=checkpoint.last(3))
    state = blank(mib)
    begun = time.monotonic()
    found = run.restore(state)
    say("restored", step=found, seconds=time.monotonic() - begun)
    start = 0 if found is None else found + 1
    say("first step", step=start)
    for step in range(start, steps):
        fill(state, step)
        run.save(step, state)
        say("saved", step=step)
    run.wait()
    say("durable")
    sys.stdin.read()  # whoever started it decides when it ends
    run.close()


if __name__ == "__main__":
    main()
