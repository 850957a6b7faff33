"""Has live mounts served by the code that runs this."""

from __future__ import annotations

import os
import sys
from typing import Any

from envstore.errors import NotFoundError, UsageError
from envstore.fuse.mountinfo import resolve
from envstore.fuse.records import RecordFiles
from envstore.fuse.sockets import ask

_WITHIN = 60.0


def upgrade_mount(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Replace holder and server of the mount on ``path``.

    Returns the ``server_pid`` and ``version`` of the new one. Readers wait meanwhile, for
    milliseconds. Raises ``NotFoundError`` (no live mount there), ``UsageError`` (no server of its
    own), ``UnsupportedFormatError`` (the kernel cannot), ``EnvstoreError`` (this code does not
    start: the mount is served as before).
    """
    from envstore.fuse import background

    record = RecordFiles(resolve(path)).load()
    if record is None:
        raise NotFoundError(f"{resolve(path)} is no mount of yours", hint="see: envstore mounts")
    if not record.control:
        raise UsageError(
            f"{record.mountpoint} has no server of its own",
            hint="upgrade the node server: envstore remount --upgrade /run/envstore/mnt",
        )
    program = [sys.executable, "-P", os.path.abspath(background.__file__)]
    found: dict[str, Any] = ask(record.control, _WITHIN, ask="upgrade", program=program)
    return found
