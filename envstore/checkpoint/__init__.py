"""Checkpoints that survive: staged in memory, persisted by a process of their own, restored.

from envstore import checkpoint

run = checkpoint.Run("team/llm", save=checkpoint.every(minutes=10), keep=checkpoint.last(2))
state = {"model": model, "optimizer": optimizer, "loader": loader, "rng": checkpoint.rng()}
done = run.restore(state)
for n in range(0 if done is None else done + 1, steps):
    ...
    run.step(n, state, metrics={"loss": loss})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envstore.checkpoint.errors import (
        CheckpointError,
        FencedError,
        NoCheckpointError,
        NotFiniteError,
        RanksDisagreeError,
        SaveFailedError,
        SlotSpaceError,
        StateMismatchError,
        UntrustedObjectError,
    )
    from envstore.checkpoint.ledger import Save
    from envstore.checkpoint.live import rng
    from envstore.checkpoint.options import Staging
    from envstore.checkpoint.policies import auto, best, every, last, pinned, younger_than
    from envstore.checkpoint.run import Run

__all__ = [
    "CheckpointError",
    "FencedError",
    "NoCheckpointError",
    "NotFiniteError",
    "RanksDisagreeError",
    "Run",
    "Save",
    "SaveFailedError",
    "SlotSpaceError",
    "Staging",
    "StateMismatchError",
    "UntrustedObjectError",
    "auto",
    "best",
    "every",
    "last",
    "pinned",
    "rng",
    "younger_than",
]

_PLACES = {
    "Run": "run",
    "Save": "ledger",
    "Staging": "options",
    "rng": "live",
    **dict.fromkeys(("auto", "best", "every", "last", "pinned", "younger_than"), "policies"),
}


def __getattr__(name: str) -> Any:
    # Its modules import this package too: whoever needs one of them does not load them all.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PLACES.get(name, 'errors')}")
    return getattr(module, name)
