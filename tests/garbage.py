"""What a collector would do to a store, done at once: for tests of writers."""

from __future__ import annotations

from envstore.store import doomed
from envstore.store.doomed import Condemned, State
from envstore.store.repository import Repository


def condemn(repository: Repository, *keys: str) -> None:
    """Condemn ``keys`` at the next epoch, besides what was before."""
    objects = repository.objects
    found = doomed.read_doomed(objects)
    epoch = found.state.epoch + 1
    rows = [*found.condemned, *(Condemned(key, epoch, objects.now()) for key in keys)]
    state = State(epoch, condemned=doomed.write_list(objects, rows), deleting=found.state.deleting)
    doomed.put_state(objects, state, found.version)


def delete_condemned(repository: Repository) -> None:
    """Sweep all that is condemned."""
    objects = repository.objects
    found = doomed.read_doomed(objects)
    for row in found.condemned:
        objects.delete(row.key)
    doomed.put_state(objects, State(found.state.epoch), found.version)
