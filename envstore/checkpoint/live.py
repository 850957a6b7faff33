"""What the objects in a training state are: modules, optimizers, wrappers, random generators."""

from __future__ import annotations

import random
import sys
from typing import Any

from envstore.checkpoint.errors import StateMismatchError


def is_stateful(value: Any) -> bool:
    """Tell whether ``value`` has ``state_dict`` and ``load_state_dict``, or is a generator."""
    kind = type(value)
    if _is_generator(value):
        return True
    return callable(getattr(kind, "state_dict", None)) and callable(
        getattr(kind, "load_state_dict", None)
    )


def is_module(value: Any) -> bool:
    """Tell whether ``value`` is a module of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def is_optimizer(value: Any) -> bool:
    """Tell whether ``value`` is an optimizer of torch, whose step alone changes its tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.optim.Optimizer)


def is_replicated_module(value: Any) -> bool:
    """Tell whether ``value`` is a DistributedDataParallel module, alike on all ranks."""
    parallel = sys.modules.get("torch.nn.parallel")
    return parallel is not None and isinstance(value, parallel.DistributedDataParallel)


def unwrap(value: Any) -> Any:
    """Return the object whose state ``value`` has: mostly itself.

    Of modules in DistributedDataParallel or torch.compile it is the plain module, so that its
    tensors have their plain names and it can be restored without the wrapper.
    """
    if _is_generator(value):
        return _Generator(value)
    while True:
        if is_replicated_module(value):
            value = value.module
            continue
        eval_frame = sys.modules.get("torch._dynamo.eval_frame")
        if eval_frame is not None and isinstance(value, eval_frame.OptimizedModule):
            value = value._orig_mod
            continue
        return value


class _Generator:
    """A random generator as an object with a state."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Return where the generator is."""
        generator = self._generator
        if isinstance(generator, random.Random):
            return {"state": generator.getstate()}
        if hasattr(generator, "bit_generator"):
            return {"state": generator.bit_generator.state}
        return {"state": generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generator there."""
        generator = self._generator
        if isinstance(generator, random.Random):
            generator.setstate(state["state"])
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = state["state"]
        else:
            generator.set_state(state["state"])


class Rng:
    """The random generators of this process: Python's, numpy's, torch's and its accelerators'.

    Generators of libraries that are not loaded when the state is taken are left out. Each rank
    has its own; restored by another number of ranks they are refused.
    """

    per_rank = True

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all generators. Waits for the accelerators."""
        state: dict[str, Any] = {"python": random.getstate()}
        if (np := sys.modules.get("numpy")) is not None:
            state["numpy"] = np.random.get_state()
        if (torch := sys.modules.get("torch")) is not None:
            state["torch"] = torch.get_rng_state()
            for kind, module in _accelerators(torch):
                if hasattr(module, "get_rng_state_all"):
                    state[kind] = module.get_rng_state_all()
                else:
                    state[kind] = [module.get_rng_state()]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all generators. Raises ``StateMismatchError`` for other accelerators than saved."""
        torch = sys.modules.get("torch")
        here: dict[str, Any] = dict(_accelerators(torch)) if torch is not None else {}
        for kind in state.keys() - {"python", "numpy", "torch"}:
            module = here.get(kind)
            count = module.device_count() if module is not None else 0
            if count != len(state[kind]):
                raise StateMismatchError(
                    f"the checkpoint holds random generators of {len(state[kind])} {kind} devices, "
                    f"and {count} are here"
                )
        random.setstate(state["python"])
        if "numpy" in state:
            import numpy as np

            np.random.set_state(state["numpy"])
        if "torch" in state:
            import torch as loaded

            loaded.set_rng_state(state["torch"])
        for kind, module in here.items():
            if kind not in state:
                continue
            if hasattr(module, "set_rng_state_all"):
                module.set_rng_state_all(state[kind])
            else:
                module.set_rng_state(state[kind][0])


def rng() -> Rng:
    """Return what holds all random generators of this process, for ``{"rng": rng(), ...}``."""
    return Rng()


def _is_generator(value: Any) -> bool:
    """Tell whether ``value`` is a random generator of Python, numpy or torch."""
    if type(value) is random.Random:
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Generator):
        return True
    np = sys.modules.get("numpy")
    return np is not None and isinstance(value, np.random.Generator)


def _accelerators(torch: Any) -> list[tuple[str, Any]]:
    """Return the kind and module of each accelerator that has been used in this process."""
    found = []
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            continue
        if getattr(module, "is_initialized", lambda: True)():
            found.append((kind, module))
    return found
