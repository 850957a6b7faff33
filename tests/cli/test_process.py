"""The command as a process: starting, being interrupted, losing its reader, meeting a bug."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from envstore.cli import main as entry
from envstore.cli.group import cli as group
from tests.commands import REPOSITORY, Cli
from tests.trees import noise

_HEAVY = {
    "rich", "botocore", "boto3", "blake3", "zstandard", "pyfastcdc", "pyfuse3", "trio", "sqlite3",
    "logging", "concurrent.futures", "subprocess", "urllib.request", "ssl",
}  # fmt: skip


def _all_commands() -> list[list[str]]:
    context = click.Context(group, info_name="envstore")
    found: list[list[str]] = [[]]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append([name])
        if isinstance(command, click.Group):
            found += [[name, inner] for inner in command.list_commands(context)]
    return found


def test_all_the_promised_commands_are_there() -> None:
    assert {words[0] for words in _all_commands() if words} == {
        "init", "push", "pull", "hydrate", "mount", "umount", "mounts", "stats", "remount", "node",
        "run", "profile", "repack", "ls", "show", "log", "tag", "diff", "rm", "du", "verify",
        "cache", "doctor", "completion", "lock", "update", "explain", "activate", "check", "csi",
        "k8s", "fdstore", "checkpoint", "gc", "repair", "rebuild-index",
    }  # fmt: skip


@pytest.mark.parametrize("words", _all_commands(), ids=lambda words: " ".join(words) or "envstore")
def test_help(cli: Cli, words: list[str]) -> None:
    text = cli.ok(*words, "--help")
    assert text.startswith(f"Usage: envstore {' '.join(words)}".rstrip())
    examples = text.partition("\nExamples:\n")[2].splitlines()
    assert examples
    assert all(line.startswith("  ") and "envstore" in line for line in examples)
    for option in ("--store", "--json", "--quiet", "--verbose", "--cache-dir", "--cache-size"):
        assert option in text
    assert cli.ok(*words, "-h") == text
    listed = text.partition("Options:\n")[2].partition("\n\n")[0].splitlines()
    assert all(line.startswith(("  -", "      ")) for line in listed)
    # What a list of commands cuts off is of no use there.
    assert not re.search(r"\.\.\.$", text.partition("Options:")[0].partition("\n")[2], re.MULTILINE)


def test_no_command_shows_the_help(cli: Cli) -> None:
    assert cli.ok() == cli.ok("--help")


def test_version(cli: Cli) -> None:
    from envstore import __version__

    assert cli.ok("--version") == f"envstore {__version__}\n"


def test_help_imports_nothing_heavy(cli: Cli) -> None:
    listing = "import sys, runpy; sys.argv = ['envstore', '--help']\n"
    listing += "try: runpy.run_module('envstore', run_name='__main__')\n"
    listing += "except SystemExit: print('\\n'.join(sys.modules), file=sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-c", listing], env=cli.env, capture_output=True, text=True, check=True
    )
    imported = set(done.stderr.split())
    assert "envstore.cli.push" in imported
    assert imported & _HEAVY == set()
    assert {name for name in imported if name.startswith("envstore.")} <= {
        name for name in imported if name.startswith("envstore.cli")
    } | {"envstore.errors", "envstore.wording", "envstore.__main__"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: Cli, shell: str) -> None:
    script = cli.ok("completion", shell)
    assert "_ENVSTORE_COMPLETE" in script
    assert cli.json("completion", shell)["script"] + "\n" == script
    if shell == "bash":
        subprocess.run(["bash", "-c", f"{script}\ncomplete -p envstore"], check=True)


def test_completion(stored: Cli) -> None:
    stored.ok("tag", "tree", "tree:v1")
    stored.ok("tag", "tree", "team/other")
    assert "plain,verify" in stored.completed("envstore ver")
    assert stored.completed("envstore checkpoint l") == ["plain,latest", "plain,ls"]
    assert stored.completed("envstore show tr") == ["plain,tree", "plain,tree:v1"]
    assert stored.completed("envstore show tree:") == ["plain,tree:latest", "plain,tree:v1"]
    assert stored.completed("envstore diff tree te") == ["plain,team/other"]
    assert stored.completed("envstore push --parent te") == ["plain,team/other"]
    assert stored.completed("envstore push x ") == ["file,"]
    assert stored.completed("envstore mount x ") == ["dir,"]
    elsewhere = f"envstore --store {stored.root}/nowhere show tr"
    assert stored.completed(elsewhere) == []
    stored.env["ENVSTORE_URL"] = f"{stored.root}/nowhere"
    assert stored.completed("envstore show tr") == []
    assert "plain,tree" in stored.completed(f"envstore --store {stored.store} show tr")
    assert stored.completed(f"envstore --cache-size much --store {stored.store} show te") == [
        "plain,team/other"
    ]


@pytest.mark.parametrize(("name", "status", "line"), [
    ("SIGINT", 130, b"envstore: interrupted\n"), ("SIGTERM", 143, b""), ("SIGHUP", 129, b""),
])  # fmt: skip
def test_a_signal_while_waiting_for_the_store(
    cli: Cli, name: str, status: int, line: bytes
) -> None:
    cli.env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        cli.env["ENVSTORE_URL"] = f"s3://bucket/x?endpoint={endpoint}"
        with cli.start("ls", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)  # it has asked, and waits for an answer that never comes
                process.send_signal(signal.Signals[name])
                out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, b"", line)


def test_interrupting_a_push_at_any_moment(stored: Cli, tree: Path) -> None:
    (tree / "noise").write_bytes(noise(6, 24 << 20))
    started = time.monotonic()
    stored.ok("push", "whole", tree, "--kind", "dir")
    usual = time.monotonic() - started
    moments = random.Random(1)
    for round_ in range(6):
        (tree / "lib" / "text").write_text(f"round {round_}")
        (tree / "noise").write_bytes(noise(7 + round_, 24 << 20))
        before = stored.refs()
        push = stored.start(
            "push", "tree", tree, "--kind", "dir", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with push:
            # An interpreter that is interrupted while it starts does not end as envstore does.
            while "/blake3/" not in Path(f"/proc/{push.pid}/maps").read_text():
                assert push.poll() is None
            try:
                _, err = push.communicate(timeout=moments.uniform(0.0, 0.8) * usual)
            except subprocess.TimeoutExpired:
                push.send_signal(signal.SIGINT)
                _, err = push.communicate(timeout=120)
        # Python may die of the signal itself while it ends or imports: the same to a shell.
        if push.returncode in (130, -signal.SIGINT):
            assert err in (b"envstore: interrupted\n", b""), err
            after = stored.refs()
            if after != before:
                # Too late: the ref had moved already, and then to a whole snapshot.
                assert stored.json("verify", "tree")["ok"] is True
        else:
            assert (push.returncode, err.decode()) == (0, "")
    assert stored.json("verify", "--read-data")["ok"] is True
    stored.ok("push", "tree", tree, "--kind", "dir")


def test_a_reader_that_goes_away(stored: Cli, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(3000):
        (many / f"{number:0100}").touch()
    stored.ok("push", "many", many, "--kind", "dir")
    with stored.start("ls", "many", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("command", [["ls", "tree"], ["--help"], ["--json", "show", "tree"]])
def test_an_output_that_is_full(stored: Cli, command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = stored.start(*command, stdout=full, stderr=subprocess.PIPE)
        with done:
            _, err = done.communicate(timeout=60)
    assert done.returncode == 1
    assert err.count(b"\n") == 1
    assert b"No space left on device" in err
    assert b"bug" not in err


def test_no_streams_at_all(stored: Cli) -> None:
    argv = " ".join(stored.argv("tag", "tree", "other"))
    subprocess.run(["sh", "-c", f"{argv} <&- >&- 2>&-"], env=stored.env, check=True)
    assert "default/other/latest" in stored.refs()


def test_a_bug_is_one_line_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("envstore.store.cache.BlobCache.usage", broken)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert entry.main(["cache", "show"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "unexpected ZeroDivisionError: two\\nlines; this is a bug" in err
        log = tmp_path / "state" / "envstore" / "errors.log"
        assert str(log) in err
        assert "in broken" in log.read_text()

        monkeypatch.setenv("ENVSTORE_DEBUG", "1")
        assert entry.main(["cache", "show"]) == 1
        assert "in broken" in capsys.readouterr().err

        monkeypatch.delenv("ENVSTORE_DEBUG")
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
        assert entry.main(["cache", "show"]) == 1
        assert "ENVSTORE_DEBUG=1" in capsys.readouterr().err
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_run_as_a_module_and_as_a_script(cli: Cli) -> None:
    called = "from envstore.cli.main import main; import sys; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", called, "--version"], env=cli.env, capture_output=True, check=True
    )
    assert done.stdout.decode() == cli.ok("--version")
    assert (REPOSITORY / "envstore" / "__main__.py").is_file()
    assert os.access(sys.executable, os.X_OK)


def test_what_fails_in_the_wake_of_an_interrupt_is_the_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(entry, "_run", interrupted)
    assert entry.main(["ls"]) == 130
    assert capsys.readouterr().err == "envstore: interrupted\n"


@pytest.mark.parametrize(
    ("name", "module"),
    [("requirements.txt", "packaging"), ("environment.yml", "yaml")],
)
def test_what_an_extra_is_needed_for_is_said(cli: Cli, name: str, module: str) -> None:
    cli.ok("init")
    (cli.root / name).write_text("channels: [x]\ndependencies: []\n" if "yml" in name else "leaf\n")
    without = f"import sys; sys.modules[{module!r}] = None\n"
    without += "from envstore.cli.main import main; sys.exit(main(['push', 'x', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", without, cli.root / name],
        env=cli.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"needs the Python module {module}, which is not installed" in done.stderr
    assert "pip install 'envstore[resolver]'" in done.stderr


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["mount", "x", "m"], "pyfuse3", "fuse"),
        (["mount", "x", "m", "--foreground"], "trio", "fuse"),
        (["k8s", "status"], "kubernetes", "csi"),
    ],
)
def test_commands_name_the_extra_that_they_need(
    cli: Cli, command: list[str], module: str, extra: str
) -> None:
    cli.ok("init")
    (cli.root / "m").mkdir()
    (cli.root / "leaf").mkdir()
    cli.ok("push", "x", cli.root / "leaf", "--kind", "dir")
    without = f"import sys; sys.modules.update(dict.fromkeys(({module!r}, 'yaml')))\n"
    without += "from envstore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", without, *command],
        cwd=cli.root, env=cli.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"needs the Python module {module}, which is not installed" in done.stderr
    assert f"pip install 'envstore[{extra}]'" in done.stderr
