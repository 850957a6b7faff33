"""``run``: the command's surroundings, its end, its signals, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Cli, name_space_copied, one_line

_COUNTER = """
import os, signal
seen = []
watched = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, watched)
print("ready", flush=True)
while (number := signal.sigwait(watched)) != signal.SIGTERM:
    seen.append(signal.Signals(number).name)
    print("got", seen[-1], flush=True)
print(",".join(seen), flush=True)
os._exit(5)
"""


def _nothing_left(cli: Cli) -> None:
    assert list(cli.root.glob("envstore-run-*")) == []
    assert cli.json("mounts") == {"mounts": []}
    with open("/proc/self/mountinfo") as table:
        assert str(cli.root) not in table.read()


def test_the_environments_own_programs_come_first(stored: Cli) -> None:
    done = stored("run", "tree", "--", "hello")
    assert done.status == 0
    assert done.err == ""
    prefix = done.out.removeprefix("hello from ").strip()
    assert prefix.startswith(f"{stored.root}/envstore-run-")
    _nothing_left(stored)


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -SEGV $$", 139)],
)
def test_the_status_is_that_of_the_command(stored: Cli, script: str, status: int) -> None:
    done = stored("run", "tree", "--", "sh", "-c", script)
    assert (done.status, done.out, done.err) == (status, "", "")
    _nothing_left(stored)


def test_stdin_stdout_and_arguments_are_the_commands_own(stored: Cli) -> None:
    script = 'printf "%s|" "$@"; cat'
    argv = ["run", "tree", "--", "sh", "-c", script, "sh", "--json", "--", "-x", "two words", ""]
    with stored.start(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(b"from stdin", timeout=120)
    assert process.returncode == 0
    assert out == b"--json|--|-x|two words||from stdin"


def test_what_cannot_be_run(stored: Cli, tmp_path: Path) -> None:
    for name, status, says in (
        ("no-such-program", 127, "no command no-such-program"),
        (str(tmp_path / "nope"), 127, "no command"),
        (str(tmp_path), 126, "is a directory"),
        (str(stored.store / "envstore.json"), 126, "is not executable"),
    ):
        one_line(done := stored("run", "tree", "--", name), [says])
        assert done.status == status
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    one_line(done := stored("run", "tree", "--", broken), ["interpreter", "not there"])
    assert done.status == 127
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"\x00\x01\x02")
    nonsense.chmod(0o755)
    one_line(done := stored("run", "tree", "--", nonsense), ["cannot start", "xec format"])
    assert done.status == 126
    _nothing_left(stored)


def test_stats(stored: Cli) -> None:
    done = stored(
        "run", "--stats", "tree", "--", "sh", "-c", "cat $ENVSTORE_PREFIX/lib/text; exit 3"
    )
    assert (done.status, done.out) == (3, "some text\n")
    assert done.err.startswith("envstore: tree: mounted in ")
    assert " fetched " in done.err
    done = stored(
        "run", "--json", "tree", "--", "sh", "-c", "cat $ENVSTORE_PREFIX/lib/deep/data | wc -c"
    )
    assert done.out.strip() == "768000"
    facts = json.loads(done.err)
    assert (facts["ref"], facts["exit_code"]) == ("tree", 0)
    assert facts["digest"] == stored.json("show", "tree")["digest"]
    assert facts["requests"] > 0
    assert facts["mount"]["bytes_read"] >= 768_000
    assert facts["logical_bytes"] >= 768_000


def _lines(process: subprocess.Popen[bytes]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.read().decode().split("\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_passed_on(stored: Cli, name: str) -> None:
    argv = ["run", "tree", "--", "sh", "-c", "echo ready; exec sleep 1000"]
    with stored.start(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        number = signal.Signals[name]
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err == b""
    _nothing_left(stored)


def test_a_command_may_outlive_a_signal(stored: Cli) -> None:
    argv = ["run", "tree", "--", sys.executable, "-c", _COUNTER]
    with stored.start(*argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for name in ("SIGINT", "SIGHUP", "SIGINT"):
            process.send_signal(signal.Signals[name])
            assert process.stdout.readline() == f"got {name}\n".encode()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"SIGINT,SIGHUP,SIGINT\n"
        assert process.wait(timeout=120) == 5
    _nothing_left(stored)


def test_ctrl_c_reaches_the_command_once(stored: Cli) -> None:
    ours, theirs = pty.openpty()
    with stored.start(
        *("run", "tree", "--", sys.executable, "-c", _COUNTER),
        stdin=theirs,
        stdout=subprocess.PIPE,
        preexec_fn=_own_terminal,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.write(ours, b"\x03")
        assert process.stdout.readline() == b"got SIGINT\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"SIGINT\n"
        assert process.wait(timeout=120) == 5
    os.close(ours)
    _nothing_left(stored)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_what_stays_in_the_background_may_go_on(stored: Cli) -> None:
    go, out = stored.root / "go", stored.root / "out"
    for fifo in (go, out):
        os.mkfifo(fifo)
    script = f"cd $ENVSTORE_PREFIX/lib; (read go < {go}; cat text > {out}) & echo ready; read end"
    with stored.start(
        *("run", "tree", "--", "sh", "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        (listed,) = stored.json("mounts")["mounts"]
        server = os.pidfd_open(listed["holder_pid"])
        process.stdin.close()
        assert process.wait(timeout=120) == 1  # what `read` says at the end of its input
    assert list(stored.root.glob("envstore-run-*")) == []
    go.write_text("go\n")
    assert out.read_text() == "some text\n"
    ended, _, _ = select.select([server], [], [], 120)
    assert ended == [server]
    os.close(server)
    _nothing_left(stored)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to copy the mount name space")
def test_a_name_space_that_was_copied_meanwhile_is_not_waited_for(stored: Cli) -> None:
    with stored.start(
        *("run", "tree", "--", "sh", "-c", "echo ready; read end"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        with name_space_copied():
            process.stdin.close()
            assert process.wait(timeout=120) == 1
            _nothing_left(stored)


def test_a_server_that_is_killed_is_replaced(stored: Cli) -> None:
    script = (
        "import json, os, subprocess, sys;"
        "listed = subprocess.run([sys.executable, '-m', 'envstore', '--json', 'mounts'],"
        "    stdout=subprocess.PIPE, check=True).stdout;"
        "os.kill(json.loads(listed)['mounts'][0]['server_pid'], 9);"
        "import pathlib;"
        "text = pathlib.Path(os.environ['ENVSTORE_PREFIX'], 'lib/text').read_text();"
        "os._exit(6 if text == 'some text\\n' else 7)"
    )
    done = stored("run", "tree", "--", sys.executable, "-c", script)
    assert done.status == 6
    assert done.err == ""
    _nothing_left(stored)


def test_that_nobody_serves_any_more_is_told(stored: Cli) -> None:
    script = (
        "import json, os, subprocess, sys;"
        "listed = subprocess.run([sys.executable, '-m', 'envstore', '--json', 'mounts'],"
        "    stdout=subprocess.PIPE, check=True).stdout;"
        "found = json.loads(listed)['mounts'][0];"
        "[os.kill(found[name + '_pid'], 19) for name in ('holder', 'server')];"
        "[os.kill(found[name + '_pid'], 9) for name in ('holder', 'server')]; os._exit(6)"
    )
    done = stored("run", "--stats", "tree", "--", sys.executable, "-c", script)
    assert done.status == 6
    assert "server was killed" in done.err
    assert "Traceback" not in done.err
    _nothing_left(stored)


def test_reads_that_fail_are_told_of(stored: Cli, tree: Path) -> None:
    (tree / "lib" / "deep" / "data").write_bytes(os.urandom(500_000))
    stored.ok("push", "tree", tree, "--kind", "dir")
    for pack in (stored.store / "packs").rglob("*"):
        if pack.is_file():
            data = bytearray(pack.read_bytes())
            data[: len(data) // 4] = bytes(len(data) // 4)
            pack.write_bytes(data)
    stored.ok("cache", "clear")
    done = stored("run", "tree", "--", "sh", "-c", "cat $ENVSTORE_PREFIX/lib/deep/data | wc -c")
    if done.status == 0:
        assert "failed; why is in" in done.err
        log = Path(done.err.rstrip().rpartition(" ")[2])
        assert "pack" in log.read_text()
    else:
        one_line(done)
    _nothing_left(stored)
