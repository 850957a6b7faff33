"""``activate``: what real shells make of the code it prints, and that they get everything back."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.channel.conda import Channel
from tests.channel.packing import SUBDIR
from tests.channel.solving import install
from tests.commands import Cli

ODD = "a b'c\"d $HOME `id` \\ é\n*"
POSIX = [shell for shell in ("bash", "sh", "zsh") if shutil.which(shell)]
SHELLS = [*POSIX, *(["fish"] if shutil.which("fish") else [])]
# What nobody is promised to find unchanged, or what a shell counts by itself.
_VOLATILE = {"_", "SHLVL", "PWD", "OLDPWD"}


def make_environment(root: Path, name: str, *, conda: bool = True) -> Path:
    """A prefix without a Python: a program, variables and scripts."""
    program = root / "bin" / "which-one"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho program of {name}\n")
    program.chmod(0o755)
    if not conda:
        return root
    (root / "bin" / "python3").symlink_to("/bin/true")
    (root / "conda-meta").mkdir()
    (root / "conda-meta/history").touch()
    state = {"env_vars": {"FROM_STATE": ODD, "TWICE": "state", "GONE": "***unset***"}}
    (root / "conda-meta/state").write_text(json.dumps(state))
    for folder in ("env_vars.d", "activate.d", "deactivate.d"):
        (root / "etc/conda" / folder).mkdir(parents=True)
    variables = {"FROM_PACKAGE": f"package of {name}", "TWICE": "package", "GONE": "1"}
    (root / "etc/conda/env_vars.d/package.json").write_text(json.dumps(variables))
    for order in "12":
        (root / f"etc/conda/activate.d/{order} script.sh").write_text(
            f'export SCRIPTS="${{SCRIPTS-}}{name}{order}:$FROM_PACKAGE;"\n'
        )
        (root / f"etc/conda/deactivate.d/{order} script.sh").write_text(
            f'echo "left {name}{order} $CONDA_PREFIX"; unset SCRIPTS\n'
        )
        (root / f"etc/conda/activate.d/{order} script.fish").write_text(
            f'set -gx SCRIPTS "$SCRIPTS"{name}{order}":$FROM_PACKAGE;"\n'
        )
        (root / f"etc/conda/deactivate.d/{order} script.fish").write_text(
            f'echo "left {name}{order} $CONDA_PREFIX"; set -e SCRIPTS\n'
        )
    return root


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to copy, with two environments and a plain tree."""
    base = tmp_path_factory.mktemp("template")
    cli = Cli(base / "cli")
    cli.ok("init")
    cli.ok("push", "one", make_environment(base / "one", "one"))
    cli.ok("push", "team/two:v2", make_environment(base / "two", "two"))
    cli.ok("push", "plain", make_environment(base / "plain", "plain", conda=False))
    return cli.store


@pytest.fixture
def two(cli: Cli, _template: Path) -> Iterator[Cli]:
    """The command line with that store; what is mounted goes away again."""
    shutil.copytree(_template, cli.store)
    cli.env["XDG_RUNTIME_DIR"] = str(cli.root / "run time")
    (cli.root / "run time").mkdir()
    yield cli
    for mount in cli.json("mounts")["mounts"]:
        cli.ok("umount", "--lazy", mount["mountpoint"])


class Shell:
    """Runs scripts in which ``activate REF`` is the user's line, and ``note X`` tells the state."""

    def __init__(self, cli: Cli, shell: str) -> None:
        self.cli, self.shell = cli, shell
        self.notes = cli.root / "notes"

    def __call__(self, script: str, env: dict[str, str] | None = None) -> str:
        command = " ".join(self.cli.argv("activate"))
        note = f"/usr/bin/env -0 > '{self.notes}'/$1"
        if self.shell == "fish":
            head = (
                f"function activate; {command} $argv | source; end\n"
                f"function note; /usr/bin/env -0 > '{self.notes}'/$argv[1]; end\n"
            )
            options = ["--no-config"]
        else:
            head = f'set -eu\nactivate() {{ eval "$({command} "$@")"; }}\nnote() {{ {note}; }}\n'
            options = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}.get(self.shell, [])
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        done = subprocess.run(
            [self.shell, *options, "-c", head + script],
            env={**self.cli.env, **(env or {})},
            cwd=self.cli.root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done
        assert done.stderr == ""
        return done.stdout

    def state(self, name: str) -> dict[str, str]:
        items = (self.notes / name).read_bytes().decode().split("\0")
        pairs = (item.partition("=") for item in items if item)
        return {name: value for name, _, value in pairs if name not in _VOLATILE}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, two: Cli) -> Shell:
    return Shell(two, request.param)


def test_there_is_a_bash() -> None:
    assert "bash" in SHELLS


def test_everything_is_set_and_everything_is_put_back(shell: Shell) -> None:
    before = {"FROM_PACKAGE": "mine", "VIRTUAL_ENV": "/venv"}
    out = shell(
        "note before\nactivate one\nnote inside\nwhich-one\nenvstore_deactivate\nnote after\n",
        before,
    )
    inside = shell.state("inside")
    prefix = inside["ENVSTORE_PREFIX"]
    assert prefix.startswith(f"{shell.cli.root}/run time/envstore/envs/one-")
    left = [f"left one{order} {prefix}" for order in "21"]
    assert out.splitlines() == ["program of one", *left]
    assert inside["PATH"] == f"{prefix}/bin:{shell.cli.env['PATH']}"
    assert inside["CONDA_PREFIX"] == prefix
    assert inside["CONDA_DEFAULT_ENV"] == "one"
    assert inside["CONDA_SHLVL"] == "1"
    assert inside["CONDA_PROMPT_MODIFIER"] == "(one) "
    assert inside["FROM_STATE"] == ODD
    assert inside["TWICE"] == "state"
    assert inside["FROM_PACKAGE"] == "package of one"
    assert inside["SCRIPTS"] == "one1:package of one;one2:package of one;"
    assert not {"GONE", "VIRTUAL_ENV"} & set(inside)
    assert shell.state("before") == shell.state("after")
    assert shell.state("after").items() >= before.items()


def test_a_second_environment_takes_the_place_of_the_first_until_it_is_left(shell: Shell) -> None:
    shell(
        "note before\nactivate one\nnote one\nactivate team/two:v2\nnote two\n"
        "envstore_deactivate\nnote again\nenvstore_deactivate\nnote after\n"
    )
    one, two = shell.state("one"), shell.state("two")
    assert two["PATH"] == f"{two['CONDA_PREFIX']}/bin:{shell.cli.env['PATH']}"
    assert (two["CONDA_SHLVL"], two["CONDA_PREFIX_1"]) == ("2", one["CONDA_PREFIX"])
    assert two["CONDA_DEFAULT_ENV"] == "team/two:v2"
    assert two["SCRIPTS"] == "two1:package of two;two2:package of two;"
    assert shell.state("again") == one
    assert shell.state("after") == shell.state("before")


def test_activating_twice_is_activating_once(two: Cli) -> None:
    shell = Shell(two, "bash")
    shell(
        "note before\nactivate one\nnote one\nactivate one\nnote twice\nenvstore_deactivate\n"
        "note after\n"
    )
    assert shell.state("twice") == shell.state("one")
    assert shell.state("after") == shell.state("before")


def test_a_conda_that_is_active_already_is_what_comes_back(two: Cli) -> None:
    shell = Shell(two, "bash")
    outer = {"CONDA_PREFIX": "/conda", "CONDA_SHLVL": "1", "CONDA_DEFAULT_ENV": "base"}
    shell("activate one\nnote inside\nenvstore_deactivate\nnote after\n", outer)
    inside = shell.state("inside")
    assert (inside["CONDA_SHLVL"], inside["CONDA_PREFIX_1"]) == ("2", "/conda")
    assert shell.state("after").items() >= outer.items()
    assert "CONDA_PREFIX_1" not in shell.state("after")


def test_a_tree_without_conda_has_its_programs_found(two: Cli) -> None:
    shell = Shell(two, "bash")
    out = shell("activate plain\nnote inside\nwhich-one\nenvstore_deactivate\nnote after\n")
    inside, after = shell.state("inside"), shell.state("after")
    assert out == "program of plain\n"
    prefix = inside.pop("ENVSTORE_PREFIX")
    assert inside.pop("PATH") == f"{prefix}/bin:{after.pop('PATH')}"
    assert inside == after


def test_what_was_done_to_path_meanwhile_stays(shell: Shell) -> None:
    change = (
        "set -gx PATH /first $PATH /last" if shell.shell == "fish" else "PATH=/first:$PATH:/last"
    )
    shell(f"activate one\n{change}\nenvstore_deactivate\nnote after\n")
    assert shell.state("after")["PATH"] == f"/first:{shell.cli.env['PATH']}:/last"


@pytest.mark.parametrize("name", POSIX)
def test_nothing_is_left_in_the_shell(two: Cli, name: str) -> None:
    shell = Shell(two, name)
    out = shell(
        'PS1=\'$ \'\nactivate one\necho "[$PS1]"\nactivate plain\necho "[$PS1]"\n'
        'envstore_deactivate\nenvstore_deactivate >/dev/null\necho "[$PS1]"\n'
        "set | grep '^_*envstore' | grep -v '^_=' || :\n"
        "type envstore_deactivate >/dev/null 2>&1 || echo gone\n"
    )
    lines = [line for line in out.splitlines() if not line.startswith("left ")]
    assert lines == ["[(one) $ ]", "[(plain) $ ]", "[$ ]", "gone"]


@pytest.mark.skipif("fish" not in SHELLS, reason="needs fish")
def test_nothing_is_left_in_fish(two: Cli) -> None:
    out = Shell(two, "fish")(
        "function fish_prompt; echo '[mine]'; end\nactivate one\nfish_prompt\nactivate plain\n"
        "fish_prompt\nenvstore_deactivate\nenvstore_deactivate >/dev/null\nfish_prompt\n"
        "functions -a | string match '*envstore*'\nset -n | string match '*envstore*'; true\n"
    )
    lines = [line for line in out.splitlines() if not line.startswith("left ")]
    assert lines == ["(one) [mine]", "(plain) [mine]", "[mine]"]


def test_deactivating_can_unmount(shell: Shell) -> None:
    shell("activate one\nenvstore_deactivate\n")
    (mount,) = shell.cli.json("mounts")["mounts"]
    out = shell("activate one\nnote inside\nenvstore_deactivate --umount\n")
    assert shell.state("inside")["ENVSTORE_PREFIX"] == mount["mountpoint"]
    assert f"unmounted {mount['mountpoint']}" in out
    assert shell.cli.json("mounts") == {"mounts": []}
    assert not os.path.exists(mount["mountpoint"])


def test_a_mount_that_is_gone_can_be_left(shell: Shell) -> None:
    umount = " ".join(shell.cli.argv("umount", "--lazy"))
    where = "$ENVSTORE_PREFIX" if shell.shell == "fish" else '"$ENVSTORE_PREFIX"'
    shell(
        f"note before\nactivate one\n{umount} {where} >/dev/null\nenvstore_deactivate\nnote after\n"
    )
    after = shell.state("after")
    del after["SCRIPTS"]  # what would have taken it back is gone
    assert after == shell.state("before")


def test_a_directory_of_ones_own(two: Cli, tmp_path: Path) -> None:
    place = tmp_path / "it's a $(place) of my own"
    line = json.dumps(str(place)).replace("$", "\\$")
    shell = Shell(two, "bash")
    shell(f"activate one --mountpoint {line}\nnote inside\nwhich-one\nenvstore_deactivate\n")
    assert shell.state("inside")["CONDA_PREFIX"] == str(place)
    (mount,) = two.json("mounts")["mounts"]
    assert mount["mountpoint"] == str(place)
    two.fails(
        2, "activate", "plain", "--mountpoint", place, says=["another snapshot", "envstore umount"]
    )
    two.fails(2, "activate", "plain", "--mountpoint", tmp_path / "a:b", says=["PATH"])


def test_a_ref_that_moved_is_mounted_beside_the_old_snapshot(two: Cli, tmp_path: Path) -> None:
    first = two.json("activate", "one", "--shell", "bash")
    two.ok("push", "one", make_environment(tmp_path / "newer", "newer"))
    second = two.json("activate", "one")
    assert first["mounted"]
    assert second["mounted"]
    assert not two.json("activate", "one")["mounted"]
    assert len({first["mountpoint"], second["mountpoint"]}) == 2
    for text in (first["digest"][:8], first["digest"]):
        assert two.json("activate", f"@{text}")["digest"] == first["digest"]


def test_shells_that_ask_at_once_share_one_mount(two: Cli) -> None:
    started = [two.start("--json", "activate", "one", stdout=subprocess.PIPE) for _ in range(4)]
    answers = []
    for process in started:
        with process:
            answers.append(json.loads(process.communicate(timeout=120)[0]))
    assert sorted(answer["mounted"] for answer in answers) == [False, False, False, True]
    assert len({answer["mountpoint"] for answer in answers}) == 1
    assert len(two.json("mounts")["mounts"]) == 1


def test_a_mount_whose_server_was_killed_is_made_anew(two: Cli) -> None:
    first = two.json("activate", "one")
    (mount,) = two.json("mounts")["mounts"]
    for number in (mount["holder_pid"], mount["server_pid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    out = Shell(two, "bash")("activate one\nwhich-one\nenvstore_deactivate >/dev/null\n")
    assert out == "program of one\n"
    assert two.json("activate", "one")["mountpoint"] == first["mountpoint"]


def test_what_rattler_sets_is_set(two: Cli, conda_channel: Channel, tmp_path: Path) -> None:
    """With rattler's activation of the same prefix for comparison."""
    prefix = tmp_path / "prefix"
    specs = ["settings", "hello-pkg"]
    install([conda_channel.url], specs, prefix, tmp_path / "cache", platform=SUBDIR)
    state = json.dumps({"version": 1, "env_vars": {"SETTINGS_MODE": "slow", "MORE": "a b"}})
    (prefix / "conda-meta/state").write_text(state)
    two.ok("push", "real", prefix)
    shell = Shell(two, "bash")
    where = shlex.quote(str(prefix))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from rattler.shell import activate, ActivationVariables, Shell\n"
        "print(activate(Path(sys.argv[1]), ActivationVariables(), Shell.bash).script)"
    )
    rattler = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {where}"
    shell(f'set +u\neval "$({rattler})"\nnote rattler\n')
    theirs = shell.state("rattler")
    shell(f"activate real --mountpoint {shlex.quote(str(tmp_path / 'real'))}\nnote ours\nhello\n")
    ours = shell.state("ours")
    del ours["ENVSTORE_PREFIX"], ours["CONDA_PROMPT_MODIFIER"], ours["CONDA_DEFAULT_ENV"]
    assert ours["SETTINGS_HOME"] == f"{tmp_path}/real/share/settings"
    # The scripts in it were relocated to where rattler installed them, and are pushed as they are.
    moved = {k: v.replace(str(prefix), f"{tmp_path}/real") for k, v in theirs.items()}
    ours["SETTINGS_RELOCATED"] = moved["SETTINGS_RELOCATED"]
    # It has the shell expand what is in values (conda does not), and freezes PATH.
    assert ours.pop("SETTINGS_TEXT") == "a b'c\"d $HOME `id` \\ é"
    assert "$HOME" not in moved.pop("SETTINGS_TEXT")
    assert ours.pop("PATH").split(":")[0] == moved.pop("PATH").split(":")[0]
    assert ours == moved


def test_packages_are_activated_where_they_are_mounted(
    two: Cli, conda_channel: Channel, tmp_path: Path
) -> None:
    spec = tmp_path / "environment.yml"
    spec.write_text(
        f"channels: [{json.dumps(conda_channel.url)}]\ndependencies: [settings]\n"
        f"variables: {{MINE: {json.dumps(ODD)}}}\n"
    )
    two.ok("push", "packages", spec)
    shell = Shell(two, "bash")
    shell("activate packages\nnote inside\nenvstore_deactivate\nnote after\n")
    inside = shell.state("inside")
    prefix = inside["CONDA_PREFIX"]
    assert inside["MINE"] == ODD
    assert inside["SETTINGS_TEXT"] == "a b'c\"d $HOME `id` \\ é"
    assert inside["SETTINGS_ORDER"] == "12"
    assert inside["SETTINGS_HOME"] == f"{prefix}/share/settings"
    assert inside["SETTINGS_RELOCATED"] == f"{prefix}/share"
    assert not {name for name in shell.state("after") if name.startswith("SETTINGS")}
    script = 'echo "$SETTINGS_RELOCATED"; echo "$CONDA_PREFIX/share"; echo "$MINE"'
    relocated, expected, mine = two.ok("run", "packages", "--", "sh", "-c", script).split("\n", 2)
    assert relocated == expected != f"{prefix}/share"
    assert mine == f"{ODD}\n"


def test_editors_can_be_told(two: Cli, tmp_path: Path) -> None:
    known = two.home / ".conda/environments.txt"
    known.parent.mkdir()
    known.write_text("/other/env")
    where = two.json("activate", "one", "--register")["mountpoint"]
    two.ok("activate", "one", "--register")
    assert known.read_text() == f"/other/env\n{where}\n"
    line = two.fails(2, "activate", "plain", "--register", says=["no conda environment"])
    assert "--register" in line
    assert [mount["ref"] for mount in two.json("mounts")["mounts"]] == ["one"]


def test_the_kind_of_shell(two: Cli) -> None:
    assert two.json("activate", "one", "--shell", "fish")["shell"] == "fish"
    assert two.json("activate", "one", env={"SHELL": "/bin/zsh"})["shell"] == "zsh"
    # The shell that asks comes before the one that the user logs in to.
    argv = " ".join(two.argv("--json", "activate", "one"))
    done = subprocess.run(
        ["bash", "-c", f'echo "$({argv})"'],
        env={**two.env, "SHELL": "/bin/zsh"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout)["shell"] == "bash"


def test_run_sets_what_activation_does(two: Cli) -> None:
    script = 'printf "%s\\n" "$CONDA_DEFAULT_ENV" "$SCRIPTS" "$FROM_STATE" "$@"; which-one'
    done = two("run", "one", "--", "sh", "-c", script, "sh", ODD, "$(id)", env={"SHLVL": "7"})
    assert (done.status, done.err) == (0, "")
    scripts = "one1:package of one;one2:package of one;"
    assert done.out == f"one\n{scripts}\n{ODD}\n{ODD}\n$(id)\nprogram of one\n"
    done = two("run", "one", "--", "env", "-0", env={"SHLVL": "7", "CONDA_SHLVL": "x"})
    assert {"SHLVL=7", "CONDA_SHLVL=1", "TWICE=state"} < set(done.out.split("\0"))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 3", "ended its shell with status 3"),
        ("exec true", "ended its shell with status 0"),
        ("kill -9 $$", "ended its shell with status -9"),
    ],
)
def test_scripts_that_end_the_shell(two: Cli, tmp_path: Path, script: str, says: str) -> None:
    bad = make_environment(tmp_path / "bad", "bad")
    (bad / "etc/conda/activate.d/2 script.sh").write_text(f"{script}\n")
    two.ok("push", "bad", bad)
    two.fails(1, "run", "bad", "--", "true", says=["activate.d/2 script.sh", says])


def test_scripts_that_fail_or_speak_do_not_stop_a_run(two: Cli, tmp_path: Path) -> None:
    loud = make_environment(tmp_path / "loud", "loud")
    (loud / "etc/conda/activate.d/1 script.sh").write_text("echo spoken; export A=1; false\n")
    two.ok("push", "loud", loud)
    done = two("run", "loud", "--", "sh", "-c", "echo $A $SCRIPTS")
    assert (done.status, done.err) == (0, "spoken\n")
    assert done.out == "1 loud2:package of loud;\n"


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("conda-meta/state", "{", "no JSON"),
        ("conda-meta/state", "[1]", "no object"),
        ("conda-meta/state", '{"env_vars": 1}', "no object"),
        ("etc/conda/env_vars.d/package.json", '{"A": 1}', "no variable"),
        ("etc/conda/env_vars.d/package.json", '{"A;id": "x"}', "no variable"),
        ("etc/conda/env_vars.d/package.json", '{"": "x"}', "no variable"),
        ("etc/conda/env_vars.d/package.json", " " * (1 << 20) + "{}", "larger"),
    ],
)
def test_variables_that_are_none(
    two: Cli, tmp_path: Path, path: str, content: str, says: str
) -> None:
    bad = make_environment(tmp_path / "bad", "bad")
    (bad / path).write_text(content)
    two.ok("push", "bad", bad)
    two.fails(1, "activate", "bad", says=[path, says])
    two.fails(1, "run", "bad", "--", "true", says=[path, says])
    assert two.json("mounts") == {"mounts": []}


def test_what_is_not_there(two: Cli) -> None:
    two.fails(1, "activate", "nothing", says=["nothing"])
    two.fails(2, "activate", "not a ref", says=["not a valid ref"])
    assert two.json("mounts") == {"mounts": []}
