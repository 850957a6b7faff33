"""Which safetensors files can be made of the ranks' chunks as they are."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from envstore.checkpoint import dtypes, tensorfile
from envstore.checkpoint.table import Assembled, TensorRecord, tensor_path
from envstore.store.entries import Entry

Refs = list[tuple[bytes, int]]


def consolidate(
    tensors: Mapping[tuple[str, str], Assembled], entries: Mapping[bytes, Entry]
) -> Iterator[tuple[bytes, bytes, Refs]]:
    """Yield path, header and references of the tensors' chunks for each item that has a file.

    ``tensors`` are by item and name, ``entries`` the ranks' files. An item has one if each of its
    tensors is whole on one rank, or cut along its first dimension alone, and if its ranks' chunks
    are cut where its tensors begin and end. The same from the same parts, whoever asks.
    """
    items: dict[str, list[Assembled]] = {}
    for (item, _), tensor in sorted(tensors.items()):
        items.setdefault(item, []).append(tensor)
    files = _Files(entries)
    for item, found in items.items():
        # Elements of falling size stay aligned, as the header's length is a multiple of 8.
        found.sort(key=lambda tensor: (-dtypes.item_size(tensor.dtype), tensor.name))
        refs = _refs(found, files)
        if refs is not None:
            path = tensor_path(item, 0, 1).encode()
            head = tensorfile.header(
                (tensor.name, tensor.dtype, tensor.shape, _bytes(tensor)) for tensor in found
            )
            yield path, head, refs


def _refs(tensors: list[Assembled], files: _Files) -> Refs | None:
    refs: Refs = []
    for tensor in tensors:
        if tensor.per_rank or any(not _is_row(piece) for piece in tensor.pieces):
            return None
        for piece in tensor.pieces:
            found = files.refs(piece)
            if found is None:
                return None
            refs += found
    return refs


def _is_row(piece: TensorRecord) -> bool:
    """Whether the box is all of the tensor but in its first dimension."""
    return piece.lengths[1:] == piece.shape[1:]


def _bytes(tensor: Assembled) -> int:
    return math.prod(tensor.shape) * dtypes.item_size(tensor.dtype)


class _Files:
    """The chunks of the ranks' files by where they begin."""

    def __init__(self, entries: Mapping[bytes, Entry]) -> None:
        self._entries = entries
        self._bounds: dict[bytes, list[int]] = {}

    def refs(self, piece: TensorRecord) -> Refs | None:
        """Return the references of a tensor's bytes, ``None`` if they are not cut so."""
        if not piece.size:
            return []
        path = piece.path.encode()
        entry = self._entries.get(path)
        if entry is None:
            return None
        if path not in self._bounds:
            self._bounds[path] = [0, *accumulate(size for _, size in entry.refs)]
        bounds = self._bounds[path]
        first = bisect_left(bounds, piece.start)
        last = bisect_left(bounds, piece.start + piece.size)
        if last == len(bounds) or bounds[first] != piece.start:
            return None
        if bounds[last] != piece.start + piece.size:
            return None
        return list(entry.refs[first:last])
