"""What a push of many packages costs when the store holds most or all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.channel.conda import Channel
from tests.channel.many import build_many
from tests.channel.server import serving
from tests.commands import Cli

COUNT = 60
CHANGED = 7


@pytest.fixture
def many(tmp_path: Path) -> Channel:
    return build_many(tmp_path / "many", COUNT, newer=[CHANGED])


def specify(cli: Cli, *channels: str, newest: bool) -> None:
    wanted = f"part-{CHANGED} {'1.1' if newest else '1.0'}.*"
    (cli.root / "environment.yml").write_text(
        f"channels: {json.dumps(channels)}\ndependencies: {json.dumps(['all-parts', wanted])}\n"
    )


def test_of_many_packages_one_that_changed_is_all_that_is_fetched_and_stored(
    cli: Cli, many: Channel, conda_channel: Channel
) -> None:
    cli.ok("init")
    with serving(many.path) as server:
        channels = [server.url, conda_channel.url]
        specify(cli, *channels, newest=False)
        first = cli.json("push", "env", "environment.yml")
        assert len(server.paths(".conda")) == COUNT + 1
        server.requests.clear()
        specify(cli, *channels, newest=True)
        second = cli.json("push", "env", "environment.yml")
        assert server.paths(".conda") == [f"/noarch/part-{CHANGED}-1.1-pyh0_0.conda"]
    assert first["packages"] == first["new_packages"] == COUNT + 2
    assert (second["packages"], second["new_packages"]) == (COUNT + 2, 1)
    assert second["downloaded_bytes"] == many.package(f"part-{CHANGED}").size
    assert second["uploaded_bytes"] * 10 < first["uploaded_bytes"]
    program = f"import part_{CHANGED}, part_0.module0; print(part_{CHANGED}.VERSION)"
    assert cli.ok("run", "env", "--", "python", "-c", program) == "1.1\n"


def test_a_fresh_machine_fetches_nothing_that_the_store_holds(
    cli: Cli, many: Channel, conda_channel: Channel, tmp_path: Path
) -> None:
    cli.ok("init")
    with serving(many.path) as server:
        specify(cli, server.url, conda_channel.url, newest=True)
        cli.ok("lock", "environment.yml", "-o", "envstore.lock")
        first = cli.json("push", "env", "envstore.lock")
        server.requests.clear()
        other = Cli(tmp_path / "other machine")
        other.env["ENVSTORE_URL"] = str(cli.store)
        shutil.copy(cli.root / "envstore.lock", other.root)
        second = other.json("push", "copy", "envstore.lock")
        assert server.requests == []
    assert second["packages"] == first["packages"]
    assert (second["new_packages"], second["downloaded_bytes"]) == (0, 0)
    digests = {cli.json("show", name)["manifest"] for name in ("env", "copy")}
    assert len(digests) == 1
