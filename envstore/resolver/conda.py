"""conda specs to conda packages, by rattler's solver."""

from __future__ import annotations

import datetime
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envstore.errors import CorruptError, EnvstoreError, UsageError
from envstore.resolver.channels import find_channels, make_client, with_channel
from envstore.resolver.conflicts import UnsatisfiableError
from envstore.resolver.lock import CondaPackage
from envstore.resolver.rattler_call import call, checked, without_secrets
from envstore.resolver.target import Target, own_platform

if TYPE_CHECKING:
    from rattler import Channel, GenericVirtualPackage, MatchSpec, RepoDataRecord

_DROPPED = frozenset({"fn", "indexed_timestamp"})  # of the channel, not of the package
_PLAIN = _DROPPED | frozenset(
    {
        "name", "version", "build", "subdir", "url", "sha256", "size", "md5", "channel",
        "build_number", "noarch", "depends", "constrains", "python_site_packages_path",
    }
)  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAST_SECOND = 253_402_300_799
"""The end of the year 9999, in seconds since 1970."""


def solve(
    specs: Sequence[str],
    channels: Sequence[str],
    target: Target,
    *,
    cache: Path,
    priority: str = "strict",
    exclude_newer: str = "",
    constraints: Sequence[str] = (),
    keep: Sequence[CondaPackage] = (),
    warnings: list[str] | None = None,
) -> tuple[CondaPackage, ...]:
    """Return the packages that ``specs`` need on ``target``, in the order of installation.

    ``channels`` are as in ``CondaRequest``, the first having most to say. ``keep`` are packages
    that stay as they are if that is possible, which it is not for those of other channels;
    ``constraints`` hold for packages that come in anyway. ``exclude_newer`` (RFC 3339) leaves out
    what was published later, and what does not say when it was. Repodata is kept below ``cache``.
    Raises ``UnsatisfiableError``, ``UsageError`` for a malformed spec or channel,
    ``NotFoundError``, ``UnavailableError`` and ``AccessDeniedError`` for channels,
    ``CorruptError`` for what they say.
    """
    import rattler

    sources = find_channels(channels, warnings if warnings is not None else [])
    parsed = [_parsed(spec, sources) for spec in specs]
    limits = [_parsed(spec, sources) for spec in constraints]
    gateway = rattler.Gateway(cache_dir=cache, client=make_client())
    levels = rattler.ChannelPriority
    level = levels.Strict if priority == "strict" else levels.Disabled
    cutoff = cutoff_time(exclude_newer)
    virtual = _virtual(target.virtual)
    locked = records_of(_still_offered(keep, sources, cutoff))
    try:
        records = call(
            lambda: rattler.solve(
                sources,
                parsed,
                gateway=gateway,
                platforms=[rattler.Subdir(target.platform), rattler.Subdir("noarch")],
                locked_packages=locked,
                virtual_packages=virtual,
                channel_priority=level,
                exclude_newer=cutoff,
                constraints=limits,
            )
        )
    except UnsatisfiableError as error:
        if target.platform == own_platform():
            raise
        raise UnsatisfiableError(f"{target.platform}: {error.message}", hint=error.hint) from error
    known = {package.url: package for package in keep}
    ordered = _ordered(records)
    return tuple(known.get(str(record.url)) or _package(record) for record in ordered)


def _still_offered(
    packages: Iterable[CondaPackage], sources: Sequence[Channel], cutoff: datetime.datetime | None
) -> list[CondaPackage]:
    """Return those of ``packages`` that are of these channels and not too new.

    rattler takes what is locked from wherever it came, and whenever.
    """
    bases = tuple(f"{channel.base_url.rstrip('/')}/" for channel in sources)
    found = []
    for package in packages:
        offered = package.url.startswith(bases) or f"{package.channel.rstrip('/')}/" in bases
        if offered and (cutoff is None or 0 < _published(package) <= cutoff.timestamp()):
            found.append(package)
    return found


def _published(package: CondaPackage) -> float:
    """Return when a package was published, in seconds since 1970; 0 if it does not say."""
    stamp = package.extra.get("timestamp")
    if not isinstance(stamp, int | float):
        return 0
    # Repodata has milliseconds, and in its early days seconds.
    return stamp / 1000 if stamp > _LAST_SECOND else stamp


def cutoff_time(text: str) -> datetime.datetime | None:
    """Return the moment that ``text`` (RFC 3339, or a date: its end) names, in UTC.

    Raises ``UsageError``.
    """
    if not text:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no time", hint="such as 2026-01-31T00:00:00Z") from None
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        moment += datetime.timedelta(days=1)
    if moment.tzinfo is None:
        return moment.replace(tzinfo=datetime.UTC)
    return moment.astimezone(datetime.UTC)


def _parsed(spec: str, sources: list[Channel]) -> MatchSpec:
    """Return ``spec`` for rattler; the channel it names joins ``sources`` as the last of them."""
    from rattler import MatchSpec

    text, channel = with_channel(spec)
    if channel is not None and all(known.base_url != channel.base_url for known in sources):
        sources.append(channel)
    try:
        return checked(lambda: MatchSpec(text, strict=False))
    except EnvstoreError as error:
        raise UsageError(f"{spec!r} is no conda spec: {error.message}") from error


def _virtual(versions: Mapping[str, str]) -> list[GenericVirtualPackage]:
    from rattler import GenericVirtualPackage, PackageName, Version
    from rattler.package import BuildString

    def make() -> list[GenericVirtualPackage]:
        parts = [(name, text.partition("=")) for name, text in sorted(versions.items())]
        return [
            GenericVirtualPackage(PackageName(name), Version(version), BuildString(build or "0"))
            for name, (version, _, build) in parts
        ]

    return checked(make)


def records_of(packages: Iterable[CondaPackage]) -> list[RepoDataRecord]:
    """Return locked packages as rattler's own records."""
    from rattler import PackageRecord, RepoDataRecord

    def make() -> list[RepoDataRecord]:
        found = []
        with tempfile.TemporaryDirectory() as work:
            path = Path(work, "index.json")
            for package in packages:
                path.write_text(json.dumps(_index(package)))
                digests = (package.size or None, package.sha256 or None, package.md5 or None)
                record = PackageRecord.from_index_json(path, *digests)
                found.append(RepoDataRecord(record, package.filename, package.url, package.channel))
        return found

    return checked(make)


def _index(package: CondaPackage) -> dict[str, Any]:
    """Return what a package's ``info/index.json`` says of it."""
    index: dict[str, Any] = {
        **package.extra,
        "name": package.name,
        "version": package.version,
        "build": package.build,
        "build_number": package.build_number,
        "subdir": package.subdir,
        "depends": list(package.depends),
        "constrains": list(package.constrains),
    }
    if package.noarch:
        index["noarch"] = package.noarch
    if package.python_site_packages_path:
        index["python_site_packages_path"] = package.python_site_packages_path
    return index


def _ordered(records: Sequence[RepoDataRecord]) -> list[RepoDataRecord]:
    """Return ``records`` with what each depends on before it, the same way every time."""
    from rattler import PackageRecord

    by_name = sorted(records, key=lambda record: record.name.normalized)
    ordered = PackageRecord.sort_topologically(list(by_name))
    known = {record.name.normalized: record for record in by_name}
    return [known[record.name.normalized] for record in ordered]


def _package(record: RepoDataRecord) -> CondaPackage:
    """Return a solved record as a locked package, checked: a channel may say anything."""
    try:
        value = json.loads(record.to_json())
        sha256 = value.get("sha256", "")
        package = CondaPackage(
            name=value["name"],
            version=str(value["version"]),
            build=value["build"],
            subdir=value["subdir"],
            url=without_secrets(value["url"]),
            sha256=sha256,
            size=int(value.get("size") or 0),
            md5=value.get("md5") or "",
            channel=without_secrets(value.get("channel") or ""),
            build_number=int(value.get("build_number") or 0),
            noarch=value.get("noarch") or "",
            depends=tuple(value.get("depends") or ()),
            constrains=tuple(value.get("constrains") or ()),
            python_site_packages_path=value.get("python_site_packages_path") or "",
            extra={key: item for key, item in sorted(value.items()) if key not in _PLAIN},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"a channel describes {record.file_name} wrongly: {error}") from error
    if not _SHA256.fullmatch(package.sha256):
        raise CorruptError(
            f"channel {package.channel} gives no SHA-256 for {package.filename}",
            hint="have its owner index it again",
        )
    return package
