"""Whose keys open a store: the node server's own, the driver's files, or a volume's Secret.

A Secret, mounted for the driver or named by a volume, has the keys ``access_key_id``,
``secret_access_key`` and, for temporary ones, ``session_token``. For the driver each store has
one of its own, mounted as the directory ``DIR/<store>``. Nothing of it is ever kept or shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from envstore.csi.config import NamedStore
from envstore.csi.refusal import RefusedError, invalid
from envstore.csi.request import quoted
from envstore.errors import UnavailableError, UsageError
from envstore.store.objects.credentials import Credentials

KEYS = ("session_token", "access_key_id", "secret_access_key")
"""In the order in which files are read: whoever finds the last has not missed the first."""

_LONGEST = 1 << 16
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
        raise invalid(
            f"store {store} wants keys of each volume: name a Secret in nodePublishSecretRef, in a"
            " StorageClass also as csi.storage.k8s.io/provisioner-secret-name"
        )
    for key in secrets:
        if key not in KEYS:
            known = ", ".join(KEYS)
            raise invalid(f"the volume's Secret holds {quoted(key)}, but known are {known}")
    try:
        return _parsed(secrets)
    except UsageError as error:
        raise invalid(f"the volume's Secret: {error}") from None


def _from_files(store: str, directory: Path | None) -> Credentials:
    if directory is None:
        raise _lacking(store, "it was started without a directory of them")
    problem = ""
    # If it is being replaced, the directory that is read may go before the last file is.
    for _ in range(_TIMES):
        try:
            return _parsed(_files(directory / store))
        except UsageError as error:
            problem = error.message
        except OSError as error:
            problem = f"cannot read {error.filename}: {error.strerror}"
    raise _lacking(store, problem)


def _lacking(store: str, problem: str) -> RefusedError:
    hint = "an administrator adds them to the driver's Secret"
    what = f"the driver's own credentials for store {store}: {problem}"
    return RefusedError.of(UnavailableError(what, hint=hint))


def _files(directory: Path) -> Mapping[str, str]:
    """Return what is in one state of a mounted Secret: what is not there is left out."""
    # Kubernetes replaces all keys at once, by another directory that the link ..data leads to.
    for place in (directory / "..data", directory):
        with suppress(FileNotFoundError):
            opened = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = {key: _read(opened, key) for key in KEYS}
            finally:
                os.close(opened)
            return {key: value for key, value in found.items() if value}
    return {}


def _read(directory: int, key: str) -> str:
    try:
        file = os.open(key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        try:
            return os.read(file, _LONGEST).decode("latin-1")
        finally:
            os.close(file)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise OSError(error.errno, error.strerror, key) from error


def _parsed(found: Mapping[str, str]) -> Credentials:
    return Credentials.parse({key: value.strip() for key, value in found.items()})
