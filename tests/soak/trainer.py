"""One life of a training job: ``python -m tests.soak.trainer STORE RUN LIFE STEPS PAUSE``.

Restores, checks each value against what the life that saved it must have written, and saves every
step. Says as lines of JSON what was restored, and each checkpoint that is acknowledged.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from envstore import checkpoint
from envstore.checkpoint.layout import CheckpointId
from envstore.errors import EnvstoreError

VALUES = 30_000


def values(run: str, life: int, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a step: one never changes, one rarely, one always."""
    seeds = {"still": (0, 0), "slow": (life, step // 4), "fast": (life, step)}
    name = int.from_bytes(run.encode()[-6:], "big")
    return {
        key: np.random.default_rng((name, *seed)).random(VALUES, dtype=np.float32)
        for key, seed in seeds.items()
    }


def fresh() -> dict[str, Any]:
    """Return a state before the first step."""
    model = {key: np.zeros(VALUES, np.float32) for key in ("still", "slow", "fast")}
    return {"model": model, "life": 0, "step": 0}


def wrong(run: str, state: dict[str, Any], step: int) -> str:
    """Return what is wrong with what was restored as ``step``, or nothing."""
    if state["step"] != step:
        return f"it says step {state['step']}"
    for key, wanted in values(run, state["life"], step).items():
        bad = int((state["model"][key] != wanted).sum())
        if bad:
            return f"{bad} values of {key} are not those of life {state['life']}"
    return ""


def _say(what: str, **fields: Any) -> None:
    os.write(1, (json.dumps({"say": what, **fields}) + "\n").encode())


def _live(store: str, name: str, life: int, steps: int, pause: float) -> None:
    state = fresh()
    with checkpoint.Run(
        name,
        store,
        save=checkpoint.every(steps=1),
        keep=checkpoint.last(3),
        on_busy="wait",
        on_error="raise",
    ) as run:
        done = run.restore(state)
        if done is not None:
            _say("restored", step=done, life=state["life"], wrong=wrong(name, state, done))
        for step in range((done or 0) + 1, (done or 0) + 1 + steps):
            for key, new in values(name, life, step).items():
                state["model"][key][:] = new
            state["life"], state["step"] = life, step
            save = run.step(step, state, {"loss": 1 / step})
            if save is not None:

                def acknowledged(future: Future[CheckpointId], step: int = step) -> None:
                    if future.exception() is None:
                        _say("durable", step=step, checkpoint=str(future.result()), life=life)

                save.durable.add_done_callback(acknowledged)
            time.sleep(pause)
        run.wait(90)
    _say("end")


def main() -> int:
    """Live; a failure that is no bug is told as commands tell it."""
    store, name, life, steps, pause = sys.argv[1:]
    try:
        _live(store, name, int(life), int(steps), float(pause))
    except EnvstoreError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        body = {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": 1}
        os.write(2, (json.dumps({"error": body}) + "\n").encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
