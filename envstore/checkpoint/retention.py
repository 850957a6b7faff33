"""Removes the checkpoints that a policy does not keep, after a new one is committed."""

from __future__ import annotations

import time

from envstore.checkpoint.policies import decode_keep, superseded, to_delete
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit


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
