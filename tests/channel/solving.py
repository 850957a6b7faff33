"""What rattler makes of a channel, in a process of its own: its crash at exit stays there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_INSTALL = """
import asyncio, json, sys
from rattler import Channel, Gateway, VirtualPackage, install, solve

async def main():
    asked = json.loads(sys.argv[1])
    gateway = Gateway(cache_dir=asked["cache"] + "/repodata")
    records = await solve(
        [Channel(url) for url in asked["channels"]], asked["specs"], gateway=gateway,
        platforms=[asked["platform"], "noarch"], virtual_packages=VirtualPackage.detect(),
    )
    if asked["prefix"]:
        await install(
            records, asked["prefix"], cache_dir=asked["cache"] + "/pkgs", show_progress=False,
            execute_link_scripts=asked["scripts"],
        )
    print(json.dumps({r.name.normalized: str(r.version) for r in records}))
    await asyncio.sleep(0.05)

asyncio.run(main())
"""


class UnsolvableError(Exception):
    """rattler found no solution, or could not install it; the message is its last words."""


def install(
    channels: Sequence[str],
    specs: Sequence[str],
    prefix: Path | None,
    cache: Path,
    *,
    platform: str,
    scripts: bool = False,
) -> dict[str, str]:
    """Solve ``specs`` and install them into ``prefix`` if there is one, as rattler does it.

    Returns the version of each package by its name. Raises ``UnsolvableError``.
    """
    asked = {
        "channels": list(channels),
        "specs": list(specs),
        "prefix": str(prefix) if prefix else "",
        "cache": str(cache),
        "platform": platform,
        "scripts": scripts,
    }
    command = [sys.executable, "-c", _INSTALL, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if not done.stdout:
        raise UnsolvableError(done.stderr[-4000:])
    found: dict[str, str] = json.loads(done.stdout)
    return found
