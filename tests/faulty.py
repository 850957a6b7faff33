"""An object store that fails on command, around a real one.

    store = FaultyStore(open_objects(url))
    store.fail("put", UnavailableError("gone"), key="packs/", after=True)  # stored, then an error
    store.corrupt("get_range", key="packs/", times=1)
    gate = store.gate("put_if", key="refs/")
    ...
    gate.wait_entered()   # somebody is inside put_if and waits
    gate.open()

Every fault names an operation (or ``"*"``) and the beginning of a key, may be limited to the first
``times`` matching calls and may let ``skip`` of them pass before. Faults apply in the order in
which they were added, and are removed by ``Fault.remove``.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from envstore.errors import CorruptError, NotFoundError
from envstore.store.objects.base import ObjectInfo, ObjectStore, ignore
from envstore.store.objects.body import Body, joined, length

_Change = Callable[[bytes], bytes]

OPERATIONS = (
    "get",
    "get_range",
    "get_versioned",
    "put",
    "put_if",
    "size",
    "list",
    "delete",
)
# A test that waits for an event which never comes should fail by its own name.
_PATIENCE = 60.0
_PIECE = 100_000


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached the store: the operation, the key, and the bytes given or asked for."""

    operation: str
    key: str
    length: int = 0


@dataclass(eq=False)
class Fault:
    """What happens to some of the calls. ``hits`` counts them."""

    store: FaultyStore
    operation: str
    key: str
    times: int | None
    skip: int
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    change: _Change | None = None
    drop: bool = False
    hits: int = 0
    _seen: int = 0

    def remove(self) -> None:
        """Let calls pass again."""
        self.store.remove(self)

    def takes(self, call: Call) -> bool:
        """Return whether this fault applies to ``call``, and count it if so."""
        if self.operation not in ("*", call.operation) or not call.key.startswith(self.key):
            return False
        self._seen += 1
        if self._seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


@dataclass(eq=False)
class Gate:
    """Holds matching calls until it is opened; those that enter later pass at once."""

    _entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _opened: threading.Event = field(default_factory=threading.Event)

    def wait_entered(self, count: int = 1) -> None:
        """Wait until ``count`` further calls are, or have been, held here."""
        for _ in range(count):
            if not self._entered.acquire(timeout=_PATIENCE):
                raise TimeoutError("nobody came to the gate")

    def open(self) -> None:
        """Let everybody through, now and later."""
        self._opened.set()

    def hold(self) -> None:
        """Wait here until the gate is opened."""
        self._entered.release()
        if not self._opened.wait(_PATIENCE):
            raise TimeoutError("nobody opened the gate")


class _DroppedError(Exception):
    """A request that is not to arrive."""


class FaultyStore:
    """An ``ObjectStore`` that passes everything to ``inner``, except as it is told otherwise."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.url = inner.url
        self.traffic = inner.traffic
        self.calls: list[Call] = []
        self.skew = 0.0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    # Telling it what to do.

    def fail(
        self,
        operation: str,
        error: BaseException,
        *,
        key: str = "",
        times: int | None = None,
        skip: int = 0,
        after: bool = False,
    ) -> Fault:
        """Raise ``error`` instead of doing the operation, or with ``after`` once it is done."""

        def throw() -> None:
            raise error

        return self._add(
            operation,
            key,
            times,
            skip,
            before=None if after else throw,
            after=throw if after else None,
        )

    def corrupt(
        self, operation: str, *, key: str = "", times: int | None = None, skip: int = 0, at: int = 0
    ) -> Fault:
        """Flip every bit of byte ``at`` of what is read or written (from the end if negative)."""

        def flip(data: bytes) -> bytes:
            changed = bytearray(data)
            if changed:
                changed[at % len(changed)] ^= 0xFF
            return bytes(changed)

        return self._add(operation, key, times, skip, change=flip)

    def truncate(
        self, operation: str, *, key: str = "", times: int | None = None, skip: int = 0, by: int = 1
    ) -> Fault:
        """Cut ``by`` bytes off the end of what is read or written."""
        return self._add(
            operation, key, times, skip, change=lambda data: data[: max(0, len(data) - by)]
        )

    def replace(
        self, operation: str, data: bytes, *, key: str = "", times: int | None = None, skip: int = 0
    ) -> Fault:
        """Read or write ``data`` instead."""
        return self._add(operation, key, times, skip, change=lambda _: data)

    def drop(
        self, operation: str, *, key: str = "", times: int | None = None, skip: int = 0
    ) -> Fault:
        """Lose the object: writes and deletes do nothing yet succeed, reads find nothing."""
        return self._add(operation, key, times, skip, drop=True)

    def gate(
        self,
        operation: str,
        *,
        key: str = "",
        times: int | None = None,
        skip: int = 0,
        after: bool = False,
    ) -> Gate:
        """Hold calls before the operation (``after``: once it is done) until the gate opens."""
        gate = Gate()
        self._add(
            operation,
            key,
            times,
            skip,
            before=None if after else gate.hold,
            after=gate.hold if after else None,
        )
        return gate

    def call_before(
        self,
        operation: str,
        work: Callable[[], None],
        *,
        key: str = "",
        times: int | None = None,
        skip: int = 0,
    ) -> Fault:
        """Call ``work`` before the operation is done."""
        return self._add(operation, key, times, skip, before=work)

    def remove(self, fault: Fault) -> None:
        """Forget ``fault``."""
        with self._lock:
            self._faults.remove(fault)

    def clear(self) -> None:
        """Forget every fault and every recorded call."""
        with self._lock:
            self._faults.clear()
            self.calls.clear()

    def count(self, operation: str = "*", key: str = "") -> int:
        """Return how many calls of ``operation`` there were on keys beginning with ``key``."""
        with self._lock:
            return sum(
                operation in ("*", call.operation) and call.key.startswith(key)
                for call in self.calls
            )

    def counts(self) -> Counter[str]:
        """Return the number of calls of each operation."""
        with self._lock:
            return Counter(call.operation for call in self.calls)

    # The ObjectStore.

    def get(self, key: str) -> bytes:
        return self._read(Call("get", key), lambda: self.inner.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = self._read(
            Call("get_range", key, length), lambda: self.inner.get_range(key, start, length)
        )
        if len(data) != length:
            raise CorruptError(f"{key} is too short")  # as every backend does
        return data

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """The faults of ``get_range`` apply, and it counts as one."""
        data = memoryview(self.get_range(key, start, sum(map(len, views))))
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)
            arrived(len(view))

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """The faults of ``get_range`` apply, and it counts as one."""
        data = self.get_range(key, start, length)
        for at in range(0, length, _PIECE):
            yield data[at : at + _PIECE]

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        version = ""

        def read() -> bytes:
            nonlocal version
            data, version = self.inner.get_versioned(key)
            return data

        return self._read(Call("get_versioned", key), read), version

    def put(self, key: str, data: Body) -> None:
        faults = self._meet(Call("put", key, length(data)))
        if not any(fault.drop for fault in faults):
            changing = any(fault.change is not None for fault in faults)
            self.inner.put(key, _changed(joined(data), faults) if changing else data)
        _finish(faults)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        faults = self._meet(Call("put_if", key, len(data)))
        if any(fault.drop for fault in faults):
            new = "dropped"
        else:
            new = self.inner.put_if(key, _changed(data, faults), version)
        _finish(faults)
        return new

    def size(self, key: str) -> int | None:
        faults = self._meet(Call("size", key))
        if any(fault.drop for fault in faults):
            return None
        size = self.inner.size(key)
        _finish(faults)
        return size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List ``prefix``; a dropped listing is empty, and ``change`` does not apply."""
        faults = self._meet(Call("list", prefix))
        if not any(fault.drop for fault in faults):
            yield from self.inner.list(prefix)
        _finish(faults)

    def delete(self, key: str) -> None:
        faults = self._meet(Call("delete", key))
        if not any(fault.drop for fault in faults):
            self.inner.delete(key)
        _finish(faults)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Delete; what happens before happens between ``check`` and the request."""
        met: list[Fault] = []

        def checked() -> None:
            check()
            met[:] = self._meet(Call("delete", key))
            if any(fault.drop for fault in met):
                raise _DroppedError

        with contextlib.suppress(_DroppedError):
            self.inner.delete_within(key, seconds, checked)
        _finish(met)

    def settle(self, seconds: float) -> None:
        self.inner.settle(seconds)

    def now(self) -> float:
        """Return the time of the inner store's clock, which ``skew`` seconds can be added to."""
        return self.inner.now() + self.skew

    def close(self) -> None:
        self.inner.close()

    def _read(self, call: Call, read: Callable[[], bytes]) -> bytes:
        faults = self._meet(call)
        if any(fault.drop for fault in faults):
            raise NotFoundError(f"{call.key} does not exist")
        data = _changed(read(), faults)
        _finish(faults)
        return data

    def _add(
        self,
        operation: str,
        key: str,
        times: int | None,
        skip: int,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        change: _Change | None = None,
        drop: bool = False,
    ) -> Fault:
        if operation != "*" and operation not in OPERATIONS:
            raise ValueError(f"no such operation: {operation}")
        fault = Fault(self, operation, key, times, skip, before, after, change, drop)
        with self._lock:
            self._faults.append(fault)
        return fault

    def _meet(self, call: Call) -> Sequence[Fault]:
        with self._lock:
            self.calls.append(call)
            faults = [fault for fault in self._faults if fault.takes(call)]
        for fault in faults:
            if fault.before is not None:
                fault.before()
        return faults


def _changed(data: bytes, faults: Sequence[Fault]) -> bytes:
    for fault in faults:
        if fault.change is not None:
            data = fault.change(data)
    return data


def _finish(faults: Sequence[Fault]) -> None:
    for fault in faults:
        if fault.after is not None:
            fault.after()
