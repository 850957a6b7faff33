"""Object backends: ``file://`` and ``s3://`` behind one interface."""

from __future__ import annotations

from envstore.errors import UsageError
from envstore.store.objects.base import ObjectInfo, ObjectStore, Traffic
from envstore.store.objects.credentials import Credentials, KeyRing
from envstore.store.objects.url import FileLocation, S3Location, parse_url

__all__ = [
    "Credentials",
    "FileLocation",
    "KeyRing",
    "ObjectInfo",
    "ObjectStore",
    "S3Location",
    "Traffic",
    "open_objects",
    "parse_url",
]


def open_objects(url: str, *, create: bool = False, keys: KeyRing | None = None) -> ObjectStore:
    """Open the object store that ``url`` names.

    ``url`` is ``file:///abs/path``, a plain path, or
    ``s3://bucket[/prefix][?endpoint=..&region=..&path_style=1&profile=..]``. With ``create`` the
    directory is made; a bucket must exist and is asked for. Without it an S3 server is not
    contacted before the first request. ``keys`` are used instead of whatever credentials this
    process has, and nothing else if they are refused.

    Raises ``UsageError`` (malformed URL; keys for a directory), ``NotFoundError`` (no such
    directory, or with ``create`` no such bucket), ``AccessDeniedError`` (no credentials, no
    permission), ``UnavailableError`` and ``NoSpaceError``.
    """
    location = parse_url(url)
    if isinstance(location, FileLocation):
        if keys is not None:
            raise UsageError("credentials are for S3 stores: a directory's are its modes")
        from envstore.store.objects.file import FileObjects

        return FileObjects(location.path, create=create)
    # Importing the S3 client costs a fifth of a second: only who needs it pays.
    from envstore.store.objects.s3 import S3Objects

    store = S3Objects(location, keys=keys)
    if create:
        try:
            store.check_bucket()
        except BaseException:
            store.close()
            raise
    return store
