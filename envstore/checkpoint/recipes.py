"""Which chunks the files of a part are made of, as far as it was stored.

A part that comes in waves is described only after its last one; what was made of the earlier
waves is kept in a file beside the slot, so that a persister that is replaced can go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.layout import StagedFile
from envstore.errors import CorruptError
from envstore.store.digest import parse_hex
from envstore.store.entries import Entry, composed_entry, sort_key
from envstore.store.frames import MAX_SIZE
from envstore.store.index import DedupIndex
from envstore.store.locations import FrameRef
from envstore.store.source import Kind

MAX_BYTES = 256 << 20
Ref = tuple[bytes, int]


class Recipe:
    """The references of each segment of each file. Use from one thread."""

    def __init__(self, files: Sequence[StagedFile]) -> None:
        """Begin with nothing stored. Offsets in ``files`` mean nothing here."""
        self.paths = [file.path for file in files]
        self.lengths = [[length for _, length in file.segments] for file in files]
        self.refs: list[list[list[Ref]]] = [[[] for _ in file.segments] for file in files]
        self.new_bytes = 0
        self.places: dict[bytes, tuple[FrameRef, int]] = {}
        """Where the chunks of earlier waves lie: a store opened anew may not find them again."""

    def remember(self, index: DedupIndex) -> None:
        """Note where all chunks lie that are stored by now."""
        for name in names(self):
            place = index.find(name)
            if place is not None and name not in self.places:
                self.places[name] = index.frames[place[0]], place[1]

    def teach(self, index: DedupIndex) -> None:
        """Tell ``index`` what ``remember`` noted."""
        frames = list(dict.fromkeys(frame for frame, _ in self.places.values()))
        numbers = {frame: number for number, frame in enumerate(frames)}
        index.add_located(
            frames,
            ((name, numbers[frame], at) for name, (frame, at) in self.places.items()),
        )

    def check(self, files: Sequence[StagedFile]) -> None:
        """See that a wave is one of the same part. Raises ``CheckpointError``."""
        lengths = [[length for _, length in file.segments] for file in files]
        if [file.path for file in files] != self.paths or lengths != self.lengths:
            raise CheckpointError(
                "a wave of this checkpoint holds other files than the one before",
                hint="save again",
            )

    def entries(self) -> list[Entry]:
        """Return the entries of the files and of the directories above them, in order.

        Raises ``CheckpointError`` if some of a file was not stored.
        """
        found: dict[bytes, Entry] = {}
        for path, lengths, segments in zip(self.paths, self.lengths, self.refs, strict=True):
            refs = tuple(ref for segment in segments for ref in segment)
            if [sum(length for _, length in segment) for segment in segments] != lengths:
                raise CheckpointError(f"not all of {path} was staged", hint="save again")
            name = path.encode()
            found[name] = composed_entry(name, refs)
        for name in list(found):
            above = name.rpartition(b"/")[0]
            while above and above not in found:
                found[above] = Entry(above, Kind.DIRECTORY)
                above = above.rpartition(b"/")[0]
        return sorted(found.values(), key=lambda entry: sort_key(entry.path))


def keep(path: Path, sequence: int, waves: int, recipe: Recipe) -> None:
    """Write down what was made of the first ``waves`` waves of the save ``sequence``.

    Raises ``OSError``.
    """
    value = {
        "sequence": sequence,
        "waves": waves,
        "new_bytes": recipe.new_bytes,
        "refs": [
            [[[name.hex(), size] for name, size in segment] for segment in segments]
            for segments in recipe.refs
        ],
        "places": [
            [name.hex(), at, _written(frame)] for name, (frame, at) in recipe.places.items()
        ],
    }
    partial = path.with_name(f"{path.name}.partial")
    fd = os.open(
        partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    with open(fd, "w") as file:
        json.dump(value, file, separators=(",", ":"))
    partial.replace(path)


def kept(path: Path, sequence: int, waves: int, files: Sequence[StagedFile]) -> Recipe:
    """Return what ``keep`` wrote down for a part of ``files``.

    Raises ``CheckpointError`` if it is not there, or another save's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        value: Any = json.loads(data) if len(data) <= MAX_BYTES else None
        if value["sequence"] != sequence or value["waves"] != waves:
            raise CorruptError("it is of another save")
        recipe = Recipe(files)
        recipe.new_bytes = int(value["new_bytes"])
        recipe.refs = [
            [[_ref(item) for item in segment] for segment in segments] for segments in value["refs"]
        ]
        if [len(segments) for segments in recipe.refs] != [len(one) for one in recipe.lengths]:
            raise CorruptError("it is of other files")
        for name, at, frame in value["places"]:
            recipe.places[_name(name)] = _frame(frame), _number(at)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, CorruptError) as error:
        raise CheckpointError(
            f"the first {waves} waves of this checkpoint are not known any more ({path})",
            hint="save again; memory for a whole state in a slot makes waves needless",
        ) from error
    return recipe


def _ref(item: Any) -> Ref:
    name, size = item
    return _name(name), _number(size, least=1)


def _name(text: Any) -> bytes:
    found = parse_hex(text)
    if found is None:
        raise CorruptError("it holds a malformed digest")
    return found


def _number(value: Any, *, least: int = 0, most: int = MAX_SIZE) -> int:
    if type(value) is not int or not least <= value <= most:
        raise CorruptError("it holds a number that cannot be")
    return value


def _written(frame: FrameRef) -> list[Any]:
    anchor = None if frame.anchor is None else _written(frame.anchor)
    numbers = [frame.offset, frame.stored, frame.raw, frame.codec]
    return [frame.pack.hex(), *numbers, frame.digest.hex(), anchor]


def _frame(item: Any) -> FrameRef:
    pack, offset, stored, raw, codec, digest, anchor = item
    return FrameRef(
        _name(pack),
        _number(offset, most=(1 << 32) - 1),
        _number(stored),
        _number(raw),
        _number(codec, most=255),
        _name(digest),
        None if anchor is None else _frame(anchor),
    )


def names(recipe: Recipe) -> Iterable[bytes]:
    """Return the digests of all chunks, some more than once."""
    return (name for file in recipe.refs for segment in file for name, _ in segment)
