"""The command line as a user has it: a process of its own, with a home of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.forkserver import fork_server

REPOSITORY = Path(__file__).parent.parent
NOBODY = 65534
_PATIENCE = 120.0

# A device of one's own in a mount namespace of one's own: the machine's may be closed to users.
_AS_NOBODY = """
set -e
mount -t tmpfs none "$1"
mknod "$1/fuse" c 10 229
chmod 666 "$1/fuse"
mount --bind "$1/fuse" /dev/fuse
shift
# One shell more, because setpriv still has its privileges while it looks for the program.
exec setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'exec "$@"' sh "$@"
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class Process(subprocess.Popen[bytes]):
    """A command that does not outlive a test that fails."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.terminate()
            try:
                self.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        super().__exit__(kind, error, trace)


class Cli:
    """Runs ``python -m envstore`` with everything it may touch below ``root``.

    ``store`` is a directory (not made here) that ``ENVSTORE_URL`` names.
    """

    def __init__(self, root: Path, *, ordinary: bool = False) -> None:
        self.root = root
        self.store = root / "store"
        self.home = root / "home"
        self.ordinary = ordinary
        self.home.mkdir(parents=True)
        self.env: dict[str, str] = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": str(REPOSITORY),
            # A file that was left open is said on stderr, where each test looks for one line.
            "PYTHONWARNINGS": "always::ResourceWarning",
            "LC_ALL": "C.UTF-8",
            "TMPDIR": str(root),
            "ENVSTORE_URL": str(self.store),
            "ENVSTORE_NODE_SOCKET": str(root / "node.sock"),
            **{k: v for k, v in os.environ.items() if k.startswith("AWS_")},
        }
        if ordinary:
            os.chown(self.home, NOBODY, NOBODY)
            os.chown(root, NOBODY, NOBODY)
            (root / "dev").mkdir()

    def argv(self, *arguments: str | Path) -> list[str]:
        """Return the whole command for these arguments."""
        argv = [sys.executable, "-m", "envstore", *map(str, arguments)]
        if self.ordinary:
            return [
                "unshare",
                "--mount",
                "sh",
                "-c",
                _AS_NOBODY,
                "sh",
                str(self.root / "dev"),
                *argv,
            ]
        return argv

    def start(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> Process:
        """Start a command, as from a fresh login, and return its process."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("cwd", self.root)
        prepare = options.pop("preexec_fn", lambda: None)

        def heed_signals() -> None:
            # Whoever runs the tests may ignore some, under nohup for example.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            prepare()

        options["preexec_fn"] = heed_signals
        return Process(self.argv(*arguments), env={**self.env, **(env or {})}, **options)

    def __call__(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> Done:
        """Run a command to its end; as a copy of a started interpreter where that is the same."""
        env = {**self.env, **(env or {})}
        template = fork_server(self.env)
        if not self.ordinary and not options.keys() - {"cwd"} and template.fits(env):
            words = [str(word) for word in arguments]
            found = template.run(words, env, str(options.get("cwd", self.root)), _PATIENCE)
            status, said, complained = found
            return Done(status, said.decode(), complained.decode())
        process = self.start(
            *arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        with process:
            out, err = process.communicate(timeout=_PATIENCE)
        return Done(process.returncode, out.decode(), err.decode())

    def ok(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run a command that must succeed; returns its stdout."""
        done = self(*arguments, env=env)
        assert done.status == 0, (arguments, done)
        assert "Traceback" not in done.err
        return done.out

    def json(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run a command that must succeed with ``--json``; returns its object."""
        out = self.ok("--json", *arguments, env=env)
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    def fails(
        self,
        status: int,
        *arguments: str | Path,
        says: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command that must fail as users are promised; returns its one line."""
        done = self(*arguments, env=env)
        assert done.status == status, (arguments, done)
        return one_line(done, says)

    def completed(self, line: str) -> list[str]:
        """Return what bash is offered for the last word of ``line``: its kind, and its text."""
        count = str(line.count(" "))
        env = {"_ENVSTORE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": count}
        done = self(env=env)
        assert done.err == ""
        return done.out.split()

    def refs(self) -> dict[str, bytes]:
        """Return every ref's bytes, straight from the disk."""
        base = self.store / "refs"
        return {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}


def one_line(done: Done, says: Sequence[str] = ()) -> str:
    """Check that a failure is told in one line, on stderr alone, and return it."""
    assert done.out == "", done
    assert done.err.endswith("\n"), done
    assert done.err.count("\n") == 1, done
    assert done.err.startswith("envstore: "), done
    for word in ("Traceback", "Error:", "bug", 'File "'):
        assert word not in done.err, done
    for words in says:
        assert words in done.err, (words, done)
    return done.err


@contextmanager
def name_space_copied() -> Iterator[None]:
    """Have a process keep a copy of all mounts, as the start of a container makes one."""
    copy = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read end"]
    with subprocess.Popen(copy, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate()


def can_be_ordinary() -> bool:
    """Whether tests may become another user, and that user may run this Python."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        return False
    tried = subprocess.run(
        [
            *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
            *("sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", "import envstore.cli.main"),
        ],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return tried.returncode == 0
