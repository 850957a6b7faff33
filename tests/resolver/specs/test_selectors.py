"""Platform selectors of environment files."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.resolver.specs.selectors import KNOWN, evaluate, select, true_names


@pytest.mark.parametrize(
    ("selector", "platform", "holds"),
    [
        ("linux", "linux-64", True),
        ("linux64", "linux-64", True),
        ("linux64", "linux-aarch64", False),
        ("linux-aarch64", "linux-aarch64", True),
        ("aarch64", "linux-aarch64", True),
        ("x86_64", "osx-64", True),
        ("unix", "win-64", False),
        ("osx and arm64", "osx-arm64", True),
        ("not win", "linux-64", True),
        ("not not win", "linux-64", False),
        ("not (win or osx)", "linux-64", True),
        ("win or linux and x86_64", "linux-64", True),
        ("(win or linux) and arm64", "linux-64", False),
        ("linux or nonsense", None, False),
        ("linux linux", None, False),
        ("", None, False),
        ("()", None, False),
        ("(linux", None, False),
        ("linux)", None, False),
        ("and linux", None, False),
        ("not", None, False),
        ("__import__('os')", None, False),
        ("linux.real", None, False),
        ("(" * 500, None, False),
    ],
)
def test_selectors(selector: str, platform: str | None, holds: bool) -> None:
    if platform is None:
        with pytest.raises(ValueError, match=r"."):
            evaluate(selector, "linux-64")
    else:
        assert evaluate(selector, platform) is holds


NAMES = st.sampled_from(sorted(KNOWN))
EXPRESSIONS = st.recursive(
    NAMES.map(lambda name: (name, lambda true: name in true)),
    lambda inner: st.one_of(
        inner.map(lambda e: (f"not ({e[0]})", lambda true: not e[1](true))),
        st.tuples(inner, inner).map(
            lambda e: (f"({e[0][0]}) and ({e[1][0]})", lambda t: e[0][1](t) and e[1][1](t))
        ),
        st.tuples(inner, inner).map(
            lambda e: (f"({e[0][0]}) or ({e[1][0]})", lambda t: e[0][1](t) or e[1][1](t))
        ),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.sampled_from(["linux-64", "linux-aarch64", "osx-arm64", "win-64"]))
def test_values_are_those_of_logic(expression, platform: str) -> None:
    text, value = expression
    if len(text) <= 200:
        assert evaluate(text, platform) is value(true_names(platform))


@given(st.text(max_size=60))
def test_any_text_is_a_selector_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        evaluate(text, "linux-64")


def test_lines_whose_selector_does_not_hold_are_blank_with_all_below_them() -> None:
    unknown: list[tuple[int, str]] = []
    text = "\n".join(
        [
            "dependencies:",
            "  - a  # [win]",
            "  - b  # [linux]",
            "  - pip:  # [osx]",
            "    - c",
            "",
            "    - d",
            "  - e  # [for fun]",
            "  # [win]",
            "  - 'f#[win]'",
        ]
    )
    lines = select(text, "linux-64", unknown).split("\n")
    kept = ["dependencies:", "  - b  # [linux]", "  - e  # [for fun]", "  # [win]", "  - 'f#[win]'"]
    assert [line for line in lines if line] == kept
    assert lines[9] == "  - 'f#[win]'"
    assert unknown == [(8, "[for fun] is not taken for a selector: 'for' is no platform")]


def test_windows_line_ends() -> None:
    assert select("a:\r\n- b # [win]\r\n- c\r\n", "linux-64", []).split() == ["a:", "-", "c"]
