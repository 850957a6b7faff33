from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, CorruptError, NotFoundError, UsageError
from envstore.resolver.conda import solve
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import CondaPackage
from envstore.resolver.target import make_target
from tests.channel.conda import Channel, write_repodata
from tests.channel.content import GENERIC
from tests.channel.packing import JANUARY, MONTH, SUBDIR, About, Package
from tests.channel.server import serving
from tests.resolver.surroundings import _no_settings, cache
from tests.s3server import S3Server

__all__ = ["_no_settings", "cache"]


def run(
    channels: list[str], *specs: str, cache: Path, platform: str = SUBDIR, **options: object
) -> dict[str, CondaPackage]:
    target = make_target(
        platform,
        glibc=str(options.pop("glibc", "2.36")),
        cuda=str(options.pop("cuda", "none")),
    )
    found = solve(specs, channels, target, cache=cache / "repodata", **options)  # type: ignore[arg-type]
    return {package.name: package for package in found}


def listed(directory: Path, *abouts: About, **lie: object) -> str:
    """Write a channel that says it has packages which nobody ever made; return its URL."""
    packages = [
        Package(about, directory / about.filename, "ab" * 32, "cd" * 16, 7) for about in abouts
    ]
    channel = write_repodata(directory, packages)
    for path in directory.glob("*/repodata.json"):
        value = json.loads(path.read_text())
        for record in value["packages.conda"].values():
            record.update(lie)
        path.write_text(json.dumps(value))
    return channel.url


def test_packages_are_locked_with_all_that_is_known(conda_channel: Channel, cache: Path) -> None:
    found = run([conda_channel.url], "hello-pkg", cache=cache)
    assert set(found) == {"python", "greeting", "hello-pkg"}
    made = conda_channel.package("hello-pkg")
    package = found["hello-pkg"]
    assert package.url == conda_channel.package_url("hello-pkg")
    assert package.sha256 == made.sha256
    assert package.md5 == made.md5
    assert package.size == made.size
    assert package.noarch == "python"
    assert package.depends == made.about.depends
    assert package.channel.rstrip("/") == conda_channel.url
    assert package.extra["timestamp"] == made.about.timestamp
    assert found["python"].build == "h0_cpython"


def test_what_a_package_needs_comes_before_it(conda_channel: Channel, cache: Path) -> None:
    specs = ["hello-pkg", "speedup", "binprefix"]
    orders = [list(run([conda_channel.url], *order, cache=cache)) for order in (specs, specs[::-1])]
    assert orders[0] == orders[1]
    assert orders[0].index("python") < orders[0].index("speedup")
    assert orders[0].index("greeting") < orders[0].index("hello-pkg")


def test_virtual_packages_are_those_of_the_target(conda_channel: Channel, cache: Path) -> None:
    assert "needs-cuda" in run([conda_channel.url], "needs-cuda", cache=cache, cuda="12.4")
    with pytest.raises(UnsatisfiableError, match=r"__cuda >=12\.0, which nothing") as caught:
        run([conda_channel.url], "needs-cuda", cache=cache)
    assert "--cuda" in str(caught.value)
    assert "needs-new-glibc" in run([conda_channel.url], "needs-new-glibc", cache=cache, glibc="3")
    with pytest.raises(UnsatisfiableError, match="__glibc") as caught:
        run([conda_channel.url], "needs-new-glibc", cache=cache)
    assert "--glibc" in str(caught.value)


def test_another_platform_gets_its_own_packages(tmp_path: Path, cache: Path) -> None:
    about = About("python", "3.11.9", subdir="linux-aarch64", depends=("__archspec 1 aarch64",))
    url = listed(tmp_path / "channel", about)
    assert run([url], "python", cache=cache, platform="linux-aarch64")["python"].subdir == (
        "linux-aarch64"
    )
    with pytest.raises(UnsatisfiableError, match=r"^linux-s390x: .*no channel has python "):
        run([url], "python", cache=cache, platform="linux-s390x")


def test_the_first_channel_that_has_a_package_is_its_only_one(tmp_path: Path, cache: Path) -> None:
    old = listed(tmp_path / "old", About("lib", "1.0", **GENERIC))
    new = listed(
        tmp_path / "new",
        About("lib", "2.0", **GENERIC),
        About("app", depends=("lib >=2",), **GENERIC),
    )
    assert run([old, new], "lib", cache=cache)["lib"].version == "1.0"
    assert run([new, old], "lib", cache=cache)["lib"].version == "2.0"
    assert run([old, new], "app", cache=cache, priority="disabled")["lib"].version == "2.0"
    with pytest.raises(UnsatisfiableError, match="behind a channel") as caught:
        run([old, new], "app", cache=cache)
    assert "disabled" in str(caught.value)
    assert run([old], f"{new}::lib", cache=cache, priority="disabled")["lib"].version == "2.0"


def test_channels_by_name_lie_below_the_alias(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(tmp_path / "team", About("lib", "1.0", **GENERIC))
    listed(tmp_path / "other", About("lib", "2.0", **GENERIC))
    monkeypatch.setenv("CONDA_CHANNEL_ALIAS", tmp_path.as_uri())
    assert run(["team"], "lib", cache=cache)["lib"].version == "1.0"
    spec = "other::lib >=2"
    assert run(["team"], spec, cache=cache, priority="disabled")["lib"].version == "2.0"
    monkeypatch.setenv("CONDA_CHANNEL_ALIAS", "somewhere")
    with pytest.raises(UsageError, match="CONDA_CHANNEL_ALIAS"):
        run(["team"], "lib", cache=cache)


def test_defaults_are_what_the_user_says(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = listed(tmp_path / "main", About("lib", **GENERIC))
    other = listed(tmp_path / "other", About("thing", **GENERIC))
    with pytest.raises(UsageError, match="CONDA_DEFAULT_CHANNELS"):
        run(["defaults"], "lib", cache=cache)
    warnings: list[str] = []
    assert run([other, "defaults"], "thing", cache=cache, warnings=warnings)
    assert "'defaults' is left out" in warnings[0]
    monkeypatch.setenv("CONDA_DEFAULT_CHANNELS", f" {url} ,{other}")
    assert set(run(["defaults"], "lib", "thing", cache=cache)) == {"lib", "thing"}


def test_what_is_newer_than_a_moment_is_left_out(tmp_path: Path, cache: Path) -> None:
    abouts = [
        About("lib", f"{number}.0", timestamp=JANUARY + number * MONTH, **GENERIC)
        for number in (1, 2, 3)
    ]
    url = listed(tmp_path / "channel", *abouts)
    versions = {
        moment: run([url], "lib", cache=cache, exclude_newer=moment)["lib"].version
        for moment in ("2025-03-02", "2025-03-15T00:00:00+02:00", "2026-01-01T00:00:00Z", "")
    }
    assert list(versions.values()) == ["2.0", "2.0", "3.0", "3.0"]
    with pytest.raises(UnsatisfiableError, match="newer than the cutoff"):
        run([url], "lib", cache=cache, exclude_newer="2024-01-01")
    with pytest.raises(UsageError, match="is no time"):
        run([url], "lib", cache=cache, exclude_newer="yesterday")


def test_locked_packages_stay_only_where_they_are_offered(tmp_path: Path, cache: Path) -> None:
    abouts = [
        About("lib", f"{number}.0", timestamp=JANUARY + number * MONTH, **GENERIC)
        for number in (1, 2, 3)
    ]
    url = listed(tmp_path / "channel", *abouts)
    other = listed(tmp_path / "other", *abouts)
    keep = list(run([url], "lib ==2.0", cache=cache).values())
    assert run([url], "lib", cache=cache, keep=keep)["lib"] == keep[0]
    moved = run([other], "lib", cache=cache, keep=keep)["lib"]
    assert (moved.version, moved.channel.rstrip("/")) == ("3.0", other)
    earlier = run([url], "lib", cache=cache, keep=keep, exclude_newer="2025-02-20")["lib"]
    assert earlier.version == "1.0"
    later = run([url], "lib", cache=cache, keep=keep, exclude_newer="2026-01-01")["lib"]
    assert later == keep[0]
    nameless = [dataclasses.replace(keep[0], extra={"timestamp": "then"})]
    later = run([url], "lib", cache=cache, keep=nameless, exclude_newer="2026-01-01")["lib"]
    assert later.version == "3.0"


def test_locked_packages_stay_unless_they_are_in_the_way(tmp_path: Path, cache: Path) -> None:
    abouts = [About("lib", f"{number}.0", **GENERIC) for number in (1, 2)]
    abouts.append(About("tool", "1.0", depends=("lib",), **GENERIC))
    url = listed(tmp_path / "channel", *abouts)
    first = run([url], "tool", "lib <2", cache=cache)
    keep = list(first.values())
    again = run([url], "tool", cache=cache, keep=keep)
    assert again == first
    moved = run([url], "tool", cache=cache, keep=[item for item in keep if item.name != "lib"])
    assert moved["lib"].version == "2.0"
    assert run([url], "tool", "lib >=2", cache=cache, keep=keep)["lib"].version == "2.0"


def test_constraints_hold_for_what_comes_anyway(tmp_path: Path, cache: Path) -> None:
    abouts = [About("lib", f"{number}.0", **GENERIC) for number in (1, 2)]
    url = listed(tmp_path / "channel", *abouts, About("tool", depends=("lib",), **GENERIC))
    found = run([url], "tool", cache=cache, constraints=["lib <2", "absent >=4"])
    assert {name: item.version for name, item in found.items()} == {"lib": "1.0", "tool": "1.0"}


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (["wants-missing"], "not-in-the-channel"),
        (["nowhere-to-be-found"], "no channel has nowhere-to-be-found"),
        (["greeting >=9"], "no channel has greeting >=9"),
        (["wants-old-greeting", "wants-new-greeting"], r"greeting 2\.\*.*greeting 1\.\*"),
        (["hello-pkg 1.1.*", "greeting 1.*"], "greeting"),
    ],
)
def test_what_conflicts_is_said_in_a_line(
    conda_channel: Channel, cache: Path, specs: list[str], reason: str
) -> None:
    with pytest.raises(UnsatisfiableError) as caught:
        run([conda_channel.url], *specs, cache=cache)
    said = str(caught.value)
    assert re.search(reason, said), said
    assert "\n" not in said
    assert len(said) < 800


def test_malformed_specs_and_channels(conda_channel: Channel, cache: Path) -> None:
    with pytest.raises(UsageError, match="'python ====' is no conda spec"):
        run([conda_channel.url], "python ====", cache=cache)
    with pytest.raises(UsageError, match="user name or password"):
        run(["https://user:pw@channels.example/team"], "python", cache=cache)
    with pytest.raises(UsageError, match="a channel's token"):
        run(["https://channels.example/t/tk-123/team"], "python", cache=cache)


def test_channels_that_lie_are_told(tmp_path: Path, cache: Path) -> None:
    url = listed(tmp_path / "channel", About("lib", **GENERIC), sha256=None)
    with pytest.raises(CorruptError, match="no SHA-256"):
        run([url], "lib", cache=cache)
    (tmp_path / "channel/noarch/repodata.json").write_text("{ not json")
    with pytest.raises(CorruptError, match="malformed") as caught:
        run([url], "lib", cache=cache)
    assert "\n" not in str(caught.value)


def test_a_channel_behind_a_password(
    conda_channel: Channel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(conda_channel.path, user="me", password="hunter2") as server:
        with pytest.raises(AccessDeniedError, match="HTTP 401") as caught:
            run([server.url], "greeting", cache=tmp_path / "a")
        assert "netrc" in str(caught.value)
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        found = run([server.url], "greeting", cache=tmp_path / "b")
        monkeypatch.delenv("NETRC")
        logins = tmp_path / "logins.json"
        logins.write_text(
            json.dumps({"127.0.0.1": {"BasicHTTP": {"username": "me", "password": "hunter2"}}})
        )
        monkeypatch.setenv("RATTLER_AUTH_FILE", str(logins))
        assert run([server.url], "greeting", cache=tmp_path / "c") == found
        said = repr(found) + json.dumps([dataclasses.asdict(item) for item in found.values()])
        assert found["greeting"].url.startswith(server.url)
    encoded = base64.b64encode(b"me:hunter2").decode()
    assert "hunter2" not in said
    assert encoded not in said


def test_mirrors_are_asked_with_their_own_logins(
    conda_channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(conda_channel.path, user="me", password="hunter2") as server:
        logins = {"127.0.0.1": {"BasicHTTP": {"username": "me", "password": "hunter2"}}}
        (tmp_path / "logins.json").write_text(json.dumps(logins))
        monkeypatch.setenv("RATTLER_AUTH_FILE", str(tmp_path / "logins.json"))
        monkeypatch.setenv("ENVSTORE_MIRRORS", f"https://up.example/team={server.url}")
        found = run(["https://up.example/team"], "greeting", cache=tmp_path / "cache")
        assert server.paths()
    assert found["greeting"].url.startswith("https://up.example/team/noarch/greeting-2.0")


def test_a_channel_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty") as server, pytest.raises(NotFoundError, match="check the"):
        run([f"{server.url}/team"], "python", cache=tmp_path)


def test_a_channel_in_a_bucket(
    conda_channel: Channel, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.new_bucket()
    with contextlib.closing(s3_server.client()) as client:
        for path in conda_channel.path.glob("*/**/*"):
            if path.is_file() and not path.name.endswith(".conda"):
                key = f"team/{path.relative_to(conda_channel.path)}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    channel = f"s3://{bucket}/team"
    with monkeypatch.context() as patch:
        # As the AWS SDKs have it, from the environment alone.
        patch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
        patch.setenv("AWS_REGION", "us-east-1")
        found = run([channel], "greeting", cache=tmp_path / "a")
    assert found["greeting"].url == f"{channel}/noarch/greeting-2.0-0.conda"


def test_settings_of_rattler_count(
    conda_channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "rattler/config.toml"
    settings.parent.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with serving(conda_channel.path) as server:
        mirrors = f'[mirrors]\n"https://up.example/team" = ["{server.url}"]\n'
        bucket = '[s3-options.data]\nendpoint-url = "http://127.0.0.1:1"\nregion = "here"\n'
        settings.write_text(mirrors + bucket)
        found = run(["https://up.example/team"], "greeting", cache=tmp_path)
        assert found["greeting"].url.startswith("https://up.example/team/noarch/")
        settings.write_text(f"tls-no-verify = true\n{mirrors}")
        with pytest.raises(UsageError, match="mirrors cannot be had together"):
            run(["https://up.example/team"], "greeting", cache=tmp_path)
        settings.write_text("tls-no-verify = maybe\n")
        with pytest.raises(UsageError) as caught:
            run([server.url], "greeting", cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert "tls-no-verify" in str(caught.value)
