"""Makes bytecode; run as a script by an environment's own interpreter, never by site or user code.

Requests come in on stdin and answers go out on stdout, both as length-prefixed frames, until
stdin ends. Only the standard library is used and the syntax is Python 3.7's, because the
environment, not envstore, chooses the interpreter.

The bytes of an answer depend on the source, its path and the interpreter's release alone, not
on who compiled it before or what else the process has seen. Python's own ``.pyc`` files do not
have that property: which equal constants are one object, and which objects carry the flag that
they may be referred to again, follows reference counts and the set of interned strings.
"""

from __future__ import annotations

import _imp
import gc
import importlib.util
import marshal
import os
import struct
import sys

MYPY = False
if MYPY:
    from types import CodeType
    from typing import BinaryIO

# A signature is laid out as envstore.store.source.stat_signature does it.
SIGNATURE = struct.Struct("<QQQqqI")
REQUEST = struct.Struct("<BBHH")
ANSWER = struct.Struct("<BI")

FOLLOW, HAS_CACHE, CREATE, INNER = 1, 2, 4, 8
HELLO, DONE, OMITTED, CHANGED, FAILED = range(5)

_HEADER = struct.Struct("<4sI8s")
_STAMP = struct.Struct("<II")
_UNCHECKED, _HASH_FLAGS = 0b01, (0b01, 0b11)
_VALUES_ONLY = 2
_SETS_ARE_SORTED = (3, 11)

# One-character strings are shared by the whole process; making all of them interned keeps that
# from depending on which of them something else interned before.
_SHARED = [sys.intern(chr(i)) for i in range(256)] + [sys.intern("")]


class Changed(Exception):  # noqa: N818 - an answer, not an error
    """A file is not what the request says."""


def read_file(path: bytes, signature: bytes, follow: bool) -> tuple[bytes, os.stat_result]:
    """Return content and status of a file; raises ``Changed`` or ``OSError``."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    try:
        status = os.fstat(fd)
        if sign(status) != signature:
            raise Changed
        size = status.st_size
        data = os.read(fd, size + 1)
        while len(data) < size:
            more = os.read(fd, size - len(data))
            if not more:
                raise Changed
            data += more
        if len(data) != size or sign(os.fstat(fd)) != signature:
            raise Changed
        return data, status
    finally:
        os.close(fd)


def sign(st: os.stat_result) -> bytes:
    """Return what must be equal for a file to count as unchanged."""
    return SIGNATURE.pack(
        st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode
    )


def load(data: bytes, source: os.stat_result, source_hash: bytes) -> CodeType | None:
    """Return the code of a ``.pyc`` file if the interpreter would use it for this source."""
    if len(data) < _HEADER.size:
        return None
    magic, flags, check = _HEADER.unpack_from(data)
    if magic != importlib.util.MAGIC_NUMBER:
        return None
    if flags == 0:
        stamp = (source.st_mtime_ns // 1_000_000_000 & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF)
        if _STAMP.unpack(check) != stamp:
            return None
    elif flags not in _HASH_FLAGS or check != source_hash:
        return None
    try:
        # What it loads, this interpreter would load by itself; it is not run.
        code = marshal.loads(memoryview(data)[_HEADER.size :])  # noqa: S302
    except Exception:  # noqa: BLE001 - whatever a damaged file makes marshal raise
        return None
    return code if type(code) is type(load.__code__) else None


def canonical(code: CodeType, name: str) -> bytes:
    """Return the code's one serialised form, with ``name`` as the file name of every part.

    Version 2 of the format has neither references nor interned strings, so it holds values and
    nothing else; reading it back gives objects shared in the one way the interpreter does by
    itself, and these are written the usual, smaller way.
    """
    # Python 3.13 interns file names by itself; elsewhere it must not hang on who else did.
    name = sys.intern(name)
    rename(code, name)
    if sys.version_info < _SETS_ARE_SORTED:
        code = with_sorted_sets(code)
    try:
        code = marshal.loads(marshal.dumps(code, _VALUES_ONLY))  # noqa: S302
    except ValueError:
        # Python 3.14 has slices as constants, which version 2 cannot hold.
        code = marshal.loads(marshal.dumps(code))  # noqa: S302
    rename(code, name)
    return marshal.dumps(code)


def with_sorted_sets(code: CodeType) -> CodeType:
    """Return the code with its sets built anew in one order.

    Under a fixed hash seed that order decides in which one they are written.
    """
    if not hasattr(code, "replace"):
        return code
    consts = []
    for const in code.co_consts:
        if isinstance(const, type(code)):
            const = with_sorted_sets(const)
        elif isinstance(const, frozenset):
            const = frozenset(sorted(const, key=lambda item: (type(item).__name__, repr(item))))
        consts.append(const)
    return code.replace(co_consts=tuple(consts))


def rename(code: CodeType, name: str) -> None:
    """Make ``name`` itself, not an equal string, the file name of a code object and its parts."""
    # As on import, parts are renamed that bear the old name of the whole, if it differs at all.
    _imp._fix_co_filename(code, "")  # type: ignore[attr-defined]
    _imp._fix_co_filename(code, name)  # type: ignore[attr-defined]


def compiled(data: bytes, name: str, level: int) -> CodeType | None:
    """Compile a source; ``None`` if that cannot be done."""
    try:
        code: CodeType = compile(data, name, "exec", dont_inherit=True, optimize=level)
    except Exception:  # noqa: BLE001 - not a program of this language version, however that shows
        return None
    return code


def make(
    flags: int, level: int, path: bytes, cache: bytes, signature: bytes, cache_signature: bytes
) -> bytes | None:
    """Return the content of a ``.pyc`` file, or ``None`` if there is to be none.

    Raises ``Changed`` or ``OSError``.
    """
    source, status = read_file(path, signature, bool(flags & FOLLOW))
    source_hash = importlib.util.source_hash(source)
    # Of several trees below one directory, each has names of its own.
    name = os.fsdecode(path.partition(b"/")[2] if flags & INNER else path)
    code = None
    if flags & HAS_CACHE:
        try:
            code = load(read_file(cache, cache_signature, False)[0], status, source_hash)
        except (OSError, Changed):
            # It only saves work: what cannot be read, or is being rewritten, is made anew.
            code = None
    if code is None and flags & CREATE:
        code = compiled(source, name, level)
    if code is None:
        return None
    try:
        content = canonical(code, name)
    except ValueError:
        # Nested too deeply to be written, which is why Python has no .pyc for it either.
        return None
    return _HEADER.pack(importlib.util.MAGIC_NUMBER, _UNCHECKED, source_hash) + content


def answer(request: tuple[int, int, bytes, bytes, bytes, bytes]) -> tuple[int, bytes]:
    """Return the kind and the payload of the answer to one request."""
    try:
        content = make(*request)
    except Changed:
        return CHANGED, b""
    except OSError as error:
        return FAILED, struct.pack("<i", error.errno or 0)
    return (OMITTED, b"") if content is None else (DONE, content)


def receive(stream: BinaryIO) -> tuple[int, int, bytes, bytes, bytes, bytes] | None:
    """Return the next request, or ``None`` at the end of the stream."""
    head = stream.read(REQUEST.size)
    if len(head) < REQUEST.size:
        return None
    flags, level, path_size, cache_size = REQUEST.unpack(head)
    body = stream.read(path_size + cache_size + 2 * SIGNATURE.size)
    path, cache = body[:path_size], body[path_size : path_size + cache_size]
    signatures = body[path_size + cache_size :]
    return flags, level, path, cache, signatures[: SIGNATURE.size], signatures[SIGNATURE.size :]


def send(kind: int, payload: bytes) -> None:
    """Write one answer to stdout."""
    view = memoryview(ANSWER.pack(kind, len(payload)) + payload)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Answer requests until stdin ends or nobody reads the answers any more."""
    # Code objects are in no cycles, and there are many of them.
    gc.disable()
    version = ".".join(map(str, sys.version_info[:3]))
    hello = "\n".join((sys.implementation.cache_tag or "", version))
    try:
        send(HELLO, hello.encode())
        while True:
            request = receive(sys.stdin.buffer)
            if request is None:
                return
            send(*answer(request))
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
