"""A store whose writers put into it what a terminal would obey: none of it is printed."""

from __future__ import annotations

import contextlib
import os
import pty
import re
from pathlib import Path

import pytest

from envstore.resolver.lockfile import encode_lock
from envstore.store.entries import Entry
from envstore.store.locks import save_lock
from envstore.store.manifest import build_parts
from envstore.store.objects import open_objects
from envstore.store.profiles import Profile, Range, save_profile
from envstore.store.refs import RefName, move_ref
from envstore.store.snapshots import Snapshot, load_snapshot, save_snapshot
from envstore.store.source import Kind
from tests.commands import Cli
from tests.fuzz.memory import forge, root_of
from tests.locks import full_lock

_EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n\x7f\b"
_STYLE = re.compile("\x1b\\[[0-9;]*m")
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def hostile(cli: Cli) -> Cli:
    """A store with ``evil:latest``, whose parent is another snapshot of the same sort."""
    cli.ok("init")
    evil = _EVIL.encode("utf-8", "surrogateescape")
    entries = [
        Entry(evil + b"link", Kind.SYMLINK, target=evil),
        Entry(evil.replace(b"/", b""), Kind.FILE, mode=None),
    ]
    raws = [raw for _, raw in build_parts(sorted(entries, key=lambda entry: entry.path))]
    memory, name = forge(raws, root_of(raws))
    objects = open_objects(str(cli.store))
    for key, data in memory.objects.items():
        objects.put(key, data)
    first = load_snapshot(objects, name)
    text = encode_lock(full_lock()).decode().rstrip()
    lock = save_lock(objects, (text[:-1].rstrip() + ',\n  "x-more": "\u202e\x9b31m"\n}\n').encode())
    evils = {_EVIL: _EVIL, "plain": _EVIL}
    snapshot = save_snapshot(
        objects,
        Snapshot("dir", first.manifest, 2, 0, _EVIL, (name,), lock, _EVIL, evils),
    )
    move_ref(objects, RefName("default", "evil", "latest"), snapshot, None)
    ranges = (Range(evil, 0, 10), Range(b"x", 0, 1))
    save_profile(objects, first.manifest, "start", Profile(ranges, (1 << 64) - 1, (evil, evil)))
    objects.close()
    return cli


def _check(text: str) -> None:
    bad = _OBEYED.search(_STYLE.sub("", text).replace("\r\n", "\n"))
    assert bad is None, (bad, text)


_COMMANDS = [
    ["ls"], ["ls", "evil"], ["ls", "evil", "nothing" + _EVIL], ["show", "evil"], ["log", "evil"],
    ["show", "evil", "--lock"], ["diff", "evil", "evil"], ["profile", "evil", "--list"],
    ["profile", "evil", "--show"], ["du"], ["verify"], ["show", "evil" + _EVIL],
    ["cat", "evil", _EVIL], ["gc", "--dry-run"],
]  # fmt: skip


def test_nothing_that_a_terminal_would_obey(hostile: Cli, tmp_path: Path) -> None:
    for command in _COMMANDS:
        words = [word.replace("\0", "") for word in command]
        done = hostile(*words)
        assert "Traceback" not in done.err, (command, done.err)
        assert "this is a bug" not in done.err, (command, done.err)
        if "--lock" not in command:  # that goes into files as it is
            _check(done.out)
        _check(done.err)
    done = hostile("pull", "evil", tmp_path / "copy")
    assert done.status == 0, done
    _check(done.out + done.err)


@pytest.mark.parametrize("command", [["show", "evil"], ["show", "evil", "--lock"], ["log", "evil"]])
def test_nothing_on_a_terminal_either(hostile: Cli, command: list[str]) -> None:
    ours, theirs = pty.openpty()
    screen = bytearray()
    with hostile.start(
        *command, env={"TERM": "xterm-256color"}, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while piece := os.read(ours, 1 << 16):
                screen += piece
    os.close(ours)
    assert process.returncode == 0
    _check(screen.decode())
