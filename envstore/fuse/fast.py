"""Lays the fast path of a mount: names from an image, files from disk, the rest from a server."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from envstore.errors import EnvstoreError, UnsupportedFormatError
from envstore.fuse.content import Content
from envstore.fuse.erofs import ensure_image
from envstore.fuse.forest import OBJECTS
from envstore.fuse.keeping import MountRequest
from envstore.fuse.local import LocalFiles
from envstore.fuse.overlay import mount_fast, probe
from envstore.fuse.session import bind, close_mount
from envstore.store.cache import BlobCache

_log = logging.getLogger(__name__)


def prepare_fast_path(content: Content, cache: BlobCache) -> dict[str, Any]:
    """Return what ``lay_fast_path`` needs of a snapshot, after writing its image if need be.

    Raises ``EnvstoreError`` when the tree cannot be represented, or the image not be written.
    """
    image = ensure_image(content.tree, content.key, cache.root / "images")
    return {"image": str(image), "local": str(LocalFiles(cache).directory)}


def wanted_fast_path(
    request: MountRequest, content: Content, cache: BlobCache
) -> dict[str, Any] | None:
    """Return what the fast path of a mount is laid of, ``None`` to do without.

    Raises ``EnvstoreError`` if the request insists on one and there is none.
    """
    if not _wants_fast_path(request):
        return None
    try:
        return prepare_fast_path(content, cache)
    except EnvstoreError as error:
        if request.fast_path == "on":
            raise
        _log.warning("no fast path: %s", error)
        return None


def _wants_fast_path(request: MountRequest) -> bool:
    """Whether a mount is to be laid over an image; raises if it must be and cannot.

    Such a mount lets other users in, so nobody gets it who has not asked for either.
    """
    if request.record or request.fast_path == "off":
        return False
    if request.fast_path == "auto" and not (request.allow_other and os.geteuid() == 0):
        return False
    reason = request.no_fast_path
    if not reason:
        return True
    if request.fast_path == "on":
        raise UnsupportedFormatError(f"no fast path here: {reason}", hint="see: envstore doctor")
    _log.info("no fast path here: %s", reason)
    return False


def tried(request: MountRequest, cache: BlobCache) -> MountRequest:
    """Return the request with what keeps this machine from fast paths, if it may want one.

    For whoever makes the mount, before there is a server, which could not try. Takes 10 ms.
    """
    maybe = request.fast_path == "on" or (request.fast_path == "auto" and request.allow_other)
    if not request.node and (request.record or not maybe):
        return request
    return replace(request, no_fast_path=probe(cache.root) or "")


def lay_fast_path(
    parts: dict[str, Any],
    server: str,
    subtree: str,
    mountpoint: str,
    source: str,
    *,
    required: bool,
) -> bool:
    """Mount a snapshot on ``mountpoint`` over ``parts`` and the server mounted on ``server``.

    Where the kernel cannot, the server's ``subtree`` of the snapshot is shown instead, and
    ``False`` returned, unless the fast path is ``required``. Call from another process than the
    server's. Raises ``EnvstoreError``.
    """
    objects = Path(server) / (subtree + os.fsdecode(OBJECTS))
    try:
        mount_fast(Path(parts["image"]), Path(parts["local"]), objects, mountpoint, source=source)
    except EnvstoreError as error:
        if required:
            raise
        _log.warning("no fast path: %s", error)
        bind(os.path.join(server, subtree), mountpoint)
        return False
    return True


def hide(server: str) -> None:
    """Take the server's own mount out of sight; what was laid over it goes on using it."""
    close_mount(server, lazy=True)
    with contextlib.suppress(OSError):
        os.rmdir(server)
