"""Which rank this process is, of how many, and in which incarnation of the job.

The *incarnation* is a text that all ranks of one start of the job share and that no other start
ever has: the epochs of a run are opened by it, so that a restarted job knows that it is a new one.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envstore.checkpoint.errors import CheckpointError
from envstore.errors import UsageError

MAX_RANKS = 1 << 16
"""More ranks than this are taken for a mistake."""

_MAX_TEXT = 256

# Each launcher's names for rank and world size. SLURM_STEP_NUM_TASKS and not SLURM_NTASKS: a batch
# script has the latter too, and is one process.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("JOB_COMPLETION_INDEX", "WORLD_SIZE"),
)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's ``rank`` among ``world_size`` of them."""

    rank: int
    world_size: int


def find_ranks(rank: int | None, world_size: int | None, environ: Mapping[str, str]) -> Ranks:
    """Return who this process is.

    Arguments win over an initialised ``torch.distributed``, and that over the variables of
    torchrun, Slurm (``srun``), Open MPI and indexed Kubernetes Jobs (which say the rank but not
    the number of ranks: ``WORLD_SIZE`` or ``world_size=`` must). Without any: the only one.
    Raises ``UsageError``.
    """
    if rank is not None and world_size is not None:
        return _checked(rank, world_size, "rank= and world_size=")
    if rank is not None:
        raise UsageError("rank= is given without world_size=", hint="give both, or neither")
    group = initialised_group()
    if world_size is None and group is not None:
        return _checked(group.get_rank(), group.get_world_size(), "torch.distributed")
    for rank_variable, size_variable in _LAUNCHERS:
        if rank_variable not in environ:
            continue
        size = environ.get(size_variable) if world_size is None else str(world_size)
        if size is None:
            if rank_variable != "JOB_COMPLETION_INDEX":
                continue
            raise UsageError(
                "JOB_COMPLETION_INDEX says which rank this is, but nothing how many there are",
                hint="give world_size= (1 if each index is a run of its own) or set WORLD_SIZE",
            )
        if size == "1" and world_size == 1:
            return Ranks(0, 1)
        where = f"{rank_variable} and {size_variable}"
        return _checked(_number(environ[rank_variable], where), _number(size, where), where)
    if world_size not in (None, 1):
        raise UsageError(
            f"world_size={world_size} is given, but nothing says which rank this is",
            hint="give rank= too",
        )
    return Ranks(0, 1)


def given_incarnation(incarnation: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the incarnation that the caller, or ``ENVSTORE_INCARNATION``, says, if they do.

    Raises ``UsageError`` if it is malformed.
    """
    said: object = incarnation if incarnation is not None else environ.get("ENVSTORE_INCARNATION")
    if said is None:
        return None
    if not isinstance(said, str) or not said or len(said) > _MAX_TEXT or not said.isprintable():
        raise UsageError(
            f"the incarnation {said!r:.80} is not a printable text of 1 to {_MAX_TEXT} characters"
        )
    return said


def scheduled_incarnation(environ: Mapping[str, str]) -> str | None:
    """Return the incarnation that the scheduler's variables make, or ``None``.

    Slurm: job, step and restart count. JobSet: ``JOBSET_UID`` (or ``JOBSET_NAME``) and
    ``JOBSET_RESTART_ATTEMPT``, which a pod template takes by the downward API from the labels
    ``jobset.sigs.k8s.io/jobset-uid`` and ``jobset.sigs.k8s.io/restart-attempt``.
    """
    attempt = environ.get("JOBSET_RESTART_ATTEMPT")
    jobset = environ.get("JOBSET_UID") or environ.get("JOBSET_NAME")
    if jobset and attempt:
        return f"jobset-{jobset}-{attempt}"[:_MAX_TEXT]
    job = environ.get("SLURM_JOB_ID")
    if job and "SLURM_STEP_ID" in environ:
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        return f"slurm-{job}.{environ['SLURM_STEP_ID']}-{restart}"[:_MAX_TEXT]
    return None


def random_incarnation() -> str:
    """Return an incarnation that nobody else has."""
    return secrets.token_hex(16)


def no_common_incarnation(world_size: int) -> CheckpointError:
    """Return the error of several ranks that cannot know that they belong together."""
    return CheckpointError(
        f"nothing tells the {world_size} ranks which start of the job they belong to",
        hint="start them with torchrun, srun or JobSet, call torch.distributed."
        "init_process_group first, or give incarnation= a text that all ranks of this start "
        "share and no other start has",
    )


def initialised_group() -> Any:
    """Return the module ``torch.distributed`` if its default group exists, else ``None``."""
    module = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return None
    return module


def _checked(rank: int, world_size: int, where: str) -> Ranks:
    given: tuple[object, ...] = (rank, world_size)
    for number in given:
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{where}: {number!r:.40} is not a whole number")
    if not 1 <= world_size <= MAX_RANKS or not 0 <= rank < world_size:
        raise UsageError(
            f"{where} say rank {rank} of {world_size}, which cannot be",
            hint=f"ranks count from 0, and there are at most {MAX_RANKS}",
        )
    return Ranks(rank, world_size)


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{where}: {text!r:.40} is not a number")
    return int(text)
