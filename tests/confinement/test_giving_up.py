"""What is given up is gone: processes give it up, and then try to do it all the same."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from envstore.confinement import capabilities, landlock, seccomp
from envstore.confinement.process import in_force
from envstore.confinement.programs import starts_programs
from envstore.fuse import privileges
from tests.commands import NOBODY
from tests.sources import ListedSource
from tests.stores import Store

ROOT = os.geteuid() == 0
_CALLS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_HEAD = """
import ctypes, errno, os, signal, socket, subprocess, sys, threading
from envstore.confinement import process
place, outside = sys.argv[1], sys.argv[2]
def refused(work, *numbers):
    try:
        work()
    except OSError as error:
        assert error.errno in numbers, error
    else:
        raise AssertionError("it was done")
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
"""


def run(script: str, tmp_path: Path, *, ordinary: bool = False) -> None:
    place, outside = tmp_path / "place", tmp_path / "outside"
    place.mkdir()
    outside.mkdir()
    if ordinary:
        os.chown(place, NOBODY, NOBODY)
        os.chown(outside, NOBODY, NOBODY)
    become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n" if ordinary else ""
    if ordinary:  # what is imported later, too, while it can be read
        become = f"import encodings.idna\n{become}"
    code = _HEAD + become + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, place, outside],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


_CONFINED = """
os.chmod(outside, 0o777)
open(outside + "/there", "w").close()
kept = open(outside + "/kept", "w")
process.confine([place], (), executing=False)
found = process.in_force(os.getpid())
assert found.capabilities == 0 and found.no_new_privs, found
assert found.filtered is (not lacks_filter), found
if not lacks_filter:
    EPERM = errno.EPERM,
    refused(lambda: subprocess.run(["true"]), *EPERM)
    refused(lambda: os.execv("/bin/true", ["true"]), *EPERM)
    refused(lambda: os.kill(os.getppid(), signal.SIGTERM), *EPERM)
    refused(lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 15), *EPERM)
    refused(lambda: os.mknod(place + "/pipe", 0o600 | 0o010000), *EPERM)
    refused(lambda: call("unshare", 0x10000000), *EPERM)
    refused(lambda: call("mount", b"none", place.encode(), b"tmpfs", 0, None), *EPERM)
    refused(lambda: call("ptrace", 16, os.getppid(), 0, 0), *EPERM)
    refused(lambda: call("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), 0), *EPERM)
    refused(lambda: os.setuid(os.getuid()), *EPERM)
    os.kill(os.getpid(), 0)  # only asks
if landlock:
    for work in (
        lambda: open(outside + "/there", "w"),
        lambda: open(outside + "/new", "w"),
        lambda: os.truncate(outside + "/there", 0),
        lambda: os.mkdir(outside + "/directory"),
        lambda: os.unlink(outside + "/there"),
        lambda: os.rename(outside + "/there", place + "/there"),
        lambda: os.symlink("x", outside + "/link"),
        lambda: socket.socket(socket.AF_UNIX).bind(outside + "/socket"),
    ):
        refused(work, errno.EACCES, errno.EXDEV)
# What servers do:
kept.write("open files stay writable")
kept.close()
open(outside + "/there").close()
os.makedirs(place + "/a/b")
with open(place + "/file", "w") as file:
    file.write("x")
os.link(place + "/file", place + "/a/other")
os.rename(place + "/file", place + "/a/b/file")
os.unlink(place + "/a/other")
memory = os.memfd_create("memory")
os.write(memory, b"x")
os.truncate(memory, 1 << 20)
started = threading.Thread(target=lambda: None)
started.start()
started.join()
socket.getaddrinfo("localhost", 80)
"""


def _facts() -> str:
    lacking = seccomp.unavailable() is not None
    return f"lacks_filter, landlock = {lacking}, {landlock.version() >= 3}\n"


def test_a_confined_process_can_do_what_servers_do_and_nothing_else(tmp_path: Path) -> None:
    run(_facts() + _CONFINED, tmp_path)


@pytest.mark.skipif(not ROOT, reason="needs root, to be another user")
def test_so_can_one_without_privileges(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):  # pytest's own, which nobody else may enter
        os.chmod(parent, os.stat(parent).st_mode | 0o011)
    run(_facts() + _CONFINED, tmp_path, ordinary=True)


def test_one_that_may_start_programs_gains_nothing_by_them(tmp_path: Path) -> None:
    run(
        """
        process.confine([place], (), executing=True)
        said = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
        found = dict(line.split(":\\t") for line in said.splitlines() if ":\\t" in line)
        assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0, said
        assert found["NoNewPrivs"] == "1", said
        assert os.getuid() or int(found["CapBnd"], 16) == 0, said
        """,
        tmp_path,
    )


@pytest.mark.skipif(not ROOT, reason="others have no capability to keep")
def test_what_is_kept_is_kept_and_nothing_else_comes_back(tmp_path: Path) -> None:
    run(
        """
        from envstore.confinement import capabilities as c
        process.keep_capabilities({c.SYS_ADMIN, c.SETPCAP}, privileged=False)
        found = process.in_force(os.getpid())
        assert found.capabilities == found.bounding == 1 << c.SYS_ADMIN | 1 << c.SETPCAP, found
        assert found.describe()["capabilities"] == ["setpcap", "sys_admin"]
        process.keep_capabilities({c.SYS_PTRACE})
        assert process.in_force(os.getpid()).capabilities == 0
        assert process.in_force(os.getpid()).bounding == 0
        """,
        tmp_path,
    )


def test_nobody_sees_into_a_process_that_keeps_to_itself(tmp_path: Path) -> None:
    run(
        """
        import resource
        process.keep_to_itself()
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        assert libc.prctl(3, 0, 0, 0, 0) == 0  # PR_GET_DUMPABLE
        """,
        tmp_path,
    )


def test_a_capability_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    run(
        """
        process.keep_capabilities(())
        process.keep_capabilities({21})
        assert process.in_force(os.getpid()).capabilities == 0
        """,
        tmp_path,
    )


class _Filter:
    """The filter as the kernel would run it."""

    def __init__(self, code: bytes) -> None:
        self.code = list(struct.iter_unpack("=HBBI", code))

    def __call__(self, architecture: int, number: int, *arguments: int) -> int:
        data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
        at = value = 0
        while True:
            kind, yes, no, operand = self.code[at]
            at += 1
            match kind:
                case 0x20:
                    (value,) = struct.unpack_from("=I", data, operand)
                case 0x06:
                    return int(operand)
                case _:
                    holds = {
                        0x15: value == operand,
                        0x35: value >= operand,
                        0x45: bool(value & operand),
                    }[kind]
                    at += yes if holds else no


ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


@pytest.mark.parametrize("machine", sorted(_CALLS))
@pytest.mark.parametrize("executing", [True, False])
def test_the_filter_refuses_what_is_on_the_list_and_nothing_else(
    machine: str, executing: bool
) -> None:
    column, architecture = _CALLS[machine]
    run = _Filter(seccomp.filter_of(column, architecture, 4711, executing=executing))
    listed = {numbers[column] for numbers in seccomp._REFUSED.values()} - {None}
    programs = {numbers[column] for numbers in seccomp._EXECUTE.values()}
    clone, clone3, kill, tgkill = (56, 220)[column], 435, (62, 129)[column], (234, 131)[column]
    for number in range(1024):
        if number in listed or (executing and number in programs):
            wanted = EPERM
        elif number == tgkill:
            wanted = EPERM  # of process 0
        else:
            wanted = ENOSYS if number == clone3 else ALLOW
        assert run(architecture, number) == wanted, number
    assert run(architecture, kill, 1, 9) == EPERM
    assert run(architecture, kill, 4711, 9) == ALLOW
    assert run(architecture, tgkill, 1, 1, 9) == EPERM
    assert run(architecture, tgkill, 4711, 4712, 6) == ALLOW
    assert run(architecture, clone, 0x3D0F00) == ALLOW  # a thread
    for name_space in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000):
        assert run(architecture, clone, 17 | name_space) == EPERM
    assert run(architecture, 0x40000000 | 59) == EPERM
    assert run(0x40000003, 11) == EPERM  # calls of another architecture


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another table of numbers")
def test_the_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no header of the kernel here")
    defined = {
        words[1].removeprefix("__NR_"): int(words[2])
        for line in header.read_text().splitlines()
        if len(words := line.split()) == 3 and words[0] == "#define" and words[2].isdigit()
    }
    for name, (number, _) in {**seccomp._REFUSED, **seccomp._EXECUTE}.items():
        assert defined.get(name, number) == number, name


def test_what_cannot_be_given_up_is_an_error(tmp_path: Path) -> None:
    run(
        """
        from envstore.confinement import capabilities
        from envstore.errors import EnvstoreError
        def fail(*arguments):
            raise OSError(errno.EPERM, "Operation not permitted")
        capabilities.prctl = fail
        try:
            process.confine([place], (), executing=False)
        except EnvstoreError as error:
            assert "cannot be given up" in str(error) and "doctor" in error.hint
        else:
            raise AssertionError("nothing was said")
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [("[default]\ncredential_process = /bin/keys\n", True), ("[default]\n", False)],
)
def test_programs_that_print_keys_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: bool
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "missing"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert starts_programs() is False
    (tmp_path / "config").write_text(text)
    assert starts_programs() is found


def test_there_is_nothing_to_say_of_a_process_that_is_not_there() -> None:
    assert in_force(1 << 22) is None
    assert capabilities.NAMES[capabilities.SYS_ADMIN] == "sys_admin"
    assert ctypes.sizeof(seccomp._Program) == 16


def test_a_node_server_takes_leases_of_stores_in_directories(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as below_var:
        for root in (tmp_path / "store", Path(below_var, "store")):
            with Store(root) as store:
                name = store.push(ListedSource({b"file": b"1"})).snapshot
                url = store.url
            script = f"""
            from pathlib import Path
            from envstore.fuse.keeping import MountRequest
            from envstore.fuse.privileges import ServerConfinement
            from envstore.store.leases import Lease
            from envstore.store.objects import open_objects
            request = MountRequest("", "", place + "/mount", node=place + "/socket")
            ServerConfinement(request, Path(place))
            Lease.take(open_objects({url!r}), bytes.fromhex({name.hex()!r}), "test")
            """
            work = root.parent / "work"
            work.mkdir()
            run(script, work)
            with Store(root) as store:
                assert len(store.object_keys("leases/")) == 1


def test_a_node_server_leaves_the_systems_directories_alone(tmp_path: Path) -> None:
    for name in ("etc", "srv", "usr/local", "var/lib/x", "var/tmp", "var/srv", "var/log"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data").symlink_to("var/srv")
    (tmp_path / "var/lib64").symlink_to("lib")
    (tmp_path / "file").touch()
    found = {path.relative_to(tmp_path) for path in privileges._others(os.fsencode(tmp_path))}
    assert found == set(map(Path, ("srv", "data", "var/tmp", "var/srv")))
