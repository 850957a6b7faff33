"""What each process of a mount keeps of its user's privileges.

The holder keeps what mounting and unmounting takes. A server, which reads what strangers have
stored, keeps next to nothing, and can start nothing: what follows a holder that died is started by
its understudy (see there).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from envstore.confinement.capabilities import (
    DAC_OVERRIDE,
    DAC_READ_SEARCH,
    NET_BIND_SERVICE,
    SETPCAP,
    SYS_ADMIN,
    SYS_PTRACE,
)
from envstore.confinement.process import confine, in_force, keep_capabilities, keep_to_itself
from envstore.confinement.programs import starts_programs
from envstore.errors import EnvstoreError
from envstore.fuse.keeping import MountRequest

if TYPE_CHECKING:
    from envstore.fuse.processes import ServerProcess

_PRIVILEGED_PORTS = 1024
_SYSTEM = frozenset(
    b"bin boot dev etc lib lib32 lib64 libx32 lost+found proc root run sbin sys usr var".split()
)
"""Directories at the top in which a node server writes nothing but its cache."""
_SYSTEM_VAR = frozenset(
    b"account adm backups cache crash db empty ftp games kerberos lib lock log mail nis preserve"
    b" run spool vmail www yp".split()
)
"""The same below ``/var``, where stores may lie besides."""

_Identity = tuple[int, int] | None


def keep_what_a_holder_needs(request: MountRequest) -> None:
    """Give up what mounting, unmounting and starting servers does not take.

    Of root ``sys_admin`` (mounts) and ``dac_override`` (mount points and targets of others) stay,
    ``setpcap`` for servers to give up more, and what servers may need; of a node server
    ``sys_ptrace``, to see mount points in others' name spaces. Other users have no capability, and
    stay able to run fusermount3. Raises ``ConfinementError``.
    """
    keep_to_itself()
    root = os.geteuid() == 0
    kept = {SYS_ADMIN, SETPCAP, DAC_OVERRIDE, DAC_READ_SEARCH} if root else set()
    if root and request.node:
        kept.add(SYS_PTRACE)
    keep_capabilities(kept | _for_the_port(request), privileged=not root)


class ServerConfinement:
    """What a server may do from when this is made, for good; for a process of one thread.

    It may read what its user may, and write below the cache, below a store in a directory (for
    leases), and where its metrics' socket is; a node server, which cannot know which stores it
    will be asked for, below everything that is no directory of the system's (``_SYSTEM``).

    As root it keeps ``dac_read_search`` for a store in a directory, ``dac_override`` only if the
    cache or that store is another user's, ``net_bind_service`` only for a port below 1024. It can
    start programs only if the AWS configuration has a ``credential_process``.

    Raises ``ConfinementError``.
    """

    def __init__(self, request: MountRequest, cache: Path) -> None:
        self._cache = cache
        self._there = _identity(cache)
        store = _directory_of(request.store)
        kept = _for_the_port(request)
        if os.geteuid() == 0:
            owned = [cache] if store is None else [cache, store]
            kept |= {DAC_READ_SEARCH} if store is not None or request.node else set()
            kept |= {DAC_OVERRIDE} if any(map(_is_anothers, owned)) else set()
        places = [cache, Path(os.devnull), *_login_caches()]
        places += [store] if store is not None else []
        places += _others() if request.node else []
        if request.metrics and not _port(request.metrics):
            places.append(Path(request.metrics).parent)
        confine(places, kept, executing=starts_programs())

    @property
    def cache_gone(self) -> bool:
        """Whether the cache is no longer the directory in which this process may write."""
        return _identity(self._cache) != self._there

    @property
    def cache_replaced(self) -> bool:
        """Whether there is another in its place, for a server that is started now."""
        found = _identity(self._cache)
        return found is not None and found != self._there


def describe(server: ServerProcess | None) -> dict[str, object]:
    """Return what the kernel says of this process, a holder, and of its server."""
    pids = {"holder": os.getpid(), **({"server": server.pid} if server is not None else {})}
    found = {name: in_force(pid) for name, pid in pids.items()}
    return {name: one.describe() for name, one in found.items() if one is not None}


def _for_the_port(request: MountRequest) -> set[int]:
    port = _port(request.metrics) if request.metrics else None
    return {NET_BIND_SERVICE} if port and port < _PRIVILEGED_PORTS else set()


def _port(address: str) -> int | None:
    from envstore.fuse.prometheus import check_address

    try:
        place = check_address(address)
    except EnvstoreError:
        return None
    return None if place is None else place[1]


def _directory_of(store: str) -> Path | None:
    """Return where a store is, if it is a directory."""
    if not store:
        return None
    from envstore.store.objects.url import FileLocation, parse_url

    try:
        location = parse_url(store)
    except EnvstoreError:
        return None  # whoever opens it will say so
    return location.path if isinstance(location, FileLocation) else None


def _is_anothers(place: Path) -> bool:
    """Whether root must override permissions to work in a directory."""
    try:
        if place.stat().st_uid:
            return True
        return any(
            found.st_uid and not found.st_mode & stat.S_IXOTH
            for found in (parent.stat() for parent in place.absolute().parents)
        )
    except OSError:
        return False


def _others(top: bytes = b"/") -> Iterator[Path]:
    """Yield the directories at the top, and in its ``var``, that are not the system's."""
    for place, system in ((top, _SYSTEM), (os.path.join(top, b"var"), _SYSTEM_VAR)):
        try:
            entries = list(os.scandir(place))
        except OSError:
            continue  # then nobody keeps stores there
        for entry in entries:
            if entry.name not in system and entry.is_dir(follow_symlinks=place == top):
                yield Path(os.fsdecode(entry.path))


def _login_caches() -> list[Path]:
    """Return where botocore keeps short-lived keys that it renews."""
    home = Path(os.path.expanduser("~/.aws"))
    return [home / "sso/cache", home / "login/cache"]


def _identity(directory: Path) -> _Identity:
    """Return which directory a path leads to now, ``None`` if to none."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None
