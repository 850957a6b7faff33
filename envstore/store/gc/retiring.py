"""Takes packs that are about to be deleted out of what helps writers: nothing names them then.

Index segments are written anew without them, samples name the new segments, and stored packages
that need one go: all of these are caches, which nobody has to find. Order: new segments, samples,
then the old ones. Whoever dies in between has at worst left a segment that lists what is gone,
and the next collection takes that for what it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from envstore.store.digest import parse_hex
from envstore.store.gc.ahead import read_ahead
from envstore.store.gc.marking import Progress
from envstore.store.gc.survey import Survey
from envstore.store.gc.usage import read_segments, segment_names
from envstore.store.index import encode_segment, segment_key
from envstore.store.objects.base import ObjectStore
from envstore.store.packages import decode_package
from envstore.store.samples import Sample, build_sample, open_sample, sample_key
from envstore.store.verify import DAMAGE


@dataclass(slots=True)
class Retired:
    """Keys that nothing needs any more, and the bytes that were written instead of them."""

    keys: list[str] = field(default_factory=list)
    written: int = 0


@dataclass(slots=True)
class _Segment:
    """What became of a segment: its new name if there is one, and the hooks that it still has."""

    new: bytes | None
    hooks: frozenset[int]


def retire(
    objects: ObjectStore, found: Survey, gone: AbstractSet[bytes], progress: Progress
) -> Retired:
    """Let segments, samples and packages name none of the packs ``gone``.

    Reads all of them, one at a time. The keys it returns are to be deleted by the caller.
    """
    result = Retired()
    if not gone:
        return result
    changed = _segments(objects, found, gone, result, progress)
    if changed:
        _samples(objects, found, changed, result)
    _packages(objects, found, gone, result, progress)
    return result


def _segments(
    objects: ObjectStore,
    found: Survey,
    gone: AbstractSet[bytes],
    result: Retired,
    progress: Progress,
) -> dict[bytes, _Segment]:
    """Write segments anew that list one of ``gone``; returns what became of each."""
    names = segment_names(found)
    changed: dict[bytes, _Segment] = {}
    for at, name, packs in read_segments(objects, found, names):
        progress("rewriting the index", at, len(names))
        left = [pack for pack in packs if pack.digest not in gone]
        if len(left) == len(packs):
            continue
        new = None
        if left:
            new, sealed = encode_segment(left)
            objects.put(segment_key(new), sealed)
            result.written += len(sealed)
        hooks = build_sample([(name, left)]).heads
        changed[name] = _Segment(new, frozenset(hooks))
        result.keys.append(segment_key(name))
    return changed


def _samples(
    objects: ObjectStore, found: Survey, changed: dict[bytes, _Segment], result: Retired
) -> None:
    for key in [key for key in found.caches if key.startswith("samples/")]:
        name = parse_hex(key.removeprefix("samples/"))
        try:
            sample = open_sample(objects.get(key), name or b"")
        except DAMAGE:
            continue
        if not any(segment in changed for segment in sample.segments):
            continue
        new = _without(sample, changed)
        if new.segments:
            new_name, data = new.encode()
            objects.put(sample_key(new_name), data)
            result.written += len(data)
        result.keys.append(key)


def _without(sample: Sample, changed: dict[bytes, _Segment]) -> Sample:
    """Return a sample with the segments and hooks that are left of those it has."""
    segments: list[bytes] = []
    numbers: list[int | None] = []
    hooks: list[frozenset[int] | None] = []
    for segment in sample.segments:
        became = changed.get(segment)
        name = segment if became is None else became.new
        numbers.append(None if name is None else len(segments))
        hooks.append(None if became is None else became.hooks)
        if name is not None:
            segments.append(name)
    heads, places = array("Q"), array("I")
    for head, old in zip(sample.heads, sample.numbers, strict=True):
        number, left = numbers[old], hooks[old]
        if number is not None and (left is None or head in left):
            heads.append(head)
            places.append(number)
    return Sample(tuple(segments), heads, places)


def _packages(
    objects: ObjectStore,
    found: Survey,
    gone: AbstractSet[bytes],
    result: Retired,
    progress: Progress,
) -> None:
    """Note the stored packages that need one of ``gone``, and those that nobody can read."""
    keys = [key for key in found.caches if key.startswith("packages/")]

    def read(key: str) -> bytes | None:
        try:
            return objects.get(key)
        except DAMAGE:
            return None

    for at, (key, data) in enumerate(read_ahead(keys, read, weigh=found.caches.__getitem__)):
        progress("looking into packages", at, len(keys))
        if data is None:
            continue
        try:
            frames = decode_package(data, key).locations.frames
        except DAMAGE:
            continue
        if not gone.isdisjoint(frame.pack for frame in frames):
            result.keys.append(key)
