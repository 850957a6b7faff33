from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from envstore.checkpoint.adapters.accelerate import attach
from envstore.errors import UsageError
from tests.stores import Store

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of accelerate and what it imports


def prepared() -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_a_state_is_saved_and_loaded(store: Store, tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    saves = attach(accelerator, "team/llm")
    assert saves.latest_dir(tmp_path / "out") is None
    train(accelerator, model, optimizer, 3)
    assert accelerator.save_state(str(tmp_path / "out" / "checkpoint_3"))
    shutil.rmtree(tmp_path / "out" / "checkpoint_3")  # it is kept until it is saved
    expected = train(accelerator, model, optimizer, 3)
    saves.wait()
    assert saves.run.latest() == 3
    with pytest.raises(UsageError, match="holds no step"):
        accelerator.save_state(str(tmp_path / "out" / "final"))
    saves.close()

    accelerator, model, optimizer = prepared()
    saves = attach(accelerator, "team/llm")
    found = saves.latest_dir(tmp_path / "other")
    assert found == str(tmp_path / "other" / "checkpoint_3")
    accelerator.load_state(found)
    assert train(accelerator, model, optimizer, 3) == expected
    saves.close()
    assert accelerator.save_state(str(tmp_path / "out" / "plain"))  # its own again
    store.assert_sound()
