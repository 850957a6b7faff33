from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from envstore.errors import CorruptError, EnvstoreError
from envstore.resolver.activation import activated, read_activation
from envstore.resolver.hooks import shell_hook

OUTER = {"VIRTUAL_ENV": "/outer", "CONDA_PREFIX": "/conda", "PYTHONHOME": "/home", "X": "x"}


def prefix_of(root: Path, *files: str) -> Path:
    root.mkdir()
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch(mode=0o755)
    return root


def surroundings(prefix: Path, **base: str) -> dict[str, str]:
    return activated(read_activation(prefix, "name:tag", base), base)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["data"], OUTER),
        (["bin/tool"], OUTER),
        (["bin/python3"], {"X": "x"}),
        (
            ["bin/python", "pyvenv.cfg"],
            {"X": "x", "VIRTUAL_ENV": "PREFIX", "VIRTUAL_ENV_PROMPT": "name:tag"},
        ),
        (
            ["bin/python", "conda-meta/history"],
            {
                "X": "x",
                "CONDA_PREFIX": "PREFIX",
                "CONDA_DEFAULT_ENV": "name:tag",
                "CONDA_PROMPT_MODIFIER": "(name:tag) ",
                "CONDA_SHLVL": "1",
            },
        ),
    ],
)
def test_kinds_of_prefixes(tmp_path: Path, files: list[str], told: dict[str, str]) -> None:
    prefix = prefix_of(tmp_path / "prefix", *files)
    found = surroundings(prefix, **OUTER, PATH="/usr/bin:/bin")
    assert found.pop("ENVSTORE_PREFIX") == str(prefix)
    first = f"{prefix}/bin:" if files != ["data"] else ""
    assert found.pop("PATH") == f"{first}/usr/bin:/bin"
    expected = {key: value.replace("PREFIX", str(prefix)) for key, value in told.items()}
    assert found == expected


def test_without_a_path_there_is_the_usual_one(tmp_path: Path) -> None:
    prefix = prefix_of(tmp_path / "prefix", "bin/tool")
    for base in ({}, {"PATH": ""}):
        assert surroundings(prefix, **base)["PATH"] == f"{prefix}/bin:{os.defpath}"


def test_no_shell_is_started_for_variables_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = prefix_of(tmp_path / "prefix", "conda-meta/history", "etc/conda/env_vars.d/a.json")
    (prefix / "etc/conda/env_vars.d/a.json").write_text('{"A": "b"}')
    (prefix / "etc/conda/activate.d").mkdir()
    (prefix / "etc/conda/activate.d/notes.txt").touch()
    monkeypatch.setattr("subprocess.run", None)
    assert surroundings(prefix)["A"] == "b"


def test_scripts_see_what_was_set_before_and_change_it(tmp_path: Path) -> None:
    prefix = prefix_of(tmp_path / "prefix", "conda-meta/history", "etc/conda/activate.d/a.sh")
    (prefix / "etc/conda/activate.d/a.sh").write_text(
        'export A="$CONDA_PREFIX $CONDA_DEFAULT_ENV"\nunset GONE\nexport PATH="/mine:$PATH"\n'
        'export B="two\nlines"\ncd /\n'
    )
    (tmp_path / "startup").write_text("export STARTUP=1\n")
    own = {"SHLVL": "3", "PWD": "/x", "_": "y", "BASH_ENV": str(tmp_path / "startup")}
    found = surroundings(prefix, PATH=os.environ["PATH"], GONE="1", **own)
    assert found["A"] == f"{prefix} name:tag"
    assert found["B"] == "two\nlines"
    assert "GONE" not in found
    assert found["PATH"].startswith("/mine:")
    assert {name: found[name] for name in own} == own
    assert not {"OLDPWD", "STARTUP"} & set(found)
    with pytest.raises(EnvstoreError, match="no sh on PATH"):
        surroundings(prefix, PATH=str(tmp_path))


@pytest.mark.timeout(60)
def test_what_a_script_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    prefix = prefix_of(tmp_path / "env", "bin/python", "etc/conda/activate.d/agent.sh")
    script = prefix / "etc/conda/activate.d/agent.sh"
    script.write_text("sleep 3600 &\nexport AGENT=$!\n")
    agent = int(surroundings(prefix, PATH=os.defpath)["AGENT"])
    os.kill(agent, signal.SIGKILL)


def test_a_link_that_is_no_directory_of_scripts(tmp_path: Path) -> None:
    prefix = prefix_of(tmp_path / "prefix", "etc/conda", "conda-meta")
    activation = read_activation(prefix, "name", {})
    assert (activation.enter, activation.leave) == ((), ())
    assert "CONDA_PREFIX" not in activation.variables
    nested = prefix_of(tmp_path / "nested", "conda-meta/state")
    (nested / "conda-meta/state").write_text("[" * 100_000)
    with pytest.raises(CorruptError, match="no JSON"):
        read_activation(nested, "name", {})


def test_what_a_prompt_could_misread_is_not_in_it(tmp_path: Path) -> None:
    prefix = prefix_of(tmp_path / "prefix", "bin/tool")
    activation = read_activation(prefix, "a$(id)`id`%n\\w", {})
    assert activation.prompt == "(a__id__id__n_w) "
    assert "$(id)" not in shell_hook(activation, "bash").replace("'", "")
