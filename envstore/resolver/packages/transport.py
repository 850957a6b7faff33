"""Opens URLs of packages (https, http, file, s3) at an offset, once; who retries is elsewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from envstore.errors import EnvstoreError, UsageError
from envstore.resolver.packages.bodies import Body, Failed, Nothing, malformed, open_file
from envstore.resolver.packages.credentials import origin_of, shown
from envstore.resolver.packages.web import Surroundings, Web

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Transport:
    """Connections of one thread, kept open between archives; ``interrupt`` is for any thread."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._shared = surroundings
        self._web = Web(surroundings)
        self._clients: dict[str, S3Client] = {}

    def open(self, url: str, start: int = 0, version: str = "") -> Body:
        """Open ``url`` at ``start`` if the server can, else at 0.

        With ``version``, only if it is still that, else all of it. Raises ``Failed``.
        """
        try:
            split = urlsplit(url)
            scheme, host, _ = origin_of(url)
        except ValueError:
            raise malformed(url) from None
        if scheme in ("http", "https") and host:
            return self._web.open(url, start, version)
        if scheme == "file":
            return open_file(split.netloc, split.path, start)
        if scheme == "s3":
            return self._open_s3(url.partition("#")[0], start)
        raise Failed(
            UsageError(
                f"cannot fetch {shown(url)}: it is not a URL of a known kind",
                hint="https://, file:/// and s3:// are known",
            ),
            passing=False,
        )

    def interrupt(self) -> None:
        """Make a read that waits in another thread fail at once."""
        self._web.interrupt()

    def close(self) -> None:
        """Close all connections."""
        self._web.close()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _open_s3(self, url: str, start: int) -> Body:
        from envstore.store.objects import s3_errors
        from envstore.store.objects.s3_client import make_client
        from envstore.store.objects.s3_client import shown as shown_endpoint
        from envstore.store.objects.url import S3Location, parse_url

        split = urlsplit(url)
        query = f"?{split.query}" if split.query else ""
        key = unquote(split.path).lstrip("/")
        try:
            location = parse_url(f"s3://{split.netloc}{query}")
            client = self._clients.get(location.url)
            if client is None and isinstance(location, S3Location):
                client = make_client(location, self._shared.timeout)
                self._clients[location.url] = client
        except EnvstoreError as error:
            raise Failed(error, passing=False) from error
        if not isinstance(location, S3Location) or client is None or not key:
            raise malformed(url)
        endpoint = shown_endpoint(client.meta.endpoint_url)

        def failed(error: Exception) -> Failed:
            failure = s3_errors.classify(error, location, endpoint, f"fetch {shown(url)}")
            return Failed(failure.error, passing=failure.passing, unreachable=not failure.sent)

        wanted: dict[str, Any] = {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = client.get_object(Bucket=location.bucket, Key=key, **wanted)
        except s3_errors.RAISED as error:
            response = getattr(error, "response", {})
            if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                return Nothing()
            raise failed(error) from error
        return _S3Body(answer, s3_errors.RAISED, failed)


class _S3Body:
    """An object of a bucket."""

    def __init__(self, answer: Any, raised: tuple[type[Exception], ...], failed: Any) -> None:
        self._body, self._raised, self._failed = answer["Body"], raised, failed
        match = _RANGE.match(answer.get("ContentRange", ""))
        self.start = int(match[1]) if match else 0
        total = match[2] if match else answer.get("ContentLength")
        self.total: int | None = None if total in ("*", None) else int(total)
        self.version = ""

    def read(self, size: int) -> bytes:
        """See ``Body.read``."""
        try:
            data: bytes = self._body.read(size)
        except self._raised as error:
            raise self._failed(error) from error
        return data

    def close(self) -> None:
        """See ``Body.close``."""
        self._body.close()
