"""Finds the profile that a mount follows, and the frames it stands for.

The search runs beside the loading of the tree and costs the mount nothing; the frames are then
fetched in the recorded order while whoever waits for one goes first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from envstore.errors import EnvstoreError
from envstore.fuse.default_profile import default_ranges
from envstore.fuse.tree import ROOT, Tree
from envstore.store.locations import NOWHERE, FrameRef, Located
from envstore.store.profiles import NO_PROFILE, Range, find_profile
from envstore.store.repository import Repository
from envstore.store.source import Kind
from envstore.store.whereabouts import ATTEMPTS

if TYPE_CHECKING:
    from envstore.fuse.loader import FrameLoader
    from envstore.fuse.metrics import Metrics
    from envstore.fuse.moved import Moved
    from envstore.fuse.reader import Reader
    from envstore.fuse.relocating import RelocatingReader

DEFAULT_LIMIT = 5 << 20
"""Stored bytes fetched ahead of a tree of which no start was recorded."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """The ranges to fetch ahead and where they are from.

    ``origin`` is ``recorded`` or ``inherited`` (from an ancestor), and ``name`` then the
    profile's; or ``default``, which the tree itself decides, or ``none``.
    """

    origin: str
    name: str = ""
    ranges: tuple[Range, ...] = ()


class ProfileSearch:
    """Looks for the profile of a snapshot in a thread of its own, from the start on."""

    def __init__(self, repository: Repository, snapshot: bytes, wanted: str = "") -> None:
        """Look for the profile called ``wanted``, the one that fits if empty, or ``none``."""
        self._choice = Choice("none" if wanted == NO_PROFILE else "default")
        self._thread = threading.Thread(
            target=self._search, args=(repository, snapshot, wanted), daemon=True
        )
        if wanted != NO_PROFILE:
            self._thread.start()

    def result(self) -> Choice:
        """Return what was found, waiting for it. A store that fails means the default."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._choice

    def _search(self, repository: Repository, snapshot: bytes, wanted: str) -> None:
        try:
            found = find_profile(repository, snapshot, wanted or None)
            if found is None:
                if wanted:
                    _log.warning("there is no profile %r: following the default", wanted)
                return
            own = repository.snapshot(snapshot).manifest == found.manifest
            origin = "recorded" if own else "inherited"
            self._choice = Choice(origin, found.name, found.profile.ranges)
        except EnvstoreError as error:
            _log.warning("no profile is followed but the default: %s", error)


async def follow(
    search: ProfileSearch,
    tree: Tree,
    moved: Moved,
    loader: FrameLoader,
    reader: Reader | RelocatingReader,
    room: int,
    account: Metrics | None = None,
) -> None:
    """Fetch what the profile names of ``tree``, ``room`` raw bytes of it at most.

    ``reader`` is told which files it need not guess about, ``moved`` asked for what is not where
    it should be.
    """
    import trio  # whoever only makes or shows profiles has no event loop

    choice = await trio.to_thread.run_sync(search.result, abandon_on_cancel=True)
    reader.expect(_nodes(choice.ranges, tree))
    locations: Located | None = moved.locations
    for _ in range(1 + ATTEMPTS):
        if locations is None:
            return
        frames = await trio.to_thread.run_sync(plan, choice, tree, locations, room)
        name = choice.name or choice.origin
        _log.info("fetching %d frames ahead (profile %s)", len(frames), name)
        missed = await loader.stream(frames, certain=bool(choice.ranges), account=account)
        if not missed:
            return
        try:
            locations = await moved.again(locations, missed[0].pack)
        except EnvstoreError as error:
            _log.warning("not everything is fetched ahead: %s", error)
            return


def plan(choice: Choice, tree: Tree, locations: Located, room: int) -> list[FrameRef]:
    """Return the frames to fetch ahead in order, ``room`` raw bytes of them at most.

    Takes about 30 us a file.
    """
    if choice.origin == "default":
        frames = resolve(default_ranges(tree), tree, locations)
        return _head(frames, (frame.stored for frame in frames), min(room, DEFAULT_LIMIT))
    frames = resolve(choice.ranges, tree, locations)
    return _head(frames, (frame.raw for frame in frames), room)


def _head(frames: list[FrameRef], sizes: Iterable[int], room: int) -> list[FrameRef]:
    for count, size in enumerate(sizes):
        room -= size
        if room < 0:
            return frames[:count]
    return frames


def _nodes(ranges: Iterable[Range], tree: Tree) -> set[int]:
    """Return the nodes that ``ranges`` are of, and those that stand for them."""
    nodes: dict[bytes, int | None] = {b"": ROOT}
    found: set[int] = set()
    for path in {item.path for item in ranges}:
        node = _find(tree, path, nodes)
        if node is not None:
            found.update((node, tree.inode(node)))
    return found


def resolve(ranges: Iterable[Range], tree: Tree, locations: Located) -> list[FrameRef]:
    """Return the frames that hold ``ranges``, each once, in order of first need.

    What is not in ``tree``, or is no file there, is passed over.
    """
    nodes: dict[bytes, int | None] = {b"": ROOT}
    numbers: dict[int, None] = {}
    ref_frames = locations.ref_frames
    for item in ranges:
        node = _find(tree, item.path, nodes)
        if node is None or tree.kind(node) is not Kind.FILE:
            continue
        for piece in tree.pieces(node, item.offset, item.length):
            numbers[ref_frames[piece.ref]] = None
    numbers.pop(NOWHERE, None)
    return [locations.frames[number] for number in numbers]


def _find(tree: Tree, path: bytes, nodes: dict[bytes, int | None]) -> int | None:
    """Return the node at ``path``; ``nodes`` remembers what was looked up."""
    missing = []
    while path not in nodes:
        path, _, name = path.rpartition(b"/")
        missing.append(name)
    node = nodes[path]
    while missing and node is not None:
        name = missing.pop()
        path = path + b"/" + name if path else name
        node = nodes[path] = tree.lookup(node, name)
    return node
