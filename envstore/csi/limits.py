"""How much a request may hold: what is larger than the specification allows is refused."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from envstore.csi.redaction import TOKENS
from envstore.csi.refusal import invalid

STRING = 128
"""Bytes in a string, and in no other field unless said here (CSI specification, "Size Limits")."""

MAP = 4096
"""Bytes in the keys and values of a map, or in all strings of a list of mount options."""

_LONGER = {
    # "SP SHOULD support the maximum path length allowed by the operating system".
    "staging_target_path": 4095,
    "target_path": 4095,
    "volume_path": 4095,
    "node_id": 256,
}

# Banned in names by the specification, and of no use in an id or a path.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def check_limits(message: Message) -> None:
    """Raise ``RefusedError`` (``INVALID_ARGUMENT``) if a field of ``message`` is too long.

    Also if a string, other than a value in a map, has control characters. Values are not
    repeated in the error.
    """
    for field, value in message.ListFields():
        _check(field, value)


def _check(field: FieldDescriptor, value: Any) -> None:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        _check_map(field, value)
    elif inner is not None:
        for item in value if field.is_repeated else [value]:
            check_limits(item)
    elif field.type == FieldDescriptor.TYPE_STRING:
        _check_strings(field, value)


def _check_strings(field: FieldDescriptor, value: Any) -> None:
    strings = list(value) if field.is_repeated else [value]
    most = MAP if field.is_repeated else _LONGER.get(field.name, STRING)
    size = sum(len(text.encode()) for text in strings)
    if size > most:
        raise invalid(f"{field.name} is {size} bytes long; at most {most} are allowed")
    if any(_CONTROL.search(text) for text in strings):
        raise invalid(f"{field.name} has control characters")


def _check_map(field: FieldDescriptor, value: Any) -> None:
    # The kubelet's tokens alone may be larger; how large they are is no choice of a user.
    size = sum(len(f"{key}{value[key]}".encode()) for key in value if key != TOKENS)
    if size > MAP:
        raise invalid(f"{field.name} holds {size} bytes; at most {MAP} are allowed")
