"""In which order the files of an environment are laid into packs."""

from __future__ import annotations


def layout_order(path: bytes) -> tuple[int, bytes]:
    """Return the key of ``path``: what a start reads first, then programs, then the rest.

    Sources and test suites are rarely read at all, so they should not lie between what is: a
    package's bytecode is then one run of frames, fetched with one request.
    """
    if b"/tests/" in path or b"/test/" in path:
        return 3, path
    if path.endswith((b".pth", b"pyvenv.cfg")) or b"/_distutils_hack/" in path:
        # What every start reads, before the first import: one frame, at the front.
        return 0, b"\0" + path
    if path.endswith(b".pyc"):
        return 0, path
    name = path[path.rfind(b"/") + 1 :]
    if path.startswith(b"bin/") or name.endswith(b".so") or b".so." in name:
        return 1, path
    return 2, path
