"""Healing: leads every manifest that names a damaged pack to good copies of what it held.

Whoever writes takes the chunks of damaged packs for absent and so stores them again. What is left
to do then is here: the locations of all manifests that look for them in the damaged packs are led
to where they lie now. No snapshot and no manifest changes. Packs that were stored again under
their own name are whole, and come off the list; others stay on it, and in quarantine, until they
are collected: nothing leads to them any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from envstore.errors import EnvstoreError
from envstore.store.damage import forget_damage
from envstore.store.digest import parse_hex
from envstore.store.guarded import GuardedStore
from envstore.store.index import DedupIndex
from envstore.store.locations import FrameRef, Locations, packs_named
from envstore.store.manifest import Root
from envstore.store.packs import pack_key
from envstore.store.problems import DAMAGE
from envstore.store.redirecting import Find, redirect
from envstore.store.repository import PARALLEL, Repository
from envstore.store.sessions import SessionLostError
from envstore.wording import counted


@dataclass(slots=True)
class Healed:
    """What healing did: manifests led elsewhere, and how many chunks of theirs; packs that are
    whole again. ``left`` chunks still lie in damaged packs, as no copy of them is known.
    """

    manifests: int = 0
    chunks: int = 0
    left: int = 0
    packs: set[bytes] = field(default_factory=set)


def heal(repository: Repository, damaged: Collection[bytes], index: DedupIndex) -> Healed:
    """Heal what can be healed with the chunks that ``index`` knows, at the end of a push.

    ``damaged`` is what its session knew of. No request if that is empty; else a listing, a request
    for each manifest of the store, and a few for each that is harmed and each pack led to.
    ``index`` must be settled and know nothing in damaged packs but what was stored there anew.
    Call within a session. Raises the errors of the store; what cannot be healed is left as it is.
    """
    healed = Healed()
    if not damaged:
        return healed
    stored = {index.frames[number].pack for number in index.own}
    for pack in stored.intersection(damaged):
        forget_damage(repository.objects, pack)
        healed.packs.add(pack)
    leaving = frozenset(damaged) - stored
    sizes: dict[bytes, int] = {}

    def is_there(frame: FrameRef) -> bool:
        # Segments may list what is lost: nobody is to be led from good frames to none.
        if frame.pack not in sizes:
            sizes[frame.pack] = repository.objects.size(pack_key(frame.pack)) or 0
        return frame.offset + frame.stored <= sizes[frame.pack]

    def find(name: bytes) -> tuple[FrameRef, int] | None:
        place = index.find(name)
        frame = None if place is None else index.frames[place[0]]
        if place is None or frame is None or not frame.pack or not is_there(frame):
            return None
        if frame.anchor is not None and not is_there(frame.anchor):
            return None
        return frame, place[1]

    for manifest in harmed_manifests(repository, leaving):
        try:
            moved, left = lead(repository, manifest, leaving, find)
        except DAMAGE:
            continue  # for `repair`, which looks for more than was pushed
        healed.manifests += moved > 0
        healed.chunks += moved
        healed.left += left
    return healed


def heal_after(repository: Repository, index: DedupIndex) -> list[str]:
    """Heal at the end of a push within its session; returns what there is to tell about it.

    No request unless packs are known to be damaged. Raises nothing but ``SessionLostError``: the
    push itself has succeeded.
    """
    objects = repository.objects
    damaged = objects.session.damaged_packs if isinstance(objects, GuardedStore) else frozenset()
    if not damaged:
        return []
    try:
        healed = heal(repository, damaged, index)
    except SessionLostError:
        raise
    except EnvstoreError as error:
        return [f"damaged packs are not healed yet: {error.message}"]
    if not healed.packs and not healed.chunks:
        return []
    return [
        f"healed {counted(len(healed.packs), 'damaged pack')} by storing the same again, and led "
        f"{counted(healed.manifests, 'tree')} to good copies of {counted(healed.chunks, 'chunk')}; "
        "look with: envstore verify"
    ]


def harmed_manifests(repository: Repository, packs: Collection[bytes]) -> Iterator[bytes]:
    """Yield the manifests whose locations name one of ``packs``. One request each."""
    if not packs:
        return
    objects = repository.objects
    wanted = frozenset(packs)

    def names(key: str) -> bytes | None:
        manifest = parse_hex(key.rpartition("/")[2])
        if manifest is None:
            return None
        try:
            found = packs_named(objects.get(key), key)
        except DAMAGE:
            return None  # removed meanwhile, or damaged itself
        return None if wanted.isdisjoint(found) else manifest

    with ThreadPoolExecutor(PARALLEL) as pool:
        for manifest in pool.map(names, [info.key for info in objects.list("locations/")]):
            if manifest is not None:
                yield manifest


def lead(
    repository: Repository, manifest: bytes, leaving: Collection[bytes], find: Find
) -> tuple[int, int]:
    """Lead what a manifest has in ``leaving`` to where ``find`` says; returns moved and left.

    First its parts, for they must be read to know what the files are made of. Raises
    ``CorruptError`` and ``NotFoundError`` for metadata that is lost.
    """
    root, locations = repository.located(manifest)
    parts = redirect(repository.objects, manifest, root, leaving, find)
    if parts.moved:
        locations = repository.locations(manifest, root)
    names = reference_names(repository, root, locations)
    files = redirect(repository.objects, manifest, root, leaving, find, names)
    # What is left of the parts is counted with the rest.
    return parts.moved + files.moved, files.left


def reference_names(repository: Repository, root: Root, locations: Locations) -> bytes:
    """Return the digests of all references of a manifest, one after the other."""
    return b"".join(part.ref_digests for part in repository.parts(root, locations))
