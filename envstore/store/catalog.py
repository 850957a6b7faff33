"""What a store holds, as people ask for it: its refs, the entries of a directory, removing names.

Everything here is a handful of requests, sent in parallel where there are many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from envstore.errors import ConflictError, EnvstoreError, NotFoundError
from envstore.store.digest import parse_hex
from envstore.store.manifest import Entry
from envstore.store.refs import Ref, RefName, list_refs, move_ref, read_ref, try_read
from envstore.store.repository import PARALLEL, Repository
from envstore.store.sessions import writing
from envstore.store.snapshots import Snapshot
from envstore.store.source import Kind
from envstore.store.verify import DAMAGE, Problem


@dataclass(frozen=True, slots=True)
class Listed:
    """A ref with what it leads to, or with the error that is in the way."""

    name: RefName
    ref: Ref | None = None
    snapshot: Snapshot | None = None
    error: EnvstoreError | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Where a ref points now, and where it pointed before (``None``: it is new)."""

    name: RefName
    snapshot: bytes
    before: bytes | None


def describe_refs(repository: Repository, prefix: str = "") -> list[Listed]:
    """Return every ref whose ``namespace/name/tag`` starts with ``prefix``, in order.

    One listing, and one or two requests for each ref. A damaged ref or snapshot is told of in
    its own row; what concerns the whole store is raised.
    """
    names = sorted(list_refs(repository.objects, prefix))
    with ThreadPoolExecutor(PARALLEL) as pool:
        found = pool.map(lambda name: _describe(repository, name), names)
        return [listed for listed in found if listed is not None]


def _describe(repository: Repository, name: RefName) -> Listed | None:
    try:
        ref = read_ref(repository.objects, name)
    except NotFoundError:
        return None  # removed since it was listed
    except DAMAGE as error:
        return Listed(name, error=error)
    try:
        return Listed(name, ref, repository.snapshot(ref.snapshot))
    except DAMAGE as error:
        return Listed(name, ref, error=error)


def entries_at(entries: Iterable[Entry], path: bytes, *, recursive: bool) -> Iterator[Entry]:
    """Yield what ``path`` names: the entries in a directory (``b""`` is the root), or itself.

    With ``recursive`` everything below it. ``entries`` come in the order of a manifest. Raises
    ``NotFoundError``.
    """
    below = path + b"/" if path else b""
    found = not path
    for entry in entries:
        if entry.path == path:
            found = True
            if entry.kind is not Kind.DIRECTORY:
                yield entry
                return
        elif entry.path.startswith(below):
            if recursive or b"/" not in entry.path[len(below) :]:
                yield entry
        elif found and path:
            return  # a directory's entries follow it without a gap
    if not found:
        text = path.decode(errors="backslashreplace")
        raise NotFoundError(f"there is no /{text} in this snapshot")


def tag(repository: Repository, source: str, target: RefName, *, force: bool = False) -> Tagged:
    """Point ``target`` at the snapshot that ``source`` stands for.

    A handful of requests; for a digest, which may name what nothing else does any more, one more
    for each of its packs, to see that it is whole. Raises ``NotFoundError`` if it is not,
    ``ConflictError`` if ``target`` points elsewhere already and ``force`` is not given, or if it
    is moved at the same time.
    """
    expected, found = _tagged(repository, source, target, force=force)
    if found.before == found.snapshot:
        return found
    with writing(repository, f"tag {target}") as (session, inside):
        # What the source means from here on cannot be collected before the target is there.
        expected, found = _tagged(inside, source, target, force=force)
        session.claim_snapshot(found.snapshot, verify="@" in source)
        moved = move_ref(inside.objects, target, found.snapshot, expected)
        if repository.witness is not None:
            repository.witness.saw(target, moved)
    return found


def _tagged(
    repository: Repository, source: str, target: RefName, *, force: bool
) -> tuple[tuple[Ref, str] | None, Tagged]:
    """Return the target's ref as it is, and what is to become of it. Raises ``ConflictError``."""
    name = repository.resolve(source)
    # A digest given in full was not looked up yet.
    repository.snapshot(name)
    expected = try_read(repository.objects, target)
    before = expected[0].snapshot if expected else None
    if before is not None and before != name and not force:
        raise ConflictError(
            f"{target} exists and points at @{before.hex()[:12]}", hint="--force moves it"
        )
    return expected, Tagged(target, name, before)


def current(repository: Repository, names: Sequence[RefName]) -> list[tuple[RefName, Ref | None]]:
    """Return where each of ``names`` points, ``None`` for one that is damaged.

    Raises ``NotFoundError`` for the first that does not exist.
    """
    found: list[tuple[RefName, Ref | None]] = []
    for name in dict.fromkeys(names):
        try:
            found.append((name, read_ref(repository.objects, name)))
        except NotFoundError:
            raise
        except DAMAGE:
            found.append((name, None))
    return found


def remove_refs(repository: Repository, names: Iterable[RefName]) -> None:
    """Remove ``names``; the snapshots stay until they are collected as garbage."""
    for name in names:
        repository.objects.delete(name.key)
        if repository.witness is not None:
            repository.witness.removed(name)


def read_refs(repository: Repository) -> tuple[dict[RefName, Ref], list[Problem]]:
    """Return every ref, and those that are damaged. A listing, and a request for each."""

    def read(name: RefName) -> Ref | EnvstoreError | None:
        try:
            return read_ref(repository.objects, name)
        except NotFoundError:
            return None  # removed since it was listed
        except DAMAGE as error:
            return error

    names = sorted(list_refs(repository.objects))
    refs: dict[RefName, Ref] = {}
    broken: list[Problem] = []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for name, found in zip(names, pool.map(read, names), strict=True):
            if isinstance(found, Ref):
                refs[name] = found
            elif found is not None:
                broken.append(Problem(name.key, found.message, (str(name),)))
    return refs, broken


def all_targets(repository: Repository, refs: Mapping[RefName, Ref]) -> list[tuple[str, bytes]]:
    """Return what ``verify`` takes for the whole store.

    That is every one of ``refs``, and under its digest every snapshot that none names any more.
    """
    targets = [(str(name), ref.snapshot) for name, ref in refs.items()]
    named = {snapshot for _, snapshot in targets}
    listed = (
        parse_hex(info.key.rpartition("/")[2]) for info in repository.objects.list("snapshots/")
    )
    others = sorted(name for name in listed if name is not None and name not in named)
    targets += [(f"@{name.hex()[:12]}", name) for name in others]
    return targets
