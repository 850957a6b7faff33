"""What the URLs of conda packages, wheels and source distributions say, for all locks alike."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

from envstore.errors import UsageError
from envstore.resolver.lock import Build, PypiPackage
from envstore.resolver.specs.files import refuse_secrets

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONDA = re.compile(r"([^/]+)-([^/-]+)-([^/-]+)(?:\.conda|\.tar\.bz2)")
_VERSION_CONTROL = ("git+", "hg+", "svn+", "bzr+")


def checked_sha256(text: str, where: str) -> str:
    """Return a digest in lower case; raises ``UsageError`` if it is none."""
    digest = text.lower()
    if not _SHA256.fullmatch(digest):
        what = f"{text!r} is not a SHA-256" if text else "there is no SHA-256"
        raise UsageError(f"{where}: {what}", hint="lock it again, with digests")
    return digest


def conda_name(url: str) -> tuple[str, str, str] | None:
    """Return name, version and build of a conda package's URL, ``None`` if it is none."""
    match = _CONDA.fullmatch(unquote(url.partition("#")[0].rpartition("/")[2]))
    return (match[1], match[2], match[3]) if match else None


def named_version(filename: str) -> tuple[str, str] | None:
    """Return normalised name and version of a wheel's or source distribution's file name."""
    from packaging.utils import (
        InvalidSdistFilename,
        InvalidWheelFilename,
        parse_sdist_filename,
        parse_wheel_filename,
    )

    try:
        if filename.endswith(".whl"):
            name, version, *_ = parse_wheel_filename(filename)
        else:
            name, version = parse_sdist_filename(filename)
    except (InvalidSdistFilename, InvalidWheelFilename):
        return None
    return str(name), str(version)


def pypi_package(
    name: str,
    version: str,
    location: str,
    sha256: str,
    where: str,
    *,
    filename: str = "",
    size: int = 0,
    requires: tuple[str, ...] = (),
    requires_python: str = "",
    direct: str = "",
) -> PypiPackage:
    """Return a wheel, or what is to be built to one if ``location`` is a source distribution.

    ``sha256`` may be in the fragment of ``location`` instead. Raises ``UsageError`` for checkouts
    and for what has no digest or no version.
    """
    from packaging.utils import canonicalize_name

    if location.startswith(_VERSION_CONTROL):
        raise UsageError(
            f"{where} comes from a version control system, without a digest of its content",
            hint="build a wheel of it, and lock that",
        )
    url, _, fragment = refuse_secrets(location, where).partition("#")
    fields = dict(parse_qsl(fragment))
    if "subdirectory" in fields:
        raise UsageError(
            f"{where} is built in a directory of its archive, which is not supported",
            hint="build a wheel of it, and lock that",
        )
    digest = checked_sha256(sha256 or fields.get("sha256", ""), where)
    filename = filename or unquote(url.rpartition("/")[2])
    said = named_version(filename)
    if not version and said is None:
        raise UsageError(f"{where} has no version", hint="lock it again, with versions")
    version = version or (said[1] if said else "")
    if filename.endswith(".whl"):
        if said is None or said[0] != canonicalize_name(name):
            raise UsageError(f"{where} names the file {filename!r}, which is no wheel of it")
        return PypiPackage(
            said[0], version, filename, url, digest, size, requires, requires_python, direct
        )
    return PypiPackage(
        canonicalize_name(name),
        version,
        "",
        "",
        "",
        requires=requires,
        requires_python=requires_python,
        direct=direct,
        build=Build(url, digest),
    )
