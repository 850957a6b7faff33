"""The fast path: a mount whose names the kernel serves from an image, and whose files from disk.

An EROFS image of a tree's names and attributes lies on top of layers that only hold data:
complete files on this machine, then the objects directory of a FUSE server. Everything is put
together in a mount name space of a thread's own, from which only the finished mount comes out,
so that nothing is left behind however this ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from envstore.errors import AccessDeniedError, EnvstoreError, UnsupportedFormatError
from envstore.fuse.build import build_tree
from envstore.fuse.erofs import write_image
from envstore.fuse.syscalls import AT_FDCWD, MOVE_EMPTY_SOURCE, MOVE_MOUNT, checked, system
from envstore.store.digest import digest
from envstore.store.manifest import Entry, Root, build_parts, decode_part
from envstore.store.source import Kind

FILESYSTEM = "overlay"
"""The type that such a mount has in the mount table; its source starts with ``envstore:``."""

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_RDONLY, _NOSUID, _NODEV = 1, 2, 4

_LOOP_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LOOP_FLAGS = 1 | 4  # read-only, and gone with its last user
_LOOP_CONFIG = struct.Struct("<II52xI244x")
_ATTEMPTS = 64
_STRING_MAX = 255
"""Bytes of a value that fsconfig(2) takes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the fast path needs: what came of trying it, and what mends it if it fails."""

    name: str
    detail: str
    mend: str | None = None


class _CallError(EnvstoreError):
    """A system call failed; ``number`` is its errno."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def make_fast(image: Path, local: Path, objects: Path | None, *, source: str) -> int:
    """Return a mount of the tree of ``image``, read-only, that has no place yet.

    Bytes come from ``local`` (complete files, see ``LocalFiles``) and what is not there from
    ``objects``, the directory of a server that must be answering by now: call from another
    thread than the one that serves. Neither may lie in the directory of ``image``. ``source`` is
    what tools show as the mounted device.

    Raises ``AccessDeniedError``, ``UnsupportedFormatError`` (the kernel lacks something),
    ``EnvstoreError``.
    """
    _require_root()
    layers = [local] if objects is None else [local, objects]
    try:
        return _apart(partial(_make_overlay, image, layers, source))
    except OSError as error:
        raise EnvstoreError(f"cannot mount over {image}: {error.strerror}") from error


def mount_fast(
    image: Path, local: Path, objects: Path | None, target: str | os.PathLike[str], *, source: str
) -> None:
    """Mount what ``make_fast`` makes on the directory ``target``.

    Raises as that does; then nothing was mounted.
    """
    fd = make_fast(image, local, objects, source=source)
    try:
        system(MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(target), MOVE_EMPTY_SOURCE)
    except OSError as error:
        raise EnvstoreError(
            f"cannot mount on {os.fsdecode(target)} over {image}: {error.strerror}"
        ) from error
    finally:
        os.close(fd)


def probe(directory: Path) -> str | None:
    """Return why the fast path does not work here, ``None`` if it does.

    ``directory`` is the cache's, made if missing: whether it works depends on the file system.
    """
    for finding in examine(directory):
        if finding.mend is not None:
            return f"{finding.name}: {finding.detail}"
    return None


def examine(directory: Path) -> list[Finding]:
    """Try what the fast path needs, up to the first thing that fails; leaves nothing behind."""
    try:
        _require_root()
        _apart(lambda: os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), keep=False)
    except (EnvstoreError, OSError) as error:
        mend = "mount as root; in a container, with --cap-add SYS_ADMIN"
        return [Finding("privileges", str(error), mend)]
    found = [Finding("privileges", "root, with a mount name space of its own")]
    try:
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=directory) as name:
            found += _try_mounts(Path(name))
    except OSError as error:
        found.append(Finding("cache", f"{directory}: {error.strerror}", "set ENVSTORE_CACHE_DIR"))
    return found


def _require_root() -> None:
    if os.geteuid() != 0:
        raise AccessDeniedError("only root can mount EROFS and overlayfs")


def _try_mounts(directory: Path) -> list[Finding]:
    """Mount a tree of one file and read it."""
    content = b"envstore"
    name = digest(content)
    image, local, empty = (directory / part for part in ("names/image", "local", "none"))
    image.parent.mkdir()
    _write_sample(image, name, len(content))
    (local / name.hex()[:2]).mkdir(parents=True)
    empty.mkdir()
    (local / name.hex()[:2] / name.hex()).write_bytes(content)
    kinds: list[str] = []
    try:
        _apart(lambda: _make_erofs(image, kinds.append), keep=False)
    except EnvstoreError as error:
        mend = "modprobe erofs (and loop before Linux 6.12), or a kernel that has them"
        return [Finding("EROFS", error.message, mend)]
    found = [Finding("EROFS", f"mounts {kinds[0]}")]
    mend = "modprobe overlay; Linux 6.8 or newer is needed"
    try:
        fd = _apart(partial(_make_overlay, image, [local, empty], "envstore"))
    except EnvstoreError as error:
        return [*found, Finding("overlayfs", error.message, mend)]
    try:
        with open(os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
            read = file.read()
    except OSError as error:
        return [*found, Finding("overlayfs", f"cannot read: {error.strerror}", mend)]
    finally:
        os.close(fd)
    if read != content:
        return [*found, Finding("overlayfs", "a file does not have the bytes it should", mend)]
    return [*found, Finding("overlayfs", "takes files from data-only layers")]


def _write_sample(image: Path, name: bytes, size: int) -> None:
    entry = Entry(b"file", Kind.FILE, size=size, digest=name, refs=((name, size),))
    parts = list(build_parts([entry]))
    root = Root(tuple(info for info, _ in parts), 1, 1, size)
    tree = build_tree(root, [decode_part(raw) for _, raw in parts])
    with image.open("x+b") as out:
        write_image(tree, root.digest, out)


def _apart(make: Callable[[], int], *, keep: bool = True) -> int:
    """Run ``make`` in a mount name space of its own; returns the descriptor it returns.

    A thread's name space ends with the thread, and all that was mounted in it.
    """
    results: list[int | BaseException] = []

    def work() -> None:
        try:
            # For a thread this implies a working directory of its own.
            checked("unshare", _CLONE_NEWNS)
            checked("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            results.append(make())
        except BaseException as error:  # noqa: BLE001 - raised where the thread is waited for
            results.append(error)

    thread = threading.Thread(target=work, name="mount")
    thread.start()
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    if not keep:
        os.close(result)
    return result


def _make_overlay(image: Path, layers: list[Path], source: str) -> int:
    """Return a mount of ``image`` over ``layers`` that has no place yet."""
    # In this name space nobody else misses what was there.
    names = image.absolute().parent
    fd = _make_erofs(image)
    try:
        system(MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(names), MOVE_EMPTY_SOURCE)
    finally:
        os.close(fd)
    with _Context(FILESYSTEM) as context:
        context.set("source", source.encode(errors="replace")[:_STRING_MAX])
        context.flag("ro")
        context.set("metacopy", b"on")
        context.set("redirect_dir", b"on")
        context.place("lowerdir+", names)
        for layer in layers:
            context.place("datadir+", layer)
        return context.mount()


def _make_erofs(image: Path, note: Callable[[str], object] = lambda how: None) -> int:
    """Return a mount of ``image`` that has no place yet; ``note`` is told how it was done."""
    try:
        fd = _open_erofs(image)
        note("files")
        return fd
    except _CallError as error:
        if error.number not in (errno.ENOTBLK, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    device, path = _attach_loop(image)
    try:
        fd = _open_erofs(Path(path))
        note("loop devices")
        return fd
    finally:
        os.close(device)


def _open_erofs(source: Path) -> int:
    with _Context("erofs") as context:
        context.place("source", source)
        context.flag("ro")
        return context.mount()


def _attach_loop(image: Path) -> tuple[int, str]:
    """Return a loop device of ``image``, open, which frees itself after its last use."""
    try:
        with image.open("rb") as file, open("/dev/loop-control", "rb") as control:
            for _ in range(_ATTEMPTS):
                path = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
                device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    config = _LOOP_CONFIG.pack(file.fileno(), 512, _LOOP_FLAGS)
                    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                    return device, path
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:  # somebody else took it meanwhile
                        raise
    except OSError as error:
        raise UnsupportedFormatError(f"no loop device: {error.strerror}") from error
    raise EnvstoreError("no loop device is free")


class _Context:
    """A file system being put together; closed without ``mount`` it is forgotten."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._opened: list[int] = []
        try:
            self._fd = system(_FSOPEN, kind.encode(), _CLOEXEC)
        except OSError as error:
            raise UnsupportedFormatError(
                f"the kernel cannot mount {kind}: {error.strerror}"
            ) from error

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in (self._fd, *self._opened):
            os.close(fd)

    def set(self, key: str, value: bytes) -> None:
        self._configure(_SET_STRING, key, value)

    def place(self, key: str, path: Path) -> None:
        """Set a path, of any length."""
        name = os.fsencode(path.absolute())
        if len(name) <= _STRING_MAX:
            self.set(key, name)
            return
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise _CallError(f"{self._kind}: {key}: {error.strerror}", error.errno or 0) from error
        # It is looked up when the mount is made.
        self._opened.append(fd)
        self.set(key, b"/proc/self/fd/%d" % fd)

    def flag(self, key: str) -> None:
        self._configure(_SET_FLAG, key, None)

    def mount(self) -> int:
        self._configure(_CREATE, None, None)
        try:
            return system(_FSMOUNT, self._fd, _CLOEXEC, _RDONLY | _NOSUID | _NODEV)
        except OSError as error:
            raise _CallError(f"{self._kind}: {error.strerror}", error.errno or 0) from error

    def _configure(self, command: int, key: str | None, value: bytes | None) -> None:
        try:
            name = None if key is None else key.encode()
            system(_FSCONFIG, self._fd, command, name, value, 0)
        except OSError as error:
            said = self._messages() or error.strerror
            what = f"{self._kind}: {key}: {said}" if key else f"{self._kind}: {said}"
            raise _CallError(what, error.errno or 0) from error

    def _messages(self) -> str:
        """Return what the kernel has to say of the failure, if anything."""
        said = []
        while True:
            try:
                said.append(os.read(self._fd, 4096).decode(errors="replace").strip())
            except OSError:
                return "; ".join(said)
