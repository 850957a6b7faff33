from __future__ import annotations

import pytest

from envstore.errors import NotFoundError
from envstore.resolver.explain import Chain, Item, Need, explain
from envstore.resolver.lock import LocalPython, Lock
from envstore.resolver.request import CondaRequest, PypiRequest, Request
from tests.locks import conda, sha256, wheel

PYTHON = Item("conda", "python", "3.11.7")
NUMPY = Item("conda", "numpy", "2.1.3")
PANDAS = Item("pypi", "pandas", "2.2")
DEMO = Item("pypi", "demo", "1.0")


def environment() -> Lock:
    return Lock(
        "linux-64",
        (
            conda("python", "3.11.7", depends=("__glibc >=2.17", "libzlib >=1.2", "pip")),
            conda("libzlib", "1.3"),
            # pip and python need each other, as they do on real channels.
            conda("pip", "24.0", depends=("python >=3.8",)),
            conda("numpy", "2.1.3", depends=("python >=3.11", "main::libzlib[version='>=1']")),
            conda("pytorch-cpu", "2.5", extra={"purls": ["pkg:pypi/torch@2.5"]}),
            wheel("pandas", "2.2", requires=("NumPy>=1.26", "six; extra == 'test'")),
            wheel("six", "1.17"),
            wheel(
                "demo",
                extras=("fast",),
                requires=(
                    "six>=1; extra == 'fast'",
                    "colorama; sys_platform == 'win32'",
                    "torch>=2",
                    "pandas",
                    "not a requirement(",
                ),
                requires_python=">=3.9",
            ),
            wheel("colorama"),
            wheel("alone"),
        ),
        virtual={"__glibc": "2.28"},
        request=Request(
            conda=CondaRequest(("python 3.11.*", "numpy >=2", "tool")),
            pypi=PypiRequest(("demo[fast]>=1", "pandas>=2")),
        ),
    )


def test_a_package_that_was_asked_for_and_is_needed_too() -> None:
    (found,) = explain(environment(), "numpy")
    assert found.item == NUMPY
    assert found.needed_by == (Need(PANDAS, "NumPy>=1.26"),)
    assert found.chains == (
        Chain("numpy >=2", ()),
        Chain("pandas>=2", (Need(PANDAS, "NumPy>=1.26"),)),
        Chain("demo[fast]>=1", (Need(DEMO, "pandas"), Need(PANDAS, "NumPy>=1.26"))),
    )


def test_chains_go_through_cycles_and_both_kinds() -> None:
    (found,) = explain(environment(), "libzlib")
    assert [chain.asked for chain in found.chains] == [
        "python 3.11.*",
        "numpy >=2",
        "demo[fast]>=1",
        "pandas>=2",
    ]
    assert found.chains[1].needs == (Need(NUMPY, "main::libzlib[version='>=1']"),)
    assert found.chains[2].needs == (Need(DEMO, "python>=3.9"), Need(PYTHON, "libzlib >=1.2"))


def test_what_the_target_must_have_is_explained() -> None:
    (found,) = explain(environment(), "__glibc")
    assert found.item == Item("virtual", "__glibc", "2.28")
    assert found.needed_by == (Need(PYTHON, "__glibc >=2.17"),)


def test_markers_and_extras_decide() -> None:
    (six,) = explain(environment(), "six")
    assert six.needed_by == (Need(DEMO, "six>=1"),)
    (colorama,) = explain(environment(), "colorama")
    assert colorama.needed_by == ()
    assert colorama.chains == ()


def test_a_distribution_that_a_conda_package_provides() -> None:
    (found,) = explain(environment(), "pytorch-cpu")
    assert found.needed_by == (Need(DEMO, "torch>=2"),)


def test_names_are_compared_as_their_kind_has_it() -> None:
    assert explain(environment(), "PyTorch-CPU") == explain(environment(), "pytorch-cpu")
    lock = Lock("linux-64", (wheel("typing-extensions"), conda("typing_extensions")))
    assert [found.item.kind for found in explain(lock, "Typing_Extensions")] == ["pypi", "conda"]


def test_a_package_that_is_not_there_has_similar_names() -> None:
    with pytest.raises(NotFoundError, match=r"nunpy is not in this environment \(there is numpy"):
        explain(environment(), "nunpy")


def test_a_local_interpreter_is_needed_by_wheels() -> None:
    python = LocalPython("3.11.2", sha256("p"), "lib/python3.11/site-packages")
    request = Request(pypi=PypiRequest(("click",)), python=">=3.10")
    lock = Lock("linux-64", (python, wheel("click", requires_python=">=3.8")), request=request)
    (found,) = explain(lock, "python")
    click = Item("pypi", "click", "1.0")
    assert found.item.kind == "python"
    assert found.chains == (
        Chain("python >=3.10", ()),
        Chain("click", (Need(click, "python>=3.8"),)),
    )


def test_wheels_that_a_lock_says_were_requested_begin_chains() -> None:
    lock = Lock("linux-64", (wheel("a", requires=("b",), requested=True), wheel("b")))
    (found,) = explain(lock, "b")
    assert [(chain.asked, len(chain.needs)) for chain in found.chains] == [("a", 1)]


def test_many_ways_cost_no_more_than_the_packages() -> None:
    layers = 60
    packages = [
        conda(f"p{layer}-{side}", depends=(f"p{layer + 1}-0", f"p{layer + 1}-1"))
        for layer in range(layers)
        for side in range(2)
    ]
    last = f"p{layers}-0"
    lock = Lock(
        "linux-64",
        (*packages, conda(last)),
        request=Request(conda=CondaRequest(("p0-0", "p0-1"))),
    )
    (found,) = explain(lock, last)
    assert [len(chain.needs) for chain in found.chains] == [layers, layers]
