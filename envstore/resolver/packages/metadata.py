"""What packages say of themselves in files of the core metadata and WHEEL formats."""

from __future__ import annotations

from typing import Any

MAX_METADATA = 64 << 20
"""Bytes of one file with metadata; conda's paths.json of the largest packages has 30 MB."""


def headers(data: bytes) -> dict[str, list[str]]:
    """Return the fields of a file in the format of e-mail headers, by name in lower case."""
    from email.parser import HeaderParser

    message = HeaderParser().parsestr(data.decode("utf-8", "replace"))
    fields: dict[str, list[str]] = {}
    for name, value in message.items():
        fields.setdefault(name.lower(), []).append(str(value))
    return fields


def first(fields: dict[str, list[str]], name: str) -> str:
    """Return the first value of a field, empty if there is none."""
    return fields.get(name, [""])[0].strip()


def distribution(data: bytes, path: str) -> dict[str, Any] | None:
    """Return name and version of the distribution described by ``data``, if it is one.

    ``path`` is the directory or file that makes it known to Python, relative to the prefix.
    """
    fields = headers(data)
    name, version = first(fields, "name"), first(fields, "version")
    return {"name": name, "version": version, "path": path} if name and version else None
