"""Keeping the optimizers of torch from stepping while their parameters are still being copied.

Between two steps of an optimizer neither the parameters nor its state change, in a training loop
that changes them by optimizers alone; forward and backward only read them. So a copy of them may
go on meanwhile, if each step waits for its end. A loop that changes parameters by other means
(``p.data.add_()``, an optimizer that is no ``torch.optim.Optimizer``) must not use this.
"""

from __future__ import annotations

import os
import threading
from typing import Any


class StepGate:
    """Shut while a copy is under way; the step of every ``torch.optim.Optimizer`` waits at it.

    Thread-safe. A child of ``fork`` never waits: nobody copies there.
    """

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._open = threading.Event()
        self._open.set()
        self._pid = os.getpid()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def shut(self) -> None:
        """Have steps wait from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let steps go on."""
        self._open.set()

    def close(self) -> None:
        """Open it and take it away from the optimizers; idempotent."""
        self._open.set()
        self._hook.remove()

    def _before_step(self, *_: Any) -> None:
        if self._pid == os.getpid():
            self._open.wait()
