"""Does the store keep its word on conditional writes? Some servers do not."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from envstore.errors import AccessDeniedError, ConflictError, NotFoundError, UnavailableError
from envstore.store.objects.base import ObjectStore

_RACERS = 32
_ROUNDS = 1
# Only for a machine that cannot start so many threads; the others must not wait for ever.
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ProbeCheck:
    """One check: its name, whether it passed, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe saw, up to the first check that failed.

    ``leftovers`` are keys that could not be removed afterwards.
    """

    checks: tuple[ProbeCheck, ...]
    leftovers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed: many writers may share the store."""
        return all(check.ok for check in self.checks)


def probe_conditional_put(
    objects: ObjectStore, *, racers: int = _RACERS, rounds: int = _ROUNDS
) -> ProbeResult:
    """Try whether ``put_if`` is atomic: of many writers at once, exactly one may win.

    ``racers`` threads start together, ``rounds`` times, on a key that does not exist and then
    on one version of it; a stale version and a version of a missing key must lose as well. The
    keys are ``probe/<random>-..`` and are removed afterwards. One round takes some 90 requests
    and a second or two; servers that queue rivals for a lock may need several seconds.

    Raises ``UnavailableError`` if the store cannot be reached, and whatever else keeps the
    probe from being made at all (``AccessDeniedError``, ``NoSpaceError``, ``NotFoundError``).
    """
    stem = f"probe/{secrets.token_hex(8)}"
    missing = f"{stem}-missing"
    raced = [f"{stem}-{number}" for number in range(rounds)]
    try:
        checks = _checks(objects, raced, missing, racers)
    except UnavailableError:
        raise  # what cannot be reached cannot be tidied up either
    except BaseException:
        _remove(objects, [*raced, missing])
        raise
    return ProbeResult(checks, leftovers=_remove(objects, [*raced, missing]))


def _checks(
    objects: ObjectStore, raced: Sequence[str], missing: str, racers: int
) -> tuple[ProbeCheck, ...]:
    """Return the checks up to and including the first that fails."""
    checks: list[ProbeCheck] = []
    version = ""
    for key in raced:
        create = _race(objects, key, None, racers, f"{racers} writers create one object")
        checks.append(create)
        if not create.ok:
            return tuple(checks)
        _, version = objects.get_versioned(key)
        move = _race(objects, key, version, racers, f"{racers} writers move one version")
        checks.append(move)
        if not move.ok:
            return tuple(checks)
        checks.append(_must_lose(objects, key, version, "a stale version loses"))
    checks.append(_must_lose(objects, missing, version, "a version of a missing object loses"))
    return tuple(checks)


def _race(
    objects: ObjectStore, key: str, version: str | None, racers: int, name: str
) -> ProbeCheck:
    # Bodies differ, or two winners would have written the same version.
    bodies = [f"{name} {number} {secrets.token_hex(8)}".encode() for number in range(racers)]
    barrier = threading.Barrier(racers)

    def write(body: bytes) -> str | UnavailableError | None:
        barrier.wait(_START_SECONDS)
        try:
            return objects.put_if(key, body, version)
        except ConflictError:
            return None
        except UnavailableError as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        outcomes = list(pool.map(write, bodies))
    unknown = [outcome for outcome in outcomes if isinstance(outcome, UnavailableError)]
    if len(unknown) == racers:
        raise unknown[0]
    try:
        final, final_version = objects.get_versioned(key)
    except NotFoundError:
        return ProbeCheck(name, False, "nobody's write was stored")
    winners = [
        (body, outcome)
        for body, outcome in zip(bodies, outcomes, strict=True)
        # Of those who got no answer, the object itself tells who won.
        if isinstance(outcome, str) or (isinstance(outcome, UnavailableError) and body == final)
    ]
    detail = f"{len(winners)} won" + (f", {len(unknown)} got no answer" if unknown else "")
    ok = len(winners) == 1
    if ok and winners[0][0] != final:
        ok, detail = False, f"{detail}, but the object holds what another one wrote"
    elif ok and isinstance(winners[0][1], str) and winners[0][1] != final_version:
        ok, detail = False, f"{detail}, but was given a version that the object does not have"
    return ProbeCheck(name, ok, detail)


def _must_lose(objects: ObjectStore, key: str, version: str, name: str) -> ProbeCheck:
    try:
        objects.put_if(key, b"this must not be stored", version)
    except ConflictError:
        return ProbeCheck(name, True, "it lost")
    return ProbeCheck(name, False, "it was stored")


def _remove(objects: ObjectStore, keys: Sequence[str]) -> tuple[str, ...]:
    left: list[str] = []
    for key in keys:
        try:
            objects.delete(key)
        except AccessDeniedError:
            # Writers without the right to delete are legitimate, and answer the question too.
            left.append(key)
    return tuple(left)
