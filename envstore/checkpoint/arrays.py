"""Tensors of torch and arrays of numpy as one thing: elements in memory, maybe a shard of more.

Neither library is imported: what they make is recognised by those that are loaded already.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from envstore.checkpoint.copying import copy_from
from envstore.checkpoint.dtypes import is_float, is_known
from envstore.checkpoint.errors import CheckpointError

Places = dict[Any, tuple[tuple[int, ...], tuple[int, ...], int]]


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor or array of the state, and which part of the whole this rank holds.

    ``local`` is the plain tensor (detached) or array with the elements; ``shape`` is that of the
    whole, ``offsets`` and ``lengths`` say which box of it ``local`` is. ``owner`` is the rank
    that stores the box if several ranks hold the same, -1 if that is not known from the tensor.
    """

    kind: str
    local: Any
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    nbytes: int
    owner: int = -1
    distributed: bool = False


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """The bytes of a plain tensor on any device, row after row."""

    tensor: Any
    nbytes: int
    stable: bool

    def copy_into(self, view: memoryview) -> None:
        """Copy the elements into ``view`` by several threads. Waits for the device."""
        if not self.nbytes:
            return
        torch = sys.modules["torch"]
        source = self.tensor
        if source.device.type == "cpu" and is_dense(source):
            copy_from(source.data_ptr(), view)
            return
        with torch.no_grad():
            if is_dense(source):
                source = source.view(-1).view(torch.uint8)
                target = torch.frombuffer(view, dtype=torch.uint8)
            else:
                target = torch.frombuffer(view, dtype=torch.uint8)
                if target.data_ptr() % source.element_size():
                    # Strided loops must not store to addresses that are no element's.
                    source = source.resolve_conj().resolve_neg().contiguous()
                    source = source.view(-1).view(torch.uint8)
                else:
                    target = target.view(source.dtype).view(source.shape)
            target.copy_(source)


@dataclass(frozen=True, slots=True)
class ArrayPiece:
    """The bytes of an array, row after row."""

    array: Any
    nbytes: int
    stable: bool = False

    def copy_into(self, view: memoryview) -> None:
        """Copy the elements into ``view``."""
        if not self.nbytes:
            return
        if self.array.flags.c_contiguous:
            copy_from(self.array.ctypes.data, view)
            return
        np = sys.modules["numpy"]
        np.copyto(np.ndarray(self.array.shape, self.array.dtype, buffer=view), self.array)


@dataclass(frozen=True, slots=True)
class BytesPiece:
    """Bytes that were made for the checkpoint and never change."""

    data: bytes
    stable: bool = True

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return len(self.data)

    def copy_into(self, view: memoryview) -> None:
        """Copy the bytes into ``view``."""
        view[:] = self.data


def is_tensor(value: Any) -> bool:
    """Tell whether ``value`` is a tensor of torch, of whatever kind."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def plain_kinds() -> list[type]:
    """Return the classes of plain tensors and arrays, as far as they are loaded."""
    torch, np = sys.modules.get("torch"), sys.modules.get("numpy")
    kinds: list[type] = [] if torch is None else [torch.Tensor, torch.nn.Parameter]
    return kinds if np is None else [*kinds, np.ndarray]


def shard_of(value: Any, what: str, places: Places | None = None) -> Shard | None:
    """Describe a tensor or array; ``None`` if ``value`` is none that can be stored as elements.

    ``places`` remembers what was found out about meshes, for the next tensor of the same state.
    Raises ``CheckpointError`` naming ``what`` for tensors that have no values: on the meta device,
    or partial sums of a mesh.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_tensor(torch, value, what, {} if places is None else places)
    np = sys.modules.get("numpy")
    if np is not None and type(value) is np.ndarray:
        dtype = _array_dtype(value.dtype)
        if dtype is None:
            return None
        shape = value.shape
        return Shard("array", value, dtype, shape, (0,) * len(shape), shape, value.nbytes)
    return None


def piece_of(shard: Shard, stable: bool) -> TensorPiece | ArrayPiece:
    """Return what copies the elements of ``shard``."""
    if shard.kind == "array":
        return ArrayPiece(shard.local, shard.nbytes)
    return TensorPiece(shard.local, shard.nbytes, stable)


def identity(shard: Shard) -> tuple[Any, ...] | None:
    """Return what two names of the same memory have in common; ``None`` if there are no bytes."""
    local = shard.local
    if not shard.nbytes:
        return None
    if shard.kind == "array":
        return ("array", local.ctypes.data, shard.dtype, shard.lengths, local.strides)
    return (
        local.device,
        local.data_ptr(),
        shard.dtype,
        shard.lengths,
        local.stride(),
        local.is_conj(),
        local.is_neg(),
        shard.shape,
        shard.offsets,
    )


def is_dense(tensor: Any) -> bool:
    """Tell whether the memory of a plain tensor is its elements, row after row."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def memory_of(shard: Shard) -> memoryview | None:
    """Return the elements as writable bytes; ``None`` if they are not dense and in main memory.

    The caller keeps ``shard`` for as long as the view.
    """
    local = shard.local
    if not shard.nbytes:
        return memoryview(bytearray())
    if shard.kind == "array":
        if not local.flags.c_contiguous or not local.flags.writeable:
            return None
        return view_of(local.ctypes.data, shard.nbytes)
    if local.device.type != "cpu" or not is_dense(local):
        return None
    return view_of(local.data_ptr(), shard.nbytes)


def not_finite(shards: list[tuple[str, Shard]]) -> list[str]:
    """Return the names of those that hold NaN or infinity. Waits for each device once."""
    torch: Any = sys.modules.get("torch")
    found: list[str] = []
    sums: dict[Any, list[tuple[str, Any, Any]]] = {}
    for name, shard in shards:
        if not shard.nbytes or not is_float(shard.dtype):
            continue
        if shard.kind == "array":
            np = sys.modules["numpy"]
            if not np.isfinite(shard.local).all():
                found.append(name)
            continue
        local = shard.local
        with torch.no_grad():
            if local.element_size() == 1 or local.dtype is torch.complex32:
                local = _widened(torch, local)
            # A sum is NaN or infinite if an element is: one pass, and no array of booleans.
            total = local.sum(dtype=None if local.dtype.itemsize > 2 else torch.float32)
            sums.setdefault((local.device, total.dtype), []).append((name, local, total))
    for entries in sums.values():
        fine = torch.isfinite(torch.stack([total for _, _, total in entries])).tolist()
        found.extend(
            name
            for (name, local, _), ok in zip(entries, fine, strict=True)
            if not ok and not bool(torch.isfinite(local).all())
        )
    order = {name: at for at, (name, _) in enumerate(shards)}
    return sorted(found, key=order.__getitem__)


def _of_tensor(torch: Any, value: Any, what: str, places: Places) -> Shard | None:
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        raise CheckpointError(f"{what} has no shape yet", hint="run its lazy module once")
    dtype = _dtype_name(value.dtype)
    if not dtype or value.layout is not torch.strided or value.is_nested:
        return None
    if value.device.type == "meta":
        raise CheckpointError(
            f"{what} is on the meta device: it has no values", hint="use to_empty() first"
        )
    if not _is_plain(torch, type(value)):
        return _of_subclass(torch, value, dtype, what, places)
    local = value.detach()
    shape = tuple(local.shape)
    return Shard("tensor", local, dtype, shape, (0,) * len(shape), shape, local.nbytes)


def _is_plain(torch: Any, kind: type) -> bool:
    return kind is torch.Tensor or kind is torch.nn.Parameter


def _of_subclass(torch: Any, value: Any, dtype: str, what: str, places: Places) -> Shard | None:
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(value, module.DTensor):
        if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return None  # a subclass whose elements are elsewhere
        local = value.detach().as_subclass(torch.Tensor)
        shape = tuple(local.shape)
        return Shard("tensor", local, dtype, shape, (0,) * len(shape), shape, local.nbytes)
    shape = tuple(value.shape)
    key = (value.device_mesh, value.placements, shape)
    place = places.get(key)
    if place is None:
        place = places[key] = _place(value, what)
    offsets, lengths, owner = place
    with torch.no_grad():
        local = value.to_local().detach()
    if hasattr(local, "wait"):  # a collective is still on its way
        local = local.wait()
    if tuple(local.shape) != lengths:
        raise CheckpointError(f"{what} is not one box of the whole tensor on this rank")
    return Shard(
        "tensor",
        local,
        dtype,
        shape,
        offsets,
        lengths,
        local.nbytes,
        owner=owner,
        distributed=True,
    )


def _place(value: Any, what: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the box of a DTensor that this rank has, and the first rank that has the same."""
    if any(placement.is_partial() for placement in value.placements):
        raise CheckpointError(
            f"{what} is a partial sum on its mesh", hint="redistribute it before it is saved"
        )
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        raise CheckpointError(f"{what} lies on a mesh that this rank is no part of")
    first = tuple(
        0 if placement.is_replicate() else at
        for placement, at in zip(value.placements, coordinate, strict=True)
    )
    chunks = value.__create_chunk_list__()
    if len(chunks) != 1:
        raise CheckpointError(f"{what} is not one box of the whole tensor on this rank")
    lengths = tuple(chunks[0].sizes)
    offsets = (0,) * len(lengths) if 0 in lengths else tuple(chunks[0].offsets)
    return offsets, lengths, int(value.device_mesh.mesh[first])


def _array_dtype(dtype: Any) -> str | None:
    """Return our name of a numpy dtype, ``None`` for objects and records."""
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "biufcSUmM":
        return None
    if dtype.isnative and dtype.kind in "biufc" and is_known(dtype.name):
        return str(dtype.name)
    name = f"numpy:{dtype.str}"
    return name if is_known(name) and dtype.itemsize else None


@cache
def _dtype_name(dtype: Any) -> str:
    """Return our name of a torch dtype, ``""`` for those that are stored as objects."""
    name = str(dtype).removeprefix("torch.")
    return name if is_known(name) else ""


def _widened(torch: Any, tensor: Any) -> Any:
    if tensor.dtype is torch.complex32:
        return torch.view_as_real(tensor).to(torch.float32)
    return tensor.to(torch.float32)


def view_of(address: int, size: int) -> memoryview:
    """Return memory as writable bytes, which the caller keeps alive for as long as the view."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
