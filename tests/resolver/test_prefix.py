"""Awkward trees, sources that are no programs, and bytecode that is not what it seems."""

from __future__ import annotations

import importlib.util
import marshal
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, NotFoundError, UsageError
from envstore.resolver import prefix as prefix_module
from envstore.resolver.prefix import PrefixSource
from envstore.store.source import WINDOW, ChangedError, Kind, OmitEntry, SourceEntry
from tests.resolver.installs import (
    HEADER,
    SITE,
    TAG,
    VERSION,
    cache_of,
    code_of,
    compile_all,
    empty_environment,
    materialise,
    module,
    parts,
    read,
    read_all,
    read_source,
    release,
    run,
)
from tests.stores import Store

PROGRAM = """
def double(x):
    return [2 * y for y in (x,)][0]

NAMES = "{" if 1 in {2, 3} else {"a b", "c d"}
"""


@pytest.fixture
def env(tmp_path: Path) -> Path:
    return empty_environment(tmp_path / "env")


@pytest.fixture
def source(env: Path) -> Iterator[PrefixSource]:
    module(env, "answer", PROGRAM)
    found = PrefixSource(env)
    yield found
    found.close()


def path_of(name: str, suffix: str = "") -> bytes:
    return f"{SITE}/__pycache__/{name}.{TAG}{suffix}.pyc".encode()


def entry_of(source: PrefixSource, path: bytes) -> SourceEntry:
    return next(entry for entry in source.scan() if entry.path == path)


def test_a_pyc_is_made_where_there_is_none(env: Path) -> None:
    module(env, "answer", PROGRAM)
    pushed = read_all(env)
    assert set(pushed.bytecode()) == {path_of("answer")}
    assert pushed.items[f"{SITE}/__pycache__".encode()].kind is Kind.DIRECTORY
    names: dict[str, object] = {}
    exec(code_of(pushed.bytecode()[path_of("answer")]), names)
    assert callable(names["double"])
    assert names["double"](21) == 42


def stale(cache: Path, source: Path) -> None:
    status = source.stat()
    source.write_text("VALUE = 'another'\n")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns - 5_000_000_000))


def truncated(cache: Path, source: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-7])


def header_only(cache: Path, source: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:9])


def empty(cache: Path, source: Path) -> None:
    cache.write_bytes(b"")


def other_magic(cache: Path, source: Path) -> None:
    cache.write_bytes(b"\x33\x0d\r\n" + cache.read_bytes()[4:])


def no_code(cache: Path, source: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:HEADER] + marshal.dumps(("not", "code")))


def garbage(cache: Path, source: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:HEADER] + b"\xff\xfe garbage")


def unreadable(cache: Path, source: Path) -> None:
    cache.chmod(0)


def wrong_hash(cache: Path, source: Path) -> None:
    data = cache.read_bytes()
    wrong = importlib.util.source_hash(b"something else")
    cache.write_bytes(
        data[:4] + (1).to_bytes(4, "little") + wrong + marshal.dumps(compile("1", "", "exec"))
    )


def unknown_flags(cache: Path, source: Path) -> None:
    data = cache.read_bytes()
    hashed = importlib.util.source_hash(source.read_bytes())
    cache.write_bytes(data[:4] + (4).to_bytes(4, "little") + hashed + data[HEADER:])


def dangling(cache: Path, source: Path) -> None:
    cache.unlink()
    cache.symlink_to("nowhere")


def checked_hash(cache: Path, source: Path) -> None:
    data = cache.read_bytes()
    hashed = importlib.util.source_hash(source.read_bytes())
    cache.write_bytes(data[:4] + (3).to_bytes(4, "little") + hashed + data[HEADER:])


@pytest.mark.parametrize(
    "damage",
    [
        stale, truncated, header_only, empty, other_magic, no_code, garbage, unreadable,
        wrong_hash, unknown_flags, dangling, checked_hash,
    ],
)  # fmt: skip
def test_whatever_lies_there_the_result_is_that_of_the_source(env: Path, damage: object) -> None:
    path = module(env, "answer", PROGRAM)
    compile_all(env)
    assert callable(damage)
    damage(cache_of(path), path)
    got = read_all(env).bytecode()[path_of("answer")]
    shutil.rmtree(path.parent / "__pycache__")
    assert got == read_all(env).bytecode()[path_of("answer")]


def test_valid_bytecode_is_rewritten_not_compiled_again(env: Path) -> None:
    path = module(env, "answer", "VALUE = 'written'\n")
    compile_all(env)
    status = path.stat()
    # The same size and time, so Python would run what is compiled; so does the pushed tree.
    path.write_text("VALUE = 'altered'\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    names: dict[str, object] = {}
    exec(code_of(read_all(env).bytecode()[path_of("answer")]), names)
    assert names["VALUE"] == "written"


@pytest.mark.parametrize(
    "text",
    [
        b"print 'python 2'\n",
        b"# coding: no-such-encoding\n",
        b"x = '\xff'\n",
        b"x = 1\0\n",
        b"# -*- coding: utf-8 -*-\nnothing = {{ cookiecutter.name }\n",
        b"x = " + b"(" * 5000 + b")" * 5000,
        b"from __future__ import no_such_feature\n",
    ],
)
def test_what_is_no_program_has_no_bytecode(env: Path, text: bytes) -> None:
    path = module(env, "broken", text)
    cache_of(path).parent.mkdir()
    cache_of(path).write_bytes(b"invalid")
    module(env, "sound", PROGRAM)
    pushed = read_all(env)
    assert pushed.omitted == {path_of("broken")}
    assert pushed.lasting == {True}
    assert set(pushed.bytecode()) == {path_of("sound")}
    assert pushed.items[f"{SITE}/broken.py".encode()].data == text
    assert pushed.warnings == []


def test_an_empty_source_has_bytecode(env: Path) -> None:
    module(env, "nothing", b"")
    assert len(read_all(env).bytecode()[path_of("nothing")]) > HEADER


def test_what_else_is_bytecode_or_looks_like_it(env: Path) -> None:
    path = module(env, "answer", PROGRAM)
    cache = path.parent / "__pycache__"
    cache.mkdir()
    keep = {
        path.parent / "alone.pyc": b"stands in for its source",
        cache / "answer.double-1.py311.nbi": b"numba's",
    }
    drop = [f"answer.{other}.pyc" for other in ("cpython-27", "pypy39", f"{TAG}-pytest-8.3.4")]
    drop += [f"gone.{TAG}.pyc", "answer.pyc", f"answer.{TAG}.opt-3.pyc"]
    for file, data in keep.items():
        file.write_bytes(data)
    for name in drop:
        (cache / name).write_bytes(b"of no use")
    pushed = read_all(env)
    for file, data in keep.items():
        assert pushed.items[os.fsencode(file.relative_to(env))].data == data
    inside = {path for path in pushed.items if b"__pycache__/" in path}
    assert inside == {path_of("answer"), f"{SITE}/__pycache__/answer.double-1.py311.nbi".encode()}


def test_a_directory_of_bytecode_alone_goes_with_it(env: Path) -> None:
    cache = env / "share/__pycache__"
    cache.mkdir(parents=True)
    (cache / f"gone.{TAG}.pyc").write_bytes(b"of no use")
    assert not any(b"__pycache__" in path for path in read_all(env).items)


def test_what_is_only_called_like_the_cache_is_kept(env: Path) -> None:
    module(env, "answer", PROGRAM)
    (env / SITE / "__pycache__").symlink_to("/nonexistent")
    other = env / SITE / "package"
    other.mkdir()
    (other / "__pycache__").write_bytes(b"a file")
    (other / "module.py").write_text(PROGRAM)
    pushed = read_all(env)
    assert pushed.bytecode() == {}
    assert pushed.items[f"{SITE}/__pycache__".encode()].kind is Kind.SYMLINK
    assert pushed.items[f"{SITE}/package/__pycache__".encode()].data == b"a file"


def test_a_directory_that_looks_like_bytecode_is_kept(env: Path) -> None:
    path = module(env, "answer", PROGRAM)
    (path.parent / "__pycache__" / "strange.pyc").mkdir(parents=True)
    (path.parent / "strange.py").mkdir()
    pushed = read_all(env)
    assert pushed.items[f"{SITE}/__pycache__/strange.pyc".encode()].kind is Kind.DIRECTORY
    assert pushed.items[f"{SITE}/strange.py".encode()].kind is Kind.DIRECTORY
    assert set(pushed.bytecode()) == {path_of("answer"), f"{SITE}/__pycache__/strange.pyc".encode()}


def test_optimised_variants_are_kept_when_valid_and_never_made(env: Path) -> None:
    module(env, "answer", "def f():\n    'documented'\n    assert False\n    return 1\n")
    module(env, "plain", PROGRAM)
    compile_all(env, "-O")
    compile_all(env, "-OO")
    cache_of(env / SITE / "plain.py", ".opt-1").unlink()
    cache_of(env / SITE / "plain.py", ".opt-2").write_bytes(b"damaged")
    pushed = read_all(env)
    assert pushed.omitted == {path_of("plain", ".opt-2")}
    names = {path_of("answer", suffix) for suffix in ("", ".opt-1", ".opt-2")}
    assert set(pushed.bytecode()) == names | {path_of("plain")}
    found = []
    for name in sorted(names):
        scope: dict[str, object] = {}
        code = code_of(pushed.bytecode()[name])
        assert {part.co_filename for part in parts(code)} == {f"{SITE}/answer.py"}
        exec(code, scope)
        function = scope["f"]
        assert callable(function)
        found.append(function.__doc__)
    assert found == ["documented", None, "documented"]


def test_outside_the_library_bytecode_is_kept_but_not_made(env: Path) -> None:
    for name in ("with", "without", "stale"):
        (env / "share" / name).mkdir(parents=True)
        (env / "share" / name / "tool.py").write_text(PROGRAM)
    for name in ("with", "stale"):
        run([str(env / "bin/python"), "-m", "compileall", "-q", str(env / "share" / name)])
    (env / "share/stale/tool.py").write_text(PROGRAM + "# changed\n")
    pushed = read_all(env)
    assert set(pushed.bytecode()) == {f"share/with/__pycache__/tool.{TAG}.pyc".encode()}
    assert pushed.omitted == {f"share/stale/__pycache__/tool.{TAG}.pyc".encode()}


def test_links_to_sources(env: Path, tmp_path: Path) -> None:
    path = module(env, "answer", PROGRAM)
    outside = tmp_path / "outside.py"
    outside.write_text(PROGRAM)
    site = path.parent
    (site / "inner.py").symlink_to("answer.py")
    (site / "twice.py").symlink_to("inner.py")
    (site / "outer.py").symlink_to(outside)
    (site / "upward.py").symlink_to(os.path.relpath(outside, site))
    (site / "absolute.py").symlink_to(path)
    (site / "dangling.py").symlink_to("nowhere.py")
    (site / "loop.py").symlink_to("loop.py")
    (site / "folder.py").symlink_to("/")
    pushed = read_all(env)
    assert set(pushed.bytecode()) == {path_of(name) for name in ("answer", "inner", "twice")}
    code = code_of(pushed.bytecode()[path_of("inner")])
    assert code.co_filename == f"{SITE}/inner.py"
    assert pushed.items[f"{SITE}/inner.py".encode()].target == b"answer.py"


def test_a_linked_library_is_not_entered_twice(env: Path) -> None:
    module(env, "answer", PROGRAM)
    if not (env / "lib64").is_symlink():
        (env / "lib64").symlink_to("lib")
    pushed = read_all(env)
    assert pushed.items[b"lib64"].kind is Kind.SYMLINK
    assert set(pushed.bytecode()) == {path_of("answer")}


def test_a_second_library_of_its_own(env: Path) -> None:
    (env / "lib64").unlink(missing_ok=True)
    other = env / "lib64" / VERSION / "site-packages"
    other.mkdir(parents=True)
    (other / "native.py").write_text(PROGRAM)
    name = f"lib64/{VERSION}/site-packages/__pycache__/native.{TAG}.pyc"
    assert set(read_all(env).bytecode()) == {name.encode()}


def test_names_of_every_kind(env: Path, tmp_path: Path) -> None:
    site = os.fsencode(env / SITE)
    longest = 255 - len(f".{TAG}.pyc")
    names = [b"caf\xe9", "grüße".encode(), b"with space", b"dotted.name", b"new\nline", b"-"]
    names += [b"l" * longest, b"m" * (longest + 1)]
    for name in names:
        Path(os.fsdecode(site + b"/" + name + b".py")).write_text(PROGRAM)
    deep = "d" * 200 + "/" + "e" * 200
    (env / SITE / deep).mkdir(parents=True)
    (env / SITE / deep / "deep.py").write_text(PROGRAM)
    pushed = read_all(env)
    suffix = f".{TAG}.pyc".encode()
    start = f"{SITE}/__pycache__/".encode()
    wanted = {start + name + suffix for name in names[:-1]}
    wanted.add(f"{SITE}/{deep}/__pycache__/deep".encode() + suffix)
    assert set(pushed.bytecode()) == wanted
    for path, data in pushed.bytecode().items():
        source = path.replace(b"__pycache__/", b"").removesuffix(suffix) + b".py"
        assert os.fsencode(code_of(data).co_filename) == source
    copy = tmp_path / "copy"
    materialise(pushed, copy)
    try:
        script = (
            "import importlib, sys; found = importlib.import_module(sys.argv[1]);"
            "print(ascii(found.double.__code__.co_filename))"
        )
        said = run([str(copy / "bin/python"), "-X", "utf8", "-c", script, os.fsdecode(b"caf\xe9")])
        assert said.stdout.strip() == ascii(f"{copy}/{SITE}/" + os.fsdecode(b"caf\xe9.py"))
    finally:
        release(copy)


def test_a_tree_deeper_than_a_path_may_be(env: Path) -> None:
    folder = os.open(env / SITE, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    os.close(os.open("deep.py", os.O_WRONLY | os.O_CREAT, dir_fd=folder))
    os.close(folder)
    pushed = read_all(env)
    assert pushed.bytecode() == {}
    assert sum(path.endswith(b"/deep.py") for path in pushed.items) == 1


def test_a_large_module_comes_in_windows(env: Path, source: PrefixSource) -> None:
    module(env, "large", f"DATA = {os.urandom(WINDOW)!r}\n")
    entry = entry_of(source, path_of("large"))
    pieces = list(source.read(entry))
    assert [len(piece) for piece in pieces[:-1]] == [WINDOW] * (len(pieces) - 1)
    assert len(pieces) > 1
    assert marshal.loads(b"".join(pieces)[HEADER:]).co_filename == f"{SITE}/large.py"


def test_a_source_that_changes_is_noticed(env: Path, source: PrefixSource) -> None:
    entry = entry_of(source, path_of("answer"))
    module(env, "answer", PROGRAM + "# changed\n")
    with pytest.raises(ChangedError, match=r"answer\.py"):
        read(source, entry)


def test_a_source_that_goes_is_noticed(env: Path, source: PrefixSource) -> None:
    entry = entry_of(source, path_of("answer"))
    (env / SITE / "answer.py").unlink()
    with pytest.raises(ChangedError, match=r"answer\.py"):
        read(source, entry)


def test_bytecode_that_changes_meanwhile_does_not_matter(env: Path, source: PrefixSource) -> None:
    compile_all(env)
    first = read(source, entry_of(source, path_of("answer")))
    entry = entry_of(source, path_of("answer"))
    cache_of(env / SITE / "answer.py").write_bytes(b"being written")
    assert read(source, entry) == first


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_source_that_may_not_be_read(env: Path, source: PrefixSource) -> None:
    (env / SITE / "answer.py").chmod(0)
    with pytest.raises(AccessDeniedError, match=r"answer\.py"):
        read(source, entry_of(source, path_of("answer")))


def test_the_signature_follows_what_the_bytecode_depends_on(
    env: Path, source: PrefixSource
) -> None:
    def signature() -> bytes:
        return entry_of(source, path_of("answer")).signature

    path = env / SITE / "answer.py"
    seen = [signature()]
    assert signature() == seen[0]
    for change in (
        lambda: path.write_text(PROGRAM + "\n"),
        lambda: os.utime(path, ns=(0, 0)),
        lambda: compile_all(env),
        lambda: os.utime(cache_of(path), ns=(0, 0)),
        lambda: cache_of(path).unlink(),
        lambda: replace_interpreter(env, "#!/bin/sh\nexit 1\n"),
    ):
        change()
        seen.append(signature())
    assert all(before != after for before, after in pairwise(seen))


def test_entries_may_be_read_in_any_order_skipped_and_read_again(env: Path) -> None:
    for number in range(300):
        module(env, f"m{number:03}", f"VALUE = {number}\n")
    wanted = read_all(env).bytecode()
    source = PrefixSource(env, workers=2)
    try:
        entries = [entry for entry in source.scan() if entry.path.endswith(b".pyc")]
        entries.sort(key=source.order)
        assert {entry.path: read(source, entry) for entry in reversed(entries)} == wanted
        source.expect(entries)
        some = entries[::3] + entries[:10] + entries[-1:] + entries[::-7]
        for entry in some:
            assert read(source, entry) == wanted[entry.path]
        source.expect(entries)
        source.close()
        source.expect(entries[5:])
        assert {entry.path: read(source, entry) for entry in entries} == wanted
    finally:
        source.close()


def test_order_puts_bytecode_before_programs_before_the_rest(source: PrefixSource) -> None:
    paths = [b"lib/b.pyc", b"lib/c.pyc", b"bin/python", b"lib/a.so", b"lib/a.so.1", b"lib/a.py"]
    entries = [SourceEntry(path, Kind.FILE) for path in paths]
    shuffled = [entries[at] for at in (4, 1, 5, 0, 3, 2)]
    assert sorted(shuffled, key=source.order) == entries


def replace_interpreter(env: Path, script: str) -> None:
    """Put ``script`` in the place of the environment's interpreter."""
    for name in ("python", "python3", VERSION):
        (env / "bin" / name).unlink(missing_ok=True)
        (env / "bin" / name).write_text(script)
        (env / "bin" / name).chmod(0o755)


def other_version(env: Path) -> None:
    """Make it an environment of a Python that is not there."""
    (env / "lib" / VERSION).rename(env / "lib/python3.8")
    for name in ("python", "python3", VERSION):
        (env / "bin" / name).unlink(missing_ok=True)
    (env / "bin/python3.8").symlink_to("/nonexistent/python3.8")


def test_without_its_interpreter_one_of_the_same_version_does(env: Path) -> None:
    module(env, "answer", PROGRAM)
    wanted = read_all(env).bytecode()
    for name in ("python", "python3", VERSION):
        (env / "bin" / name).unlink(missing_ok=True)
    (env / "bin" / VERSION).symlink_to("/nonexistent/python")
    pushed = read_all(env)
    assert pushed.bytecode() == wanted
    assert pushed.warnings == [
        f"bin/{VERSION} leads to /nonexistent/python, which is not there: "
        f"bytecode is made by {sys.executable}"
    ]


def test_without_any_interpreter_bytecode_is_left_out(env: Path) -> None:
    module(env, "answer", PROGRAM)
    compile_all(env)
    other_version(env)
    pushed = read_all(env)
    assert pushed.bytecode() == {}
    assert pushed.omitted == set()
    assert pushed.warnings == [
        "bin/python3.8 leads to /nonexistent/python3.8, which is not there: "
        "bytecode is left out, imports will be slower"
    ]


def test_an_interpreter_for_another_machine_is_not_run(env: Path) -> None:
    module(env, "answer", PROGRAM)
    real = Path(sys.executable).resolve()
    head = bytearray(real.read_bytes()[:64])
    machine = b"\xb7\0" if head[18] != 0xB7 else b"\x3e\0"
    for name in ("python", "python3", VERSION):
        (env / "bin" / name).unlink(missing_ok=True)
    (env / "bin" / VERSION).write_bytes(head[:18] + machine + head[20:])
    (env / "bin" / VERSION).chmod(0o755)
    pushed = read_all(env)
    name = "aarch64" if machine == b"\xb7\0" else "x86_64"
    assert pushed.warnings == [f"bin/{VERSION} is for {name}: bytecode is made by {sys.executable}"]
    source = PrefixSource(env)
    assert source.attributes()["platform"] == f"linux-{name}"


def test_an_interpreter_that_does_not_start(env: Path) -> None:
    module(env, "answer", PROGRAM)
    wanted = read_all(env).bytecode()
    replace_interpreter(env, "#!/bin/sh\necho 'libpython.so: cannot open' >&2\nexit 127\n")
    pushed = read_all(env)
    assert pushed.bytecode() == wanted
    assert pushed.warnings == [
        f"{env}/bin/{VERSION} does not run: libpython.so: cannot open: "
        f"bytecode is made by {sys.executable}"
    ]


def test_an_interpreter_of_another_version(env: Path) -> None:
    module(env, "answer", PROGRAM)
    (env / "lib" / VERSION).rename(env / "lib/python3.8")
    pushed = read_all(env)
    assert pushed.omitted == {b"lib/python3.8/site-packages/__pycache__/answer.cpython-38.pyc"}
    # The same tree may have bytecode once the right interpreter is there.
    assert pushed.lasting == {False}
    (warning,) = pushed.warnings
    assert f"is {TAG}" in warning
    assert "not cpython-38: bytecode is left out" in warning


def test_a_prefix_without_python(env: Path) -> None:
    module(env, "answer", PROGRAM)
    compile_all(env)
    (env / "lib" / VERSION).rename(env / "lib/other")
    pushed = read_all(env)
    assert pushed.bytecode() == {}
    assert pushed.warnings == [f"no CPython 3 found in {env}: bytecode is left out"]


def test_an_omission_that_may_pass_is_not_remembered(
    env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(env, "answer", PROGRAM)
    module(env, "broken", "print 'python 2'\n")
    replace_interpreter(env, "#!/bin/sh\nexit 1\n")
    with Store(tmp_path / "store") as store:
        with monkeypatch.context() as patch:
            patch.setattr(prefix_module, "own_interpreter", lambda tag: None)
            first = store.push(PrefixSource(env))
            assert "bytecode is left out" in first.warnings[0]
            again = store.push(PrefixSource(env))
            assert again.warnings == first.warnings
        last = store.push(PrefixSource(env))
        assert not last.unchanged
        assert last.files == first.files + 1
        assert store.push(PrefixSource(env)).unchanged
        store.pull(tmp_path / "pulled")
    assert (tmp_path / "pulled" / os.fsdecode(path_of("answer"))).is_file()
    assert not (tmp_path / "pulled" / os.fsdecode(path_of("broken"))).exists()


def test_nothing_of_the_environment_runs(env: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    trap = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("sitecustomize", "usercustomize", "struct", "importlib", "marshal", "answer"):
        module(env, name, trap)
        (env / f"{name}.py").write_text(trap)
    (env / SITE / "trap.pth").write_text(f"import os; {trap}")
    pushed = read_all(env)
    assert len(pushed.bytecode()) == 6
    assert not ran.exists()
    run([str(env / "bin/python"), "-c", ""])
    assert ran.exists()  # the trap does work


def test_a_read_only_tree_is_left_as_it_is(env: Path) -> None:
    module(env, "answer", PROGRAM)
    folders = [Path(folder) for folder, _, _ in os.walk(env)]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert set(read_all(env).bytecode()) == {path_of("answer")}
    finally:
        release(env)
    assert not cache_of(env / SITE / "answer.py").parent.exists()


def test_wrong_roots(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        PrefixSource(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError):
        PrefixSource(tmp_path / "fifo")


def test_a_source_after_close_works_again(env: Path, source: PrefixSource) -> None:
    first = read_source(source)
    source.close()
    source.close()
    assert read(source, entry_of(source, path_of("answer"))) == first.bytecode()[path_of("answer")]


def test_omission_is_said_before_the_first_piece(env: Path, source: PrefixSource) -> None:
    module(env, "broken", "print 'python 2'\n")
    with pytest.raises(OmitEntry):
        source.read(entry_of(source, path_of("broken")))
