"""Which store and run a text names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from envstore.checkpoint.layout import RunName
from envstore.errors import UsageError
from envstore.store.objects.url import FileLocation, default_store, parse_url


@dataclass(frozen=True, slots=True)
class RunPlace:
    """A run and the canonical URL of the store that it is in.

    ``default`` is whether nobody named a store, so that the user's own one is meant and made if
    missing.
    """

    run: RunName
    store: str
    default: bool


def find_place(name: str, store: str | None, environ: Mapping[str, str]) -> RunPlace:
    """Return what ``name`` stands for: ``[namespace/]run``, or ``URL#[namespace/]run``.

    Without a URL in ``name`` or ``store``: ``ENVSTORE_URL``, else the user's own store.
    Raises ``UsageError``.
    """
    given: list[tuple[str, object]] = [("the name of a run", name)]
    if store is not None:
        given.append(("store=", store))
    for what, text in given:
        if not isinstance(text, str):
            raise UsageError(f"{what} is {text!r:.80}", hint="texts, as in Run('team/llm')")
    url, hash_sign, run = name.rpartition("#")
    if hash_sign and store is not None:
        raise UsageError(f"{name!r:.100} names a store, and store= too", hint="give one of them")
    if hash_sign and not url:
        raise UsageError(f"{name!r:.100} has nothing before the #", hint="write URL#namespace/run")
    if not hash_sign and "://" in name:
        raise UsageError(
            "the URL of a store is given without the name of a run",
            hint="write URL#namespace/run, as in s3://bucket/prefix#team/llm",
        )
    named = url or store or environ.get("ENVSTORE_URL") or None
    location = FileLocation(default_store()) if named is None else parse_url(named)
    return RunPlace(RunName.parse(run), location.url, named is None)
