"""What a pod or a volume asks for, from the attributes that Kubernetes hands on."""

from __future__ import annotations

from dataclasses import dataclass

CANONICAL_PREFIX = "/opt/envstore"
"""Where a pod sees a volume unless it says otherwise: the prefix that files are relocated to."""


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod that a volume is published for, as the kubelet says (``podInfoOnMount``)."""

    namespace: str
    name: str
    uid: str
    service_account: str = ""


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """A volume as it was asked for.

    ``store`` is the name of a configured store, empty for the default one. ``ref`` is canonical
    (``namespace/name:tag``, the tag empty if ``digest`` is given without one), ``digest`` 64 hex
    digits or empty: resolve the tag. ``fast_path`` is ``auto``, ``on`` or ``off``. ``pod`` is
    ``None`` where the kubelet said nothing of it. ``ephemeral`` volumes are written in a pod spec.
    """

    store: str
    ref: str
    digest: str = ""
    prefix: str = CANONICAL_PREFIX
    fast_path: str = "auto"
    profile: str = ""
    pod: Pod | None = None
    ephemeral: bool = False
