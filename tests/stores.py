"""A store in a directory with everything a push and a pull need, for one test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from envstore.store.cache import BlobCache
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.pull import PullResult, pull
from envstore.store.push import PushOptions, PushResult, push
from envstore.store.refs import RefName, list_refs, read_ref
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot
from envstore.store.source import DirectorySource, Source
from envstore.store.statcache import StatCache
from envstore.store.verify import Report, verify
from tests.faulty import FaultyStore


class Store:
    """A file store below ``root`` with its stat cache and, if asked for, a node cache."""

    def __init__(
        self,
        root: Path,
        *,
        cache: bool = False,
        wrap: Callable[[ObjectStore], ObjectStore] = lambda objects: objects,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.url = f"file://{root}/objects"
        objects = open_objects(self.url, create=True)
        config, _ = init_store(objects)
        self.cache = BlobCache(root / "cache") if cache else None
        self.repository = Repository(wrap(objects), config, self.cache)
        self.stat_cache = StatCache(root / "stat.sqlite")
        self.state = root / "state"

    def push(
        self,
        what: Path | Source,
        ref: str = "tree",
        *,
        kind: str = "dir",
        normalise: bool = False,
        options: PushOptions | None = None,
    ) -> PushResult:
        """Push a directory, or a source, which is closed afterwards."""
        source = (
            DirectorySource(what, kind=kind, normalise=normalise)
            if isinstance(what, Path)
            else what
        )
        try:
            return push(
                self.repository,
                source,
                RefName.parse(ref),
                self.stat_cache,
                state=self.state,
                options=options,
            )
        finally:
            source.close()

    def pull(self, destination: Path, ref: str = "tree") -> PullResult:
        """Pull ``ref``."""
        return pull(self.repository, self.repository.resolve(ref), destination)

    def snapshot(self, ref: str = "tree") -> Snapshot:
        """Return what ``ref`` points at."""
        return self.repository.snapshot(self.repository.resolve(ref))

    def targets(self) -> list[tuple[str, bytes]]:
        """Return every ref and the snapshot it names, as ``verify`` takes them."""
        objects = self.repository.objects
        names = sorted(list_refs(objects))
        return [(str(name), read_ref(objects, name).snapshot) for name in names]

    def verify(self, *, read_data: bool = True, whole: bool = True) -> Report:
        """Verify every ref, by default every byte and the index too."""
        return verify(self.repository, self.targets(), read_data=read_data, whole=whole)

    def verify_targets(self, targets: list[tuple[str, bytes]]) -> Report:
        """Verify every byte of the given snapshots."""
        return verify(self.repository, targets, read_data=True)

    def assert_sound(self) -> None:
        """Check that every byte of every ref, and the index, is as it should be."""
        assert self.verify().problems == []

    @property
    def faults(self) -> FaultyStore:
        """The faulty store that was asked for with ``wrap=FaultyStore``."""
        objects = self.repository.objects
        assert isinstance(objects, FaultyStore)
        return objects

    def in_this_thread(self, work: Callable[[], object]) -> None:
        """Do ``work`` with a stat cache of this thread's own: SQLite insists on that."""
        old = self.stat_cache
        self.stat_cache = StatCache(self.root / "stat.sqlite")
        try:
            work()
        finally:
            self.stat_cache.close()
            self.stat_cache = old

    def object_keys(self, prefix: str = "") -> list[str]:
        """Return every object key."""
        return sorted(info.key for info in self.repository.objects.list(prefix))

    def path(self, key: str) -> Path:
        """Return the file of an object."""
        return self.root / "objects" / key

    def forget(self) -> None:
        """Lose all that this machine remembers; the store stays."""
        self.stat_cache.close()
        for name in ("stat.sqlite", "stat.sqlite-wal", "stat.sqlite-shm"):
            with suppress(FileNotFoundError):
                (self.root / name).unlink()
        for path in self.state.iterdir() if self.state.exists() else ():
            path.unlink()
        self.stat_cache = StatCache(self.root / "stat.sqlite")

    def close(self) -> None:
        """Release everything."""
        self.stat_cache.close()
        self.repository.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
