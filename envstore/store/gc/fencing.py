"""Writers' sessions as a collector sees them: who may still rely on what, and who is over."""

from __future__ import annotations

from dataclasses import dataclass, replace

from envstore.errors import ConflictError, NotFoundError
from envstore.store.objects.base import ObjectStore
from envstore.store.session_records import Stored, fence, read_record, read_sessions


@dataclass(frozen=True, slots=True)
class Writers:
    """All sessions there are, and those of them that are open."""

    all: tuple[Stored, ...]

    @property
    def open(self) -> tuple[Stored, ...]:
        """The sessions whose writers may still declare something."""
        return tuple(stored for stored in self.all if not stored.record.fenced)

    def allow(self, epoch: int) -> bool:
        """Whether every writer at work knows what was condemned at ``epoch``."""
        return all(epoch <= stored.record.epoch for stored in self.open)


def meet_writers(objects: ObjectStore, *, change: bool = True) -> Writers:
    """Read the sessions, fence those that are over, and remove what they have left.

    With ``change`` false nothing is written, and those that are over only count as fenced. One
    listing, a request for each session and one for each that is over.
    """
    now = objects.now()
    found: list[Stored] = []
    for stored in read_sessions(objects):
        session: Stored | None = stored
        if not stored.record.fenced and stored.record.is_over(now):
            fenced = replace(stored, record=replace(stored.record, fenced=int(now)))
            session = _fenced(objects, stored) if change else fenced
        if session is None:
            continue
        until = session.record.kept_until
        declared = session.record.roots or session.record.keys
        if change and until is not None and (until < now or not declared):
            objects.delete(session.key)
        else:
            found.append(session)
    return Writers(tuple(found))


def _fenced(objects: ObjectStore, stored: Stored) -> Stored | None:
    """Return a session that is over as it is after all; ``None`` if it has ended."""
    try:
        try:
            return fence(objects, stored)
        except ConflictError:
            # It was heard of in this very moment.
            return read_record(objects, stored.key)
    except NotFoundError:
        return None
