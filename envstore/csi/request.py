"""What a pod or a volume asks for, from the attributes that Kubernetes hands on.

Attributes are written by whoever may create a pod: every one is bounded and checked before it is
used for anything, and messages repeat no more than a few printable characters of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from envstore.csi.refusal import RefusedError, invalid
from envstore.errors import UsageError
from envstore.store.refs import RefName, is_part
from envstore.store.relocation import MAX_PREFIX

CANONICAL_PREFIX = "/opt/envstore"
"""Where a pod sees a volume unless it says otherwise: the prefix that files are relocated to."""

FAST_PATHS = ("auto", "on", "off")

KUBERNETES = "csi.storage.k8s.io/"
"""What the keys begin with that the kubelet and the provisioner add; nobody else's may."""
PROVISIONER = "storage.kubernetes.io/csiProvisionerIdentity"
"""Which provisioner made a volume, in the attributes of each that one has made."""

_ATTRIBUTES = ("ref", "store", "prefix", "fastPath", "profile", "digest")
_MOST = 64
_LONGEST_KEY = 256
_LONGEST_REF = 3 * 128 + len("/:@") + 64
_LONGEST_SHOWN = 80

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?")
_UID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]{0,127}")


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

    ``store`` is the name of a configured store, empty for the default one. ``ref`` is canonical,
    ``namespace/name:tag`` with nothing left out. ``digest`` is 64 hex digits, of a snapshot that
    must be the one of ``ref`` or an earlier one, or empty: resolve ``ref``. ``prefix`` is an
    absolute, normal path. ``fast_path`` is ``auto``, ``on`` or ``off``, ``profile`` a name or
    empty. ``pod`` is ``None`` where the kubelet said nothing of it. ``ephemeral`` volumes are
    written in a pod spec.
    """

    store: str
    ref: str
    digest: str = ""
    prefix: str = CANONICAL_PREFIX
    fast_path: str = "auto"
    profile: str = ""
    pod: Pod | None = None
    ephemeral: bool = False

    def attributes(self) -> dict[str, str]:
        """Return the attributes that ``parse_request`` reads the same from, without the pod's."""
        found = {
            "ref": self.ref,
            "store": self.store,
            "prefix": self.prefix,
            "fastPath": self.fast_path,
            "profile": self.profile,
            "digest": self.digest,
        }
        return {name: value for name, value in found.items() if value}


def parse_request(attributes: Mapping[str, str]) -> VolumeRequest:
    """Return what ``attributes`` (CSI: ``volume_context`` or ``parameters``) ask for.

    Known are ``ref``, ``store``, ``prefix``, ``fastPath``, ``profile`` and ``digest``, and what
    the kubelet says of the pod. Other keys that Kubernetes keeps for itself mean nothing here.

    The pod is believed: the kubelet replaces whatever a pod spec says of these keys, provided
    that the CSIDriver object says ``podInfoOnMount: true``.

    Raises ``RefusedError``, always ``INVALID_ARGUMENT``.
    """
    if len(attributes) > _MOST:
        raise invalid(f"{len(attributes)} volume attributes are more than {_MOST}")
    for key in attributes:
        if key not in _ATTRIBUTES and key != PROVISIONER and not key.startswith(KUBERNETES):
            raise _unknown(key)
    ref, pinned = _ref(_bounded(attributes, "ref", _LONGEST_REF))
    digest = _bounded(attributes, "digest", 64, pinned)
    if _DIGEST.fullmatch(digest) is None and "digest" in attributes:
        raise invalid(f"digest {quoted(digest)} is not of 64 hex digits, 0-9 and a-f")
    if pinned and digest != pinned:
        raise invalid("the digest in ref and the attribute digest are not the same")
    return VolumeRequest(
        store=_store(_bounded(attributes, "store", 63, "")),
        ref=ref,
        digest=digest,
        prefix=_prefix(_bounded(attributes, "prefix", MAX_PREFIX, CANONICAL_PREFIX)),
        fast_path=_fast_path(_bounded(attributes, "fastPath", 16, "auto")),
        profile=_profile(_bounded(attributes, "profile", 128, "")),
        pod=_pod(attributes),
        ephemeral=_boolean(attributes, KUBERNETES + "ephemeral"),
    )


def pod_of(attributes: Mapping[str, str]) -> Pod | None:
    """Return the pod that a request is for, however wrong it is otherwise; ``None``: not known."""
    try:
        return _pod(attributes)
    except RefusedError:
        return None


def is_label(text: str) -> bool:
    """Return whether ``text`` is a DNS label (RFC 1123), as names of namespaces and stores are."""
    return _LABEL.fullmatch(text) is not None


def quoted(text: str) -> str:
    """Return ``text`` in quotes, as one line of at most 80 printable ASCII characters."""
    shown = "".join(one if " " <= one <= "~" else "?" for one in text[: _LONGEST_SHOWN + 1])
    if len(shown) > _LONGEST_SHOWN:
        shown = shown[: _LONGEST_SHOWN - 3] + "..."
    return f"'{shown}'"


def _unknown(key: str) -> RefusedError:
    if len(key) > _LONGEST_KEY:
        return invalid(f"the volume attribute {quoted(key)} is not known")
    names = {name.lower(): name for name in _ATTRIBUTES}
    near = get_close_matches(key.lower(), names, 1)
    hint = f"is {names[near[0]]} meant?" if near else f"known are {', '.join(_ATTRIBUTES)}"
    return invalid(f"the volume attribute {quoted(key)} is not known ({hint})")


def _bounded(
    attributes: Mapping[str, str], name: str, longest: int, default: str | None = None
) -> str:
    """Return an attribute of at most ``longest`` characters that is not empty."""
    value = attributes.get(name)
    if value is None:
        if default is None:
            raise invalid(f"the volume attribute {name} is missing")
        return default
    if not value:
        raise invalid(f"the volume attribute {name} is empty")
    if len(value) > longest:
        raise invalid(f"the volume attribute {name} is longer than {longest}: {quoted(value)}")
    return value


def _ref(text: str) -> tuple[str, str]:
    """Return a ref in full, and the digest that it is pinned to, or an empty one."""
    head, at, pinned = text.partition("@")
    if at and not head:
        raise invalid("a volume's ref needs a name, not only a digest: name@digest")
    if at and _DIGEST.fullmatch(pinned) is None:
        raise invalid(f"the digest in ref {quoted(text)} is not of 64 hex digits, 0-9 and a-f")
    try:
        name = RefName.parse(head)
    except UsageError:
        raise invalid(
            f"ref {quoted(text)} is not of the form [namespace/]name[:tag][@digest]"
        ) from None
    return f"{name.namespace}/{name.name}:{name.tag}", pinned


def _store(name: str) -> str:
    if name and not is_label(name):
        raise invalid(f"store {quoted(name)} is not the name of a store")
    return name


def _prefix(path: str) -> str:
    if len(path.encode(errors="replace")) > MAX_PREFIX:
        raise invalid(f"prefix {quoted(path)} is longer than {MAX_PREFIX} bytes")
    if not path.isprintable():
        raise invalid(f"prefix {quoted(path)} holds a character that cannot be printed")
    if not path.startswith("/"):
        raise invalid(f"prefix {quoted(path)} is not an absolute path")
    if any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise invalid(f"prefix {quoted(path)} is / or holds //, /./, /../ or a / at its end")
    return path


def _fast_path(word: str) -> str:
    if word not in FAST_PATHS:
        raise invalid(f"fastPath {quoted(word)} is not one of {', '.join(FAST_PATHS)}")
    return word


def _profile(name: str) -> str:
    if name and not is_part(name):
        raise invalid(f"profile {quoted(name)} is not the name of a profile")
    return name


def _pod(attributes: Mapping[str, str]) -> Pod | None:
    said = {
        word: _kubernetes(attributes, f"pod.{word}", form)
        for word, form in (("namespace", _LABEL), ("name", _SUBDOMAIN), ("uid", _UID))
    }
    account = _kubernetes(attributes, "serviceAccount.name", _SUBDOMAIN)
    if not any(said.values()) and not account:
        return None
    if not all(said.values()):
        missing = ", ".join(f"{KUBERNETES}pod.{word}" for word, value in said.items() if not value)
        raise invalid(f"the pod is said in part only: {missing} is missing")
    return Pod(said["namespace"], said["name"], said["uid"], account)


def _kubernetes(attributes: Mapping[str, str], key: str, form: re.Pattern[str]) -> str:
    """Return what the kubelet says under ``key``, empty if it says nothing."""
    value = attributes.get(KUBERNETES + key, "")
    if value and (len(value) > 253 or form.fullmatch(value) is None):
        raise invalid(f"{KUBERNETES}{key} {quoted(value)} is no name in Kubernetes")
    return value


def _boolean(attributes: Mapping[str, str], key: str) -> bool:
    value = attributes.get(key, "false")
    if value not in ("true", "false"):
        raise invalid(f"{key} {quoted(value)} is neither true nor false")
    return value == "true"
