"""Rebuilds the index from packs alone: each says itself, at its end, what it holds.

Segments that are damaged, or list packs that are missing or are otherwise, go; every pack that no
segment lists is listed in a new one; damaged samples go, and segments that none covers get one.
Readers need none of this: it spares writers from storing again what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from envstore.errors import CorruptError, NotFoundError
from envstore.store.digest import digest, parse_hex
from envstore.store.examining import read_trailer
from envstore.store.frames import encode_table
from envstore.store.index import MAX_CHUNKS, encode_segment, segment_key
from envstore.store.known import RECENT
from envstore.store.packing import SEGMENT_PACKS
from envstore.store.packs import Pack, pack_key
from envstore.store.problems import DAMAGE
from envstore.store.repository import PARALLEL, Repository
from envstore.store.samples import build_sample, open_sample, sample_key


@dataclass(slots=True)
class Rebuilt:
    """What was done: keys of segments and samples that went, and of those that were stored.

    ``packs`` were listed anew. ``unreadable`` says of packs that cannot be listed why.
    """

    removed: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    packs: int = 0
    unreadable: dict[bytes, str] = field(default_factory=dict)


def rebuild_index(
    repository: Repository,
    without: Collection[bytes] = (),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rebuilt:
    """Make the index whole; packs in ``without``, damaged or doomed, are not listed anew.

    Call within a session. Every segment is read, and the last bytes of each pack that none lists;
    ``progress`` is told how many of the latter are done and how many there are. Memory: 32 bytes a
    pack, a few trailers, and one segment. Raises the errors of the store.
    """
    done = Rebuilt()
    objects = repository.objects
    # What is cached says nothing about what is in the store.
    repository = Repository(objects, repository.config, None)
    # The listing of packs comes first: one that is stored meanwhile is listed by who stores it.
    sizes = {
        name: info.size
        for info in objects.list("packs/")
        if (name := parse_hex(info.key.rpartition("/")[2])) is not None
    }
    listed, bad = _listed(repository, sizes)
    missing = sorted(name for name in sizes if name not in listed and name not in without)
    for packs in _gathered(_read(repository, missing, sizes, done, progress)):
        name, data = encode_segment(packs)
        objects.put(segment_key(name), data)
        done.stored.append(segment_key(name))
        done.packs += len(packs)
    # Only now, so that whoever dies in between has lost nothing.
    for key in bad:
        if key not in done.stored:
            objects.delete(key)
            done.removed.append(key)
    _rebuild_samples(repository, done)
    return done


def _listed(repository: Repository, sizes: dict[bytes, int]) -> tuple[set[bytes], list[str]]:
    """Return the packs that sound segments list, and the keys of the others."""
    listed: set[bytes] = set()
    bad: list[str] = []
    for info in repository.objects.list("index/"):
        name = parse_hex(info.key.removeprefix("index/"))
        if name is None:
            continue
        try:
            packs = repository.segment(name)
            for pack in packs:
                _check_claim(repository, pack, sizes)
        except NotFoundError:
            continue  # removed since it was listed
        except CorruptError:
            bad.append(info.key)
            continue
        listed.update(pack.digest for pack in packs)
    return listed, bad


def _check_claim(repository: Repository, pack: Pack, sizes: dict[bytes, int]) -> None:
    """See that a pack is as a segment lists it. Raises ``CorruptError``."""
    table = encode_table(pack.frames)
    if pack.digest not in sizes:
        if repository.objects.size(pack_key(pack.digest)) is None:
            raise CorruptError(f"it lists pack {pack.digest.hex()}, which is missing")
        return  # stored since the listing
    if digest(table) == pack.digest:
        return
    try:
        found = read_trailer(repository.objects, pack.digest, sizes[pack.digest])
    except DAMAGE:
        return  # the pack is to blame, and not the segment
    # Of version 1, then: its name is that of all its bytes.
    if not found.old or encode_table(found.pack.frames) != table:
        raise CorruptError(f"it lists pack {pack.digest.hex()} otherwise than that is")


def _read(
    repository: Repository,
    names: list[bytes],
    sizes: dict[bytes, int],
    done: Rebuilt,
    progress: Callable[[int, int], None],
) -> Iterator[Pack]:
    """Yield packs by their own tables, a few read at once."""

    def read(name: bytes) -> Pack | str:
        try:
            return read_trailer(repository.objects, name, sizes[name]).pack
        except DAMAGE as error:
            return error.message

    with ThreadPoolExecutor(PARALLEL) as pool:
        for at in range(0, len(names), PARALLEL):
            group = names[at : at + PARALLEL]
            for name, found in zip(group, pool.map(read, group), strict=True):
                if isinstance(found, str):
                    done.unreadable[name] = found
                else:
                    yield found
            progress(at + len(group), len(names))


def _gathered(packs: Iterator[Pack]) -> Iterator[list[Pack]]:
    """Group packs as a push would list them."""
    group: list[Pack] = []
    chunks = 0
    for pack in packs:
        group.append(pack)
        chunks += sum(len(frame.sizes) for frame in pack.frames)
        if len(group) >= SEGMENT_PACKS or chunks >= MAX_CHUNKS:
            yield group
            group, chunks = [], 0
    if group:
        yield group


def _rebuild_samples(repository: Repository, done: Rebuilt) -> None:
    """Remove damaged samples, and make one of the segments that none covers if they are many."""
    objects = repository.objects
    covered: set[bytes] = set()
    for info in list(objects.list("samples/")):
        name = parse_hex(info.key.removeprefix("samples/"))
        if name is None:
            continue
        try:
            covered.update(open_sample(objects.get(sample_key(name)), name).segments)
        except NotFoundError:
            continue
        except CorruptError:
            objects.delete(info.key)
            done.removed.append(info.key)
    names = (parse_hex(info.key.removeprefix("index/")) for info in objects.list("index/"))
    fresh = sorted(name for name in names if name is not None and name not in covered)
    if len(fresh) > RECENT:

        def segments() -> Iterator[tuple[bytes, list[Pack]]]:
            for name in fresh:
                try:
                    yield name, repository.segment(name)
                except NotFoundError:
                    continue

        name, data = build_sample(segments()).encode()
        objects.put(sample_key(name), data)
        done.stored.append(sample_key(name))
