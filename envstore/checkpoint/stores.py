"""The stores that a persister writes to: opened when first needed, and anew after an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from envstore.checkpoint.bandwidth import LimitedObjects, TokenBucket
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.layout import Orders, RunName
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.uploading import Knowledge
from envstore.errors import NotFoundError, UsageError
from envstore.store.config import load_config
from envstore.store.digest import parse_hex
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import Repository

_RECENT = 2
"""Of how many commits of a run the chunks are learned before its first save."""


@dataclass(slots=True)
class OpenStore:
    """One open store, what is known of it, and the runs that are saved there."""

    repository: Repository
    knowledge: Knowledge
    runs: dict[RunName, RunStore] = field(default_factory=dict)
    bases: dict[str, bytes] = field(default_factory=dict)
    learned: set[RunName] = field(default_factory=set)

    def run(self, name: RunName) -> RunStore:
        """Return the checkpoints of a run."""
        if name not in self.runs:
            self.runs[name] = RunStore(self.repository, name)
        return self.runs[name]

    def learn(self, run: RunStore, bases: Sequence[str]) -> list[str]:
        """Learn the newest commits of a run, the first time, and what refs or digests name.

        Returns those of ``bases`` that are not there.
        """
        if run.run not in self.learned:
            newest = run.commits()[-_RECENT:]
            self.knowledge.learn(commit.snapshot for commit in reversed(newest))
            self.learned.add(run.run)
        missing = []
        for text in bases:
            if text not in self.bases:
                try:
                    self.bases[text] = parse_hex(text) or self.repository.resolve(text)
                except (NotFoundError, UsageError):
                    missing.append(text)
        self.knowledge.learn(self.bases[text] for text in bases if text in self.bases)
        return missing


class Stores:
    """Opens each store once. Use from one thread.

    ``allowed`` are shell patterns of URLs, empty for any: whoever lets others write slots says
    with them where his credentials may be used.
    """

    def __init__(
        self,
        bucket: TokenBucket,
        allowed: Sequence[str] = (),
        *,
        open_objects: Callable[[str], ObjectStore] = open_objects,
    ) -> None:
        self._bucket = bucket
        self._allowed = tuple(allowed)
        self._open_objects = open_objects
        self._open: dict[str, OpenStore] = {}

    def open(self, url: str) -> OpenStore:
        """Return the store at ``url``.

        Raises ``CheckpointError`` if it is not allowed, and what ``Repository.open`` does.
        """
        if self._allowed and not any(fnmatchcase(url, pattern) for pattern in self._allowed):
            raise CheckpointError(
                f"this persister does not write to {url}",
                hint="its --allow-store says where it may",
            )
        if url not in self._open:
            objects = LimitedObjects(self._open_objects(url), self._bucket)
            try:
                repository = Repository(objects, load_config(objects), None)
            except BaseException:
                objects.close()
                raise
            self._open[url] = OpenStore(repository, Knowledge(repository))
        return self._open[url]

    def prepare(self, orders: Orders) -> tuple[OpenStore, RunStore]:
        """Return the store and run of ``orders``."""
        store = self.open(orders.store)
        return store, store.run(RunName.parse(orders.run))

    def drop(self, url: str) -> None:
        """Close a store, so that it is opened again: credentials may be others by then."""
        found = self._open.pop(url, None)
        if found is not None:
            found.repository.close()

    def close(self) -> None:
        """Close all of them."""
        for url in list(self._open):
            self.drop(url)
