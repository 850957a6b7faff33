"""Removes the checkpoints that a policy does not keep, after a new one is committed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import TypeVar

from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.policies import Kept, Policy, decode_keep
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit

_Kept = TypeVar("_Kept", bound=Kept)


def apply(run_store: RunStore, keep: str, *, now: float | None = None) -> list[Commit]:
    """Remove what ``keep``, as ``policies.encode_keep`` wrote it, does not; returns what went.

    Call it after a commit, never before. What the newest epoch resumed from stays: a rank may be
    restoring it yet. What no longer counts goes once a later epoch has reached the same step.
    Then what nothing needs is swept. ``now`` is Unix time. Raises ``UsageError`` (no policy) and
    the errors of the store; whatever was not removed then is removed by the next call.
    """
    policy = decode_keep(keep)
    if policy is None:
        return []
    now = time.time() if now is None else now
    commits, fenced, epoch = run_store.survey()
    protected = {epoch.resumed_from} if epoch and epoch.resumed_from else set()
    pins = run_store.pins()
    leases = run_store.leases(now)
    going = to_delete(policy, commits, pins, leases, protected, now)
    going += superseded(fenced, commits, pins, leases)
    removed = [commit for commit in going if run_store.remove(commit)]
    run_store.sweep()
    return removed


def to_delete(
    keep: Policy | None,
    commits: Sequence[_Kept],
    pins: Collection[CheckpointId],
    leases: Collection[CheckpointId],
    protected: Collection[CheckpointId],
    now: float,
) -> list[_Kept]:
    """Return which of ``commits``, ascending and all that count, need not be kept.

    Never the newest, a pinned, leased or ``protected`` one. ``now`` is Unix time.
    """
    if keep is None or not commits:
        return []
    stay = keep.kept(commits, pins, now) | {commits[-1].checkpoint}
    return [
        one
        for one in commits
        if one.checkpoint not in stay
        and one.checkpoint not in pins
        and one.checkpoint not in leases
        and one.checkpoint not in protected
    ]


def superseded(
    fenced: Sequence[_Kept],
    commits: Sequence[Kept],
    pins: Collection[CheckpointId],
    leases: Collection[CheckpointId],
) -> list[_Kept]:
    """Return which of ``fenced``, that no longer count, nobody will go back to.

    Those whose step a later epoch has reached again.
    """
    return [
        one
        for one in fenced
        if one.checkpoint not in pins
        and one.checkpoint not in leases
        and any(
            new.checkpoint.epoch > one.checkpoint.epoch
            and new.checkpoint.step >= one.checkpoint.step
            for new in commits
        )
    ]
