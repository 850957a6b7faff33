"""Conda channels: from names and URLs to what rattler fetches them with.

Settings are rattler's own, from its ``config.toml`` files (``mirrors``, ``s3-options``,
``proxy-config``, ``tls-...``), the mirrors that downloads know (see ``packages.mirrors``) as far
as they speak HTTP, and two of conda's variables: ``CONDA_CHANNEL_ALIAS``, the URL below which
channels named without one lie, and ``CONDA_DEFAULT_CHANNELS``, the comma-separated channels that
``defaults`` stands for. Credentials come from the file that ``RATTLER_AUTH_FILE`` names, rattler's
own storage or ``~/.netrc``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from envstore.errors import UsageError
from envstore.resolver.packages.mirrors import Mirrors
from envstore.resolver.rattler_call import checked
from envstore.resolver.secrets import secret_in

if TYPE_CHECKING:
    from rattler import Channel, Config
    from rattler.networking import Client
    from rattler.networking.middleware import S3Config

_SPEC_CHANNEL = re.compile(r"^\s*([^\s\[\]=<>!~,|*]+)::(.*)$", re.DOTALL)


def find_channels(names: Sequence[str], warnings: list[str]) -> list[Channel]:
    """Return the channels that ``names`` (or URLs, or paths) mean, each once, in their order.

    ``defaults`` without ``CONDA_DEFAULT_CHANNELS`` is left out, which is added to ``warnings``,
    where there are others. Raises ``UsageError`` for what is no channel, or holds credentials.
    """
    wanted: list[str] = []
    for name in names:
        wanted.extend(_expanded(name, warnings, alone=len(set(names)) == 1))
    found: dict[str, Channel] = {}
    for name in wanted:
        channel = find_channel(name)
        found.setdefault(channel.base_url, channel)
    return list(found.values())


def find_channel(name: str) -> Channel:
    """Return the channel that ``name``, a URL or a path means; raises ``UsageError``."""
    from rattler import Channel, ChannelConfig

    secret = secret_in(name)
    if secret:
        raise UsageError(
            f"a channel's URL holds {secret}",
            hint="give credentials in ~/.netrc or in the file that RATTLER_AUTH_FILE names",
        )
    alias = os.environ.get("CONDA_CHANNEL_ALIAS")
    if alias and "://" not in alias:
        raise UsageError("CONDA_CHANNEL_ALIAS is not a URL", hint="https://channels.example")
    if alias:
        config = ChannelConfig(alias.rstrip("/") + "/", os.getcwd())
    else:
        config = ChannelConfig(root_dir=os.getcwd())
    return checked(lambda: Channel(name, config))


def _expanded(name: str, warnings: list[str], *, alone: bool) -> list[str]:
    if name != "defaults":
        return [name]
    listed = [part.strip() for part in os.environ.get("CONDA_DEFAULT_CHANNELS", "").split(",")]
    chosen = [part for part in listed if part]
    if chosen:
        return chosen
    if alone:
        raise UsageError(
            "the channel 'defaults' is a name for others, and nothing says for which",
            hint="list them in CONDA_DEFAULT_CHANNELS, or name another channel",
        )
    warnings.append(
        "the channel 'defaults' is left out: CONDA_DEFAULT_CHANNELS does not say which it means"
    )
    return []


def with_channel(spec: str) -> tuple[str, Channel | None]:
    """Return a MatchSpec whose channel (``name::...``) is a URL, and that channel if it has one."""
    match = _SPEC_CHANNEL.match(spec)
    if match is None:
        return spec, None
    channel = find_channel(match[1])
    return f"{channel.base_url.rstrip('/')}::{match[2].strip()}", channel


def make_client() -> Client:
    """Return what fetches from channels, as the user's settings say; raises ``UsageError``.

    A mirror gets the credentials of its own host only. rattler (0.28) asks for them before it
    knows of the mirror, so that mirrors need a client of their own, which knows proxies from
    ``HTTPS_PROXY`` alone.
    """
    from rattler import Config
    from rattler.networking import (
        AuthenticationMiddleware,
        Client,
        GCSMiddleware,
        MirrorMiddleware,
        OciMiddleware,
        RetryMiddleware,
        S3Middleware,
    )

    config = checked(lambda: Config.load_from_default_locations("envstore"))
    mirrors = _mirrors(config)
    if not mirrors:
        return checked(lambda: Client.from_config(config))
    if config.tls_no_verify or config.tls_root_certs or config.proxy_https or config.proxy_http:
        raise UsageError(
            "mirrors cannot be had together with proxy or TLS settings in rattler's config.toml",
            hint="name the proxy in HTTPS_PROXY instead",
        )
    return checked(
        lambda: Client(
            [
                RetryMiddleware(),
                MirrorMiddleware(mirrors),
                AuthenticationMiddleware(),
                OciMiddleware(),
                GCSMiddleware(),
                S3Middleware(_s3_options(config)),
            ]
        )
    )


def _mirrors(config: Config) -> dict[str, list[str]]:
    """Return where to ask, in order, by the prefix of the URL to ask for."""
    found = {old: list(new) for old, new in config.mirrors.items()}
    for old, new in Mirrors.from_environment().pairs:
        if new.startswith(("http://", "https://")):
            places = found.setdefault(f"{old}/", [])
            places.append(f"{new.partition('?')[0].rstrip('/')}/")
    return {old: [*new, old] for old, new in found.items()}


def _s3_options(config: Config) -> dict[str, S3Config]:
    from rattler.networking.middleware import S3Config

    return {
        bucket: S3Config(
            options.get("endpoint-url"),
            options.get("region"),
            options.get("addressing-style", "virtual-host"),
        )
        for bucket, options in config.s3_options.items()
    }
