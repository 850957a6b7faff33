"""The errors a user can meet, each with what went wrong, where, and how to mend it."""

from __future__ import annotations


class EnvstoreError(Exception):
    """A failure with a cause the user can act on.

    The command line prints ``message`` and ``hint`` as one line and exits with ``exit_code``;
    any other exception type that escapes is a bug.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(EnvstoreError):
    """The request itself is malformed: a bad reference, URL, option or path."""

    exit_code = 2


class NotFoundError(EnvstoreError):
    """The named object, reference, path or store does not exist."""


class ConflictError(EnvstoreError):
    """A conditional write lost: somebody else moved the object first."""


class CorruptError(EnvstoreError):
    """Bytes that were read do not match what their name or their index promises."""


class UnavailableError(EnvstoreError):
    """The store could not be reached or did not answer; a conditional write may have landed."""


class AccessDeniedError(EnvstoreError):
    """Credentials are missing, wrong or not sufficient, or the file system refused."""


class NoSpaceError(EnvstoreError):
    """A disk or quota is full."""


class UnsupportedFormatError(EnvstoreError):
    """The store was written by a newer version, or with an algorithm this version lacks."""
