from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.resolver.packages.entry_points import (
    EntryPoint,
    parse_conda,
    parse_groups,
    scripts,
)
from envstore.store.relocation import PLACEHOLDER


@pytest.mark.parametrize(
    ("value", "module", "function"),
    [
        ("a:b", "a", "b"),
        ("a.b.c:d.e", "a.b.c", "d.e"),
        ("  a : b  ", "a", "b"),
        ("a:b [x,y]", "a", "b"),
        ("a:b[x]", "a", "b"),
        ("a-b:c_d1", "a-b", "c_d1"),
    ],
)
def test_what_is_called_is_read(value: str, module: str, function: str) -> None:
    assert EntryPoint.parse("run", value) == EntryPoint("run", module, function)


@pytest.mark.parametrize(
    "value", ["", "a", "a:", ":b", "a:b:c", "a b:c", "a:b()", "a:b\nimport os", "a:b [", "a;x:b"]
)
def test_what_is_no_function_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="is not valid"):
        EntryPoint.parse("run", value)


@pytest.mark.parametrize("command", ["", ".", "..", "a/b", "/a", "a\0", "a\nb", "x" * 256, "a\\b"])
def test_what_is_no_file_name_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="no name of a command"):
        EntryPoint.parse(command, "a:b")


@pytest.mark.parametrize("command", ["python", "python3", "python3.11", "python3.13t", "pythonw"])
def test_the_interpreter_is_not_replaced(command: str) -> None:
    with pytest.raises(ValueError, match="replace the interpreter"):
        EntryPoint.parse(command, "a:b")


@given(st.text(), st.text())
def test_scripts_are_programs_whatever_a_package_says(command: str, value: str) -> None:
    try:
        point = EntryPoint.parse(command, value)
    except ValueError:
        return
    for script in (point.conda_script("3.11"), point.pypa_script()):
        assert script.startswith(b"#!" + PLACEHOLDER + b"/bin/python")
        assert script.count(point.module.encode()) >= 1
        assert len(script.splitlines()) in (9, 10)


def test_lines_of_link_json_are_read() -> None:
    assert parse_conda("run = a.b:c") == EntryPoint("run", "a.b", "c")
    assert parse_conda("run=a:b") == EntryPoint("run", "a", "b")
    with pytest.raises(ValueError, match="is not valid"):
        parse_conda("run")


def test_names_keep_their_case_and_later_lines_win() -> None:
    text = "[console_scripts]\nRun = a:b\nRun = a:c\nrun = a:d\n%s = a:e\n"
    assert parse_groups(text) == {"console_scripts": {"Run": "a:c", "run": "a:d", "%s": "a:e"}}
    assert [point.command for point in scripts(parse_groups(text), "3.11")] == ["%s", "Run", "run"]


def test_a_command_of_both_kinds_is_one() -> None:
    groups = {"gui_scripts": {"x": "a:gui", "y": "a:gui"}, "console_scripts": {"x": "a:console"}}
    assert [(one.command, one.function) for one in scripts(groups, "3.11")] == [
        ("x", "console"),
        ("y", "gui"),
    ]


@pytest.mark.parametrize("text", ["x = y\n", "[a]\nno value\n", "[a\n", "[a]\n  = y\n"])
def test_text_that_is_no_entry_points_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"entry_points\.txt is not valid"):
        parse_groups(text)
