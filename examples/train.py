"""Trains a small transformer on Python's own documentation, and survives being killed.

Usage: python examples/train.py [--steps N] [--store URL] [--name NAME] [--save-every N]
       torchrun --nproc-per-node 2 --max-restarts 3 examples/train.py [the same]

Try it: start it, kill it with SIGKILL whenever you like, start it again with the same arguments.
It goes on from the last step that was saved and prints the same losses as a run that nobody
killed. Under torchrun kill one of the workers: all of them start anew and go on. Needs torch.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from envstore import checkpoint

CONTEXT = 32
BATCH = 16
SEED = 7


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        shape = (rows, length, self.heads, width // self.heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.mix(self.first(x)).chunk(3, -1)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.feed(self.second(x))


class Model(nn.Module):
    def __init__(self, letters: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return self.head(self.norm(self.blocks(self.letters(x) + self.places(places))))


class Loader:
    """Batches of text in an order of its own, which a checkpoint remembers."""

    def __init__(self, text: Tensor, rank: int, world_size: int) -> None:
        self.text, self.rank, self.world_size = text, rank, world_size
        self.epoch = self.batch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = self._order()
            mine = order[self.rank :: self.world_size]
            while (self.batch + 1) * BATCH <= len(mine):
                starts = mine[self.batch * BATCH : (self.batch + 1) * BATCH]
                self.batch += 1
                rows = torch.stack([self.text[start : start + CONTEXT + 1] for start in starts])
                yield rows[:, :-1], rows[:, 1:]
            self.epoch, self.batch = self.epoch + 1, 0

    def _order(self) -> Tensor:
        chooser = torch.Generator().manual_seed(SEED + self.epoch)
        samples = (len(self.text) - 1) // CONTEXT
        return torch.randperm(samples, generator=chooser) * CONTEXT


def join() -> None:
    """Make the process group of all ranks that torchrun has started."""
    # torchrun's store goes on over restarts of the workers, and gloo would find the addresses of
    # the dead in it: each start gets keys of its own.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    own = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=own, rank=rank, world_size=world_size)


def main() -> int:
    """Train; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a small transformer, with checkpoints.")
    parser.add_argument("--steps", type=int, default=200, help="how many [%(default)s]")
    parser.add_argument("--store", help="URL of the store [ENVSTORE_URL, else the user's own]")
    parser.add_argument("--name", default="example/train", help="of the run [%(default)s]")
    parser.add_argument("--save-every", type=int, default=10, help="steps [%(default)s]")
    options = parser.parse_args()

    # Starts to look for the newest checkpoint while the model is made.
    run = checkpoint.Run(
        options.name,
        options.store,
        save=checkpoint.every(steps=options.save_every),
        keep=checkpoint.last(2) | checkpoint.best("loss", "min", 1),
        on_preempt="snapshot",
    )
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ:
        join()
    text = "".join(pydoc_data.topics.topics.values())
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    encoded = torch.tensor([numbers[letter] for letter in text])
    model = Model(len(letters))
    trained: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader = Loader(encoded, run.rank, run.world_size)
    state: dict[str, Any] = {
        "model": trained,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "rng": checkpoint.rng(),
    }
    with run:
        done = run.restore(state)
        first = 1 if done is None else done + 1
        if run.rank == 0:
            print(f"starts with step {first}", flush=True)
        if done is None:
            torch.manual_seed(SEED + run.rank)  # what dropout draws from
        for step, (given, wanted) in zip(range(first, options.steps + 1), loader, strict=False):
            loss = functional.cross_entropy(trained(given).flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if run.rank == 0:
                # All its digits: two runs that differ anywhere show it.
                print(f"step {step} loss {loss.item()!r}", flush=True)
            run.step(step, state, metrics={"loss": loss.item()})
            if run.preempted:
                break
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
