"""Whether a snapshot is one that a ref pointed at."""

from __future__ import annotations

from envstore.errors import AccessDeniedError
from envstore.store.repository import Repository

MAX_ANCESTORS = 1000
"""How many snapshots are looked at to find one among the ancestors of another."""


def check_lineage(repository: Repository, head: bytes, snapshot: bytes, name: str) -> None:
    """See that ``snapshot`` is ``head``, which the ref ``name`` points at, or of its ancestors.

    A request for each ancestor that is not cached. Raises ``AccessDeniedError``.
    """
    if snapshot == head:
        return
    if all(one != snapshot for one, _ in repository.history(head, MAX_ANCESTORS)):
        raise AccessDeniedError(
            f"@{snapshot.hex()[:12]} is not a snapshot of {name}",
            hint=f"neither what it is now nor one of the {MAX_ANCESTORS} before",
        )
