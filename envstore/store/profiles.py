"""Start profiles: which ranges of which files a command reads, in the order of first touch.

A profile lies beside a manifest, not in it: one tree serves many workloads, and what is known of
them grows while the tree stays as it is. It is a hint. Whoever follows a wrong one fetches what
nobody reads, and every byte is checked as ever.
"""

from __future__ import annotations

import os
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.binary import U32, U64, Cursor, pack_array, seal, unseal
from envstore.store.objects.base import ObjectStore
from envstore.store.refs import is_part
from envstore.store.repository import Repository

MAGIC = b"ESPROF01"
MAX_BODY = 16 << 20
MAX_RANGES = 65_536
MAX_TEXT = 8 << 20
"""Bytes of all paths of a profile."""
MAX_COMMAND = 4096
DEFAULT_NAME = "start"
NO_PROFILE = "none"
"""What a user says who wants no profile, so no profile may be called so."""
MAX_ANCESTORS = 4
"""How many snapshots are asked for a profile, the youngest included."""

_MOVED_SHARE = 0.3
_ATTEMPTS = 60
_PAUSE_SECONDS = 0.05
_MOST = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes from ``offset`` of the file ``path``; ``seen`` recordings read some."""

    path: bytes
    offset: int
    length: int
    seen: int = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges in the order in which they were first read; those of one file never overlap.

    ``recordings`` says how many were merged; ``created`` (seconds since 1970) and ``command``
    are those of the last one.
    """

    ranges: tuple[Range, ...]
    created: int
    command: tuple[bytes, ...] = ()
    recordings: int = 1

    def seal(self) -> bytes:
        """Return the object to store."""
        numbers: dict[bytes, int] = {}
        for item in self.ranges:
            numbers.setdefault(item.path, len(numbers))
        paths = b"\0".join(numbers)
        command = b"\0".join(self.command)
        body = b"".join(
            (
                U64.pack(self.created),
                U32.pack(self.recordings),
                U32.pack(len(command)),
                command,
                U32.pack(len(numbers)),
                U32.pack(len(self.ranges)),
                U32.pack(len(paths)),
                paths,
                pack_array(array("I", (numbers[item.path] for item in self.ranges))),
                pack_array(array("Q", (item.offset for item in self.ranges))),
                pack_array(array("Q", (item.length for item in self.ranges))),
                pack_array(array("I", (item.seen for item in self.ranges))),
            )
        )
        return seal(MAGIC, body)


@dataclass(frozen=True, slots=True)
class Found:
    """A profile, its name, and the manifest it was recorded with."""

    name: str
    manifest: bytes
    profile: Profile


def profile_key(manifest: bytes, name: str) -> str:
    """Return the object key of a manifest's profile. Raises ``UsageError``."""
    if not is_part(name) or name == NO_PROFILE:
        raise UsageError(
            f"{name!r} cannot be a profile's name",
            hint=f"use letters, digits, '.', '_' and '-', and not {NO_PROFILE!r}",
        )
    return f"profiles/{manifest.hex()}/{name}"


def new_profile(ranges: Iterable[Range], command: Sequence[str]) -> Profile:
    """Return the profile of one recording, made now; what is too much of it is left out."""
    words: list[bytes] = []
    left = MAX_COMMAND
    for word in map(os.fsencode, command):
        left -= len(word) + 1
        if left < 0:
            break
        words.append(word)
    return Profile(_bounded(list(ranges)), int(time.time()), tuple(words))


def open_profile(data: bytes, what: str) -> Profile:
    """Decode a stored profile. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    body, _ = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    cursor = Cursor(body)
    created, recordings, length = cursor.u64(), cursor.u32(), cursor.u32()
    if length > MAX_COMMAND:
        raise CorruptError(f"{what} holds too long a command")
    command = bytes(cursor.take(length))
    files, count, text = cursor.u32(), cursor.u32(), cursor.u32()
    if count > MAX_RANGES or files > count or text > MAX_TEXT:
        raise CorruptError(f"{what} holds too many ranges")
    paths = bytes(cursor.take(text)).split(b"\0") if files else []
    numbers = cursor.array(count, 4)
    offsets, lengths = cursor.array(count, 8), cursor.array(count, 8)
    seen = cursor.array(count, 4)
    cursor.finish()
    if len(paths) != files or len(set(paths)) != files or b"" in paths or (text and not files):
        raise CorruptError(f"{what} does not name its files")
    if count and (max(numbers) >= files or not min(lengths) or not min(seen)):
        raise CorruptError(f"{what} holds a range of nothing")
    ranges = tuple(
        Range(paths[number], offset, size, times)
        for number, offset, size, times in zip(numbers, offsets, lengths, seen, strict=True)
    )
    if any(item.offset + item.length >> 64 for item in ranges):
        raise CorruptError(f"{what} holds a range beyond the end of any file")
    ordered = sorted(ranges, key=lambda item: (item.path, item.offset))
    for one, two in pairwise(ordered):
        if one.path == two.path and one.offset + one.length > two.offset:
            raise CorruptError(f"{what} holds ranges that overlap")
    words = tuple(command.split(b"\0")) if command else ()
    return Profile(ranges, created, words, recordings)


def merge(one: Profile, two: Profile) -> Profile:
    """Return the union of two profiles, by mean relative position of what both hold.

    Ranges that overlap become one. If that is too much, what the most recordings saw is kept.
    """
    ranked: dict[bytes, list[tuple[Range, float, int]]] = {}
    for side, profile in enumerate((one, two)):
        total = max(1, len(profile.ranges))
        for at, item in enumerate(profile.ranges):
            ranked.setdefault(item.path, []).append((item, at / total, side))
    weights = max(1, one.recordings), max(1, two.recordings)
    joined: list[tuple[float, Range]] = []
    for path, items in ranked.items():
        items.sort(key=lambda item: item[0].offset)
        joined += [_union(path, group, weights) for group in _overlapping(items)]
    joined.sort(key=lambda item: (item[0], item[1].path, item[1].offset))
    newer = max(one, two, key=lambda profile: (profile.created, profile.command))
    return Profile(
        _bounded([item for _, item in joined]),
        newer.created,
        newer.command,
        min(one.recordings + two.recordings, _MOST),
    )


def _overlapping(
    items: list[tuple[Range, float, int]],
) -> Iterator[list[tuple[Range, float, int]]]:
    group: list[tuple[Range, float, int]] = []
    end = 0
    for item in items:
        if group and item[0].offset >= end:
            yield group
            group, end = [], 0
        group.append(item)
        end = max(end, item[0].offset + item[0].length)
    if group:
        yield group


def _union(
    path: bytes, group: list[tuple[Range, float, int]], weights: tuple[int, int]
) -> tuple[float, Range]:
    """Return where the union of overlapping ranges belongs, and the union."""
    seen, first = [0, 0], [0.0, 0.0]
    for item, rank, side in group:
        first[side] = min(first[side], rank) if seen[side] else rank
        seen[side] = max(seen[side], item.seen)
    shares = [weights[side] if seen[side] else 0 for side in (0, 1)]
    rank = (first[0] * shares[0] + first[1] * shares[1]) / sum(shares)
    start = group[0][0].offset
    end = max(item.offset + item.length for item, _, _ in group)
    return rank, Range(path, start, end - start, min(sum(seen), _MOST))


def _bounded(ranges: list[Range]) -> tuple[Range, ...]:
    """Return as many of ``ranges`` as a profile may hold, in their order."""
    text = sum(len(path) + 1 for path in {item.path for item in ranges})
    if len(ranges) <= MAX_RANGES and text <= MAX_TEXT:
        return tuple(ranges)
    kept: set[int] = set()
    paths: set[bytes] = set()
    left = MAX_TEXT
    for at in sorted(range(len(ranges)), key=lambda at: (-ranges[at].seen, at)):
        path = ranges[at].path
        need = 0 if path in paths else len(path) + 1
        if len(kept) == MAX_RANGES:
            break
        if need <= left:
            left -= need
            paths.add(path)
            kept.add(at)
    return tuple(ranges[at] for at in sorted(kept))


def list_profiles(objects: ObjectStore, manifest: bytes) -> list[str]:
    """Return the names of a manifest's profiles, sorted. One listing."""
    prefix = f"profiles/{manifest.hex()}/"
    names = (info.key.removeprefix(prefix) for info in objects.list(prefix))
    return sorted(name for name in names if is_part(name) and name != NO_PROFILE)


def load_profile(objects: ObjectStore, manifest: bytes, name: str) -> Profile:
    """Return a manifest's profile. One request.

    Raises ``NotFoundError``, ``CorruptError``, ``UnsupportedFormatError``, ``UsageError``.
    """
    return _load_versioned(objects, manifest, name)[0]


def _load_versioned(objects: ObjectStore, manifest: bytes, name: str) -> tuple[Profile, str]:
    key = profile_key(manifest, name)
    try:
        data, version = objects.get_versioned(key)
    except NotFoundError:
        raise NotFoundError(
            f"there is no profile {name!r} of this snapshot",
            hint="see: envstore profile REF --list",
        ) from None
    return open_profile(data, key), version


def save_profile(
    objects: ObjectStore, manifest: bytes, name: str, profile: Profile, *, replace: bool = False
) -> Profile:
    """Store a recording, merged with what is there unless ``replace``; returns what is stored.

    Of recordings that are saved at the same time none is lost. Raises ``ConflictError`` if
    others were faster again and again, ``UnavailableError``. A damaged profile is replaced.
    """
    key = profile_key(manifest, name)
    for attempt in range(_ATTEMPTS):
        found, version = _current(objects, key)
        merged = profile if replace or found is None else merge(found, profile)
        data = merged.seal()
        try:
            objects.put_if(key, data, version)
        except ConflictError:
            # Somebody saved one meanwhile: ours is merged into that.
            time.sleep(random.random() * _PAUSE_SECONDS * min(attempt + 1, 4))  # noqa: S311
            continue
        except UnavailableError:
            if not _holds(objects, key, data):
                raise
        return merged
    raise ConflictError(f"the profile {name!r} is changed all the time", hint="try again")


def _current(objects: ObjectStore, key: str) -> tuple[Profile | None, str | None]:
    try:
        data, version = objects.get_versioned(key)
    except NotFoundError:
        return None, None
    try:
        return open_profile(data, key), version
    except CorruptError:
        return None, version


def _holds(objects: ObjectStore, key: str, data: bytes) -> bool:
    try:
        return objects.get(key) == data
    except NotFoundError:
        return False


def remove_profile(objects: ObjectStore, manifest: bytes, name: str) -> None:
    """Remove a manifest's profile. Raises ``NotFoundError``."""
    load_profile(objects, manifest, name)
    objects.delete(profile_key(manifest, name))


def find_profile(repository: Repository, snapshot: bytes, name: str | None = None) -> Found | None:
    """Return the profile called ``name`` of a snapshot, or else of its nearest ancestor.

    Without a name: ``start``, else all that there are, merged. Two requests for the snapshot
    and for each ancestor that has to be asked. Raises the errors of the store.
    """
    asked: set[bytes] = set()
    for _, ancestor in repository.history(snapshot, MAX_ANCESTORS):
        if ancestor.manifest in asked:
            continue
        asked.add(ancestor.manifest)
        found = _find(repository.objects, ancestor.manifest, name)
        if found is not None:
            return found
    return None


def _find(objects: ObjectStore, manifest: bytes, name: str | None) -> Found | None:
    names = [name] if name is not None else list_profiles(objects, manifest)
    if name is None and DEFAULT_NAME in names:
        names = [DEFAULT_NAME]
    whole: Profile | None = None
    for each in names:
        try:
            profile = load_profile(objects, manifest, each)
        except NotFoundError:
            continue
        whole = profile if whole is None else merge(whole, profile)
    return Found("+".join(names), manifest, whole) if whole is not None else None


def file_ranks(profile: Profile, sizes: Mapping[bytes, int]) -> dict[bytes, int]:
    """Return the places of the files that a start reads, by the first touch of each.

    ``sizes`` are the files' sizes in bytes. A file of which little was read has none: its other
    bytes would lie between what is read.
    """
    touched: dict[bytes, int] = {}
    for item in profile.ranges:
        size = sizes.get(item.path, 0)
        read = max(0, min(item.length, size - item.offset))
        touched[item.path] = touched.get(item.path, 0) + read
    moved = (path for path, read in touched.items() if read and read >= _MOVED_SHARE * sizes[path])
    return {path: rank for rank, path in enumerate(moved)}
