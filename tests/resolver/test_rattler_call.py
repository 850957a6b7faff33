from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rattler import Channel as RattlerChannel
from rattler import Gateway, MatchSpec

from envstore.errors import EnvstoreError, NotFoundError, UnavailableError, UsageError
from envstore.resolver import rattler_call
from envstore.resolver.conda import records_of
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import CondaPackage
from envstore.resolver.rattler_call import call, checked, without_secrets
from tests.channel.conda import Channel
from tests.resolver.surroundings import _no_settings, cache

__all__ = ["_no_settings", "cache"]

_PROGRAM = """
import sys
from rattler import Channel, Gateway
from envstore.resolver.lock import CondaPackage
from envstore.resolver.rattler_call import call

names = call(lambda: Gateway(cache_dir=sys.argv[2]).names([Channel(sys.argv[1])], ["noarch"]))
assert names
"""


def names(channel: str, cache: Path) -> set[str]:
    gateway = Gateway(cache_dir=cache)
    found = call(lambda: gateway.names([RattlerChannel(channel)], ["noarch"]))
    return {name.normalized for name in found}


def test_several_threads_call_at_once(conda_channel: Channel, cache: Path) -> None:
    found: list[set[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(names(conda_channel.url, cache)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all("greeting" in one for one in found)


def test_a_process_that_ends_at_once_ends_well(conda_channel: Channel, tmp_path: Path) -> None:
    for _ in range(8):
        command = [sys.executable, "-c", _PROGRAM, conda_channel.url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_errors_of_rattler_become_ours(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no noarch packages"):
        names((tmp_path / "nothing").as_uri(), tmp_path)
    with pytest.raises(UnavailableError, match="Connection refused"):
        names("http://127.0.0.1:1/channel", tmp_path)
    with pytest.raises(UsageError, match="version spec"):
        checked(lambda: MatchSpec("python ===="))
    with pytest.raises(UsageError, match="archive identifier"):
        records_of([CondaPackage("a", "1", "0", "noarch", "https://x.example/a.zip", "ab" * 32)])


def test_errors_of_others_stay_theirs() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def refuse() -> None:
        raise UnsatisfiableError("no")

    with pytest.raises(ZeroDivisionError):
        call(fail)
    with pytest.raises(UnsatisfiableError):
        call(refuse)


def test_every_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EnvstoreError) as caught:
        names("http://user:hunter2@127.0.0.1:1/t/tk-secret/channel", tmp_path)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "tk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host.example/x", "https://host.example/x"),
        ("https://host.example/t/tk-1/c", "https://host.example/t/***/c"),
        ("https://host.example/a/b@c", "https://host.example/a/b@c"),
    ],
)
def test_secrets_are_taken_out_of_urls(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_channel_that_never_answers_is_not_waited_for_for_ever(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rattler_call, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/channel"
        with pytest.raises(UnavailableError, match="says nothing"):
            names(url, cache)
