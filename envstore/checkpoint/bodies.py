"""The small objects of a run: their keys, how they are created, how what they say is checked.

Whoever reads one did not write it: numbers are bounded, names and times matched, before use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store import canonical
from envstore.store.digest import parse_hex
from envstore.store.objects.base import ObjectStore

FORMAT = 1
MAX_WORLD = 10_000
"""Ranks of one checkpoint, so that a COMMIT which names all their parts stays below 1 MiB."""
MAX_NAMES = 1_000
"""Metrics, or facts of the lineage, of one part."""
MAX_TEXT = 4_096
"""Characters of one text."""

_ID = re.compile(r"([0-9]{12})-([0-9]{8})-([0-9]{4})")
_RANK = re.compile(r"([0-9]{5})-of-([0-9]{5})")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,20}(?:Z|\+00:00)")
_RACES = 8


def run_prefix(run: RunName) -> str:
    """Return what the keys of all objects of ``run`` begin with."""
    return f"runs/{run.namespace}/{run.name}/"


def parse_id(text: str) -> CheckpointId | None:
    """Return the checkpoint that ``text`` names, ``None`` if it names none."""
    match = _ID.fullmatch(text)
    return CheckpointId(*map(int, match.groups())) if match else None


def check_id(checkpoint: CheckpointId) -> None:
    """See that ``checkpoint`` can be written as a key. Raises ``UsageError``."""
    if parse_id(str(checkpoint)) != checkpoint:
        raise UsageError(
            f"step {checkpoint.step}, epoch {checkpoint.epoch} and attempt {checkpoint.attempt} "
            "cannot be kept",
            hint="a step is a whole number from 0 to 999999999999",
        )


def rank_name(rank: int, world_size: int) -> str:
    """Return the last component of the key of a part."""
    return f"{rank:05d}-of-{world_size:05d}"


def parse_rank(text: str) -> tuple[int, int] | None:
    """Return the rank and the world size that a part's key ends with, ``None`` if it does not."""
    match = _RANK.fullmatch(text)
    if match is None:
        return None
    rank, world_size = map(int, match.groups())
    return (rank, world_size) if rank < world_size <= MAX_WORLD else None


def parse_time(text: str) -> float | None:
    """Return the Unix time that ``text`` (RFC 3339, UTC) says, ``None`` if it says none."""
    if not _TIME.fullmatch(text):
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.timestamp() if found.utcoffset() == timedelta(0) else None


def read_body(data: bytes, what: str) -> dict[str, Any]:
    """Return the object in ``data``, of a format known here.

    Raises ``CorruptError``, ``UnsupportedFormatError``.
    """
    value = canonical.decode(data, what)
    if canonical.field(value, "format", int, what) > FORMAT:
        raise UnsupportedFormatError(f"{what} is of a newer format", hint="upgrade envstore")
    return value


def read_number(value: dict[str, Any], name: str, what: str, low: int, high: int) -> int:
    """Return ``value[name]``, at least ``low`` and below ``high``. Raises ``CorruptError``."""
    found: int = canonical.field(value, name, int, what)
    if not low <= found < high:
        raise CorruptError(f"{what} has a {name!r} that cannot be: {found}")
    return found


def read_text(value: dict[str, Any], name: str, what: str) -> str:
    """Return ``value[name]``, a text of bounded length. Raises ``CorruptError``."""
    found: str = canonical.field(value, name, str, what)
    if len(found) > MAX_TEXT:
        raise CorruptError(f"{what} has a {name!r} of {len(found)} characters")
    return found


def read_time(value: dict[str, Any], name: str, what: str) -> str:
    """Return ``value[name]``, a time. Raises ``CorruptError``."""
    found = read_text(value, name, what)
    if parse_time(found) is None:
        raise CorruptError(f"{what} has a {name!r} that is no time: {found[:40]!r}")
    return found


def read_digest(text: object, what: str) -> bytes:
    """Return the digest that ``text`` names. Raises ``CorruptError``."""
    found = parse_hex(text) if isinstance(text, str) else None
    if found is None:
        raise CorruptError(f"{what} holds a malformed digest")
    return found


def read_id(value: dict[str, Any], name: str, what: str) -> CheckpointId:
    """Return the checkpoint that ``value[name]`` names. Raises ``CorruptError``."""
    found = parse_id(canonical.field(value, name, str, what))
    if found is None:
        raise CorruptError(f"{what} has no valid {name!r}")
    return found


def read_texts(value: dict[str, Any], name: str, what: str) -> dict[str, str]:
    """Return ``value[name]``, a few texts by name. Raises ``CorruptError``."""
    found = canonical.field(value, name, dict, what)
    if len(found) > MAX_NAMES:
        raise CorruptError(f"{what} has {len(found)} {name}")
    return {key: read_text(found, key, what) for key in found}


def read_metrics(value: dict[str, Any], what: str) -> dict[str, float]:
    """Return the metrics, written as the shortest decimals. Raises ``CorruptError``."""
    try:
        return {key: float(text) for key, text in read_texts(value, "metrics", what).items()}
    except ValueError:
        raise CorruptError(f"{what} has metrics that are no numbers") from None


def write_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return metrics as texts: canonical JSON has no fractions."""
    return {key: repr(float(number)) for key, number in metrics.items()}


def try_get(objects: ObjectStore, key: str) -> bytes | None:
    """Return an object, ``None`` if there is none."""
    try:
        return objects.get(key)
    except NotFoundError:
        return None


def create(objects: ObjectStore, key: str, data: bytes) -> tuple[bytes, bool]:
    """Store ``data`` under a new ``key``; returns what is there, and whether that came just now.

    Whoever was first is right: what they stored is returned. After an answer that was lost the
    object is read again. Raises ``UnavailableError`` if the outcome could not be learnt; trying
    again is then safe.
    """
    for _ in range(_RACES):
        try:
            objects.put_if(key, data, None)
        except ConflictError:
            # Nothing there: it was removed since, or a server answered so to two racers at once.
            found = try_get(objects, key)
        except UnavailableError:
            found = try_get(objects, key)
            if found is None:
                raise
        else:
            return data, True
        if found is not None:
            return found, False
    raise UnavailableError(f"{key} is created and removed again and again", hint="try later")
