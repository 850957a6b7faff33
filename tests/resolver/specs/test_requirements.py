"""Requirements files: the grammar of lines, and what becomes of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.request import PypiRequest, Request
from envstore.resolver.specs import read_specs
from envstore.resolver.specs.requirement_lines import LineError, logical_lines, parse_line

DIGEST = "946d195a0d259cbba61165e88e65941f16e9b36ea6ddb97f00452bae8b1287d3"
OTHER = "12f65c9b470abda6dc35cf8e63cc574b1c52b11df2c86030af0ac09b01b13ea9"


def read(path: Path, warnings: list[str] | None = None) -> PypiRequest:
    request = read_specs([path], platform="linux-64", warnings=warnings)
    assert isinstance(request, Request)
    return request.pypi


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_everything_a_file_may_hold(tmp_path: Path) -> None:
    write(tmp_path / "sub/more.txt", "-c ../limits.txt\nsix\n")
    write(tmp_path / "limits.txt", "numpy<3  # later\n")
    (tmp_path / "wheels").mkdir()
    path = write(
        tmp_path / "requirements.txt",
        f"""\
# what we need
-i https://index.example/simple
--extra-index-url=https://more.example/simple --pre
-f wheels
--find-links https://links.example/all.html
--only-binary numpy,Sci_Py
--no-binary :none:
idna == 3.10 \\
    --hash=sha256:{DIGEST} \\
    --hash sha256:{OTHER.upper()}
    # via requests
colorama ; sys_platform == "win32"
Pandas[excel,parquet]>=2,<3
six @ https://files.example/six-1.17.0-py2.py3-none-any.whl#sha256={DIGEST}
-r sub/more.txt
six
""",
    )
    found = read(path)
    six = f"six @ https://files.example/six-1.17.0-py2.py3-none-any.whl#sha256={DIGEST}"
    assert found.requirements == (
        "idna==3.10",
        'colorama; sys_platform == "win32"',
        "Pandas[excel,parquet]<3,>=2",
        six,
        "six",
    )
    assert found.constraints == ("numpy<3",)
    assert found.default_index == "https://index.example/simple"
    assert found.indexes == ("https://more.example/simple",)
    assert found.find_links == (f"file://{tmp_path}/wheels", "https://links.example/all.html")
    assert found.only_binary == ("numpy", "sci-py")
    assert found.no_binary == ()
    assert found.prerelease == "allow"
    assert found.require_hashes
    assert found.hashes == {"idna==3.10": (f"sha256:{DIGEST}", f"sha256:{OTHER}")}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, newline: str) -> None:
    text = newline.join(["# für", "a>=1 \\", "  ,<2", "b", ""])
    path = write(tmp_path / "requirements.txt", text.encode(encoding))
    assert read(path).requirements == ("a<2,>=1", "b")


def test_paths_are_made_absolute_and_named(tmp_path: Path) -> None:
    wheel = write(tmp_path / "wheels/some_thing-1.0-py3-none-any.whl", b"")
    sdist = write(tmp_path / "x y/other-2.tar.gz", b"")
    project = write(tmp_path / "proj/pyproject.toml", "[project]\nname = 'proj'\n").parent
    path = write(
        tmp_path / "reqs/requirements.txt",
        f"""\
../wheels/{wheel.name}
../wheels/{wheel.name}[fast] ; python_version > "3"
file://{wheel}
../x y/other-2.tar.gz
../proj
third @ ../wheels/{wheel.name}
""",
    )
    assert read(path).requirements == (
        f"some-thing @ file://{wheel}",
        f'some-thing[fast] @ file://{wheel} ; python_version > "3"',
        f"other @ file://{sdist.parent.parent}/x%20y/other-2.tar.gz",
        f"proj @ file://{project}",
        f"third @ file://{wheel}",
    )


def test_urls_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "requirements.txt",
        """\
https://files.example/six-1.17.0-py2.py3-none-any.whl
https://files.example/six-1.17.0.tar.gz
git+https://git.example/team/tool@v1#egg=tool&subdirectory=py
git+ssh://git@git.example/team/tool@v1#egg=tool[x]
""",
    )
    assert read(path).requirements == (
        "six @ https://files.example/six-1.17.0-py2.py3-none-any.whl",
        "six @ https://files.example/six-1.17.0.tar.gz",
        "tool @ git+https://git.example/team/tool@v1#subdirectory=py",
        "tool[x] @ git+ssh://git@git.example/team/tool@v1",
    )


def test_variables_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "requirements.txt", "-i https://${INDEX_HOST}/simple\nsix\n$HOME\n")
    monkeypatch.delenv("INDEX_HOST", raising=False)
    with pytest.raises(UsageError, match=r"requirements.txt:1: .*INDEX_HOST is not set"):
        read(path)
    path.write_text("-i https://${INDEX_HOST}/simple\nsix\n")
    monkeypatch.setenv("INDEX_HOST", "index.example")
    assert read(path).default_index == "https://index.example/simple"
    monkeypatch.setenv("INDEX_HOST", "me:hunter2@index.example")
    with pytest.raises(UsageError, match="user name or password") as caught:
        read(path)
    assert "hunter2" not in str(caught.value)


def test_files_that_include_each_other_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "-r a.txt\nb\n")
    assert read(write(tmp_path / "a.txt", "-r b.txt\na\n")).requirements == ("b", "a")


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path / f"r{number}.txt", f"-r r{number + 1}.txt\nx\n")
    with pytest.raises(UsageError, match="more than 64 files"):
        read(tmp_path / "r0.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-e ./proj", "editable.*without -e"),
        ("--editable=git+https://git.example/x#egg=x", "editable"),
        ("six==", "is not a requirement"),
        ("https://[x/six-1.0.tar.gz", "is not a requirement: Invalid IPv6 URL"),
        ("six --no-such-option", "unknown option --no-such-option"),
        ("six --hash=md5:0123", "is not a hash"),
        ("six --hash=sha256:0123", "is not a hash"),
        ("six --config-settings=a=b", "not supported.*build a wheel"),
        ("-i", "--index-url needs a value"),
        ("--pre=1", "--pre takes no value"),
        ("-r", "--requirement needs a value"),
        ("--index-url 'https://x", "cannot be told apart"),
        ("-i https://a.example/ -i https://b.example/", "given twice"),
        ("-r https://files.example/r.txt", "not on this machine.*download"),
        ("./nowhere", "there is no /.*/nowhere"),
        ("./nowhere-1.0-py3-none-any.whl", "there is no"),
        ("-f nowhere", "there is no"),
        ("-r nowhere.txt", "there is no /.*/nowhere.txt"),
        ("https://git.example/archive/main.zip", "does not say what it is.*NAME @ URL"),
        ("--hash=sha256:" + DIGEST, "belongs behind a requirement"),
        ("https://user:hunter2@files.example/six-1.17.0.tar.gz", "user name or password"),
        ("-i https://index.example/simple?token=hunter2", "query parameter 'token'"),
    ],
)
def test_what_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "requirements.txt", f"first\n{line}\n")
    with pytest.raises(UsageError, match=rf"(?s)^{path}:2: .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_what_is_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "requirements.txt", b"first\nsecond\n\xff\n")
    with pytest.raises(UsageError, match="requirements"):
        read(path)
    with pytest.raises(NotFoundError):
        read(tmp_path / "missing.txt")


def test_what_is_ignored_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "requirements.txt", "--trusted-host x.example\n--prefer-binary\nsix\n")
    warnings: list[str] = []
    read(path, warnings)
    assert [text.partition(" is ignored")[0] for text in warnings] == [
        f"{path}:1: --trusted-host",
        f"{path}:2: --prefer-binary",
    ]


WORDS = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)


@given(st.lists(st.tuples(WORDS, st.booleans(), st.booleans()), max_size=8))
def test_lines_continue_where_a_backslash_says_so(words: list[tuple[str, bool, bool]]) -> None:
    text, expected = "", [""]
    for word, continues, comments in words:
        if continues:
            text += f"{word} \\\n"
            expected[-1] += f"{word} "
        else:
            text += word + ("  # more" if comments else "") + "\n"
            expected[-1] += word
            expected.append("")
    assert [line for _, line in logical_lines(text)] == [part.strip() for part in expected if part]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_has_lines_and_any_line_is_read_or_refused(text: str) -> None:
    last = 0
    for number, line in logical_lines(text):
        assert number > last
        assert line == line.strip() != ""
        last = number
        with contextlib.suppress(LineError):
            parse_line(line)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["--pre", "--no-index", "--require-hashes"]).map(lambda n: (n, "")),
            st.tuples(st.sampled_from(["--index-url", "--find-links", "--hash"]), WORDS),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_options_are_found_however_they_are_spelled(
    options: list[tuple[str, str]], joined: bool
) -> None:
    words = [name + (("=" if joined else " ") + value if value else "") for name, value in options]
    line = parse_line(" ".join(["six", *words]))
    assert line.requirement == "six"
    assert list(line.options) == options
