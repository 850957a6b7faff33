"""Cut points of safetensors files: the header, then each tensor, in pieces from its start.

Layout (safetensors format, "Format" section of its README): 8 bytes little-endian header length
N, N bytes of JSON mapping names to ``{"dtype", "shape", "data_offsets": [begin, end]}`` plus an
optional ``__metadata__``, then the tensors' bytes. Cutting there makes a changed header, another
order of tensors or other shards cost nothing but the header.
"""

from __future__ import annotations

import json
from itertools import pairwise

MAX_HEADER = 3 << 20
MAX_TENSORS = 200_000
_LENGTH_BYTES = 8


def tensor_cuts(head: bytes, size: int, piece: int) -> list[int] | None:
    """Return the chunk ends of a safetensors file of ``size`` bytes, or ``None`` if it is not one.

    ``head`` is the start of the file. Tensors longer than ``piece`` bytes are cut every ``piece``
    from their own start; a header longer than ``MAX_HEADER`` or not wholly in ``head`` counts as
    not being one. Any doubt (overlap, gap, bounds, malformed JSON) gives ``None``.
    """
    if len(head) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if not 2 <= length <= MAX_HEADER or start > min(len(head), size):
        return None
    spans = _tensor_spans(head[_LENGTH_BYTES:start])
    if spans is None:
        return None
    cuts = [start]
    at = 0
    for begin, end in spans:
        if begin != at or end > size - start:
            return None
        cuts.extend(range(start + begin + piece, start + end, piece))
        cuts.append(start + end)
        at = end
    if at != size - start or any(a >= b for a, b in pairwise(cuts)):
        return None
    return cuts


def _tensor_spans(header: bytes) -> list[tuple[int, int]] | None:
    """Return the non-empty ``(begin, end)`` of the tensors in file order."""
    try:
        parsed = json.loads(header)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or len(parsed) > MAX_TENSORS:
        return None
    spans = []
    for name, tensor in parsed.items():
        if name == "__metadata__":
            continue
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2:
            return None
        begin, end = offsets
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            return None
        if end > begin:
            spans.append((begin, end))
    return sorted(spans)
