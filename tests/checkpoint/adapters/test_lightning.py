from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem
from envstore.checkpoint.adapters.lightning import EnvstoreCheckpointIO
from envstore.checkpoint.errors import CheckpointError, NoCheckpointError, UntrustedObjectError
from envstore.checkpoint.run import Run
from tests.stores import Store

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of Lightning: workers, loggers, its own deprecations
]


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.losses.append(float(loss))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Marker:
    """What JSON cannot say."""


def fit(
    out: Path | str,
    io: EnvstoreCheckpointIO | None,
    epochs: int,
    ckpt_path: str | None = None,
    **options: Any,
) -> Model:
    torch.manual_seed(0)
    model = Model()
    data = TensorDataset(torch.randn(32, 8), torch.randn(32, 1))
    saves = ModelCheckpoint(out, monitor="loss", save_last=True, **{"save_top_k": 2, **options})
    trainer = pl.Trainer(
        plugins=[io] if io else None, callbacks=[saves], max_epochs=epochs, accelerator="cpu",
        devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=8), ckpt_path=ckpt_path)
    return model


def test_a_fit_goes_on_as_if_it_had_never_ended(store: Store, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", EnvstoreCheckpointIO("team/whole"), 4)
    first = EnvstoreCheckpointIO("team/llm")
    fit(tmp_path / "out", first, 2)
    first.run.close()
    second = EnvstoreCheckpointIO("team/llm")
    model = fit(tmp_path / "out", second, 4, "last")
    assert model.losses == whole.losses[8:]
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))
    second.run.close()
    # On a node that has none of the files:
    shutil.rmtree(tmp_path / "out")
    third = EnvstoreCheckpointIO("team/llm")
    again = fit(tmp_path / "out", third, 5, third.latest_path())
    assert len(again.losses) == 4
    third.run.close()
    with Run("team/llm") as run:
        net = Model()
        assert run.restore({"model": net.state_dict()}, only=["model"]) == 20
        assert torch.equal(net.layer.weight, again.layer.weight)
    store.assert_sound()


def test_one_process_may_train_with_one_plugin_after_the_other(
    store: Store, tmp_path: Path
) -> None:
    first = EnvstoreCheckpointIO("team/llm")
    fit(tmp_path / "out", first, 1)
    second = EnvstoreCheckpointIO("team/llm")
    assert len(fit(tmp_path / "out", second, 2, "last").losses) == 4
    # The one before may be used again, too, and has nothing to wait for until then.
    first.teardown()
    assert len(fit(tmp_path / "out", first, 3, second.latest_path()).losses) == 4
    assert first.run.latest() == 12
    first.run.close()
    store.assert_sound()


def test_lightning_decides_what_is_kept(store: Store, tmp_path: Path) -> None:
    io = EnvstoreCheckpointIO("team/llm")
    fit(tmp_path / "out", io, 4, save_top_k=1)
    left = {json.loads(path.read_text())["checkpoint"] for path in (tmp_path / "out").iterdir()}
    io.teardown()
    kept = {str(commit.checkpoint) for commit in io.run.list()}
    assert left <= kept
    assert len(left) == 2  # the best and the last
    assert len(kept) <= 3
    io.run.close()


def test_objects_are_loaded_only_when_they_are_trusted(store: Store, tmp_path: Path) -> None:
    io = EnvstoreCheckpointIO("team/llm")
    state = {"global_step": 3, "state_dict": {"w": torch.ones(2)}, "marker": Marker()}
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    with pytest.raises(UntrustedObjectError):
        io.load_checkpoint(tmp_path / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "a.ckpt", map_location="cpu", weights_only=False)
    assert isinstance(loaded["marker"], Marker)
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))
    with pytest.raises(NoCheckpointError, match="holds no step"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(NoCheckpointError, match="step 7"):
        io.load_checkpoint(tmp_path / "step=7.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(state, tmp_path / "b.ckpt", storage_options={})
    io.run.close()


def test_a_fit_that_forgot_to_resume_is_stopped(store: Store, tmp_path: Path) -> None:
    io = EnvstoreCheckpointIO("team/llm")
    fit(tmp_path / "out", io, 1)
    io.run.close()
    with pytest.raises(CheckpointError, match="restore"):
        fit(tmp_path / "out", EnvstoreCheckpointIO("team/llm"), 1)


def test_without_the_plugin_files_are_written_through_fsspec(store: Store, tmp_path: Path) -> None:
    fsspec.register_implementation("envstore", EnvstoreFileSystem, clobber=True)
    whole = fit(tmp_path / "whole", EnvstoreCheckpointIO("team/whole"), 3)
    out = "envstore://team/files/run"
    fit(out, None, 1)
    again = fit(out, None, 3, f"{out}/last.ckpt")
    assert again.losses == whole.losses[4:]
    EnvstoreFileSystem.clear_instance_cache()
