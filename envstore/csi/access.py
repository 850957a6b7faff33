"""What a volume may be used as, and at which path: the parts of a request that CSI itself defines.

Volumes are read-only. A persistent volume that asks for writing is refused. A volume written in a
pod spec cannot say how it is accessed: the kubelet asks for ``SINGLE_NODE_WRITER`` and not for
``readonly`` unless the spec says so, and such a volume is mounted read-only all the same.
"""

from __future__ import annotations

import os

from envstore.csi.proto import csi_pb2
from envstore.csi.refusal import invalid
from envstore.csi.request import quoted

_Mode = csi_pb2.VolumeCapability.AccessMode

WRITERS = frozenset(
    {
        "SINGLE_NODE_WRITER",
        "SINGLE_NODE_SINGLE_WRITER",
        "SINGLE_NODE_MULTI_WRITER",
        "MULTI_NODE_SINGLE_WRITER",
        "MULTI_NODE_MULTI_WRITER",
    }
)

_HONOURED = frozenset({"ro", "exec", "nosuid", "nodev", "noatime", "nodiratime", "relatime"})
_REFUSED = frozenset({"rw", "noexec", "suid", "dev", "atime", "strictatime"})


def is_shared(mode: str) -> bool:
    """Return whether a node may have a volume of this access mode at several targets.

    As the table of NodePublishVolume says, for a plugin with ``SINGLE_NODE_MULTI_WRITER``.
    """
    return mode.startswith("MULTI_NODE_") or mode == "SINGLE_NODE_MULTI_WRITER"


def check_access(capability: csi_pb2.VolumeCapability, *, readonly: bool, ephemeral: bool) -> str:
    """Return the name of the access mode that is asked for.

    Raises ``RefusedError``, always ``INVALID_ARGUMENT``.

    Mount flags may hold secrets (specification, ``MountVolume``): none is repeated but those that
    are known.
    """
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise invalid("the volume capability has no access type")
    if kind != "mount":
        raise invalid("a volume of this driver is a file system: it cannot be a block device")
    _check_mount(capability.mount)
    number = capability.access_mode.mode
    if number not in _Mode.Mode.values() or number == _Mode.UNKNOWN:
        raise invalid("the volume capability has no access mode that is known")
    mode = _Mode.Mode.Name(number)
    if mode in WRITERS and not readonly and not ephemeral:
        raise invalid(
            f"volumes are read-only, {mode} asks for writing (use accessModes: [ReadOnlyMany],"
            " or mount the volume with readOnly: true)"
        )
    return mode


def _check_mount(mount: csi_pb2.VolumeCapability.MountVolume) -> None:
    if mount.fs_type:
        raise invalid("a volume of this driver has no file system to choose: leave fsType out")
    if mount.volume_mount_group:
        raise invalid("a volume of this driver has the owners it was stored with: no group")
    for flag in (word for flags in mount.mount_flags for word in flags.split(",") if word):
        if flag in _REFUSED:
            raise invalid(f"the mount flag {flag} cannot be had: mounts are ro,exec,nosuid,nodev")
        if flag not in _HONOURED:
            known = ", ".join(sorted(_HONOURED))
            raise invalid(f"a mount flag is not known here (known are {known})")


def check_id(volume: str) -> str:
    """Return a volume's id. Raises ``RefusedError``, always ``INVALID_ARGUMENT``."""
    if not volume:
        raise invalid("volume_id is missing")
    if not volume.isprintable() or ".." in volume.split("/"):
        raise invalid(f"volume_id {quoted(volume)} is not the id of a volume")
    return volume


def check_path(path: str, name: str) -> str:
    """Return the path in the field ``name``, absolute and normal; no file is looked at.

    Raises ``RefusedError``, always ``INVALID_ARGUMENT``.
    """
    if not path:
        raise invalid(f"{name} is missing")
    if not path.startswith("/") or path.startswith("//") or os.path.normpath(path) != path:
        raise invalid(f"{name} {quoted(path)} is not an absolute path in its simplest form")
    if not path.isprintable():
        raise invalid(f"{name} {quoted(path)} holds a character that cannot be printed")
    return path
