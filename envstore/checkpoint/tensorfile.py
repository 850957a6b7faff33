"""The headers of safetensors files, as any loader reads them.

Source: "Format" in the README of safetensors: 8 bytes little-endian length, JSON padded with
spaces, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from envstore.checkpoint.dtypes import in_safetensors

ALIGNMENT = 64

_METADATA = {"format": "pt"}  # transformers refuses files that do not say so


def header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the header of a file of ``(name, dtype, shape, bytes)``, stored in that order.

    Its length is a multiple of ``ALIGNMENT`` bytes: copies to addresses that are none take up to
    twice as long, measured with torch 2.13.
    """
    table: dict[str, object] = {"__metadata__": _METADATA}
    at = 0
    for name, dtype, shape, size in tensors:
        code, stored = in_safetensors(dtype, shape)
        table[name] = {"dtype": code, "shape": stored, "data_offsets": [at, at + size]}
        at += size
    body = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(8 + len(body)) % ALIGNMENT)
    return len(body).to_bytes(8, "little") + body
