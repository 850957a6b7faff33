"""What rattler makes of a channel, in a process of its own: its crash at exit stays there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.s3server import S3Server

_INSTALL = """
import asyncio, json, sys
from urllib.parse import urlsplit
from rattler import Channel, Gateway, VirtualPackage, install, solve
from rattler.networking import Client
from rattler.networking.middleware import AuthenticationMiddleware, S3Config, S3Middleware

async def main():
    asked = json.loads(sys.argv[1])
    client = None
    if asked["s3"]:
        layers = {
            urlsplit(url).hostname: S3Config(asked["s3"], "us-east-1", "path")
            for url in asked["channels"]
        }
        client = Client([AuthenticationMiddleware(), S3Middleware(layers)])
    gateway = Gateway(cache_dir=asked["cache"] + "/repodata", client=client)
    records = await solve(
        [Channel(url) for url in asked["channels"]], asked["specs"], gateway=gateway,
        platforms=[asked["platform"], "noarch"], virtual_packages=VirtualPackage.detect(),
    )
    if asked["prefix"]:
        await install(
            records, asked["prefix"], cache_dir=asked["cache"] + "/pkgs", show_progress=False,
            client=client, execute_link_scripts=asked["scripts"],
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
    s3: S3Server | None = None,
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
        "s3": s3.endpoint if s3 else "",
    }
    env = {**os.environ, **(s3.env if s3 else {}), "AWS_REGION": "us-east-1"}
    command = [sys.executable, "-c", _INSTALL, json.dumps(asked)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=env
    )
    if not done.stdout:
        raise UnsolvableError(done.stderr[-4000:])
    found: dict[str, str] = json.loads(done.stdout)
    return found
