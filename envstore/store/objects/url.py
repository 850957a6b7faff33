"""Store URLs: ``file:///path``, a plain path, ``s3://bucket/prefix?endpoint=...``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import (
    SplitResult,
    parse_qsl,
    quote,
    unquote,
    unquote_to_bytes,
    urlencode,
    urlsplit,
)

from envstore.errors import UsageError
from envstore.store.objects.keys import check_key

_FORMS = (
    "use file:///abs/path, a plain path, "
    "or s3://bucket/prefix?endpoint=http://host:port&region=..&path_style=1&profile=.."
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_S3_OPTIONS = frozenset({"endpoint", "region", "path_style", "profile"})
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class FileLocation:
    """A store in a directory."""

    path: Path

    @property
    def url(self) -> str:
        """The canonical URL."""
        return f"file://{quote(os.fsencode(self.path))}"


@dataclass(frozen=True, slots=True)
class S3Location:
    """A store in a bucket, under ``prefix`` (no slash at either end; may be empty).

    ``None`` means: what the AWS configuration says, or the default.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    profile: str | None = None

    @property
    def url(self) -> str:
        """The canonical URL; it never holds a secret."""
        options = {
            "endpoint": self.endpoint,
            "region": self.region,
            "path_style": None if self.path_style is None else str(int(self.path_style)),
            "profile": self.profile,
        }
        query = urlencode({k: v for k, v in options.items() if v is not None}, safe=":/")
        path = f"/{quote(self.prefix)}" if self.prefix else ""
        return f"s3://{self.bucket}{path}{'?' + query if query else ''}"


def default_store() -> Path:
    """Return where the user's own store lies, which is meant if nobody names one."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base) / "envstore" / "store"


def parse_url(url: str) -> FileLocation | S3Location:
    """Return the place that a store URL names. Raises ``UsageError``; contacts nothing."""
    if not url or "\0" in url or not _is_encodable(url):
        raise _malformed("the store URL is empty or contains what no URL can")
    match = _SCHEME.match(url)
    if match is None:
        if re.match(r"(?i)(file|s3):", url):
            raise _malformed("slashes are missing after the scheme of the store URL")
        return FileLocation(_absolute(url))
    scheme = match.group(1).lower()
    if scheme not in ("file", "s3"):
        raise _malformed(f"unknown scheme {scheme}:// in the store URL")
    try:
        split = urlsplit(url)
    except ValueError as error:
        raise _malformed("malformed store URL") from error
    return _parse_file(split) if scheme == "file" else _parse_s3(split)


def _malformed(message: str) -> UsageError:
    return UsageError(message, hint=_FORMS)


def _absolute(path: str) -> Path:
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError as error:
        raise _malformed("the store URL names the home of nobody") from error


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeError:
        return False
    return True


def _parse_file(split: SplitResult) -> FileLocation:
    if split.netloc not in ("", "localhost"):
        host = split.netloc.rpartition("@")[2]
        raise _malformed(f"file URL with a host ({host}): three slashes make a local path")
    if split.query or split.fragment:
        raise _malformed("file URL with a query: write %3F and %23 for ? and # in a path")
    path = os.fsdecode(unquote_to_bytes(os.fsencode(split.path)))
    if not path.startswith("/") or "\0" in path:
        raise _malformed("file URL without an absolute path")
    return FileLocation(_absolute(path))


def _parse_s3(split: SplitResult) -> S3Location:
    # Whatever holds an @ may be a key and its secret: such a URL is never repeated in a message.
    if "@" in split.netloc or "@" in split.path:
        raise UsageError(
            "the store URL contains credentials (or an @): they do not belong there",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: ?profile=..",
        )
    if not _BUCKET.fullmatch(split.netloc):
        raise _malformed("the store URL does not name a bucket (an endpoint goes into the query)")
    if split.fragment:
        raise _malformed("a store URL has no #fragment")
    prefix = unquote(split.path).strip("/")
    if prefix:
        try:
            check_key(prefix)
        except UsageError as error:
            raise _malformed("the store URL has a malformed prefix") from error
    options = _options(split.query)
    return S3Location(
        bucket=split.netloc,
        prefix=prefix,
        endpoint=_endpoint(options["endpoint"]) if "endpoint" in options else None,
        region=options.get("region"),
        path_style=_boolean(options["path_style"]) if "path_style" in options else None,
        profile=options.get("profile"),
    )


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _malformed("the store URL has a malformed query") from error
    for name, value in pairs:
        if name not in _S3_OPTIONS:
            # Only the name: the value may be a secret.
            raise _malformed(f"unknown option {name!r} in the store URL")
        if not value or name in options:
            raise _malformed(f"option {name!r} of the store URL is empty or given twice")
        options[name] = value
    return options


def _boolean(value: str) -> bool:
    if value.lower() not in _BOOLEANS:
        raise _malformed("path_style in the store URL is neither 1 nor 0")
    return _BOOLEANS[value.lower()]


def _endpoint(value: str) -> str:
    try:
        split = urlsplit(value)
        port = split.port
    except ValueError as error:
        raise _malformed("malformed endpoint in the store URL") from error
    if "@" in split.netloc:
        raise UsageError(
            "the endpoint in the store URL contains credentials: they do not belong there",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: ?profile=..",
        )
    plain = split.path in ("", "/") and not split.query and not split.fragment
    if split.scheme not in ("http", "https") or not split.hostname or port == 0 or not plain:
        raise _malformed("the endpoint in the store URL is not of the form http[s]://host[:port]")
    return f"{split.scheme}://{split.netloc}"
