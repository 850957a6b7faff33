"""What a run may be told, checked once, before anything is opened or started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from envstore.checkpoint.bodies import MAX_TEXT
from envstore.checkpoint.lineage import checked
from envstore.checkpoint.policies import Policy, SaveStats, encode_keep
from envstore.checkpoint.signals import parse_signals
from envstore.errors import UsageError

CheckFinite = Literal["off", "record", "refuse"]

_PERSISTERS = ("auto", "external")
_BUSY = ("skip", "wait")
_ERRORS = ("warn", "raise")
_PREEMPT = ("flush", "snapshot", "none")
_CODECS = ("raw", "split", "xor")
_FINITE = ("off", "record", "refuse")
_MIN_SLOT = 1 << 20
MAX_STEP = 10**12 - 1
MAX_METRICS = 1000
"""How many metrics a save may have."""


@dataclass(frozen=True, slots=True)
class Staging:
    """Where, and how, states are copied to before they are uploaded.

    ``dir`` is a directory in memory (a tmpfs volume; ``ENVSTORE_SLOTS``, else one's own in
    ``/dev/shm``). There are ``slots`` of them, each as large as the state, or ``max_bytes`` for
    all of them: a larger state goes in waves, each after the upload of the one before. With
    ``overlap`` ``save()`` returns earlier, and what an optimizer changes is copied until its next
    step.
    """

    dir: str | Path | None = None
    slots: int = 2
    overlap: bool = False
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for what cannot be."""
        whole("Staging(slots=)", self.slots, 2, 16)
        flag("Staging(overlap=)", self.overlap)
        if self.max_bytes is not None:
            whole("Staging(max_bytes=)", self.max_bytes, _MIN_SLOT, 1 << 50)
        given: object = self.dir
        if given is not None and (not isinstance(given, str | Path) or not str(given)):
            raise UsageError(f"Staging(dir=) is not a directory: {self.dir!r:.80}")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a ``Run``, as they were checked; see there."""

    save: Policy | None
    keep: str
    staging: Staging
    persister: str
    on_busy: str
    on_error: str
    max_failures: int
    on_preempt: str
    signals: tuple[int, ...]
    replicated: tuple[str, ...] | Literal[True]
    codec: str
    bandwidth: int | None
    lineage: Mapping[str, str]
    check_finite: CheckFinite
    fresh: bool
    prefetch: bool


def check_options(
    *,
    save: Policy | None,
    keep: Policy | None,
    staging: Staging,
    persister: str,
    on_busy: str,
    on_error: str,
    max_failures: int,
    on_preempt: str,
    signals: Sequence[str | int],
    replicated: Sequence[str] | Literal[True],
    codec: str,
    bandwidth: int | str | None,
    lineage: Mapping[str, str] | None,
    check_finite: CheckFinite,
    fresh: bool,
    prefetch: bool,
) -> Options:
    """Return the options if each of them can be. Raises ``UsageError`` naming the one that not."""
    if not isinstance(staging, Staging):
        raise UsageError(f"staging= is not a Staging: {staging!r:.80}")
    if isinstance(signals, str):
        signals = (signals,)
    saving = _policy("save=", save)
    if saving is not None:
        saving.due(0, 0.0, SaveStats(0, 0.0))  # raises what a policy that only keeps has to say
    return Options(
        saving,
        encode_keep(_policy("keep=", keep)),
        staging,
        one_of("persister=", persister, _PERSISTERS),
        one_of("on_busy=", on_busy, _BUSY),
        one_of("on_error=", on_error, _ERRORS),
        whole("max_failures=", max_failures, 1, 1_000_000),
        one_of("on_preempt=", on_preempt, _PREEMPT),
        () if on_preempt == "none" else parse_signals(signals),
        _replicated(replicated),
        one_of("codec=", codec, _CODECS),
        _bandwidth(bandwidth),
        checked(lineage),
        _finite(check_finite),
        flag("fresh=", fresh),
        flag("prefetch=", prefetch),
    )


def _policy(what: str, value: Any) -> Policy | None:
    if value is not None and not isinstance(value, Policy):
        raise UsageError(f"{what} is {value!r:.80}", hint="as in every(steps=100) or last(2)")
    return value


def one_of(what: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``. Raises ``UsageError``."""
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise UsageError(f"{what} is {value!r:.80}", hint=f"one of {known}")
    return value


def whole(what: str, value: Any, least: int, most: int) -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``. Raises ``UsageError``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{what} is {value!r:.80}", hint=f"a whole number from {least} to {most}")
    return value


def flag(what: str, value: Any) -> bool:
    """Return ``value`` if it is true or false. Raises ``UsageError``."""
    if not isinstance(value, bool):
        raise UsageError(f"{what} is {value!r:.80}", hint="True or False")
    return value


def _replicated(value: Sequence[str] | Literal[True]) -> tuple[str, ...] | Literal[True]:
    if value is True:
        return True
    if not isinstance(value, list | tuple | set | frozenset):
        raise UsageError(f"replicated= is {value!r:.80}", hint="names of items, as in ('model',)")
    if not all(isinstance(item, str) for item in value):
        raise UsageError("replicated= is not a list of names of items", hint="as in ('model',)")
    return tuple(value)


def _finite(value: CheckFinite) -> CheckFinite:
    one_of("check_finite=", value, _FINITE)
    return value


def _bandwidth(value: int | str | None) -> int | None:
    """Return bytes per second."""
    if value is None:
        return None
    if isinstance(value, str):
        from envstore.store.cache import parse_size

        value = parse_size(value)
    return whole("bandwidth=", value, 1, 1 << 50)


def check_pin(pin: str | bool) -> str:
    """Return the reason to pin, empty for none. Raises ``UsageError``."""
    if not isinstance(pin, str | bool):
        raise UsageError(f"pin= is {pin!r:.60}", hint="True, False, or a reason")
    reason = pin if isinstance(pin, str) else ("pinned" if pin else "")
    if len(reason) > MAX_TEXT:
        raise UsageError(f"a reason of {len(reason)} characters", hint=f"at most {MAX_TEXT}")
    return reason


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return the metrics as plain numbers. Raises ``UsageError``."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError(f"metrics= is {metrics!r:.60}", hint='as in {"loss": 0.25}')
    found = {}
    for name, value in metrics.items():
        try:
            if not 0 < len(name) <= 256:
                raise TypeError
            found[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"metrics: {name!r:.60} is {value!r:.60}", hint="names of numbers"
            ) from None
    if len(found) > MAX_METRICS:
        raise UsageError(f"metrics has {len(found)} entries", hint=f"at most {MAX_METRICS}")
    return found
