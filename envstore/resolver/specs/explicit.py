"""Reads conda's ``@EXPLICIT`` lists, with the ``# pip`` lines that conda-lock adds to them."""

from __future__ import annotations

import re
from pathlib import Path

from envstore.resolver.lock import CondaPackage, Lock, PypiPackage
from envstore.resolver.request import CondaRequest, Request
from envstore.resolver.specs.artefacts import conda_name, pypi_package
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import at, file_url, located, read_text, refuse_secrets, wrong

_PLATFORM = re.compile(r"#\s*platform:\s*(\S+)")
_PIP = re.compile(r"#\s*pip\s+([A-Za-z0-9._-]+)\s*@\s*(\S+)")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})|(?:md5:)?([0-9a-f]{32})", re.IGNORECASE)


def read_explicit(path: Path, context: Context) -> Lock:
    """Read a list of package URLs, in its order; raises ``UsageError``.

    A list says neither what a package depends on nor, without a SHA-256, what exactly it is:
    the archives do.
    """
    conda, pypi = list[CondaPackage](), list[PypiPackage]()
    for number, line in enumerate(read_text(path, context).splitlines(), 1):
        line = line.strip()
        if line.startswith("#"):
            _check_platform(line, path, number, context)
            pip = _PIP.fullmatch(line)
            if pip:
                where = f"{at(path, number)}: {pip[1]}"
                url = pip[2].replace("--hash=", "")
                pypi.append(pypi_package(pip[1], "", url, "", where))
        elif line and line != "@EXPLICIT":
            conda.append(_conda(line, path, number, context.platform))
    names = [package.name for package in conda]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise wrong(path, f"lists {twice} twice")
    channels = tuple(dict.fromkeys(package.channel for package in conda))
    return Lock(
        platform=context.platform,
        packages=(*conda, *sorted(pypi, key=lambda item: item.name)),
        request=Request(conda=CondaRequest(channels=channels)),
    )


def _check_platform(line: str, path: Path, number: int, context: Context) -> None:
    said = _PLATFORM.fullmatch(line)
    if said and said[1] != context.platform:
        raise wrong(path, f"is for {said[1]}, not {context.platform}", line=number)


def _conda(line: str, path: Path, number: int, platform: str) -> CondaPackage:
    url, mark, fragment = refuse_secrets(line, at(path, number)).partition("#")
    digest = _DIGEST.fullmatch(fragment)
    if mark and digest is None:
        raise wrong(path, f"{fragment!r} is neither an MD5 nor a SHA-256", line=number)
    if "://" not in url:
        url = file_url(located(path.parent, url))
    parts, name = url.split("/"), conda_name(url)
    if name is None or len(parts) < 3:
        raise wrong(path, f"{url!r} is not the URL of a conda package", line=number)
    subdir = parts[-2]
    if subdir not in (platform, "noarch"):
        raise wrong(path, f"{name[0]} is for {subdir}, not {platform}", line=number)
    sha256 = (digest[1] or "").lower() if digest else ""
    md5 = (digest[2] or "").lower() if digest else ""
    if not digest:
        hint = "list with conda list --explicit --sha256"
        raise wrong(path, f"{name[0]} has no digest", line=number, hint=hint)
    channel = "/".join(parts[:-2])
    return CondaPackage(*name, subdir, url, sha256, md5=md5, channel=channel)
