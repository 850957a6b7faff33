"""How many files a process may have open."""

from __future__ import annotations

import resource

OPEN_FILES = 65_536


def allow_many_files() -> None:
    """Let this process and its children have as many open files as many snapshots take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
