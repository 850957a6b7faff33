"""What can go wrong with a checkpoint, each with how to mend it.

All are ``EnvstoreError``s, so that one ``except`` catches what the store says too. None of them
leaves a committed checkpoint other than it was.
"""

from __future__ import annotations

from envstore.errors import EnvstoreError, NotFoundError


class CheckpointError(EnvstoreError):
    """A checkpoint cannot be saved, committed or restored."""


class NoCheckpointError(CheckpointError, NotFoundError):
    """The run, or the step that was asked for, has no committed checkpoint."""


class SlotSpaceError(CheckpointError):
    """The memory volume cannot hold a slot; found when it is reserved, never as SIGBUS."""


class StateMismatchError(CheckpointError):
    """What is to be restored differs in structure, dtype or shape from what was saved."""


class UntrustedObjectError(CheckpointError):
    """The state holds pickled objects, and the caller did not say that they are trusted."""


class NotFiniteError(CheckpointError):
    """A tensor holds NaN or infinity, and the run was told to refuse that."""


class RanksDisagreeError(CheckpointError):
    """The parts of a step do not fit together: it cannot be committed."""


class FencedError(CheckpointError):
    """A newer incarnation of the run has begun: what this one saves no longer counts."""


class SaveFailedError(CheckpointError):
    """Saves failed again and again; raised once their number reaches the limit."""
