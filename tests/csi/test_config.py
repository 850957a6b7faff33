from __future__ import annotations

import logging
import os
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from envstore.csi.config import (
    ConfigFile,
    DriverConfig,
    NamedStore,
    Rule,
    read_config,
    single_store,
)
from envstore.errors import UsageError
from tests.commands import Cli

GOOD = """
    stores:
      main:
        url: s3://envs/prod?endpoint=https://s3.example&path_style=1
        credentials: secret
      models: {url: "s3://models", credentials: volume}
      local: {url: file:///srv/store}
    default: main
    policy:
      - namespaces: [team-*]
        serviceAccounts: [trainer]
        stores: [main, local]
        refs: [default/*, "team/*:prod-?", "*"]
        modes: [ro]
      - namespaceLabels: {tier: [gold, silver], example.org/ok: "yes"}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(dedent(text))
    return path


def problem(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_config(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return message.replace(str(path), "FILE")


def test_a_file_says_which_stores_there_are_and_who_may_use_them(tmp_path: Path) -> None:
    found = read_config(write(tmp_path / "config.yaml", GOOD))
    assert found == DriverConfig(
        {
            "main": NamedStore(
                "main", "s3://envs/prod?endpoint=https://s3.example&path_style=1", "secret"
            ),
            "models": NamedStore("models", "s3://models", "volume"),
            "local": NamedStore("local", "file:///srv/store", "node"),
        },
        "main",
        (
            Rule(
                namespaces=("team-*",),
                service_accounts=("trainer",),
                stores=("main", "local"),
                refs=("default/*", "team/*:prod-?", "*"),
                modes=("ro",),
            ),
            Rule(labels=(("tier", ("gold", "silver")), ("example.org/ok", ("yes",)))),
        ),
    )


def test_one_store_alone_is_the_default_and_of_several_none_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    one = "stores: {main: {url: s3://envs}}\npolicy: []"
    assert read_config(write(path, one)).default == "main"
    two = "stores: {main: {url: s3://envs}, other: {url: s3://others}}\npolicy: []"
    assert read_config(write(path, two)).default == ""


def test_without_a_file_everybody_may_use_the_one_store() -> None:
    found = single_store("file:///srv/store")
    assert found.default == "default"
    assert found.stores["default"].url == "file:///srv/store"
    assert found.rules == (Rule(),)


BASE: dict[str, Any] = {
    "stores": {"main": {"url": "s3://envs"}},
    "policy": [{"namespaces": ["*"]}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stores": None}, "FILE: stores: is not a table"),
        ({"stores": {}}, "FILE: stores: there is none"),
        ({"stores": {"Main": {"url": "s3://e"}}}, "FILE: stores: 'Main' is no name"),
        ({"stores": {"../x": {"url": "s3://e"}}}, "FILE: stores: '../x' is no name"),
        ({"stores": {1: {"url": "s3://e"}}}, "FILE: stores: '1' is no name"),
        ({"stores": {"main": "s3://e"}}, "FILE: stores.main: is not a table"),
        ({"stores": {"main": {}}}, "FILE: stores.main: url is missing"),
        ({"stores": {"main": {"url": 1}}}, "FILE: stores.main.url: is not a string"),
        ({"stores": {"main": {"url": "/srv"}}}, "FILE: stores.main.url: is no URL"),
        ({"stores": {"main": {"url": "http://e"}}}, "FILE: stores.main.url: unknown scheme http"),
        ({"stores": {"main": {"url": "s3://"}}}, "FILE: stores.main.url: the store URL"),
        (
            {"stores": {"main": {"url": "s3://e", "endpoint": "x"}}},
            "FILE: stores.main: 'endpoint' is not known, but url, credentials are",
        ),
        (
            {"stores": {"main": {"url": "s3://envs", "credentials": "iam"}}},
            "FILE: stores.main.credentials: is not one of node, secret, volume",
        ),
        (
            {"stores": {"main": {"url": "s3://envs", "credentials": ["node"]}}},
            "FILE: stores.main.credentials: is not one of",
        ),
        (
            {"stores": {"main": {"url": "file:///x", "credentials": "secret"}}},
            "FILE: stores.main.credentials: a store in a directory takes no keys",
        ),
        (
            {"stores": {"main": {"url": "s3://envs?profile=p", "credentials": "volume"}}},
            "FILE: stores.main.url: profile= means nothing with keys of the volume",
        ),
        ({"default": "other"}, "FILE: default: is not the name of a store"),
        ({"default": ""}, "FILE: default: is not the name of a store"),
        ({"default": ["main"]}, "FILE: default: is not the name of a store"),
        ({"policies": []}, "FILE: 'policies' is not known, but stores, default, policy are"),
        ({"policy": None}, "FILE: policy: is not a list"),
        ({"policy": {}}, "FILE: policy: is not a list"),
        ({"policy": ["*"]}, "FILE: policy[0]: is not a table"),
        ({"policy": [{}]}, "FILE: policy[0]: has no condition"),
        (
            {"policy": [{"namespaces": ["*"]}, {"namespace": ["a"]}]},
            "FILE: policy[1]: 'namespace' is not known",
        ),
        ({"policy": [{"namespaces": "a"}]}, "FILE: policy[0].namespaces: is not a list"),
        ({"policy": [{"namespaces": []}]}, "FILE: policy[0].namespaces: is empty"),
        ({"policy": [{"namespaces": [1]}]}, "FILE: policy[0].namespaces[0]: is not a string"),
        ({"policy": [{"namespaces": ["a", "[a]"]}]}, "FILE: policy[0].namespaces[1]: '[a]' is not"),
        ({"policy": [{"namespaces": [None]}]}, "FILE: policy[0].namespaces[0]: is not a string"),
        ({"policy": [{"stores": ["other"]}]}, "FILE: policy[0].stores[0]: 'other' is not a store"),
        ({"policy": [{"stores": ["ma*"]}]}, "FILE: policy[0].stores[0]: 'ma*' is not a store"),
        ({"policy": [{"refs": ["a"]}]}, "FILE: policy[0].refs[0]: 'a' is not namespace/name"),
        ({"policy": [{"refs": ["a/b/c"]}]}, "FILE: policy[0].refs[0]: 'a/b/c' is not"),
        ({"policy": [{"refs": ["a/b:c:d"]}]}, "FILE: policy[0].refs[0]: 'a/b:c:d' is not"),
        ({"policy": [{"refs": ["a/b@c"]}]}, "FILE: policy[0].refs[0]: 'a/b@c' is not"),
        ({"policy": [{"modes": ["rw"]}]}, "FILE: policy[0].modes[0]: 'rw' is not one of ro"),
        (
            {"policy": [{"serviceAccounts": ["admin"]}]},
            "FILE: policy[0].serviceAccounts: also say namespaces or namespaceLabels",
        ),
        ({"policy": [{"namespaceLabels": {}}]}, "FILE: policy[0].namespaceLabels: is empty"),
        ({"policy": [{"namespaceLabels": ["a"]}]}, "FILE: policy[0].namespaceLabels: is not a"),
        (
            {"policy": [{"namespaceLabels": {"tier": True}}]},
            "FILE: policy[0].namespaceLabels.tier[0]: is not a string (quote it)",
        ),
        (
            {"policy": [{"namespaceLabels": {"tier": []}}]},
            "FILE: policy[0].namespaceLabels.tier: is empty",
        ),
        (
            {"policy": [{"namespaceLabels": {"a b": "c"}}]},
            "FILE: policy[0].namespaceLabels: 'a b' is not the name of a label",
        ),
        (
            {"policy": [{"namespaceLabels": {"a": "b c"}}]},
            "FILE: policy[0].namespaceLabels.a[0]: 'b c' is not a label's value",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "config.yaml", yaml.safe_dump({**BASE, **change}))
    assert problem(path).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FILE: is not a table"),
        ("[]", "FILE: is not a table"),
        ("stores: [", "FILE in line 1 is not YAML"),
        ("a: 1\na: 2", "FILE in line 2 is not YAML: the key 'a' is given twice"),
        ("a: &x 1\nb: *x", "FILE in line 2 is not YAML: aliases are not taken here"),
        ("a: !!python/object/apply:os.system [id]", "FILE in line 1 is not YAML: could not"),
        ("? [a]\n: b", "FILE in line 1 is not YAML: the key"),
        ("a: 1\n---\nb: 2", "FILE in line 2 is not YAML"),
        ("a: 2024-99-99", "FILE is not YAML"),
        ("a: \x01", "FILE is not YAML"),
        ("[" * 5000, "FILE is nested too deeply"),
        ("policy: []", "FILE: stores is missing"),
        ("stores: {main: {url: s3://e}}", "FILE: policy is missing"),
        ("#" * (1 << 20) + "\n", "FILE is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert problem(path).startswith(said)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert problem(path) == "cannot read FILE: No such file or directory"
    path.write_bytes(b"\xff\xfe")
    assert problem(path) == "FILE is not UTF-8"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAXYZ:hunter2@envs",
        "s3://envs?endpoint=https://me:hunter2@s3.example",
        "s3://envs?secret_access_key=hunter2",
        "file://me:hunter2@host/srv",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    path = write(
        tmp_path / "config.yaml", yaml.safe_dump({**BASE, "stores": {"main": {"url": url}}})
    )
    assert "hunter2" not in problem(path)


_WORDS = st.sampled_from(
    ["stores", "default", "policy", "url", "credentials", "refs", "namespaces", "main", "*", "a/b"]
)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | _WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(change=st.dictionaries(_WORDS, _ANY, max_size=3))
def test_whatever_a_file_says_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({**BASE, **change}))
    try:
        read_config(path)
    except UsageError:
        problem(path)


# --- a file that changes ------------------------------------------------------------------------

ONE = "stores: {main: {url: s3://one}}\npolicy: []"
TWO = "stores: {main: {url: s3://two}}\npolicy: []"


def config_map(directory: Path, text: str, version: int) -> Path:
    """Write a ConfigMap's volume as the kubelet does: every version a directory, a link swapped."""
    versions = directory / f"..2026_{version}"
    versions.mkdir(parents=True)
    (versions / "config.yaml").write_text(text)
    (directory / "..new").symlink_to(versions.name)
    os.rename(directory / "..new", directory / "..data")
    if version == 1:
        (directory / "config.yaml").symlink_to("..data/config.yaml")
    return directory / "config.yaml"


def test_a_config_map_that_changes_counts_at_once(tmp_path: Path) -> None:
    config = ConfigFile(config_map(tmp_path, ONE, 1))
    assert config().stores["main"].url == "s3://one"
    assert config() is config()
    config_map(tmp_path, TWO, 2)
    assert config().stores["main"].url == "s3://two"


def test_a_broken_change_leaves_the_last_good_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = config_map(tmp_path, ONE, 1)
    config = ConfigFile(path)
    config_map(tmp_path, "stores: {}", 2)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert config().stores["main"].url == "s3://one"
    assert "policy is missing" in config.problem
    assert len(caplog.records) == 1
    path.unlink()
    assert config().stores["main"].url == "s3://one"
    assert config.problem == f"cannot read {path}: No such file or directory"
    path.write_text(TWO)
    assert config().stores["main"].url == "s3://two"
    assert config.problem == ""


def test_a_file_that_is_broken_from_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        ConfigFile(tmp_path / "config.yaml")


# --- envstore csi check-config ------------------------------------------------------------------


def test_people_are_told_what_a_file_means(tmp_path: Path) -> None:
    cli, path = Cli(tmp_path / "cli"), write(tmp_path / "config.yaml", GOOD)
    lines = cli.ok("csi", "check-config", path).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "STORE URL CREDENTIALS",
        "main (default) s3://envs/prod?endpoint=https://s3.example&path_style=1"
        " the driver's, in the directory main of --credentials",
        "models s3://models of the Secret that each volume names",
        "local file:///srv/store the node server's own",
        "rule 1 lets pods in namespaces team-* as service accounts trainer read every ref of main"
        " or local",
        "rule 2 lets pods in namespaces with tier = gold or silver and example.org/ok = yes read"
        " every ref of every store",
        "all else is denied",
    ]


def test_programs_are_told_what_a_file_means(tmp_path: Path) -> None:
    cli, path = Cli(tmp_path / "cli"), write(tmp_path / "config.yaml", GOOD)
    found = cli.json("csi", "check-config", path)
    assert found["default"] == "main"
    assert found["stores"][1] == {
        "name": "models",
        "url": "s3://models",
        "credentials": "volume",
    }
    written = yaml.safe_load(dedent(GOOD))["policy"]
    written[1]["namespaceLabels"]["example.org/ok"] = ["yes"]
    assert found["policy"] == written


def test_a_file_that_no_driver_would_take(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "cli")
    path = write(tmp_path / "config.yaml", "stores: {main: {url: s3://envs}}\npolicy: [{}]")
    cli.fails(2, "csi", "check-config", path, says=[f"{path}: policy[0]: has no condition"])
