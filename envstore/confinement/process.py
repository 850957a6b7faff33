"""What every process of envstore that lives for long gives up, and what is in force in one."""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from envstore.confinement import capabilities, landlock, seccomp
from envstore.confinement.kernel import prctl
from envstore.errors import EnvstoreError

_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38


class ConfinementError(EnvstoreError):
    """A process cannot give up what it does not need."""


def keep_to_itself() -> None:
    """Let nobody else look into this process, and no dump of it be written.

    For every process that knows keys to a store. Takes microseconds. Raises ``ConfinementError``.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prctl(_SET_DUMPABLE, 0)
    except (OSError, ValueError) as error:
        raise _failed(error) from error


def keep_capabilities(kept: Collection[int], *, privileged: bool = False) -> None:
    """Give up all capabilities but ``kept``, and, unless ``privileged``, any way to new ones.

    ``privileged`` is for who must go on being able to run set-uid programs (fusermount3). For a
    process of one thread; what it starts has no more. Raises ``ConfinementError``.
    """
    try:
        capabilities.keep_only(kept)
        if not privileged:
            prctl(_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise _failed(error) from error


def confine(
    places: Iterable[str | os.PathLike[str]], kept: Collection[int], *, executing: bool
) -> None:
    """Leave a process that talks to a store what it needs for that, and no more, for good.

    It may write below ``places`` (where the kernel has Landlock), has the capabilities ``kept``,
    gains none, and is refused system calls (see ``seccomp``), unless it must be ``executing``
    also those that start programs. For a process of one thread; about half a millisecond. Raises
    ``ConfinementError``.
    """
    keep_to_itself()
    keep_capabilities(kept)
    try:
        landlock.write_only_below(places)
    except OSError as error:
        raise _failed(error) from error
    refuse(executing=not executing)


def refuse(*, executing: bool) -> None:
    """Refuse this process system calls for good, with ``executing`` also those that start programs.

    Raises ``ConfinementError``.
    """
    try:
        seccomp.refuse_calls(executing=executing)
    except OSError as error:
        raise _failed(error) from error


def _failed(error: Exception) -> ConfinementError:
    return ConfinementError(
        f"privileges cannot be given up: {error}",
        hint="see `envstore doctor` for what this kernel and container let a process give up",
    )


@dataclass(frozen=True, slots=True)
class InForce:
    """What the kernel says of a process: its capabilities, the bounding set, and two promises."""

    capabilities: int
    bounding: int
    no_new_privs: bool
    filtered: bool

    def describe(self) -> dict[str, object]:
        """Return it as JSON: capabilities by name."""
        held = [number for number in range(64) if self.capabilities >> number & 1]
        return {
            "capabilities": [capabilities.NAMES.get(one, str(one)) for one in held],
            "no_new_privs": self.no_new_privs,
            "seccomp": self.filtered,
        }


def in_force(pid: int) -> InForce | None:
    """Return what is in force in a process, ``None`` if there is none."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    found: Mapping[str, str] = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    held = int(found["CapEff"], 16) | int(found["CapPrm"], 16) | int(found["CapInh"], 16)
    return InForce(
        held | int(found.get("CapAmb", "0"), 16),
        int(found["CapBnd"], 16),
        found.get("NoNewPrivs", "").strip() == "1",
        found.get("Seccomp", "").strip() == "2",
    )
