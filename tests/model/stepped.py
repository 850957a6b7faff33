"""An object store in memory at whose door everybody waits until one at a time is let in.

    store = SteppedStore()
    actor = Actor(store, "push", lambda objects: push(...))
    while store.step(rng): ...

Each actor runs in a thread of its own, over a door of its own. A step lets one request of one
actor in, with what is to become of it: it is answered, it is applied and no answer comes, no
answer comes and it is applied at some later step, or its actor dies there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from envstore.errors import (
    EnvstoreError,
    UnavailableError,
)
from envstore.store.objects.base import Traffic
from envstore.store.objects.body import Body, joined
from tests.memory import Memory

_PATIENCE = 60.0


class Killed(BaseException):
    """What an actor that died meets at the door from then on."""


@dataclass(eq=False)
class _Request:
    actor: Actor
    name: str
    key: str
    do: Callable[[], Any]
    result: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def writes(self) -> bool:
        return self.name in ("put", "put_if", "delete")


class SteppedStore:
    """The door: ``memory`` is what lies behind it, without waiting."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.log: list[str] = []
        self.late: list[_Request] = []
        self._actors: list[Actor] = []
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()

    def add(self, actor: Actor) -> None:
        self._actors.append(actor)

    def ask(self, actor: Actor, name: str, key: str, do: Callable[[], Any]) -> Any:
        """Wait to be let in; called by the actors' threads."""
        request = _Request(actor, name, key, do)
        with self._changed:
            if actor.killed:
                raise Killed
            self._waiting.append(request)
            self._changed.notify_all()
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.result

    def left(self, actor: Actor) -> None:
        """Learn that an actor has ended."""
        with self._changed:
            actor.over = True
            self._changed.notify_all()

    def ready(self) -> list[_Request]:
        """Return one request of each actor, once all who have not ended wait at the door."""

        def first() -> dict[str, _Request] | None:
            found: dict[str, _Request] = {}
            for request in sorted(self._waiting, key=lambda r: (r.name, r.key)):
                found.setdefault(request.actor.name, request)
            return found if all(a.over or a.name in found for a in self._actors) else None

        with self._changed:
            assert self._changed.wait_for(lambda: first() is not None, _PATIENCE), self.log[-20:]
            found = first()
            assert found is not None
            return [found[name] for name in sorted(found)]

    def answer(self, request: _Request, fate: str = "answered") -> None:
        """Let one request in: ``answered``, ``silent``, ``late`` or ``killed``."""
        self.log.append(f"{request.actor.name}: {request.name} {request.key} {fate}")
        if fate == "killed":
            self._kill(request.actor)
            return
        if fate == "late":
            self.late.append(request)
        else:
            try:
                request.result = request.do()
            except EnvstoreError as error:
                request.error = error
        if fate in ("silent", "late"):
            request.error = UnavailableError(f"no answer about {request.key}")
        self._release(request)

    def arrive(self, request: _Request) -> None:
        """Apply a request whose actor was told long ago that there was no answer."""
        self.late.remove(request)
        self.log.append(f"late: {request.name} {request.key}")
        with suppress(EnvstoreError):
            request.do()

    def _kill(self, actor: Actor) -> None:
        with self._changed:
            actor.killed = True
            gone = [request for request in self._waiting if request.actor is actor]
        for request in gone:
            request.error = Killed()
            self._release(request)

    def _release(self, request: _Request) -> None:
        with self._changed:
            self._waiting.remove(request)
        request.done.set()


class Door:
    """The ``ObjectStore`` of one actor."""

    def __init__(self, store: SteppedStore, actor: Actor) -> None:
        self.url = store.memory.url
        self.traffic = Traffic()
        self._store = store
        self._actor = actor

    def _ask(self, name: str, key: str, *arguments: Any) -> Any:
        do = getattr(self._store.memory, name)
        return self._store.ask(self._actor, name, key, lambda: do(key, *arguments))

    def get(self, key: str) -> Any:
        return self._ask("get", key)

    def get_range(self, key: str, start: int, length: int) -> Any:
        return self._ask("get_range", key, start, length)

    def get_range_into(self, key: str, start: int, *more: Any) -> Any:
        return self._ask("get_range_into", key, start, *more)

    def iter_range(self, key: str, start: int, length: int) -> Any:
        yield self._ask("get_range", key, start, length)

    def get_versioned(self, key: str) -> Any:
        return self._ask("get_versioned", key)

    def put(self, key: str, data: Body) -> Any:
        return self._ask("put", key, joined(data))

    def put_if(self, key: str, data: bytes, version: str | None) -> Any:
        return self._ask("put_if", key, data, version)

    def size(self, key: str) -> Any:
        return self._ask("size", key)

    def list(self, prefix: str) -> Any:
        memory = self._store.memory
        return iter(self._store.ask(self._actor, "list", prefix, lambda: list(memory.list(prefix))))

    def delete(self, key: str) -> Any:
        return self._ask("delete", key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> Any:
        check()
        return self._ask("delete", key)

    def settle(self, seconds: float) -> None:
        """No step takes as long as a deadline."""

    def now(self) -> float:
        # Read in passing, with whatever else is asked.
        return self._store.memory.now()

    def close(self) -> None:
        """Nothing to release."""


class Actor:
    """Does ``work`` in a thread; ``error`` is what it raised, if it was not killed."""

    def __init__(self, store: SteppedStore, name: str, work: Callable[[Door], None]) -> None:
        self.name = name
        self.killed = False
        self.over = False
        self.error: BaseException | None = None
        self._store = store
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        store.add(self)
        self._thread.start()

    def _run(self, work: Callable[[Door], None]) -> None:
        try:
            work(Door(self._store, self))
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - for the test to judge
            self.error = error
        finally:
            self._store.left(self)

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), self.name


def fate(rng: random.Random, request: _Request, faults: float) -> str:
    """Choose what becomes of a request."""
    if rng.random() >= faults:
        return "answered"
    return rng.choice(("killed", "silent", "late") if request.writes else ("killed", "silent"))
