from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from envstore.errors import UsageError
from envstore.resolver.conda import solve
from envstore.resolver.lock import CondaPackage
from envstore.resolver.provided import names_at_hand, names_in
from envstore.resolver.stubs import Provided, python_names, read_names, write_stubs
from envstore.resolver.target import make_target
from tests.channel.conda import build_channel
from tests.resolver.surroundings import _no_settings, cache

__all__ = ["_no_settings", "cache"]


def package(name: str, version: str = "1.0", *depends: str, **more: object) -> CondaPackage:
    values = {"noarch": "", "extra": {}, **more}
    return CondaPackage(
        name,
        version,
        "0",
        "linux-64",
        f"https://channels.example/linux-64/{name}-{version}-0.conda",
        name.encode().hex().ljust(64, "0")[:64],
        depends=depends,
        **values,  # type: ignore[arg-type]
    )


def named(*packages: CondaPackage, **more: object) -> dict[str, str]:
    found = python_names(packages, **{"known": {}, **more})  # type: ignore[arg-type]
    return {item.name: item.version for item in found}


def test_packages_that_depend_on_python_are_distributions() -> None:
    assert named(
        package("numpy", "2.1.3", "python >=3.11,<3.12.0a0", "python_abi 3.11.* *_cp311"),
        package("click", "8.1", "python"),
        package("typing_extensions", "4.12", noarch="python"),
        package("openssl", "3.3.0"),
        package("python", "3.11.7", "openssl"),
    ) == {"numpy": "2.1.3", "click": "8.1", "typing-extensions": "4.12"}


def test_other_names_that_are_well_known() -> None:
    found = named(
        package("pytorch", "2.5.1", "python"),
        package("matplotlib-base", "3.9", "python"),
        package("matplotlib", "3.9", "python"),
        package("msgpack-python", "1.1", "python"),
    )
    assert found == {"torch": "2.5.1", "matplotlib": "3.9", "msgpack": "1.1"}


def test_what_the_channel_says_comes_before_guesses() -> None:
    purls = {"purls": ["pkg:pypi/PyYAML@6.0.2", "pkg:conda/pyyaml"]}
    assert named(package("yaml-py", "6", "python", extra=purls)) == {"pyyaml": "6.0.2"}
    assert named(package("not-a-dist", "6", "python", extra={"purls": []})) == {}
    bare = {"purls": ["pkg:pypi/Requests"]}
    assert named(package("requests", "2.32", extra=bare)) == {"requests": "2.32"}


def test_what_a_package_holds_comes_before_what_is_said_of_it() -> None:
    one = package("jupyter", "1.0", "python", extra={"purls": ["pkg:pypi/wrong@1"]})
    known = {one.sha256: [("notebook_shim", "0.2.4"), ("Jupyter.Core", "5.7")]}
    assert named(one, known=known) == {"jupyter-core": "5.7", "notebook-shim": "0.2.4"}
    assert named(one, known={one.sha256: []}) == {}


def test_the_user_has_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"opencv": ["opencv-python", "cv2-extra"], "vim": None, "a": "b"}))
    names = read_names(path)
    found = named(
        package("opencv", "4.10", "python"),
        package("vim", "9", "python"),
        package("a", "1", "python"),
        renamed=names,
    )
    assert found == {"opencv-python": "4.10", "cv2-extra": "4.10", "b": "1"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1, column 2"),
        ("[]", "must hold an object"),
        ('{"a": 1}', "'a' must have a name"),
        ('{"a": [""]}', "'a' must have a name"),
    ],
)
def test_malformed_files_of_names(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_names(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_names(tmp_path / "absent.json")


def test_versions_that_pypi_has_no_form_for_are_left_out() -> None:
    assert named(package("tzdata", "2024a-1_x", "python"), package("a", "9e", "python")) == {}


def test_names_are_read_from_lists_of_files() -> None:
    assert names_in(
        [
            "lib/python3.11/site-packages/numpy-2.1.3.dist-info/METADATA",
            "lib/python3.11/site-packages/numpy-2.1.3.dist-info/RECORD",
            "site-packages/ruamel.yaml-0.18.dist-info/METADATA",
            "lib/python3.11/site-packages/old-1.2-py3.11.egg-info/PKG-INFO",
            "lib/python3.11/site-packages/older-1.3-py3.11.egg-info",
            "lib/python3.11/site-packages/thing/vendored-1.0.py",
        ]
    ) == [("numpy", "2.1.3"), ("old", "1.2"), ("older", "1.3"), ("ruamel.yaml", "0.18")]


def test_packages_on_this_machine_are_asked_themselves(tmp_path: Path, cache: Path) -> None:
    channel = build_channel(tmp_path / "channel", ["hello-pkg", "binprefix", "greeting"])
    target = make_target()
    found = solve(["hello-pkg", "binprefix"], [channel.url], target, cache=cache / "repodata")
    downloads = tmp_path / "downloads"
    names = names_at_hand(found, {}, downloads)
    by_name = {item.name: names[item.sha256] for item in found}
    assert [name.replace("_", "-") for name, _ in by_name["hello-pkg"]] == ["hello-pkg"]
    assert by_name["binprefix"] == []
    # Then binprefix, which depends on python, is known to be no distribution.
    assert [item.name for item in python_names(found, names)] == ["hello-pkg"]
    assert names_at_hand(found, {item.sha256: [] for item in found}, downloads) == {}
    # One from elsewhere may have been downloaded before.
    hello = next(item for item in found if item.name == "hello-pkg")
    downloads.mkdir()
    path = channel.package("hello-pkg").path
    (downloads / f"{hello.sha256}.conda").write_bytes(path.read_bytes())
    remote = dataclasses.replace(hello, url=f"https://channels.example/noarch/{path.name}")
    assert names_at_hand([remote], {}, downloads) == {hello.sha256: names[hello.sha256]}


def test_packages_elsewhere_are_not_looked_for(tmp_path: Path) -> None:
    assert names_at_hand([package("gone", "1.0", "python")], {}, tmp_path) == {}


def test_stubs_hold_a_name_and_a_version_alone(tmp_path: Path) -> None:
    provided = [Provided("scikit-learn", "1.5.2", "x"), Provided("torch", "2.5.1+cu124", "y")]
    assert write_stubs(provided, tmp_path / "stubs") == [
        "scikit-learn==1.5.2+conda",
        "torch==2.5.1+cu124",
    ]
    assert sorted(path.name for path in (tmp_path / "stubs").iterdir()) == [
        "scikit_learn-1.5.2+conda-py3-none-any.whl",
        "torch-2.5.1+cu124-py3-none-any.whl",
    ]
