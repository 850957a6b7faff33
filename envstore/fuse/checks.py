"""Can this machine mount? Python, the kernel, its FUSE device, the helper and the binding."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from envstore.confinement import landlock, seccomp
from envstore.errors import EnvstoreError
from envstore.fuse.session import INSTALL_HINT, check_device
from envstore.store.checks import Check, failed

_PYTHON = (3, 11)
_LANDLOCK_SIGNALS = 6
_KERNEL_OLDEST, _KERNEL_RECOVERY = (5, 4), (6, 9)


def check_mounting() -> Iterator[Check]:
    """Yield one check after the other; none needs a store or changes anything."""
    yield _check_python()
    yield _check_kernel(platform.release())
    yield _check_device()
    yield _check_helper()
    yield _check_binding()
    yield _check_confinement()


def check_fast_path(directory: Path) -> Check:
    """Try whether the kernel can serve names and local files by itself, for mounts of root.

    Tries it in the cache's ``directory``. Everything works without, only slower.
    """
    from envstore.fuse.overlay import examine

    found = examine(directory)
    for finding in found:
        if finding.mend is not None:
            return Check("fast path", "note", f"{finding.name}: {finding.detail}", finding.mend)
    detail = "; ".join(f"{finding.name}: {finding.detail}" for finding in found)
    return Check("fast path", "ok", detail)


def _check_python() -> Check:
    detail = f"{platform.python_version()} in {sys.executable}"
    if sys.version_info >= _PYTHON:
        return Check("python", "ok", detail)
    return Check("python", "failed", detail, "install Python 3.11 or newer")


def _check_kernel(release: str) -> Check:
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _KERNEL_OLDEST:
        return Check("kernel", "failed", f"Linux {release}", "Linux 5.4 or newer is needed")
    if version < _KERNEL_RECOVERY:
        detail = f"Linux {release}; mounts that survive a crash of their server need 6.9"
        return Check("kernel", "note", detail)
    return Check("kernel", "ok", f"Linux {release}")


def _check_device() -> Check:
    try:
        check_device()
        # That it can be opened does not follow from its mode: containers forbid it otherwise.
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except EnvstoreError as error:
        return failed("/dev/fuse", error)
    except OSError as error:
        mend = "modprobe fuse, or start the container with --device /dev/fuse"
        return Check("/dev/fuse", "failed", f"cannot be opened: {error.strerror}", mend)
    return Check("/dev/fuse", "ok", "can be opened")


def _check_helper() -> Check:
    root = os.geteuid() == 0
    path = shutil.which("fusermount3")
    if path is None:
        # mount(2) does for root what others need the helper for.
        if root:
            return Check("fusermount3", "note", "not found; root can do without", INSTALL_HINT)
        return Check("fusermount3", "failed", "not found", INSTALL_HINT)
    found = Path(path).stat()
    if not root and not (found.st_mode & stat.S_ISUID and found.st_uid == 0):
        mend = f"as root: chown root {path} && chmod u+s {path}"
        return Check("fusermount3", "failed", f"{path} is not setuid root", mend)
    return Check("fusermount3", "ok", path)


def _check_confinement() -> Check:
    """Say what of a server's privileges this kernel lets it give up."""
    filtering, found = seccomp.unavailable(), landlock.version()
    lacks = [] if filtering is None else [f"no filter of system calls: {filtering}"]
    lacks += [] if found else ["no Landlock: servers can write wherever their user can"]
    if lacks:
        mend = "Linux 5.13 or newer with CONFIG_SECCOMP_FILTER and CONFIG_SECURITY_LANDLOCK"
        return Check("confinement", "note", "; ".join(lacks), mend)
    detail = f"servers have no capability, filtered system calls, Landlock {found}"
    if found < _LANDLOCK_SIGNALS:
        detail += "; from Linux 6.12 on they also cannot signal other processes"
    return Check("confinement", "ok", detail)


def _check_binding() -> Check:
    try:
        import pyfuse3
        import trio  # noqa: F401
    except ImportError as error:
        return Check("pyfuse3", "failed", str(error), "pip install 'envstore[fuse]'")
    return Check("pyfuse3", "ok", f"version {pyfuse3.__version__}")
