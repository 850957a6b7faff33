"""Manifests that name a snapshot as a volume, as text for people with comments that explain it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from textwrap import dedent, indent

from envstore.csi.refusal import NAME, RefusedError
from envstore.csi.request import VolumeRequest, is_label, parse_request
from envstore.errors import UsageError
from envstore.store.refs import DEFAULT_NAMESPACE, DEFAULT_TAG, RefName

KINDS = ("pod", "job", "pvc", "pv")
DEFAULT_IMAGE = "debian:stable-slim"

_LONGEST_NAME = 52
"""Characters of a name: so many leave room for what controllers add to make names of pods."""
_LONGEST_IMAGE = 512
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_SHORT = 8
_SIZE = "storage: 1Gi  # Kubernetes asks for a size; it means nothing here\n"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a manifest is to say. ``image`` is that of a container that uses the volume.

    ``name`` and ``namespace`` are DNS labels; an empty ``namespace`` leaves the choice to
    kubectl. ``kind`` is one of ``KINDS``. ``secret`` names the Secret with the keys to the store,
    where every volume brings its own.
    """

    volume: VolumeRequest
    kind: str
    name: str
    namespace: str
    image: str = DEFAULT_IMAGE
    secret: str = ""


def asked_for(
    ref: str,
    *,
    digest: str = "",
    store: str = "",
    prefix: str = "",
    profile: str = "",
    fast_path: str = "",
) -> VolumeRequest:
    """Return a volume as the driver reads it from such attributes; empty ones are left out.

    Raises ``UsageError`` where the driver would refuse it.
    """
    said = {
        "ref": f"{ref}@{digest}" if digest else ref,
        "store": store,
        "prefix": prefix,
        "profile": profile,
        "fastPath": fast_path,
    }
    try:
        request = parse_request({name: value for name, value in said.items() if value})
    except RefusedError as error:
        raise UsageError(error.message) from None
    if ":" in request.prefix:
        raise UsageError(f"Kubernetes mounts nothing at {request.prefix!r}: it holds a colon")
    return request


def attributes(volume: VolumeRequest) -> dict[str, str]:
    """Return the volume attributes to write: what is usual is left out, but not the path."""
    name = RefName.parse(volume.ref)
    said = {
        "ref": f"{name}@{volume.digest}" if volume.digest else str(name),
        "store": volume.store,
        "prefix": volume.prefix,
        "profile": volume.profile,
        "fastPath": volume.fast_path if volume.fast_path != "auto" else "",
    }
    return {key: value for key, value in said.items() if value}


def name_for(ref: str) -> str:
    """Return a name for objects in Kubernetes (RFC 1123) that reminds of a REF."""
    name = RefName.parse(ref)
    words = [
        *([name.namespace] if name.namespace != DEFAULT_NAMESPACE else []),
        name.name,
        *([name.tag] if name.tag != DEFAULT_TAG else []),
    ]
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower())
    return text[:_LONGEST_NAME].strip("-")


def check_label(text: str, what: str, longest: int = 63) -> str:
    """Return ``text`` if Kubernetes takes it for a name. Raises ``UsageError``."""
    if not is_label(text) or len(text) > longest:
        raise UsageError(
            f"{text!r} cannot be the name of {what} in Kubernetes",
            hint=f"at most {longest} of a-z, 0-9 and -, which is neither first nor last",
        )
    return text


def check_image(image: str) -> str:
    """Return ``image`` if it can name one. Raises ``UsageError``."""
    if len(image) > _LONGEST_IMAGE or _IMAGE.fullmatch(image) is None:
        raise UsageError(f"{image[:80]!r} is no name of an image")
    return image


def write(wish: Wish) -> str:
    """Return the manifest: YAML, one or two documents. Raises ``UsageError``."""
    check_label(wish.name, "an object", _LONGEST_NAME)
    check_image(wish.image)
    if wish.namespace:
        check_label(wish.namespace, "a namespace")
    if wish.secret:
        check_label(wish.secret, "a Secret")
    makers = {"pod": _pod, "job": _job, "pvc": _dynamic, "pv": _static}
    return makers[wish.kind](wish)


def _text(value: str) -> str:
    """Return a string in quotes, which JSON and YAML read the same from."""
    return json.dumps(value, ensure_ascii=False)


def _metadata(wish: Wish, name: str = "") -> str:
    space = f"\n  namespace: {_text(wish.namespace)}" if wish.namespace else ""
    return f"metadata:\n  name: {_text(name or wish.name)}{space}\n"


def _listed(values: dict[str, str], depth: int) -> str:
    return indent("".join(f"{key}: {_text(value)}\n" for key, value in values.items()), " " * depth)


def _pinned(volume: VolumeRequest) -> str:
    """Return the comment on what the ref means."""
    if volume.digest:
        return "# Pinned: every pod gets this very snapshot, also when the tag has moved on.\n"
    return "# The tag is looked up when a pod starts; with @DIGEST after it, it would be pinned.\n"


def _prefix(volume: VolumeRequest) -> str:
    return (
        "# mountPath below and prefix say the same: files that hold the path of their environment\n"
        f"# are made for {volume.prefix}, and work only there.\n"
    )


def _keys(wish: Wish, namespace: str) -> str:
    """Return the line that names the Secret of a volume."""
    if not wish.secret:
        return ""
    where = f", namespace: {_text(namespace)}" if namespace else ""
    return f"    nodePublishSecretRef: {{name: {_text(wish.secret)}{where}}}\n"


def _template(wish: Wish) -> str:
    """Return the spec of a pod with an inline volume."""
    volume = wish.volume
    return (
        "containers:\n"
        "- name: main\n"
        f"  image: {_text(wish.image)}  # yours; it needs nothing of envstore\n"
        f'  command: ["ls", "-l", {_text(volume.prefix)}]  # yours\n'
        "  volumeMounts:\n"
        "  - name: env\n"
        f"    mountPath: {_text(volume.prefix)}\n"
        "    readOnly: true\n"
        "restartPolicy: Never\n"
        "volumes:\n"
        "- name: env\n"
        "  csi:\n"
        f"    driver: {NAME}\n"
        "    readOnly: true\n"
        f"{_keys(wish, '')}"
        "    volumeAttributes:\n"
        f"{indent(_pinned(volume), ' ' * 6)}"
        f"{_listed(attributes(volume), 6)}"
    )


def _pod(wish: Wish) -> str:
    return (
        f"{_prefix(wish.volume)}apiVersion: v1\nkind: Pod\n{_metadata(wish)}"
        f"spec:\n{indent(_template(wish), '  ')}"
    )


def _job(wish: Wish) -> str:
    return (
        f"{_prefix(wish.volume)}apiVersion: batch/v1\nkind: Job\n{_metadata(wish)}"
        f"spec:\n  backoffLimit: 0\n  template:\n    spec:\n{indent(_template(wish), ' ' * 6)}"
    )


def _claim(wish: Wish, storage_class: str, volume: str = "") -> str:
    name = f"  volumeName: {_text(volume)}\n" if volume else ""
    use = dedent(
        f"""\
        # In the spec of a pod:
        #   containers:
        #   - volumeMounts:
        #     - {{name: env, mountPath: {_text(wish.volume.prefix)}, readOnly: true}}
        #   volumes:
        #   - name: env
        #     persistentVolumeClaim: {{claimName: {_text(wish.name)}, readOnly: true}}
        """
    )
    return (
        f"---\n{_prefix(wish.volume)}{use}apiVersion: v1\nkind: PersistentVolumeClaim\n"
        f"{_metadata(wish)}spec:\n"
        f"  storageClassName: {_text(storage_class)}\n{name}"
        "  accessModes: [ReadOnlyMany]\n"
        f"  resources:\n    requests:\n      {_SIZE}"
    )


def _dynamic(wish: Wish) -> str:
    volume = wish.volume
    comment = (
        "# Pinned: every claim gets this very snapshot, also when the tag has moved on.\n"
        if volume.digest
        else "# The tag is looked up when a claim is made, and stays what it is for that claim.\n"
    )
    given = attributes(volume)
    # What a class gives its claims cannot be changed: one of another digest is another class.
    name = "-".join(filter(None, [wish.name, volume.digest[:_SHORT]]))
    if wish.secret:
        # Whoever makes the volume looks the ref up, with the same keys as whoever mounts it.
        for use in ("provisioner", "node-publish"):
            given[f"csi.storage.k8s.io/{use}-secret-name"] = wish.secret
            given[f"csi.storage.k8s.io/{use}-secret-namespace"] = "${pvc.namespace}"
    return (
        "# Claims of this class are volumes of one snapshot; no data is moved to make one.\n"
        "# Making a class takes an administrator of the cluster, and the driver's controller.\n"
        "apiVersion: storage.k8s.io/v1\nkind: StorageClass\n"
        f"metadata:\n  name: {_text(name)}\n"
        f"provisioner: {NAME}\nreclaimPolicy: Delete\nvolumeBindingMode: Immediate\n"
        f"parameters:\n{indent(comment, '  ')}{_listed(given, 2)}"
        f"{_claim(wish, name)}"
    )


def _static(wish: Wish) -> str:
    volume = wish.volume
    if wish.secret and not wish.namespace:
        raise UsageError("a volume's Secret is in a namespace", hint="say which: --namespace")
    words = [wish.namespace, wish.name, volume.digest[:_SHORT]]
    name = "-".join(filter(None, words))
    claim = f"  claimRef:\n    namespace: {_text(wish.namespace)}\n    name: {_text(wish.name)}\n"
    reserved = "  # Nobody else's claim gets it.\n" + claim if wish.namespace else ""
    return (
        "# Making a volume takes an administrator of the cluster.\n"
        "apiVersion: v1\nkind: PersistentVolume\n"
        f"metadata:\n  name: {_text(name)}\n"
        "spec:\n"
        "  accessModes: [ReadOnlyMany]\n"
        f"  capacity:\n    {_SIZE}"
        '  storageClassName: ""\n'
        "  persistentVolumeReclaimPolicy: Retain\n"
        f"{reserved}  csi:\n"
        f"    driver: {NAME}\n"
        f"    volumeHandle: {_text(name)}\n"
        "    readOnly: true\n"
        f"{_keys(wish, wish.namespace)}"
        "    volumeAttributes:\n"
        f"{indent(_pinned(volume), ' ' * 6)}"
        f"{_listed(attributes(volume), 6)}"
        f"{_claim(wish, '', name)}"
    )
