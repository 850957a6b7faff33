"""The parts of several ranks become one tree, with files that any loader reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from envstore.checkpoint import tensorfile
from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import RanksDisagreeError
from envstore.checkpoint.layout import CheckpointId, part_prefix
from envstore.checkpoint.merging import merge
from envstore.checkpoint.records import Part
from envstore.checkpoint.table import TensorRecord, encode_record, tensor_path
from envstore.errors import CorruptError
from envstore.store.pull import pull
from envstore.store.repository import Repository
from tests.checkpoint.rankfiles import RUN, SAVED, state_json, store_tree
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

ID = CheckpointId(40, 2, 1)
Array = np.ndarray


@dataclass(frozen=True)
class Shard:
    """The box of ``whole`` that begins at ``offsets``."""

    whole: Array
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    own: bool = False

    @property
    def data(self) -> bytes:
        box = tuple(slice(a, a + n) for a, n in zip(self.offsets, self.lengths, strict=True))
        return self.whole[box].tobytes()


def rows(whole: Array, start: int, end: int) -> Shard:
    return Shard(whole, (start, *(0,) * (whole.ndim - 1)), (end - start, *whole.shape[1:]))


def all_of(whole: Array, *, own: bool = False) -> Shard:
    return Shard(whole, (0,) * whole.ndim, whole.shape, own)


def save_part(
    repository: Repository,
    rank: int,
    world_size: int,
    state: Mapping[str, Mapping[str, Shard]],
    *,
    piece: int = 4 << 20,
) -> Part:
    """Store a rank's state as a persister does: cut at tensors, and every ``piece`` bytes."""
    files: dict[str, Sequence[bytes]] = {}
    items: list[object] = []
    for item, shards in state.items():
        head = tensorfile.header(
            (name, str(s.whole.dtype), s.lengths, len(s.data)) for name, s in shards.items()
        )
        path, at, pieces, records = tensor_path(item, rank, world_size), len(head), [head], []
        for name, s in shards.items():
            record = TensorRecord(
                name, item, str(s.whole.dtype), s.whole.shape, s.offsets, s.lengths,
                path, at, len(s.data), rank, s.own,
            )  # fmt: skip
            records.append(encode_record(record))
            pieces += [s.data[i : i + piece] for i in range(0, len(s.data), piece)]
            at += len(s.data)
        files[path] = pieces
        items.append(
            {
                "name": item, "kind": "dict", "size": at, "objects": 0,
                "tensors": records, "value": None,
            }
        )  # fmt: skip
    files[f"{part_prefix(rank, world_size)}state.json"] = [state_json(rank, world_size, items)]
    return Part(ID, rank, world_size, store_tree(repository, files), SAVED)


def pulled(store: Store, snapshot: bytes, to: Path) -> Path:
    pull(store.repository, snapshot, to)
    return to


def test_a_loader_reads_what_the_ranks_have_cut_in_rows(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    w = random.standard_normal((6, 5)).astype(np.float32)
    h, scalar, empty = w[0].astype(np.float16), np.array(7), np.zeros((0, 4), np.float32)
    second = np.arange(24.0).reshape(4, 6)
    parts = [
        save_part(
            store.repository,
            0,
            3,
            {
                "model": {"w": rows(w, 0, 3), "empty": all_of(empty)},
                "optim": {"m": Shard(second, (0, 0), (4, 2))},
                "rng": {"seed": all_of(np.arange(3), own=True)},
            },
            piece=16,
        ),
        save_part(
            store.repository,
            1,
            3,
            {
                "model": {"h": all_of(h), "w": rows(w, 3, 4)},
                "optim": {"m": Shard(second, (0, 2), (4, 4))},
                "rng": {"seed": all_of(np.arange(3), own=True)},
            },
            piece=16,
        ),
        save_part(
            store.repository, 2, 3, {"model": {"w": rows(w, 4, 6), "s": all_of(scalar)}}, piece=16
        ),
    ]
    snapshot = merge(store.repository, RUN, ID, parts)
    sent = store.repository.objects.traffic.bytes_out
    assert merge(store.repository, RUN, ID, parts) == snapshot
    assert store.repository.objects.traffic.bytes_out - sent < 6000  # no tensors among them
    tree = pulled(store, snapshot, tmp_path / "out")
    found = load_file(tree / "model.safetensors")
    assert sorted(found) == ["empty", "h", "s", "w"]
    for name, expected in {"w": w, "h": h, "s": scalar, "empty": empty}.items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert found[name].tobytes() == expected.tobytes()
    with safe_open(tree / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    # Columns, and what each rank has of its own, are not to be had without reading the tensors.
    assert sorted(path.name for path in tree.iterdir()) == ["model.safetensors", "ranks"]
    assert load_file(tree / "ranks/00001/optim.safetensors")["m"].shape == (4, 4)
    facts = store.repository.snapshot(snapshot)
    assert (facts.kind, facts.created) == ("checkpoint", SAVED)
    assert facts.attributes == {
        "run": "team/llm", "step": "40", "epoch": "2", "attempt": "1", "world_size": "3"
    }  # fmt: skip
    report = store.verify_targets([("merged", snapshot)])
    assert report.problems == []


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 2), (3, 4), "model/w has gaps"),
        ((0, 3), (2, 4), "model/w is stored twice in part"),
    ],
)
def test_shards_that_do_not_tile_are_refused(
    store: Store, first: tuple[int, int], second: tuple[int, int], message: str
) -> None:
    w = np.zeros((4, 2), np.float32)
    parts = [
        save_part(store.repository, rank, 2, {"model": {"w": rows(w, *part)}})
        for rank, part in enumerate((first, second))
    ]
    with pytest.raises(RanksDisagreeError, match=message):
        merge(store.repository, RUN, ID, parts)


def test_ranks_with_other_shapes_or_files_are_refused(store: Store) -> None:
    one = save_part(store.repository, 0, 2, {"m": {"w": rows(np.zeros((4, 2)), 0, 2)}})
    other = save_part(store.repository, 1, 2, {"m": {"w": rows(np.zeros((4, 3)), 2, 4)}})
    with pytest.raises(RanksDisagreeError, match=r"m/w is float64 \[4, 2\] on rank 0"):
        merge(store.repository, RUN, ID, [one, other])
    stray = Part(ID, 1, 2, store_tree(store.repository, {"state.json": b"{}"}), SAVED)
    with pytest.raises(RanksDisagreeError, match=r"rank 1 of step 40 has saved 'state.json'"):
        merge(store.repository, RUN, ID, [one, stray])
    foreign = store_tree(store.repository, {"ranks/00001/state.json": state_json(0, 2)})
    with pytest.raises(RanksDisagreeError, match="is that of rank 0 of 2"):
        merge(store.repository, RUN, ID, [one, Part(ID, 1, 2, foreign, SAVED)])
    bare = store_tree(store.repository, {"ranks/00001/notes": b"text"})
    with pytest.raises(RanksDisagreeError, match=r"state.json of rank 1 of step 40 is missing"):
        merge(store.repository, RUN, ID, [one, Part(ID, 1, 2, bare, SAVED)])


def test_damage_is_named(store: Store) -> None:
    parts = [
        save_part(store.repository, rank, 2, {"m": {"w": rows(np.ones((4, 2)), at, at + 2)}})
        for rank, at in enumerate((0, 2))
    ]
    bad = store_tree(store.repository, {"ranks/00001/state.json": b"[1]"})
    with pytest.raises(CorruptError, match=r"state.json of rank 1 of step 40 is not a JSON"):
        merge(store.repository, RUN, ID, [parts[0], Part(ID, 1, 2, bad, SAVED)])
    manifest = store.repository.snapshot(parts[1].snapshot).manifest
    store.repository.objects.delete(f"locations/{manifest.hex()}")
    with pytest.raises(CorruptError, match="is damaged and not built on"):
        merge(store.repository, RUN, ID, parts)


def test_trees_of_other_kinds_are_only_put_together(store: Store, tmp_path: Path) -> None:
    parts = [
        Part(
            ID,
            rank,
            2,
            store_tree(store.repository, {f"ranks/{rank:05d}/deep/er/file": b"%d" % rank}),
            SAVED,
        )
        for rank in (0, 1)
    ]
    tree = pulled(store, merge(store.repository, RUN, ID, parts), tmp_path / "out")
    assert (tree / "ranks/00001/deep/er/file").read_bytes() == b"1"


def capture_part(
    repository: Repository, state: Mapping[str, object], rank: int, world_size: int
) -> Part:
    """Store what ``capture`` makes of a state, cut where its pieces end."""
    files: dict[str, Sequence[bytes]] = {}
    for file in capture(state, rank=rank, world_size=world_size, replicated=True).files:
        pieces = []
        for piece in file.pieces:
            data = bytearray(piece.nbytes)
            piece.copy_into(memoryview(data))
            pieces += [bytes(data[at : at + (4 << 20)]) for at in range(0, len(data), 4 << 20)]
        files[file.path] = pieces
    return Part(ID, rank, world_size, store_tree(repository, files), SAVED)


def test_what_ranks_have_divided_among_them_is_one_file(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    model = {
        f"layers.{n}.{kind}": random.standard_normal(shape).astype(dtype)
        for n in range(5)
        for kind, shape, dtype in (("w", (7, 3), np.float32), ("b", (3,), np.float16))
    }
    model["large"] = random.integers(0, 255, 5 << 20, np.uint8)
    state = {"model": model, "step": 5}
    parts = [capture_part(store.repository, state, rank, 3) for rank in range(3)]
    assert len({part.snapshot for part in parts}) == 3
    tree = pulled(store, merge(store.repository, RUN, ID, parts), tmp_path / "out")
    found = load_file(tree / "model.safetensors")
    assert found.keys() == model.keys()
    assert all(np.array_equal(found[name], model[name]) for name in model)
    assert store.verify(whole=True).problems == []
