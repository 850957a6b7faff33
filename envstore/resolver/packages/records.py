"""RECORD: which files a wheel consists of, with their digests (the PyPA's recording format).

A file that relocation changes has neither digest nor size in the RECORD that is installed, as
both would be right for one prefix only.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

_ALGORITHMS = ("sha256", "sha384", "sha512")


@dataclass(frozen=True, slots=True)
class Row:
    """A file: its path as written, digest and algorithm (empty: not given), size (-1)."""

    path: str
    algorithm: str = ""
    digest: bytes = b""
    size: int = -1

    def fields(self) -> tuple[str, str, str]:
        """Return the row as it is written."""
        if not self.algorithm:
            return self.path, "", ""
        digest = base64.urlsafe_b64encode(self.digest).rstrip(b"=").decode()
        return self.path, f"{self.algorithm}={digest}", str(self.size)

    @classmethod
    def of(cls, path: str, data: bytes) -> Row:
        """Return the row of a file with content ``data``."""
        return cls(path, "sha256", hashlib.sha256(data).digest(), len(data))


def read_record(data: bytes) -> dict[str, Row]:
    """Return the rows of a RECORD by path. Raises ``ValueError`` for what is not valid."""
    rows: dict[str, Row] = {}
    try:
        for fields in csv.reader(io.StringIO(data.decode("utf-8"), newline="")):
            if fields:
                row = _row(fields)
                if rows.setdefault(row.path, row) != row:
                    raise ValueError(f"its RECORD lists {row.path} twice")
    except (csv.Error, UnicodeDecodeError):
        raise ValueError("its RECORD is not valid CSV") from None
    return rows


def _row(fields: list[str]) -> Row:
    path, hashed, size = (*fields, "", "")[:3]
    path = path.lstrip("/")  # as uv does: some write them absolute
    if not hashed:
        return Row(path)
    algorithm, _, digest = hashed.partition("=")
    if algorithm.lower() not in _ALGORITHMS:
        raise ValueError(f"its RECORD has a digest of {path} that proves nothing: {algorithm}")
    try:
        raw = base64.b64decode(digest + "=" * (-len(digest) % 4), altchars=b"-_", validate=True)
        count = int(size) if size else -1
    except (ValueError, binascii.Error):
        raise ValueError(f"its RECORD says nothing valid of {path}") from None
    return Row(path, algorithm.lower(), raw, count)


def write_record(rows: Iterable[Row]) -> bytes:
    """Return the RECORD of ``rows``, in the order of their paths."""
    out = io.StringIO()
    plain = csv.writer(out, lineterminator="\n")
    # Before Python 3.13 it does not quote what readers take for the end of a row.
    quoting = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in sorted(rows, key=lambda row: row.path):
        (quoting if "\r" in row.path else plain).writerow(row.fields())
    return out.getvalue().encode()
