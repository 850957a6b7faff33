"""What checkpoints are measured against; also a program that serves the peers that speak S3.

Those live in an environment of their own (``.venv/peers``) and take orders as lines of JSON.
``state`` gives the same tensors everywhere: a third weights, two thirds optimizer state.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GIB = 1 << 30
TENSOR = 16 << 20
PUT = 16 << 20
"""Bytes of one request of the raw transfers that are the floor on S3."""
THREADS = 8


def state(size: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return ``size`` GiB of float32 tensors of 16 MiB in three dictionaries."""
    import torch

    torch.manual_seed(seed)
    count = max(3, round(size * GIB / TENSOR))
    names = ("model", "exp_avg", "exp_avg_sq")
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number in range(count):
        tensor = torch.randn(TENSOR // 4 // 1024, 1024)
        found[names[number % 3]][f"layers.{number // 3}.weight"] = tensor
    return found


def change(tensors: dict[str, dict[str, Any]]) -> None:
    """Change every tensor a little, as a step of training does."""
    for group in tensors.values():
        for tensor in group.values():
            tensor.mul_(1.0001)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def start_group(directory: Path) -> None:
    """Start a process group of one, which DCP's async_save asks for."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.FileStore(str(directory / "group"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def torch_save(tensors: dict[str, Any], path: Path) -> float:
    """Return the seconds of ``torch.save`` to a file and ``fsync``."""
    import torch

    def work() -> None:
        with path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    return timed(work)


def async_stall(tensors: dict[str, Any], path: Path) -> float:
    """Return for how long DCP's ``async_save`` holds the loop; returns when it has ended."""
    import torch.distributed.checkpoint as dcp

    began = time.perf_counter()
    future = dcp.async_save(tensors, checkpoint_id=str(path))
    stalled = time.perf_counter() - began
    future.result()
    return stalled


class Peers:
    """DCP by fsspec, DCP by s3torchconnector, and raw parallel requests, on one bucket."""

    def __init__(self, size: float, endpoint: str, bucket: str) -> None:
        self._tensors = state(size)
        self._endpoint, self._bucket = endpoint, bucket
        os.environ["FSSPEC_S3_ENDPOINT_URL"] = endpoint
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")

    def _client(self) -> Any:
        import botocore.session
        from botocore.config import Config

        config = Config(s3={"addressing_style": "path"}, max_pool_connections=THREADS)
        return botocore.session.Session().create_client(
            "s3", endpoint_url=self._endpoint, config=config
        )

    def _writer(self, how: str, name: str) -> Any:
        if how == "fsspec":
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

            return FsspecWriter(f"s3://{self._bucket}/{name}")
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageWriter

        return S3StorageWriter(
            region="us-east-1",
            path=f"s3://{self._bucket}/{name}",
            s3client_config=S3ClientConfig(force_path_style=True),
        )

    def _reader(self, how: str, name: str) -> Any:
        if how == "fsspec":
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

            return FsspecReader(f"s3://{self._bucket}/{name}")
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader

        return S3StorageReader(
            region="us-east-1",
            path=f"s3://{self._bucket}/{name}",
            s3client_config=S3ClientConfig(force_path_style=True),
        )

    def save(self, how: str, name: str) -> float:
        """Return the seconds of a save under ``name``."""
        import torch.distributed.checkpoint as dcp

        change(self._tensors)
        if how != "raw":
            writer = self._writer(how, name)
            return timed(lambda: dcp.save(self._tensors, storage_writer=writer))
        views = [
            memoryview(tensor.numpy()).cast("B")
            for group in self._tensors.values()
            for tensor in group.values()
        ]
        pieces = [view[at : at + PUT] for view in views for at in range(0, len(view), PUT)]
        client = self._client()

        def put(number: int) -> None:
            client.put_object(
                Bucket=self._bucket, Key=f"{name}/{number}", Body=bytes(pieces[number])
            )

        with ThreadPoolExecutor(THREADS) as pool:
            return timed(lambda: list(pool.map(put, range(len(pieces)))))

    def load(self, how: str, name: str) -> float:
        """Return the seconds of reading ``name`` into tensors that are there."""
        import torch.distributed.checkpoint as dcp

        if how != "raw":
            reader = self._reader(how, name)
            return timed(lambda: dcp.load(self._tensors, storage_reader=reader))
        client = self._client()
        listed = client.list_objects_v2(Bucket=self._bucket, Prefix=f"{name}/")["Contents"]

        def get(key: str) -> int:
            return len(client.get_object(Bucket=self._bucket, Key=key)["Body"].read())

        keys = [item["Key"] for item in listed]
        with ThreadPoolExecutor(THREADS) as pool:
            return timed(lambda: list(pool.map(get, keys)))


def main() -> None:
    """Answer lines of JSON with lines of JSON until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the peers print must not be taken for an answer
    size, endpoint, bucket = float(sys.argv[1]), sys.argv[2], sys.argv[3]
    peers = Peers(size, endpoint, bucket)
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        act = peers.save if order["do"] == "save" else peers.load
        out.write(json.dumps({"seconds": act(order["how"], order["name"])}) + "\n")


if __name__ == "__main__":
    main()
