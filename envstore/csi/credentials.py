"""Whose keys open a store: the node server's own, the driver's files, or a volume's Secret.

A Secret, mounted for the driver or named by a volume, has the keys ``access_key_id``,
``secret_access_key`` and, for temporary ones, ``session_token``. For the driver each store has
one of its own, mounted as the directory ``DIR/<store>``. Nothing of it is ever kept or shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from envstore.csi.config import NamedStore
from envstore.csi.nodeserver import Credentials
from envstore.csi.refusal import RefusedError, invalid
from envstore.csi.request import quoted
from envstore.errors import UnavailableError

NEEDED = ("access_key_id", "secret_access_key")
OPTIONAL = ("session_token",)

_LONGEST = 1 << 14
_TIMES = 3


def find_credentials(
    store: NamedStore, directory: Path | None, secrets: Mapping[str, str]
) -> Credentials | None:
    """Return the keys with which a volume of ``store`` is opened, ``None`` for the node's own.

    ``directory`` is where the driver's own are, ``secrets`` is what came with the request (CSI:
    ``node_publish_secrets``). Read anew each time, so that what is rotated counts at once.

    Raises ``RefusedError``: ``INVALID_ARGUMENT`` for what the volume got wrong, ``UNAVAILABLE``
    for what the driver's files lack.
    """
    if store.credentials != "volume" and secrets:
        raise invalid(f"store {store.name} takes no keys of a volume: name no Secret for it")
    if store.credentials == "volume":
        return _from_volume(store.name, secrets)
    if store.credentials == "secret":
        return _from_files(store.name, directory)
    return None


def _from_volume(store: str, secrets: Mapping[str, str]) -> Credentials:
    if not secrets:
        raise invalid(f"store {store} wants keys of each volume: name a nodePublishSecretRef")
    for key in secrets:
        if key not in (*NEEDED, *OPTIONAL):
            known = ", ".join((*NEEDED, *OPTIONAL))
            raise invalid(f"the volume's Secret holds {quoted(key)}, but known are {known}")
    return _checked(secrets, lambda key, what: invalid(f"{key} in the volume's Secret {what}"))


def _from_files(store: str, directory: Path | None) -> Credentials:
    def lacking(key: str, what: str) -> RefusedError:
        return _unavailable(f"{key} of store {store} {what}")

    if directory is None:
        raise _unavailable(f"the driver has no credentials for store {store}")
    for _ in range(_TIMES - 1):
        try:
            return _checked(_files(directory / store), lacking)
        except RefusedError:
            # Replaced meanwhile: the directory that was being read is gone.
            continue
    return _checked(_files(directory / store), lacking)


def _unavailable(what: str) -> RefusedError:
    hint = "an administrator adds them to the driver's Secret"
    return RefusedError.of(UnavailableError(what, hint=hint))


def _files(directory: Path) -> Mapping[str, str]:
    """Return what is in one state of a mounted Secret: what is not there is left out."""
    # Kubernetes replaces all keys at once, by another directory that the link ..data leads to.
    for place in (directory / "..data", directory):
        try:
            opened = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            # In this order a directory that is removed meanwhile lacks what is needed.
            found = {key: _read(opened, key) for key in (*OPTIONAL, *NEEDED)}
        finally:
            os.close(opened)
        return {key: value for key, value in found.items() if value is not None}
    return {}


def _read(directory: int, key: str) -> str | None:
    try:
        file = os.open(key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        with open(file, "rb") as opened:
            return opened.read(_LONGEST + 1).decode("latin-1")
    except OSError:
        return None


def _checked(found: Mapping[str, str], wrong: Callable[[str, str], RefusedError]) -> Credentials:
    """Return what was found: one word each, as HTTP headers can hold it."""
    values: dict[str, str] = {}
    for key in (*NEEDED, *OPTIONAL):
        value = found.get(key, "").strip()
        if not value and key in NEEDED:
            raise wrong(key, "is missing")
        if len(value) > _LONGEST or not all("!" <= one <= "~" for one in value):
            raise wrong(key, "is too long or not one word of ASCII")
        values[key] = value
    return Credentials(**values)
