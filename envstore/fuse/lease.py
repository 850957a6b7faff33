"""What is asked of a node server in words, each of them checked; and what is kept of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

from envstore.errors import UsageError
from envstore.fuse.access import pinned
from envstore.fuse.mountinfo import mountpoints_in
from envstore.fuse.supplies import Source
from envstore.store.objects import Credentials
from envstore.store.refs import RefName

_LONGEST, _LONGEST_LEASE = 4096, 64 << 10
_ID = re.compile(r"[0-9a-f]{16}")
_OWNER = re.compile(r"(?:[a-z][a-z0-9-]{0,31})?")
_FAST = frozenset({"auto", "on", "off"})

_MOST_MISSING = 4096

KEPT = 0
"""The name space of a mount that nobody looks for: its lease lasts until it is given back."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One mount: of what, where, in which mount name space (an inode), since when (RFC 3339).

    ``prefix`` is the path that it is made for, ``owner`` whoever asked for it. ``store`` is the
    URL as it was asked for, and ``name`` the ref.
    """

    slot: int
    target: str
    name: str
    namespace: int
    started: str
    prefix: str = ""
    owner: str = ""
    store: str = ""
    of: str = ""
    profile: str = ""
    fast_path: str = "auto"
    given: bool = False

    @classmethod
    def kept(cls, body: Mapping[str, Any]) -> Lease:
        """Return the lease in a keepsake, of whatever version."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in body.items() if name in known})

    def encode(self) -> dict[str, Any]:
        """Return the body of its keepsake."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def same_words(self, other: Lease) -> bool:
        """Whether both were asked for in the same words."""
        return self == replace(other, slot=self.slot, started=self.started)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question for a snapshot: the words of its lease, where it is and who may have it.

    ``identity`` is what the lease is to be called, empty for any name.
    """

    lease: Lease
    source: Source
    identity: str
    credentials: Credentials | None

    @classmethod
    def parse(cls, question: Mapping[str, Any]) -> Asked:
        """Return what is asked. Raises ``UsageError``."""
        identity, owner = _word(question, "id", ""), _word(question, "owner", "")
        if identity and not _ID.fullmatch(identity):
            raise UsageError("an id is 16 hex digits, in lower case")
        if not _OWNER.fullmatch(owner):
            raise UsageError("an owner is a word of lower-case letters, digits and dashes")
        namespace = question.get("namespace")
        if type(namespace) is not int or not 0 <= namespace < 1 << 64:
            raise UsageError("namespace is not the number of a mount name space")
        credentials = None
        if question.get("credentials") is not None:
            credentials = Credentials.parse(question["credentials"])
        store, ref, target = (_word(question, name) for name in ("store", "ref", "target"))
        fast_path = _word(question, "fast_path", "auto")
        if fast_path not in _FAST:
            raise UsageError("fast_path is auto, on or off")
        of = _word(question, "of", "")
        pinned(ref)
        if of:
            RefName.parse(of)
        lease = Lease(
            slot=0,
            target=target,
            name=ref,
            namespace=namespace,
            started="",
            prefix=_word(question, "prefix", "") or target,
            owner=owner,
            store=store,
            of=of,
            profile=_word(question, "profile", ""),
            fast_path=fast_path,
            given=credentials is not None,
        )
        if len(json.dumps(lease.encode())) > _LONGEST_LEASE:
            raise UsageError("the words of the question are too long together")
        source = Source.asked(store, given=lease.given)
        return cls(lease, source, identity, credentials)


def missing(keepsakes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the leases, of keepsakes' bodies by their ids, whose mounts are seen nowhere.

    At most so many as a message holds. Reads the kernel's tables; needs root for name spaces of
    others. Raises ``OSError``.
    """
    leases = {identity: Lease.kept(body) for identity, body in keepsakes.items()}
    spaces = {lease.namespace for lease in leases.values()} - {KEPT}
    mounted = mountpoints_in(spaces)
    gone = (
        identity
        for identity, lease in leases.items()
        if lease.namespace != KEPT and lease.target not in mounted.get(lease.namespace, ())
    )
    return [*islice(gone, _MOST_MISSING)]


def _word(question: Mapping[str, Any], name: str, default: str | None = None) -> str:
    word = question.get(name, default)
    if not isinstance(word, str) or "\0" in word:
        raise UsageError(f"{name} is missing, or is no text")
    if len(word) > _LONGEST:
        raise UsageError(f"{name} is longer than {_LONGEST}")
    return word
