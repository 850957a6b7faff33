"""Undoes relocation: from a file as it was installed at some prefix to what is stored of it.

Files of conda packages get back the bytes that the package has, which their digest proves; with
that it does not matter where the environment was installed. Other texts that name the prefix
(console scripts, ``activate``) name the ``PLACEHOLDER`` instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from envstore.store.relocation import PLACEHOLDER

_DETOUR = (
    rb"#!/bin/sh\n'''exec' (?P<quote>[\"']?)(?P<path>%b/[^\"'\n]*?)(?P=quote)"
    rb"(?P<rest>(?: [^\n\"']+)?) \"\$0\" \"\$@\"(?: #'''|\n' ''')"
)
_ENV = re.compile(rb"#!/usr/bin/env ([^\s/]+)")
# What may stand before and behind a path that is not part of a longer one.
_BEFORE, _BEHIND = rb"(?:(?<![\w.-])|(?<=-[ILR]))", rb"(?![\w.-])"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a conda package says of one of its files: ``sha256`` is of the package's own bytes."""

    placeholder: bytes
    binary: bool
    sha256: str
    package: str


def restore(data: bytes, claim: Claim, prefix: bytes) -> bytes | None:
    """Return the package's own bytes of a file installed at ``prefix``.

    ``None`` if it is not what the package and an installer make, as somebody changed it.
    """
    find = _binaries if claim.binary else _texts
    for found in find(data, prefix, claim.placeholder):
        if hashlib.sha256(found).hexdigest() == claim.sha256:
            return found
    return None


def with_placeholder(data: bytes, prefix: bytes) -> bytes:
    """Return a text with the ``PLACEHOLDER`` for ``prefix``, the same if it does not name it."""
    if prefix not in data:
        return data
    data = _without_detour(data, prefix)
    return re.sub(_BEFORE + re.escape(prefix) + _BEHIND, PLACEHOLDER, data)


def _texts(data: bytes, prefix: bytes, placeholder: bytes) -> Iterator[bytes]:
    yield data.replace(prefix, placeholder)
    # A shebang too long for the kernel was rewritten, by the rules of CEP 26.
    plain = _without_detour(data, prefix)
    if plain != data:
        yield plain.replace(prefix, placeholder)
    match = _ENV.match(data)
    if match is not None:
        line = b"#!%b/bin/%b" % (placeholder, match[1])
        yield line + data[match.end() :].replace(prefix, placeholder)


def _without_detour(data: bytes, prefix: bytes) -> bytes:
    """Return a script whose first line names its interpreter, although at a path too long."""
    match = re.match(_DETOUR % re.escape(prefix), data)
    if match is None:
        return data
    return b"#!" + match["path"] + match["rest"] + data[match.end() :]


def _binaries(data: bytes, prefix: bytes, placeholder: bytes) -> Iterator[bytes]:
    """Yield a binary with the placeholder, its strings as long as they were before.

    Where a string names the prefix, an installer has put as many zero bytes behind it as the
    prefix is shorter. A string without them names it by itself.
    """
    spare = len(placeholder) - len(prefix)
    if spare < 0:
        return
    pieces: list[bytes] = []
    done = at = 0
    while (at := data.find(prefix, at)) >= 0:
        end = data.find(b"\0", at)
        if end < 0:
            break
        text = data[at:end]
        room = spare * text.count(prefix)
        if data[end : end + room].count(b"\0") == room:
            pieces += (data[done:at], text.replace(prefix, placeholder))
            done = at = end + room
        else:
            at = end
    yield b"".join([*pieces, data[done:]])
