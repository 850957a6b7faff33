"""Making a store, in a place that is fit for one."""

from __future__ import annotations

from dataclasses import dataclass

from envstore.errors import NotFoundError, UnavailableError, UsageError
from envstore.store import config
from envstore.store.config import StoreConfig, init_store, load_config
from envstore.store.objects import open_objects
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.probe import ProbeResult, probe_conditional_put


@dataclass(frozen=True, slots=True)
class Created:
    """A store's canonical URL and description; ``created`` is false if it was one already.

    ``probe`` is what was seen of its conditional writes, ``None`` if they were not tried.
    """

    url: str
    config: StoreConfig
    created: bool
    probe: ProbeResult | None


def create_store(url: str, *, probe: bool = True) -> Created:
    """Make ``url`` a store unless it is one.

    With ``probe`` the place must first show that of many concurrent conditional writes one wins,
    as the safety of refs rests on it. Raises ``UsageError`` (something else is there),
    ``UnavailableError`` (the probe failed), and the errors of the object store.
    """
    objects = open_objects(url, create=True)
    try:
        try:
            return Created(objects.url, load_config(objects), False, None)
        except NotFoundError:
            _require_empty(objects)
        seen = probe_conditional_put(objects) if probe else None
        if seen is not None and not seen.ok:
            raise unsafe(objects.url, seen)
        made, created = init_store(objects)
        return Created(objects.url, made, created, seen)
    finally:
        objects.close()


def unsafe(url: str, seen: ProbeResult) -> UnavailableError:
    """Return the error for a server whose conditional writes are not to be relied on."""
    failed = next(check for check in seen.checks if not check.ok)
    return UnavailableError(
        f"{url} does not keep conditional writes ({failed.name}: {failed.detail})",
        hint="use another server; or --no-probe, with one writer at a time",
    )


def _require_empty(objects: ObjectStore) -> None:
    """Keep a mistyped URL from strewing a store over somebody's files."""
    for info in objects.list(""):
        # Whoever makes the same store at this moment is no stranger.
        if info.key != config.KEY and not info.key.startswith("probe/"):
            raise UsageError(
                f"{objects.url} is not a store and not empty: it holds {info.key}",
                hint="name an empty place, such as a directory or prefix in it",
            )
