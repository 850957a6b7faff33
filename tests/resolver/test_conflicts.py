from __future__ import annotations

import pytest

from envstore.resolver.conflicts import clip, conda_conflict, uv_conflict

BOTH = """Cannot solve the request because of: lib * cannot be installed because there are no \
viable options:
└─ lib 2 would require
   └─ numpy <1.9, for which no candidates were found.
The following packages are incompatible
├─ app * can be installed with any of the following options:
│  └─ app 1.0 would require
│     └─ numpy >=2, which can be installed with any of the following options:
│        └─ numpy 2.0
└─ lib * cannot be installed because there are no viable options:
   └─ lib 1 would require
      └─ numpy <2, which cannot be installed because there are no viable options:
         └─ numpy 1.26, which conflicts with the versions reported above.
"""


def test_a_tree_of_reasons_becomes_a_line() -> None:
    assert str(conda_conflict(BOTH)) == (
        "no set of conda packages fits: lib 2 -> numpy <1.9, which nothing provides; "
        "app 1.0 -> numpy >=2 -> numpy 2.0; "
        "lib 1 -> numpy <2 -> numpy 1.26, which conflicts (loosen or remove one of these)"
    )


def test_many_reasons_are_counted() -> None:
    lines = [
        f"└─ p{number} would require\n   └─ q{number} >=1, for which no candidates were found."
        for number in range(9)
    ]
    said = str(conda_conflict("\n".join(lines)))
    assert "q2 >=1" in said
    assert "q3 >=1" not in said
    assert "and 6 more" in said


@pytest.mark.parametrize("text", ["", "something new\nthat nobody expected", "└─", "│  ├─ x"])
def test_whatever_a_solver_says_is_repeated_in_a_line(text: str) -> None:
    for made in (conda_conflict(text), uv_conflict(text)):
        assert "\n" not in str(made)
        assert all(word in str(made) for word in text.split() if word.isalpha())


def test_long_reasons_are_cut_at_a_word() -> None:
    assert clip("a " * 1000).endswith(" a ...")
    assert len(clip("word " * 1000)) < 620
    assert clip("a\n  b") == "a b"


def test_a_chain_of_sentences_becomes_a_line() -> None:
    said = """No solution found when resolving dependencies
  cause: Because all versions of pandas depend on numpy{python_full_version < '3.14'}>=2.0.2 and \
you require pandas, we can conclude that you require numpy>=2.0.2.
         And because you require numpy<2, we can conclude that your requirements are unsatisfiable.
"""
    assert str(uv_conflict(said)) == (
        "no set of Python packages fits: all versions of pandas depend on numpy>=2.0.2 and you "
        "require pandas: you require numpy>=2.0.2; you require numpy<2 "
        "(loosen or remove one of these)"
    )
