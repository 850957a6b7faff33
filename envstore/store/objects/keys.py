"""What an object key may look like, the same for every backend."""

from __future__ import annotations

from envstore.errors import UsageError

# A component is a file name to the file backend; a key with its prefix is an S3 key (1024 bytes).
_MAX_COMPONENT = 255
_MAX_KEY = 900


def check_key(key: str) -> tuple[str, ...]:
    """Return the components of ``key``.

    A key is printable ASCII of at most 900 characters, without backslashes (some servers take
    them for slashes): components of 1 to 255 characters joined by ``/``, none of them ``.`` or
    ``..``; the first may not begin with a dot, because a backend keeps its own files under such
    names. Raises ``UsageError`` for anything else, so that no key can name a place outside the
    store.
    """
    parts = tuple(key.split("/"))
    if not key or len(key) > _MAX_KEY or not _is_allowed(key):
        raise UsageError(f"malformed object key {key[:100]!r}")
    for part in parts:
        if not part or part in (".", "..") or len(part) > _MAX_COMPONENT:
            raise UsageError(f"malformed object key {key[:100]!r}")
    if parts[0].startswith("."):
        raise UsageError(f"malformed object key {key[:100]!r}")
    return parts


def check_prefix(prefix: str) -> None:
    """Check that ``prefix`` is empty or could be how a key begins. Raises ``UsageError``."""
    if prefix:
        # What follows a final slash is still open; any component may stand for it.
        check_key(prefix + "x" if prefix.endswith("/") else prefix)


def is_key(key: str) -> bool:
    """Return whether ``key`` is well formed; a listing may meet names that are not."""
    try:
        check_key(key)
    except UsageError:
        return False
    return True


def _is_allowed(text: str) -> bool:
    return text.isascii() and text.isprintable() and "\\" not in text
