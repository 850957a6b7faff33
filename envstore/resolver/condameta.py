"""What ``conda-meta`` says of an installed environment, and what of it is true anywhere."""

from __future__ import annotations

import json
import re
from typing import Any

from envstore.resolver.restoring import Claim

_SOURCES = "/envstore/packages"
_TIME = re.compile(rb"^==> .* <==$", re.MULTILINE)
_SAME_TIME = b"==> 1980-01-02 00:00:00 <=="
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MADE_HERE = ("unix_python_entry_point", "pyc_file")


def claims(data: bytes) -> dict[bytes, Claim]:
    """Return what a package's record says of its files that name the prefix, by path.

    Raises ``ValueError`` for what is no such record.
    """
    record = _load(data)
    package = f"{record.get('name', '')}-{record.get('version', '')}"
    found = {}
    for path in _paths(record):
        name, placeholder = path.get("_path"), path.get("prefix_placeholder")
        digest, mode = path.get("sha256"), path.get("file_mode", "text")
        if (
            isinstance(name, str)
            and isinstance(placeholder, str)
            and isinstance(digest, str)
            and placeholder.startswith("/")
            and _DIGEST.fullmatch(digest)
        ):
            claim = Claim(placeholder.encode(), mode == "binary", digest, package)
            found[name.encode()] = claim
    return found


def lasting_record(data: bytes) -> bytes:
    """Return a package's record without what is true only where and when it was installed.

    That are the digests and sizes of files that name the prefix or were made for it, and where
    the package lay. Returns what is no record as it is.
    """
    try:
        record = _load(data)
        paths = _paths(record)
    except ValueError:
        return data
    source = f"{_SOURCES}/{record.get('name')}-{record.get('version')}-{record.get('build')}"
    if "extracted_package_dir" in record:
        record["extracted_package_dir"] = source
    if "package_tarball_full_path" in record:
        record["package_tarball_full_path"] = f"{_SOURCES}/{record.get('fn')}"
    if isinstance(record.get("link"), dict) and "source" in record["link"]:
        record["link"]["source"] = source
    for path in paths:
        if "prefix_placeholder" in path:
            path.pop("sha256_in_prefix", None)
            path.pop("size_in_bytes", None)
        elif path.get("path_type") in _MADE_HERE:
            for key in ("sha256", "sha256_in_prefix", "size_in_bytes"):
                path.pop(key, None)
    return json.dumps(record, indent=2).encode() + b"\n"


def lasting_history(data: bytes) -> bytes:
    """Return the history of an environment without its times."""
    return _TIME.sub(_SAME_TIME, data)


def lasting_installed(data: bytes) -> bytes:
    """Return a wheel's RECORD without digest and size of the programs in ``bin``.

    Scripts name the prefix, so both would be right for one only.
    """
    lines = data.split(b"\n")
    for number, line in enumerate(lines):
        path = line.partition(b",")[0]
        if path.startswith(b"../") and path.rpartition(b"/")[0].endswith(b"/bin"):
            lines[number] = path + b",," + (b"\r" if line.endswith(b"\r") else b"")
    return b"\n".join(lines)


def _load(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _paths(record: dict[str, Any]) -> list[dict[str, Any]]:
    listed = record.get("paths_data")
    paths = listed.get("paths") if isinstance(listed, dict) else None
    return [path for path in paths if isinstance(path, dict)] if isinstance(paths, list) else []
