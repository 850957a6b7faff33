"""The one form of bytecode, for generated programs, and the processes that make it."""

from __future__ import annotations

import marshal
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import EnvstoreError
from envstore.resolver import _compile_worker as worker
from envstore.resolver.bytecode import BytecodePool, InterpreterError, Job
from envstore.store.source import ChangedError, stat_signature
from tests.resolver.installs import HEADER, TAG, code_of, parts

OLD = "/build/placehold_placehold/lib/python3.11/site-packages/package/module.py"
NEW = "lib/python3.11/site-packages/package/module.py"
SCRIPT = Path(worker.__file__)

# Constants that a careless rewriting would take for the file name, and the ones Python shares.
TEXTS = st.sampled_from(
    [OLD, NEW, OLD[:-3], "/" + NEW, f"\xfa{chr(len(OLD))}{OLD}", "", "{", "}", "a", "é", "a b", "x"]
) | st.text(max_size=12)
CONSTANTS = st.recursive(
    TEXTS
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.just(...)
    | st.binary(max_size=12)
    | st.sampled_from([marshal.dumps(OLD), OLD.encode(), b"\xda\x01{", b""]),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
NAMES = st.sampled_from(["a", "b", "self", "Größe", "_x1", "module", "value"])


def expressions() -> st.SearchStrategy[str]:
    leaves = NAMES | CONSTANTS.map(repr).filter(lambda text: "inf" not in text)

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        members = st.lists(TEXTS | st.integers(), min_size=1, max_size=5).map(
            lambda items: "{" + ", ".join(map(repr, items)) + "}"
        )
        return st.one_of(
            st.tuples(NAMES, inner).map(lambda p: f"(lambda {p[0]}: {p[1]})"),
            st.tuples(inner, NAMES).map(lambda p: f"[{p[0]} for {p[1]} in ()]"),
            st.tuples(inner, members).map(lambda p: f"({p[0]} in {p[1]})"),
            st.tuples(inner, inner).map(lambda p: f"({p[0]}, {p[1]})"),
            inner.map(lambda text: f"(yes() if {text} else (no)[1:2])"),
        )

    return st.recursive(leaves, grown, max_leaves=6)


def programs() -> st.SearchStrategy[str]:
    line = st.tuples(NAMES, expressions()).map(lambda p: f"{p[0]} = {p[1]}")

    def nested(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        block = st.lists(body, min_size=1, max_size=3).map(
            lambda lines: "\n".join("    " + row for text in lines for row in text.split("\n"))
        )
        return st.one_of(
            st.tuples(NAMES, TEXTS, block).map(
                lambda p: f"def {p[0]}(a, *b, value={p[1]!r}):\n    {p[1]!r}\n{p[2]}"
            ),
            st.tuples(NAMES, block).map(lambda p: f"class {p[0]}:\n{p[1]}"),
            st.tuples(NAMES, block).map(lambda p: f"async def {p[0]}(self):\n{p[1]}"),
        )

    return st.lists(st.recursive(line, nested, max_leaves=6), max_size=5).map("\n".join)


def compiled(source: str, name: str) -> CodeType:
    code = compile(source.encode(), name, "exec", dont_inherit=True, optimize=0)
    assert isinstance(code, CodeType)
    return code


def tree(code: CodeType) -> object:
    """Everything a code object is, with types, so that 1, 1.0 and True differ."""
    fields = [
        "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals", "co_stacksize",
        "co_flags", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars",
        "co_filename", "co_name", "co_qualname", "co_firstlineno", "co_linetable",
        "co_exceptiontable",
    ]  # fmt: skip
    consts = [
        tree(const)
        if isinstance(const, CodeType)
        else sorted(map(repr, const))
        if isinstance(const, frozenset)
        else repr(const)
        for const in code.co_consts
    ]
    return [getattr(code, name) for name in fields], consts


@given(programs(), st.sampled_from([OLD, NEW, "module.py", "", "/" + "é" * 200 + ".py", "x" * 300]))
def test_only_the_file_name_changes_and_the_form_is_one(source: str, old: str) -> None:
    fresh = worker.canonical(compiled(source, NEW), NEW)
    rewritten = worker.canonical(marshal.loads(marshal.dumps(compiled(source, old))), NEW)
    assert rewritten == fresh
    code = marshal.loads(fresh)
    assert tree(code) == tree(compiled(source, NEW))
    assert {part.co_filename for part in parts(code)} == {NEW}
    assert worker.canonical(code, NEW) == fresh


@given(programs(), st.sampled_from([2, 3, 4]), st.lists(TEXTS, max_size=4))
def test_neither_sharing_nor_what_is_interned_shows(
    source: str, version: int, interned: list[str]
) -> None:
    code = compiled(source, OLD)
    # Two code objects that share constants, and ones that share nothing, are the same program.
    shared = worker.canonical(code.replace(co_name=code.co_name), NEW)
    kept = [sys.intern(text) for text in interned]
    apart = worker.canonical(marshal.loads(marshal.dumps(compiled(source, OLD), version)), NEW)
    assert apart == shared
    assert len(kept) == len(interned)


@given(programs(), st.binary(min_size=1, max_size=60))
def test_the_name_may_be_any_path(source: str, raw: bytes) -> None:
    name = os.fsdecode(raw.replace(b"\0", b"/"))
    made = worker.canonical(compiled(source, OLD), name)
    assert {part.co_filename for part in parts(marshal.loads(made))} == {name}


@given(programs(), st.data())
def test_only_what_python_would_use_counts_as_valid(source: str, data: st.DataObject) -> None:
    status = os.stat(__file__)
    hashed = bytes(range(8))
    stamp = struct.pack("<II", int(status.st_mtime), status.st_size)
    body = marshal.dumps(compiled(source, OLD))
    flags, check = data.draw(st.sampled_from([(0, stamp), (1, hashed), (3, hashed)]))
    sound = MAGIC_NUMBER + struct.pack("<I", flags) + check + body
    assert worker.load(sound, status, hashed) is not None
    end = data.draw(st.integers(0, len(sound) - 1))
    assert worker.load(sound[:end], status, hashed) is None
    at = data.draw(st.integers(0, HEADER - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    # Clearing or setting "check the source" leaves a valid header with the same meaning here.
    if not (at == 4 and flags and bit == 2):
        damaged = sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :]
        assert worker.load(damaged, status, hashed) is None


def job_for(root: Path, name: str, source: str = "VALUE = 1\n") -> Job:
    path = root / name
    path.write_text(source)
    return Job(name.encode(), stat_signature(path.stat()))


def interpreter(root: Path, script: str) -> Path:
    """Write a stand-in that says hello as the real one does and then misbehaves."""
    path = root / "python"
    hello = worker.ANSWER.pack(worker.HELLO, len(TAG) + 4) + f"{TAG}\n3.x".encode()
    path.write_text(
        f"#!{sys.executable} -IS\nimport os, signal, sys\nos.write(1, {hello!r})\n{script}\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[BytecodePool]:
    found = BytecodePool(Path(sys.executable), TAG, tmp_path, workers=2)
    yield found
    found.close()


def processes(pool: BytecodePool) -> list[subprocess.Popen[bytes]]:
    return [worker._process for worker in pool._workers]


def test_the_worker_reads_signatures_as_the_source_writes_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    status = (tmp_path / "file").stat()
    assert worker.sign(status) == stat_signature(status)


def test_hundreds_of_large_results_do_not_block(tmp_path: Path, pool: BytecodePool) -> None:
    # More than pipes hold in either direction, and very uneven.
    jobs = [
        job_for(tmp_path, f"m{'x' * 100}{n}.py", f"D = {'y' * (n % 7 * 50_000)!r}\n")
        for n in range(400)
    ]
    pool.announce(jobs)
    for number, job in enumerate(jobs):
        got = pool.result(job)
        assert got is not None
        assert len(got) > number % 7 * 50_000
    assert len(processes(pool)) == 2


def test_close_leaves_no_process(tmp_path: Path, pool: BytecodePool) -> None:
    jobs = [job_for(tmp_path, f"m{n}.py") for n in range(100)]
    pool.announce(jobs)
    assert pool.result(jobs[3]) is not None
    running = processes(pool)
    assert len(running) == 2
    pool.close()
    assert [process.returncode for process in running] == [-signal.SIGKILL] * 2
    pool.close()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sys.stdin.buffer.read(9); sys.exit(3)", "it ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it ended with signal 11"),
        ("sys.exit('first line\\nout of memory')", "out of memory"),
        ("os.write(1, b'\\x01\\xff\\xff\\0\\0half'); sys.exit('broke off')", "broke off"),
    ],
)  # fmt: skip
def test_a_worker_that_ends_is_named_with_the_file(tmp_path: Path, script: str, says: str) -> None:
    pool = BytecodePool(interpreter(tmp_path, script), TAG, tmp_path)
    jobs = [job_for(tmp_path, f"m{n}.py") for n in range(3)]
    pool.announce(jobs)
    running = processes(pool)
    with pytest.raises(EnvstoreError, match=says) as caught:
        pool.result(jobs[0])
    assert f"{tmp_path}/python failed while it made bytecode for m0.py" in caught.value.message
    assert caught.value.hint is not None
    assert all(process.returncode is not None for process in running)


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    pool = BytecodePool(
        interpreter(tmp_path, "signal.pause()"), TAG, tmp_path, workers=1, patience=0.2
    )
    job = job_for(tmp_path, "m.py")
    pool.announce([job])
    running = processes(pool)
    with pytest.raises(EnvstoreError, match=r"bytecode for m\.py: no answer within"):
        pool.result(job)
    assert [process.returncode for process in running] == [-signal.SIGKILL]


def test_a_worker_that_never_reads_does_not_block_either(tmp_path: Path) -> None:
    pool = BytecodePool(
        interpreter(tmp_path, "signal.pause()"), TAG, tmp_path, workers=1, patience=0.2
    )
    # Longer names than a pipe holds requests for.
    jobs = [Job(b"d" * 3000 + b"%d" % n, bytes(worker.SIGNATURE.size)) for n in range(200)]
    pool.announce(jobs)
    with pytest.raises(EnvstoreError, match="no answer within"):
        pool.result(jobs[0])


def test_what_is_no_interpreter_is_said_at_once(tmp_path: Path) -> None:
    silent = interpreter(tmp_path, "")
    silent.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(InterpreterError, match="does not run: it ended with status 0"):
        BytecodePool(silent, TAG, tmp_path).start()
    with pytest.raises(InterpreterError, match="does not start: No such file"):
        BytecodePool(tmp_path / "none", TAG, tmp_path).start()
    with pytest.raises(InterpreterError, match=f"is {TAG} .*, not cpython-399"):
        BytecodePool(Path(sys.executable), "cpython-399", tmp_path).start()


def test_an_interpreter_that_says_nothing_for_ever(tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text(f"#!{sys.executable} -IS\nimport signal\nsignal.pause()\n")
    silent.chmod(0o755)
    with pytest.raises(InterpreterError, match="does not run: no answer within"):
        BytecodePool(silent, TAG, tmp_path, patience=0.2).start()


def test_files_that_are_not_what_was_announced(tmp_path: Path, pool: BytecodePool) -> None:
    job = job_for(tmp_path, "m.py")
    with pytest.raises(ChangedError):
        pool.result(job._replace(signature=bytes(worker.SIGNATURE.size)))
    with pytest.raises(ChangedError):
        pool.result(job._replace(source=b"none.py"))
    # The pool goes on.
    assert pool.result(job) is not None


def test_bytecode_is_not_made_when_it_may_only_be_rewritten(
    tmp_path: Path, pool: BytecodePool
) -> None:
    assert pool.result(job_for(tmp_path, "m.py")._replace(create=False)) is None


def test_results_name_the_path_below_the_root(tmp_path: Path, pool: BytecodePool) -> None:
    (tmp_path / "package").mkdir()
    data = pool.result(job_for(tmp_path, "package/m.py"))
    assert data is not None
    assert code_of(data).co_filename == "package/m.py"


def test_a_worker_ends_with_its_input(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    done = subprocess.run(command, input=b"", capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith(f"{TAG}\n{'.'.join(map(str, sys.version_info[:3]))}".encode())
    assert done.stderr == b""


HOST = """
import sys
from pathlib import Path
from envstore.resolver.bytecode import BytecodePool, Job
pool = BytecodePool(Path(sys.executable), {tag!r}, Path({root!r}), workers=1)
pool.announce([Job(b"m.py", {signature!r})] * 40)
print(pool._workers[0]._process.pid, flush=True)
sys.stdin.read()
"""


def test_a_worker_does_not_outlive_a_killed_host(tmp_path: Path) -> None:
    job = job_for(tmp_path, "m.py", f"DATA = {'z' * 200_000!r}\n")
    script = HOST.format(tag=TAG, root=str(tmp_path), signature=job.signature)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        start_new_session=True,
    ) as host:
        assert host.stdout is not None
        # It is writing into a full pipe when the host goes.
        worker_fd = os.pidfd_open(int(host.stdout.readline()))
        host.kill()
        try:
            poll = select.poll()
            poll.register(worker_fd, select.POLLIN)
            assert poll.poll(60_000)
        finally:
            os.close(worker_fd)


def test_an_interrupt_at_the_terminal_does_not_reach_the_workers(pool: BytecodePool) -> None:
    pool.start()
    (process,) = processes(pool)
    assert os.getsid(process.pid) != os.getsid(0)
