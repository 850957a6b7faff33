"""Requests as they may be logged: what is secret in them is replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from envstore.csi.proto import csi_pb2

STRIPPED = "***stripped***"

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
"""Under this key of a volume's context the kubelet hands on tokens of the pod's service account
(``tokenRequests`` of the CSIDriver object), in a field that is not marked as secret."""

_TOKEN = re.compile(r'"token"\s*:\s*"([^"]+)"')
# A shorter secret cannot be told from ordinary words.
_TELLING = 4


def redacted(message: Message) -> dict[str, Any]:
    """Return a message as it may be logged, ready for JSON.

    Fields with the ``csi_secret`` option (CSI specification, "Secrets Requirements") and tokens
    of service accounts are ``STRIPPED``, at any depth. What a later version of the protocol
    added is left out.
    """
    return {field.name: _shown(field, value) for field, value in message.ListFields()}


def secrets(message: Message) -> list[str]:
    """Return every secret in a message, as it is and escaped, the longest first, to be hidden."""
    plain = {text for text in _secrets(message) if len(text) >= _TELLING}
    escaped = {form(text)[1:-1] for text in plain for form in (json.dumps, repr, ascii)}
    return sorted(plain | escaped, key=len, reverse=True)


def _is_secret(field: FieldDescriptor) -> bool:
    options: Any = field.GetOptions()
    return bool(options.Extensions[csi_pb2.csi_secret])


def _map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field of a map's values, ``None`` if ``field`` is no map."""
    entry = field.message_type
    if entry is None or not entry.GetOptions().map_entry:
        return None
    return entry.fields_by_name["value"]


def _shown(field: FieldDescriptor, value: Any) -> Any:
    if _is_secret(field):
        return STRIPPED
    if (inner := _map_value(field)) is not None:
        return {
            str(key): STRIPPED if key == TOKENS else _one(inner, value[key])
            for key in sorted(value)
        }
    if field.is_repeated:
        return [_one(field, item) for item in value]
    return _one(field, value)


def _one(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return redacted(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    return value.hex() if isinstance(value, bytes) else value


def _secrets(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        inner = _map_value(field)
        if _is_secret(field):
            yield from _texts(value, mapped=inner is not None, repeated=field.is_repeated)
        elif inner is not None:
            if inner.message_type is not None:
                for item in value.values():
                    yield from _secrets(item)
            elif TOKENS in value:
                yield value[TOKENS]
                yield from _TOKEN.findall(value[TOKENS])
        elif field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from _secrets(item)


def _texts(value: Any, *, mapped: bool, repeated: bool) -> Iterator[str]:
    for item in value.values() if mapped else value if repeated else [value]:
        yield str(item)
