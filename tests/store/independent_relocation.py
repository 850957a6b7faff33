"""Relocates a stored file with nothing but docs/format.md: no line of envstore is used."""

from __future__ import annotations

import re


class Numbers:
    """Takes numbers and bytes off a file's relocation (section 9)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        assert self.at + size <= len(self.data)
        self.at += size
        return self.data[self.at - size : self.at]

    def one(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value += (byte & 127) << shift
            shift += 7
            if byte < 128:
                assert byte or shift == 7
                return value


def package_of(relocation: bytes) -> str:
    at = Numbers(relocation)
    at.one()
    return at.take(at.one()).decode()


def relocate(relocation: bytes, stored: bytes, prefix: bytes) -> bytes:
    """Return the file ``stored`` as it is at ``prefix``; ``ValueError`` if that is too long."""
    at = Numbers(relocation)
    mode = at.one()
    at.take(at.one())
    width, size = at.one(), at.one()
    assert size == len(stored)
    assert mode in (1, 2)
    made = _text(at, width, stored, prefix) if mode == 1 else _binary(at, width, stored, prefix)
    assert at.at == len(at.data)
    return made


def _text(at: Numbers, width: int, stored: bytes, prefix: bytes) -> bytes:
    line = at.take(at.one())
    done = len(line) + line.count(b"\n") * (width - 1)
    out = [_first_line(line, prefix)] if line else []
    for _ in range(at.one()):
        gap = at.one()
        out += [stored[done : done + gap], prefix]
        done += gap + width
    return b"".join([*out, stored[done:]])


def _binary(at: Numbers, width: int, stored: bytes, prefix: bytes) -> bytes:
    if len(prefix) > width:
        raise ValueError("no room")
    out, done = b"", 0
    for _ in range(at.one()):
        for _ in range(at.one()):
            gap = at.one()
            out += stored[done : done + gap] + prefix
            done += gap + width
        rest = at.one()
        out += stored[done : done + rest]
        done += rest
        out = out.ljust(done, b"\0")
    return out + stored[done:]


def _first_line(line: bytes, prefix: bytes) -> bytes:
    line = line.decode(errors="replace").encode()
    if b" " in prefix:
        # The newline that the detour adds is not one to be replaced.
        return _detour(line, prefix) if b"\n" in line else line
    line = line.replace(b"\n", prefix)
    return line if len(line) <= 127 else _detour(line, b"")


def _detour(line: bytes, prefix: bytes) -> bytes:
    text = line.decode()
    match = re.fullmatch(r"#! *([/\n](?:\\ |[^ \t\r])*)(.*)", text, re.DOTALL)
    if match is None:
        return line.replace(b"\n", prefix)
    path, rest = (part.replace("\n", prefix.decode()) for part in match.groups())
    name = match[1].split("/")[-1]
    if re.fullmatch(r"python(\d+(\.\d+)?)?", name):
        return f"#!/bin/sh\n'''exec' \"{path}\"{rest} \"$0\" \"$@\" #'''".encode()
    return f"#!/usr/bin/env {name}{rest}".encode()
