"""Opens a run's store from the start of the process on, while the program makes its model."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future

from envstore.checkpoint.places import RunPlace
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import EnvstoreError
from envstore.store.cache import default_cache
from envstore.store.config import init_store
from envstore.store.objects import open_objects
from envstore.store.repository import Repository

_log = logging.getLogger("envstore.checkpoint")


def open_repository(place: RunPlace) -> Repository:
    """Open the store of ``place`` with the node's cache; the user's own store is made if missing.

    Raises what ``Repository.open`` does.
    """
    if not place.default:
        return Repository.open(place.store, default_cache())
    objects = open_objects(place.store, create=True)
    try:
        config, _ = init_store(objects)
        return Repository(objects, config, default_cache())
    except BaseException:
        objects.close()
        raise


class Opening:
    """The store of a run, which a thread opens ahead of its first use. Thread-safe.

    With ``look`` the thread also reads what is known of the run, so that a restore finds it, and
    with ``prefetch`` has the node cache hold the newest checkpoint. What goes wrong there is
    said by whoever needs the store, who tries again.
    """

    def __init__(self, place: RunPlace, *, look: bool, prefetch: bool) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._opened: RunStore | None = None
        self._enough = False
        self._tree: SnapshotTree | None = None
        self._done: Future[None] = Future()
        threading.Thread(
            target=self._ahead, args=(look, prefetch), name="envstore-open", daemon=True
        ).start()

    def run_store(self) -> RunStore:
        """Return the opened run. Raises what ``Repository.open`` does."""
        with self._lock:
            if self._opened is None:
                self._opened = RunStore(open_repository(self._place), self._place.run)
            return self._opened

    def stop_prefetch(self) -> None:
        """Fetch no further ahead: whoever calls reads for itself what has not come yet."""
        self._enough = True
        if self._tree is not None:
            self._tree.close()

    def close(self) -> None:
        """Let go of the store; waits for the thread. Idempotent."""
        self.stop_prefetch()
        self._done.result()
        with self._lock:
            if self._opened is not None:
                self._opened.repository.close()
                self._opened = None

    def _ahead(self, look: bool, prefetch: bool) -> None:
        try:
            run_store = self.run_store()
            latest = run_store.latest() if look or prefetch else None
            if latest is not None and prefetch and not self._enough:
                with run_store.lease(latest):
                    self._tree = SnapshotTree(run_store.repository, latest.snapshot)
                    if not self._enough:
                        self._tree.prefetch()
        except EnvstoreError as error:
            _log.debug("reading ahead: %s", error)
        except Exception:  # noqa: BLE001 - a bug here must not fail who only wants to be early
            _log.debug("reading ahead", exc_info=True)
        finally:
            self._done.set_result(None)
