from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
import torch
import torch.distributed.checkpoint as dcp

from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import NotFoundError
from envstore.store.creation import create_store
from envstore.store.refs import RefName, read_ref
from envstore.store.repository import Repository
from tests.s3server import S3Server
from tests.stores import Store

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


@pytest.fixture(autouse=True)
def _scheme(cache_dir: Path) -> Iterator[None]:
    fsspec.register_implementation("envstore", EnvstoreFileSystem, clobber=True)
    yield
    EnvstoreFileSystem.clear_instance_cache()


@pytest.fixture
def fs(store: Store) -> EnvstoreFileSystem:
    return fsspec.filesystem("envstore")


def names(fs: EnvstoreFileSystem, path: str) -> list[str]:
    return [name.rpartition("/")[2] for name in fs.ls(path, detail=False)]


def test_a_file_is_there_once_it_is_closed(fs: EnvstoreFileSystem, store: Store) -> None:
    data = os.urandom(9 << 20)
    with fs.open("envstore://team/data/v1/deep/file.bin", "wb") as file:
        file.write(data[:5])
        file.write(data[5:])
        assert not fs.exists("envstore://team/data/v1/deep/file.bin")
    assert fs.cat("envstore://team/data/v1/deep/file.bin") == data
    assert fs.cat_file("team/data/v1/deep/file.bin", 5_000_000, 5_000_100) == data[5_000_000:][:100]
    assert fs.cat_file("team/data/v1/deep/file.bin", start=-7) == data[-7:]
    assert fs.cat_ranges(["team/data/v1/deep/file.bin"] * 2, [0, 9], [4, 12]) == [
        data[:4],
        data[9:12],
    ]
    info = fs.info("envstore://team/data/v1/deep/file.bin")
    assert (info["size"], info["type"]) == (len(data), "file")
    assert fs.created("team/data/v1/deep/file.bin").year > 2000
    assert fs.isdir("team/data/v1/deep")
    assert fs.isdir("team/data/v1")
    assert fs.isdir("team/data")
    assert not fs.isdir("team/data/v2")
    assert fs.isfile("team/data/v1/deep/file.bin")
    assert fs.find("envstore://team") == ["team/data/v1/deep/file.bin"]
    assert fs.glob("team/data/*/deep/*.bin") == ["team/data/v1/deep/file.bin"]
    assert names(fs, "") == ["team"]
    with fs.open("team/data/v1/deep/file.bin") as file:
        file.seek(1 << 20)
        assert file.read(10) == data[1 << 20 :][:10]
    store.assert_sound()


def test_a_file_that_broke_off_is_not_kept(fs: EnvstoreFileSystem, store: Store) -> None:
    def break_off() -> None:
        with fs.open("team/data/v1/x", "wb") as file:
            file.write(bytes(5 << 20))
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_off()
    file = fs.open("team/data/v1/x", "wb")
    file.write(b"half")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del file
        gc.collect()
    assert [one.category for one in caught] == [ResourceWarning]
    assert not fs.exists("team/data/v1/x")
    assert store.object_keys("refs") == []


def test_errors_are_those_of_files(fs: EnvstoreFileSystem, store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="envstore://team/data/v1/none"):
        fs.open("envstore://team/data/v1/none")
    for action in (fs.ls, fs.info, fs.rm, fs.cat_file):
        with pytest.raises(FileNotFoundError):
            action("team/data/v1/none")
    with pytest.raises(OSError, match="write envstore://namespace/name/tag/file"):
        fs.pipe("team/data/v1", b"")
    with pytest.raises(OSError, match=r"\.\."):
        fs.pipe("team/data/v1/../x", b"")
    with pytest.raises(OSError, match="cannot be appended"):
        fs.open("team/data/v1/x", "ab")
    fs.pipe("team/data/v1/x", b"1")
    with pytest.raises(FileExistsError):
        fs.open("team/data/v1/x", "xb")
    with pytest.raises(OSError, match="is no directory"):
        fs.pipe("team/data/v1/x/y", b"2")
    with pytest.raises(OSError, match="safetensors header"):
        fs.pipe("team/data/v1/m.safetensors", _safetensors() + b"more")


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    for options in ({"store": f"file://{tmp_path}/none"}, {}):
        elsewhere = EnvstoreFileSystem(**options, skip_instance_cache=True)
        with pytest.raises(FileNotFoundError, match="envstore init"):
            elsewhere.ls("")


def test_safetensors_written_through_fsspec_share_chunks_with_pushed_ones(
    fs: EnvstoreFileSystem, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(_safetensors())
    store.push(tmp_path / "model", "models/base:v1", kind="model")
    before = set(store.object_keys("packs"))
    fs.pipe("team/data/v1/other.safetensors", _safetensors())
    fs.pipe("team/data/v2/other.safetensors", _safetensors(note="another header"))
    added = sum(store.path(key).stat().st_size for key in {*store.object_keys("packs")} - before)
    assert added < 10_000  # headers and manifests


def test_copy_move_and_remove(fs: EnvstoreFileSystem, store: Store) -> None:
    fs.pipe({f"team/data/v1/dir/{name}": name.encode() for name in "abc"})
    packs = store.object_keys("packs")
    fs.mv("team/data/v1/dir", "team/data/v1/moved")
    assert fs.find("team/data/v1") == [f"team/data/v1/moved/{name}" for name in "abc"]
    fs.copy("team/data/v1/moved/a", "team/data/v2/x")
    fs.mv("team/data/v1/moved/b", "team/data/v2/y")
    assert fs.cat("team/data/v2/*") == {"team/data/v2/x": b"a", "team/data/v2/y": b"b"}
    assert names(fs, "team/data/v1/moved") == ["a", "c"]
    fs.rm("team/data/v2/x")
    assert fs.find("team/data/v2") == ["team/data/v2/y"]
    fs.rm("team/data/v2", recursive=True)
    assert not fs.exists("team/data/v2")
    assert store.object_keys("refs") == ["refs/team/data/v1"]
    assert set(packs) <= set(store.object_keys("packs"))
    store.assert_sound()


def test_a_transaction_is_one_change(fs: EnvstoreFileSystem, store: Store) -> None:
    with fs.transaction:
        for name in "abc":
            fs.pipe(f"team/data/v1/{name}", name.encode())
        assert not fs.exists("team/data/v1/a")
    ref = read_ref(store.repository.objects, RefName("team", "data", "v1"))
    assert ref.sequence == 1
    assert fs.cat("team/data/v1/c") == b"c"

    def break_off() -> None:
        with fs.transaction:
            fs.pipe("team/data/v1/d", b"d")
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_off()
    assert names(fs, "team/data/v1") == ["a", "b", "c"]


def test_writers_of_one_tree_at_once_lose_nothing(fs: EnvstoreFileSystem, store: Store) -> None:
    def write(number: int) -> None:
        own = EnvstoreFileSystem(skip_instance_cache=True)
        own.pipe(f"team/data/v1/{number}", str(number).encode())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert fs.cat("team/data/v1/*") == {f"team/data/v1/{n}": str(n).encode() for n in range(6)}


def test_a_reader_goes_on_with_the_tree_it_opened(fs: EnvstoreFileSystem) -> None:
    fs.pipe("team/data/v1/x", b"one")
    with fs.open("team/data/v1/x") as file:
        fs.pipe("team/data/v1/x", b"two")
        assert file.read() == b"one"


def test_what_a_pushed_directory_is_stays(
    fs: EnvstoreFileSystem, store: Store, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "link").symlink_to("script")
    store.push(tree, "team/data:v1")
    assert fs.cat("team/data/v1/link") == b"#!/bin/sh\n"
    fs.pipe("team/data/v1/new", b"new")
    store.pull(tmp_path / "pulled", "team/data:v1")
    assert (tmp_path / "pulled" / "script").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "pulled" / "link").read_text() == "#!/bin/sh\n"
    assert (tmp_path / "pulled" / "new").read_bytes() == b"new"


def test_pandas(fs: EnvstoreFileSystem, store: Store) -> None:
    frame = pd.DataFrame({"x": range(1000), "y": [str(number) for number in range(1000)]})
    frame.to_parquet("envstore://team/data/v1/frame.parquet")
    frame.to_csv("envstore://team/data/v1/frame.csv", index=False)
    options = {"store": store.url}
    found = pd.read_parquet("envstore://team/data/v1/frame.parquet", storage_options=options)
    assert found.equals(frame)
    assert pd.read_csv("envstore://team/data/v1/frame.csv")["x"].sum() == frame["x"].sum()


def test_torch_save_and_load(fs: EnvstoreFileSystem) -> None:
    state = {"w": torch.randn(100, 100)}
    with fs.open("envstore://team/llm/final/model.pt", "wb") as file:
        torch.save(state, file)
    with fs.open("envstore://team/llm/final/model.pt") as file:
        assert torch.equal(torch.load(file)["w"], state["w"])


def _state(value: float = 0.0) -> dict[str, Any]:
    return {"model": {"w": torch.full((64, 64), value)}, "step": int(value)}


def _loaded(url: str) -> tuple[float, int]:
    state = _state()
    dcp.load(state, checkpoint_id=url)
    return float(state["model"]["w"].mean()), state["step"]


def test_a_distributed_checkpoint(fs: EnvstoreFileSystem, store: Store, tmp_path: Path) -> None:
    url = "envstore://team/llm/step-100"
    dcp.save(_state(1), checkpoint_id=url)
    assert names(fs, url) == [".metadata", "__0_0.distcp"]
    assert store.object_keys("drafts") == []
    assert store.snapshot("team/llm:step-100").kind == "checkpoint"
    assert _loaded(url) == (1, 1)
    dcp.save(_state(2), checkpoint_id=url)
    assert _loaded(url) == (2, 2)
    sequence = read_ref(store.repository.objects, RefName("team", "llm", "step-100")).sequence
    assert sequence == 2  # each save moved the ref once
    # It is a checkpoint of the run, until its tree is removed.
    with DirectoryRun("team/llm") as run:
        assert run.latest() == 100
        assert run.restore(tmp_path / "restored") == 100
        assert sorted(path.name for path in (tmp_path / "restored").iterdir()) == names(fs, url)
        dcp.save(_state(4), checkpoint_id="envstore://team/llm/step-200")
        assert run.latest() == 200
        fs.rm("envstore://team/llm/step-200", recursive=True)
        assert run.latest() == 100
        assert store.snapshot("team/llm:latest") == store.snapshot("team/llm:step-100")
    dcp.async_save(_state(3), checkpoint_id=f"{url}/below").result()
    assert _loaded(f"{url}/below") == (3, 3)


def test_ranks_that_do_not_coordinate(fs: EnvstoreFileSystem) -> None:
    url = "envstore://team/llm/alone"
    for value in (1, 2):
        dcp.save(_state(value), checkpoint_id=url, use_collectives=False)
        assert names(fs, url) == ["__0.metadata", "__0_0.distcp"]
        assert _loaded(url) == (value, value)


def test_a_distributed_checkpoint_that_breaks_off_is_seen_by_nobody(
    fs: EnvstoreFileSystem, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "envstore://team/llm/step-100"
    dcp.save(_state(1), checkpoint_id=url)
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "finish", _killed)
        for target in (url, "envstore://team/llm/step-200"):
            with pytest.raises(dcp.CheckpointException):
                dcp.save(_state(2), checkpoint_id=target)
    assert _loaded(url) == (1, 1)
    assert names(fs, "envstore://team/llm/step-200") == ["__0_0.distcp"]  # its writer may list it
    with pytest.raises(NotFoundError):
        store.snapshot("team/llm:step-200")
    dcp.save(_state(2), checkpoint_id="envstore://team/llm/step-200")
    assert _loaded("envstore://team/llm/step-200") == (2, 2)
    store.assert_sound()


def _killed(*_: object) -> None:
    raise KeyError("killed")


def test_on_s3(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, set_env: Callable[[dict[str, str]], None]
) -> None:
    set_env(s3_server.env)
    url = s3_server.url(s3_server.new_bucket(), "store")
    create_store(url)
    monkeypatch.setenv("ENVSTORE_URL", url)
    dcp.save(_state(5), checkpoint_id="envstore://team/llm/step-5")
    assert _loaded("envstore://team/llm/step-5") == (5, 5)
    with Repository.open(url) as repository:
        tree = SnapshotTree(repository, repository.resolve("team/llm:step-5"))
        assert set(tree.sizes) == {".metadata", "__0_0.distcp"}
    fs = fsspec.filesystem("envstore")
    fs.rm("envstore://team/llm/step-5", recursive=True)
    assert not fs.exists("envstore://team/llm/step-5")
    fs.close()


@pytest.fixture
def set_env(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def set_all(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def _safetensors(note: str = "") -> bytes:
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(1)
    tensors = {"w": torch.randn(300, 300, generator=generator)}
    return save(tensors, {"note": note})
