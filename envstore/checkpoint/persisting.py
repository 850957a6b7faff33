"""Brings staged parts into the store, one at a time, and tries for as long as it takes.

Oldest first, so that history is kept; newest first once the end is near (the trainer is gone, or
this process was told to end): then the newest counts most. A part that is still being staged is
begun when nothing else waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envstore.checkpoint import recipes, retention
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.hashing import HashPool
from envstore.checkpoint.layout import CheckpointId, Orders
from envstore.checkpoint.news import News, described
from envstore.checkpoint.partsession import PartSession
from envstore.checkpoint.peeking import Peek, break_slot, peek
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit, Part
from envstore.checkpoint.slotfilling import AbandonedError, SlotFilling
from envstore.checkpoint.slotformat import DURABLE, STAGED, WAVE, WRITING
from envstore.checkpoint.slots import SlotDirectory, StagedSlot
from envstore.checkpoint.stores import Stores
from envstore.checkpoint.uploading import PartUpload, save_part_snapshot
from envstore.errors import EnvstoreError, UnsupportedFormatError, UsageError

PENDING = "pending"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a part that failed is tried again; twice as long after each failure."""
POLL_SECONDS = 0.25
"""How often slots are looked at while a trainer lives: it says when there is something to do."""
EARLY_SECONDS = 0.5
"""How long a part is being staged before its upload begins: hashing a state that is copied in less
would only slow the copy down, for which the training stands still."""
COMMIT_PAUSE, LONGEST_COMMIT_PAUSE = 0.1, 5.0
"""Seconds between two looks whether all ranks have stored their parts."""
WATCHED = 4
"""Of the parts whose COMMIT is waited for, how many are looked at: the oldest, which come first."""

# No trying again will help. All else may pass: the store is down, full, or denied.
_FINAL = (CheckpointError, UsageError, UnsupportedFormatError)

_log = logging.getLogger(__name__)

_NAMED = 8

Key = tuple[int, int]


@dataclass(slots=True)
class _Trouble:
    """A part that could not be stored, or committed, yet."""

    id: str
    times: int = 0
    again: float = 0.0
    message: str = ""


@dataclass(slots=True)
class _Waiting:
    """A part in the store whose COMMIT waits for other ranks."""

    orders: Orders
    sent: int
    pause: float = COMMIT_PAUSE
    again: float = 0.0


class Worker(threading.Thread):
    """The thread that does it, for one slot directory.

    ``tell`` is called from it with each message for the trainer, ``turned`` whenever ``idle`` or
    ``waiting`` may have changed.
    """

    def __init__(
        self,
        slots: SlotDirectory,
        stores: Stores,
        *,
        tell: Callable[[dict[str, Any]], None],
        turned: Callable[[], None],
        store: str = "",
        trusted: bool = True,
    ) -> None:
        """``store`` is opened at once, so that the first save finds it open.

        Unless ``trusted``, others write into the directory: lists of packs that are kept there
        to be taken over could make the store's index lie, so none are.
        """
        super().__init__(name="persist", daemon=True)
        self._slots = slots
        self._stores = stores
        self._news = News(tell)
        self._turned = turned
        self._store = store
        self._pending = slots.path / PENDING if trusted else None
        self._hashes = HashPool()
        self._awake = threading.Condition()
        # Under the lock of ``_awake``:
        self._woken = False
        self._stopped = False
        self._hurried = False
        self._retry = False
        self._idle = False
        self._asked: list[tuple[str, int]] = []
        # Of the thread alone:
        self._trouble: dict[Key, _Trouble] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._session = PartSession()
        self._recipe: tuple[Key, int, recipes.Recipe] | None = None
        self._writing: tuple[Key, float] = (-1, -1), 0.0

    # For other threads.

    def wake(self, *, retry: bool = False) -> None:
        """Look at the slots again; with ``retry`` also try at once what failed."""
        with self._awake:
            self._woken = True
            self._retry |= retry
            self._idle = False
            self._awake.notify()

    def ask(self, id: str, number: int) -> None:
        """Somebody waits for the outcome of a part that was staged in slot ``number``.

        A persister before this one may have stored it already and died with the news.
        """
        if not self._news.will_come(id):
            with self._awake:
                self._asked.append((id, number))
        self.wake()

    def hurry(self) -> None:
        """The end is near: from now on the newest part comes first."""
        with self._awake:
            self._hurried = True
        self.wake(retry=True)

    def stop(self) -> None:
        """End after what is being done; ``join`` it then."""
        with self._awake:
            self._stopped = True
            self._awake.notify()

    @property
    def idle(self) -> bool:
        """Whether every staged part is in the store, or never will be."""
        with self._awake:
            return self._idle

    @property
    def waiting(self) -> bool:
        """Whether a part in the store waits for those of other ranks."""
        return self._news.waiting

    def status(self) -> dict[str, Any]:
        """Return what ``status`` answers, see ``News.status``."""
        return {**self._news.status(), "idle": self.idle}

    # The thread.

    def run(self) -> None:
        """Save until told to stop."""
        try:
            if self._store:
                try:
                    self._stores.open(self._store)
                except EnvstoreError as error:
                    _log.warning("the store is not ready yet: %s", error)
            while self._turn():
                pass
        finally:
            self._session.leave()
            self._hashes.close()
            self._stores.close()

    def _turn(self) -> bool:
        """Do one thing, or wait; returns whether to go on."""
        with self._awake:
            if self._stopped:
                return False
            retry, self._retry, self._woken = self._retry, False, False
            asked, self._asked = self._asked, []
        for id, number in asked:
            self._look_for(id, number)
        if retry:
            for trouble in self._trouble.values():
                trouble.again = 0.0
            for waiting in self._waiting.values():
                waiting.again = 0.0
        slot, undone = self._next()
        if slot is not None:
            with slot:
                self._save(slot)
            return True
        self._commit_waiting()
        due = [trouble.again for trouble in self._trouble.values()]
        due += [waiting.again for waiting in list(self._waiting.values())[:WATCHED]]
        pause = min(due, default=float("inf")) - time.monotonic()
        if self._slots.trainer_alive():
            pause = min(pause, POLL_SECONDS)
        with self._awake:
            if self._woken or self._stopped:
                return True
            changed = self._idle is undone
            self._idle = not undone
        if changed:
            self._turned()
        self._sleep(max(0.0, min(pause, LONGEST_PAUSE)))
        return True

    def _sleep(self, seconds: float) -> None:
        with self._awake:
            if not (self._woken or self._stopped):
                self._awake.wait(seconds)

    def _look_for(self, id: str, number: int) -> None:
        """Wait for the COMMIT of a part, unless it is still to be stored, or was told since."""
        if self._news.will_come(id):
            return
        slot = self._slots.read_slot(number)
        if slot is None:
            return
        with slot:
            orders, staged = slot.orders, slot.state != DURABLE
        if str(orders.checkpoint) == id and staged:
            return
        try:
            checkpoint = CheckpointId(*(int(number) for number in id.split("-")))
        except (TypeError, ValueError):
            return
        # If another save is in the slot by now, that one was stored: it is of the same run.
        orders = replace(orders, checkpoint=checkpoint, keep="", pin="")
        self._waiting.setdefault(id, _Waiting(orders, 0))

    def _next(self) -> tuple[StagedSlot | None, bool]:
        """Return the slot to save now, and whether there is any part that is not stored yet."""
        alive = self._slots.trainer_alive()
        found = [
            page
            for number in self._slots.numbers()
            if (page := peek(self._slots.slot_path(number), number)) is not None
            and self._is_wanted(page, alive=alive)
        ]
        self._keep_trouble({page.key for page in found})
        with self._awake:
            newest_first = self._hurried or not alive
        now = time.monotonic()
        due = [
            page
            for page in found
            if page.key not in self._trouble or self._trouble[page.key].again <= now
        ]
        due.sort(
            key=lambda page: (
                page.state != STAGED,
                -page.sequence if newest_first else page.sequence,
            )
        )
        for page in due:
            slot = self._slots.read_slot(page.number)
            if slot is not None and (slot.number, slot.sequence) == page.key:
                return slot, True
            if slot is not None:
                slot.close()  # another save is in it by now
            elif page.state == STAGED and peek(self._slots.slot_path(page.number), page.number):
                self._refuse(page)
        return None, any(page.state == STAGED or alive for page in found)

    def _is_wanted(self, page: Peek, *, alive: bool) -> bool:
        if page.state == STAGED:
            return True
        # What a dead trainer left unfinished nobody finishes.
        if not alive or page.state not in (WRITING, WAVE):
            return False
        if page.key in self._trouble:
            return page.state == WAVE
        if self._recipe is not None and self._recipe[0] == page.key:
            # A wave that was taken already stays there until the trainer begins the next.
            return page.wave >= self._recipe[1]
        if self._writing[0] != page.key:
            self._writing = page.key, time.monotonic()
        return page.state == WAVE or time.monotonic() - self._writing[1] >= EARLY_SECONDS

    def _keep_trouble(self, keys: set[Key]) -> None:
        """Forget the trouble with parts that are gone, and end the session of such a one."""
        self._session.leave_unless(keys)
        gone = self._trouble.keys() - keys
        for key in gone:
            del self._trouble[key]
        self._news.failing({item.id: item.message for item in self._trouble.values()})

    def _refuse(self, page: Peek) -> None:
        path = self._slots.slot_path(page.number)
        break_slot(path)
        error = CheckpointError(f"{path} is damaged: what was staged in it is lost")
        self._news.failed("", error, final=True)

    def _save(self, slot: StagedSlot) -> None:
        """Store and commit the part in ``slot``, and tell how it went. Does not raise."""
        key = slot.number, slot.sequence
        id = str(slot.orders.checkpoint)
        self._news.saving(id)
        with self._awake:
            self._idle = False
        try:
            try:
                self._store_part(slot, key)
            except BaseException:
                self._session.leave()
                raise
        except AbandonedError:
            _log.info("%s was not staged to its end", id)
            self._stores.drop(slot.orders.store)
        except _FINAL as error:
            self._stores.drop(slot.orders.store)
            self._trouble.pop(key, None)
            slot.mark_broken()
            self._news.failed(id, error, final=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the part is still there
            self._stores.drop(slot.orders.store)
            self._try_later(key, id, error)
        finally:
            self._news.saving("")

    def _store_part(self, slot: StagedSlot, key: Key) -> None:
        orders = slot.orders
        store, run = self._stores.prepare(orders)
        inside = self._session.enter(key, store, f"save of {orders.checkpoint} of {orders.run}")
        run = run.within(inside)
        for base in store.learn(run, orders.bases):
            self._news.warn(
                f"{orders.checkpoint}: no chunks shared with {base}, which is not there"
            )
        traffic = inside.objects.traffic
        before = traffic.bytes_out
        recipe = self._recipe_of(slot, key)
        filling = SlotFilling(slot, self._slots)
        with PartUpload(
            store.knowledge, self._hashes, recipe, codec=orders.codec, pending=self._pending
        ) as upload:
            upload.add(slot.files, slot.view, filling)
            filling.finish()
            if not slot.last:
                upload.flush()
                store.knowledge.settle()
                recipes.keep(self._recipe_path(slot), slot.sequence, slot.wave + 1, recipe)
                self._recipe = (key, slot.wave + 1, recipe)
                self._trouble.pop(key, None)
                slot.take_wave()
                return
            root = upload.finish()
        store.knowledge.settle()
        snapshot = save_part_snapshot(inside, root, orders)
        sent = traffic.bytes_out - before
        run.put_part(
            Part(
                orders.checkpoint,
                orders.rank,
                orders.world_size,
                snapshot,
                orders.saved,
                size=root.logical,
                sent=sent,
                metrics=orders.metrics,
                lineage=orders.lineage,
            )
        )
        commit = run.try_commit(orders.checkpoint)
        # From here on the other ranks, or whoever looks for the latest, can do without the slot.
        slot.mark_durable()
        self._session.leave()
        self._trouble.pop(key, None)
        if slot.wave:
            self._recipe = None
            self._recipe_path(slot).unlink(missing_ok=True)
        self._news.take_warnings(store.knowledge.known.warnings, run.warnings)
        self._news.stored(sent)
        if commit is None:
            self._waiting[str(orders.checkpoint)] = _Waiting(orders, sent)
            self._note_waiting()
        else:
            _, run = self._stores.prepare(orders)
            self._committed(run, commit, orders, sent)

    def _recipe_of(self, slot: StagedSlot, key: Key) -> recipes.Recipe:
        if slot.wave == 0:
            return recipes.Recipe(slot.files)
        if self._recipe is not None and self._recipe[:2] == (key, slot.wave):
            return self._recipe[2]
        return recipes.kept(self._recipe_path(slot), slot.sequence, slot.wave, slot.files)

    def _recipe_path(self, slot: StagedSlot) -> Path:
        return self._slots.path / f"waves-{slot.number}"

    def _commit_waiting(self) -> None:
        """Look whether the parts of other ranks have come."""
        for id, waiting in list(self._waiting.items())[:WATCHED]:
            if waiting.again > time.monotonic():
                continue
            orders = waiting.orders
            try:
                _, run = self._stores.prepare(orders)
                commit = run.try_commit(orders.checkpoint)
                if commit is None:
                    self._require_hope(run, orders, waiting)
            except _FINAL as error:
                del self._waiting[id]
                self._news.failed(id, error, final=True)
                continue
            except Exception as error:  # noqa: BLE001 - the part stays where it is
                self._stores.drop(orders.store)
                waiting.pause = min(max(FIRST_PAUSE, 2 * waiting.pause), LONGEST_PAUSE)
                waiting.again = time.monotonic() + waiting.pause
                self._news.failed(id, error, final=False)
                continue
            if commit is not None:
                del self._waiting[id]
                self._committed(run, commit, orders, waiting.sent)
            else:
                waiting.pause = min(2 * waiting.pause, LONGEST_COMMIT_PAUSE)
                waiting.again = time.monotonic() + waiting.pause
        self._note_waiting()

    def _require_hope(self, run: RunStore, orders: Orders, waiting: _Waiting) -> None:
        """Raise ``CheckpointError`` if a rank has gone on without its part of this checkpoint.

        However far behind it is, it may still come otherwise. Asked when it has been a while.
        """
        if waiting.pause < LONGEST_COMMIT_PAUSE and len(self._waiting) <= WATCHED:
            return
        missed = run.missed_by(orders.checkpoint)
        if missed:
            ranks = ", ".join(str(rank) for rank in sorted(missed)[:_NAMED])
            raise CheckpointError(
                f"step {orders.checkpoint.step} of {orders.run} is not complete: "
                f"rank {ranks} saved later steps and not this one",
                hint="look at the log of its persister",
            )

    def _committed(self, run: RunStore, commit: Commit, orders: Orders, sent: int) -> None:
        id = str(orders.checkpoint)
        self._news.durable(id, commit.snapshot, sent)
        if orders.rank:
            return  # one rank does the rest
        try:
            if orders.pin:
                run.pin(commit, orders.pin)
            if orders.keep:
                for removed in retention.apply(run, orders.keep):
                    _log.info("%s is removed, as retention says", removed.checkpoint)
        except EnvstoreError as error:
            self._news.warn(f"{id} is kept, but retention failed: {error.message}")
        self._news.take_warnings(run.warnings)

    def _try_later(self, key: Key, id: str, error: Exception) -> None:
        trouble = self._trouble.setdefault(key, _Trouble(id))
        trouble.message = described(error).message
        pause = min(FIRST_PAUSE * 2**trouble.times, LONGEST_PAUSE)
        trouble.times += 1
        trouble.again = time.monotonic() + pause
        self._news.failed(id, error, final=False)

    def _note_waiting(self) -> None:
        if self._news.wait_for(list(self._waiting)):
            self._turned()
