"""Makes and removes mounts. Who makes one also settles the protocol with the kernel, once.

After that the device answers to any process that has it open: the one that mounted, or one that
it is handed to. No server of a mount ever differs from the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UnsupportedFormatError
from envstore.fuse import protocol
from envstore.fuse.mountinfo import MountInfo, find_mount
from envstore.fuse.protocol import Flag

DEVICE = "/dev/fuse"
SUBTYPE = "envstore"
INSTALL_HINT = "apt-get install fuse3"

READAHEAD_KIB = 1024
"""What the kernel reads ahead where it lets us say so; requests are at most this large."""

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MS_BIND = 4096
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

# Not among them: AUTO_INVAL_DATA, which would have the kernel doubt contents that cannot change,
# and READDIRPLUS_AUTO, because pyfuse3 lists directories with attributes or not at all.
_WANTED = (
    Flag.ASYNC_READ | Flag.DO_READDIRPLUS | Flag.ASYNC_DIO
    | Flag.PARALLEL_DIROPS | Flag.MAX_PAGES | Flag.CACHE_SYMLINKS | Flag.INIT_EXT
    | Flag.HAS_RESEND
)  # fmt: skip
_PAGES = 256
_BACKGROUND = 2048
"""Reads that the kernel lets wait for an answer: those that wait for the store are among them."""
_MAX_WRITE = 4096

_log = logging.getLogger(__name__)


class BusyError(EnvstoreError):
    """A mount is in use."""


@dataclass(frozen=True, slots=True)
class Session:
    """A live mount: its open device, which whoever holds this must close, and where it is.

    ``init`` is the kernel's one INIT request, which every server's library wants to see;
    ``flags`` are those that both sides agreed on.
    """

    fd: int
    mountpoint: str
    init: bytes
    flags: int


def open_session(mountpoint: str, *, source: str, allow_other: bool = False) -> Session:
    """Mount on the directory ``mountpoint`` and settle the protocol with the kernel.

    ``source`` is what tools show as the mounted device. As root this is mount(2), for others
    the setuid helper fusermount3. Until a server is attached, every access waits.

    Raises ``NotFoundError`` (no device, no helper), ``AccessDeniedError``, ``EnvstoreError``.
    """
    check_device()
    source = source.replace(",", "_").replace("\\", "_")
    if os.geteuid() == 0:
        fd = _mount_as_root(mountpoint, source, allow_other)
    else:
        fd = _mount_as_user(mountpoint, source, allow_other)
    try:
        return Session(fd, mountpoint, *_handshake(fd))
    except BaseException:
        os.close(fd)
        close_mount(mountpoint, lazy=True)
        raise


def mount_again(session: Session, *, source: str) -> None:
    """Show a live mount at its mount point once more, where it is seen no longer (Linux 5.16).

    Nothing is asked of a server. Raises ``AccessDeniedError``, ``EnvstoreError``.
    """
    _mount_device(session.fd, session.mountpoint, source, allow_other=True)


def check_device() -> None:
    """See that the kernel's FUSE device can be opened. Raises as ``open_session`` does."""
    if not os.path.exists(DEVICE):
        raise NotFoundError(
            f"{DEVICE} does not exist: this machine or container cannot mount FUSE",
            hint="modprobe fuse, or start the container with --device /dev/fuse",
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise AccessDeniedError(
            f"no permission to open {DEVICE}", hint=f"as root: chmod 0666 {DEVICE}"
        )


def _mount_as_root(mountpoint: str, source: str, allow_other: bool) -> int:
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        _mount_device(fd, mountpoint, source, allow_other=allow_other)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_device(fd: int, mountpoint: str, source: str, *, allow_other: bool) -> None:
    owner = f"user_id={os.getuid()},group_id={os.getgid()}"
    options = f"fd={fd},rootmode=40000,{owner},default_permissions"
    if allow_other:
        options += ",allow_other"
    try:
        _call(
            "mount",
            source.encode(errors="replace"),
            os.fsencode(mountpoint),
            f"fuse.{SUBTYPE}".encode(),
            _MS_RDONLY | _MS_NOSUID | _MS_NODEV,
            options.encode(),
        )
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise AccessDeniedError(
                f"mounting on {mountpoint} is not permitted",
                hint="in a container, add --cap-add SYS_ADMIN (and --device /dev/fuse)",
            ) from error
        raise EnvstoreError(f"cannot mount on {mountpoint}: {error.strerror}") from error


def _mount_as_user(mountpoint: str, source: str, allow_other: bool) -> int:
    options = f"ro,nosuid,nodev,default_permissions,fsname={source},subtype={SUBTYPE}"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            done = _fusermount(
                ["-o", options, "--", mountpoint],
                f"cannot mount on {mountpoint}",
                pass_fds=(theirs.fileno(),),
                env={"_FUSE_COMMFD": str(theirs.fileno())},
            )
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise EnvstoreError(f"cannot mount on {mountpoint}: fusermount3 gave no device: {done}")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _fusermount(
    arguments: list[str],
    what: str,
    *,
    pass_fds: tuple[int, ...] = (),
    env: dict[str, str] | None = None,
) -> str:
    """Run fusermount3; ``what`` starts the message if it fails. Returns what it said."""
    try:
        done = subprocess.run(
            ["fusermount3", *arguments],
            pass_fds=pass_fds,
            env={**os.environ, **(env or {}), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except FileNotFoundError:
        raise NotFoundError(f"{what}: fusermount3 is not installed", hint=INSTALL_HINT) from None
    said = os.fsdecode(done.stdout).strip().removeprefix("fusermount3: ")
    if done.returncode:
        hint = None
        if "allow_other" in said:
            hint = "add the line user_allow_other to /etc/fuse.conf"
        elif "not permitted" in said or "ermission denied" in said:
            hint = "fusermount3 must be setuid root, and the directory yours"
        raise EnvstoreError(f"{what}: {said or 'fusermount3 failed'}", hint=hint)
    return said


def close_mount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take the mount away; with ``lazy`` now from the name space and for good when unused.

    Raises ``BusyError``, ``EnvstoreError`` (not mounted, not permitted).
    """
    if os.geteuid() == 0:
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        try:
            _call("umount2", os.fsencode(mountpoint), flags)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _busy(mountpoint) from error
            raise EnvstoreError(f"cannot unmount {mountpoint}: {error.strerror}") from error
    else:
        arguments = ["-u", *(["-z"] if lazy else []), "--", mountpoint]
        try:
            _fusermount(arguments, f"cannot unmount {mountpoint}")
        except EnvstoreError as error:
            if "busy" in error.message:
                raise _busy(mountpoint) from error
            raise


def detach(mountpoint: str) -> int:
    """Take a mount away, from under its users if there are any; returns 0."""
    try:
        close_mount(mountpoint)
    except BusyError:
        _log.warning("%s is in use: detached, served until the last user is gone", mountpoint)
        close_mount(mountpoint, lazy=True)
    return 0


def leave_no_mount(mountpoint: str) -> None:
    """Leave no dead mount behind when serving ends for another reason than an unmount."""
    mounted = find_mount(mountpoint)
    if mounted is not None and is_ours(mounted):
        with contextlib.suppress(EnvstoreError):
            close_mount(mountpoint, lazy=True)


def is_gone(device: int) -> bool:
    """Whether the kernel has given up the mount behind a device."""
    poller = select.poll()
    poller.register(device, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def is_ours(mounted: MountInfo) -> bool:
    """Whether a mount is one of envstore's."""
    if mounted.type == "overlay":
        return mounted.source.startswith("envstore:")
    return mounted.type == f"fuse.{SUBTYPE}"


def raise_readahead(mountpoint: str) -> None:
    """Let the kernel read ahead further than its 128 KiB, where it allows it (root)."""
    mounted = find_mount(mountpoint)
    if mounted is None or os.geteuid() != 0:
        return
    try:
        Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").write_text(str(READAHEAD_KIB))
    except OSError as error:
        _log.info("kernel readahead stays as it is: %s", error)


def resend(fd: int) -> None:
    """Have the kernel ask again everything that was asked and not answered (Linux 6.9).

    Call when the server that was asked is gone and before the next one begins.
    """
    os.write(fd, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, protocol.NOTIFY_RESEND, 0))


def bind(source: str, target: str) -> None:
    """Let the directory ``source`` of a mount appear on ``target``, too. Needs root.

    Raises ``AccessDeniedError``, ``EnvstoreError``.
    """
    try:
        _call("mount", os.fsencode(source), os.fsencode(target), None, _MS_BIND, None)
    except OSError as error:
        kind = AccessDeniedError if error.errno in (errno.EPERM, errno.EACCES) else EnvstoreError
        raise kind(f"cannot mount on {target}: {error.strerror}") from error


def _busy(mountpoint: str) -> BusyError:
    return BusyError(
        f"{mountpoint} is in use",
        hint=f"see who uses it with: fuser -vm {mountpoint} - or unmount with --lazy",
    )


def _call(name: str, *arguments: object) -> None:
    """Call a C library function that reports failure in errno."""
    library = ctypes.CDLL(None, use_errno=True)
    if library[name](*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _handshake(fd: int) -> tuple[bytes, int]:
    """Answer the mount's one INIT request; returns it and the flags agreed on."""
    request = os.read(fd, protocol.REQUEST_SIZE)
    _, operation, unique, *_ = protocol.IN_HEADER.unpack_from(request)
    if operation != protocol.OPCODE_INIT:
        raise EnvstoreError(f"the kernel's first FUSE request is number {operation}, not INIT")
    # Kernels before 5.17 do not send the second word of flags.
    padded = request + bytes(protocol.INIT_IN.size)
    major, minor, readahead, low, high = protocol.INIT_IN.unpack_from(
        padded, protocol.IN_HEADER.size
    )
    if major != protocol.MAJOR or minor < protocol.OLDEST_MINOR:
        raise UnsupportedFormatError(
            f"the kernel speaks FUSE {major}.{minor}, which is not supported",
            hint="Linux 5.4 or newer is needed",
        )
    offered = low | (high << 32 if low & Flag.INIT_EXT else 0)
    flags: int = _WANTED & offered
    body = protocol.INIT_OUT.pack(
        protocol.MAJOR,
        min(protocol.MINOR, minor),
        readahead,
        flags & 0xFFFFFFFF,
        _BACKGROUND,
        _BACKGROUND * 3 // 4,
        _MAX_WRITE,
        1,
        _PAGES,
        0,
        flags >> 32,
        0,
        0,
    )
    size = protocol.OUT_HEADER.size + len(body)
    os.write(fd, protocol.OUT_HEADER.pack(size, 0, unique) + body)
    return request, flags
