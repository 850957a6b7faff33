from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from envstore.checkpoint.adapters.transformers import EnvstoreCallback
from envstore.checkpoint.errors import CheckpointError, SaveFailedError
from envstore.checkpoint.policies import best
from tests.stores import Store

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of transformers and what it imports


class Data(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Stop(TrainerCallback):
    """Ends the program as a kill would, as far as the callback is concerned."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make(out: Path, *callbacks: Any, steps: int = 8, **options: Any) -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    arguments = TrainingArguments(
        str(out), max_steps=steps, save_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, disable_tqdm=True, seed=1, **options,
    )  # fmt: skip
    return Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Data(), callbacks=[*callbacks])


def losses(trainer: Trainer) -> dict[int, float]:
    return {one["step"]: one["loss"] for one in trainer.state.log_history if "loss" in one}


def test_training_goes_on_on_another_node(store: Store, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()

    saves = EnvstoreCallback("team/llm")
    assert saves.latest_dir(tmp_path / "one") is None
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "one", saves, Stop(5)).train()
    saves.close()
    shutil.rmtree(tmp_path / "one")

    saves = EnvstoreCallback("team/llm")
    found = saves.latest_dir(tmp_path / "two")
    assert found == str(tmp_path / "two" / "checkpoint-4")
    before = os.stat(f"{found}/model.safetensors").st_ino
    assert saves.latest_dir(tmp_path / "two") == found
    assert os.stat(f"{found}/model.safetensors").st_ino == before  # it was there already
    trainer = make(tmp_path / "two", saves)
    trainer.train(resume_from_checkpoint=found)
    assert losses(trainer) == losses(whole)
    assert saves.run.latest() == 8
    assert saves.run.run.find(8).metrics["loss"] == losses(whole)[8]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    saves.close()
    store.assert_sound()


def test_what_the_trainer_removes_is_saved_all_the_same(store: Store, tmp_path: Path) -> None:
    saves = EnvstoreCallback("team/llm", keep=best("loss", "min", 2))
    make(tmp_path / "out", saves, save_total_limit=1).train()
    kept = [commit.step for commit in saves.run.run.commits()]
    assert 2 <= len(kept) <= 3
    assert kept[-1] == 8
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-8"]
    assert not [path for path in (tmp_path / "out").iterdir() if len(path.name) > 20]
    saves.close()


def test_a_checkpoint_that_only_the_disk_has_is_saved_at_the_next_start(
    store: Store, tmp_path: Path
) -> None:
    make(tmp_path / "out", steps=4).train()
    (tmp_path / "out" / "checkpoint-6").mkdir()  # half of one
    shutil.copy(tmp_path / "out/checkpoint-4/model.safetensors", tmp_path / "out/checkpoint-6")
    saves = EnvstoreCallback("team/llm")
    found = saves.latest_dir(tmp_path / "out")
    assert found == str(tmp_path / "out" / "checkpoint-4")
    assert saves.run.latest() == 4
    saves.close()


def test_a_training_that_forgot_to_resume_is_stopped(store: Store, tmp_path: Path) -> None:
    saves = EnvstoreCallback("team/llm")
    make(tmp_path / "out", saves, steps=2).train()
    with pytest.raises(CheckpointError, match="begins anew"):
        make(tmp_path / "out", saves).train()
    saves.close()
    fresh = EnvstoreCallback("team/llm", fresh=True)
    make(tmp_path / "other", fresh, steps=2).train()
    assert [commit.checkpoint.epoch for commit in fresh.run.run.commits()] == [2]
    fresh.close()


def test_a_store_that_is_down_does_not_end_the_training(store: Store, tmp_path: Path) -> None:
    saves = EnvstoreCallback("team/llm")
    packs = store.root / "objects" / "packs"
    shutil.rmtree(packs, ignore_errors=True)
    packs.write_text("in the way")
    trainer = make(tmp_path / "out", saves, steps=4)
    with pytest.raises(SaveFailedError, match="last checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 4
    packs.unlink()
    assert saves.latest_dir(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")
    assert saves.run.latest() == 4
    saves.close()
