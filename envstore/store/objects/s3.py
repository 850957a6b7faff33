"""Objects in an S3 bucket, on boto3."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import botocore
from botocore import exceptions as aws

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.objects import s3_errors
from envstore.store.objects.base import ObjectInfo, TooLateError, Traffic, ignore
from envstore.store.objects.body import Body, BodyFile, joined, length, views
from envstore.store.objects.credentials import KeyRing
from envstore.store.objects.keys import check_key, check_prefix, is_key
from envstore.store.objects.s3_client import is_amazon, make_client, shown
from envstore.store.objects.url import S3Location

_T = TypeVar("_T")

_TIMEOUT_VARIABLE = "ENVSTORE_S3_TIMEOUT"
_TIMEOUT_SECONDS = 15.0
# Of the time-out, what one connection attempt or one silence of the server may take. Two of them
# and a pause fit into it.
_SILENCE_SHARE = 0.45
_MAX_ATTEMPTS = 6
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 4.0

_PIECE = 128 << 10  # bytes handed on at a time
_JOINED = 1 << 20  # buffers of fewer bytes in all are sent as one
_STEP = 512 << 10  # bytes that are received at a time into a buffer: they stay in the core's cache

_ANYTHING = "envstore.json"  # asked for when only the time of the answer is wanted
_DATE_SECONDS = 10.0
# How far this machine's clock may be from the server's where a deadline is signed.
_CLOCKS_APART = 15.0

_MAX_OBJECT = 5 << 30  # S3's limit for one PUT


class S3Objects:
    """An ``ObjectStore`` under a prefix of an S3 bucket.

    Credentials, region, profile and endpoint come from the location, else from botocore's usual
    chain (environment, ~/.aws, instance roles). If there are ``keys``, credentials come from
    nowhere else, and a request that is refused is sent again with others on the ring.

    An endpoint that is not Amazon's is spoken to with path-style addresses (unless the location
    says otherwise), and instead of the checksum trailers that many servers do not know a body has
    a Content-MD5.

    ``traffic`` counts every request sent; of an answer that breaks off, no bytes.

    A request that fails in passing is sent again after a random pause that grows
    exponentially, at most 6 times; an endpoint that cannot be reached, or says nothing, gives
    ``UnavailableError`` within ``timeout`` seconds (15, or ``ENVSTORE_S3_TIMEOUT``). A transfer
    that makes progress may last longer, and is repeated once whenever it fails.

    ``put_if`` is sent again only when it certainly did not reach the server. botocore's own
    retries are off, because a retried conditional PUT whose first attempt had landed is told
    "412 Precondition Failed" by its own success: here a lost or garbled answer is
    ``UnavailableError``, and the caller, who reads the object again, can tell by its content.

    Safe for many threads. Not to be shared with a forked child: its connections are not.
    """

    def __init__(
        self, location: S3Location, *, timeout: float | None = None, keys: KeyRing | None = None
    ) -> None:
        self.url = location.url
        self.traffic = Traffic()
        self._location = location
        self._prefix = f"{location.prefix}/" if location.prefix else ""
        self._timeout = _timeout_from_environment() if timeout is None else timeout
        self._keys = keys
        self._closed = threading.Event()
        self._bucket_seen = False
        self._client = make_client(location, self._timeout * _SILENCE_SHARE, keys)
        self._endpoint = shown(self._client.meta.endpoint_url)
        self._amazon = is_amazon(self._endpoint)
        self._told_date: tuple[float, float] | None = None
        self._presigned = threading.local()
        self._client.meta.events.register_first("choose-signer.s3.DeleteObject", self._leave_out)
        self._client.meta.events.register("before-send.s3.DeleteObject", self._replace_url)
        self._client.meta.events.register("before-send.s3", self._count)
        self._client.meta.events.register("after-call.s3", self._note_date)

    def get(self, key: str) -> bytes:
        """Return the whole object. One request. Raises ``NotFoundError``."""
        return self._get(key)[0]

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """Return the object and its ETag. Raises ``NotFoundError``."""
        data, version = self._get(key)
        return data, self._told(version, f"read {key}", "an ETag")

    def _get(self, key: str) -> tuple[bytes, str | None]:
        name = self._name(key)

        def attempt() -> tuple[bytes, str | None]:
            answer = self._client.get_object(Bucket=self._location.bucket, Key=name)
            return self._read(answer["Body"]), answer.get("ETag")

        return self._request(f"read {key}", attempt)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``. One request (none for 0 bytes).

        Raises ``NotFoundError``; ``CorruptError`` if the object is too short.
        """
        if start < 0 or length < 0:
            raise ValueError(f"negative range {start}+{length}")
        name = self._name(key)
        if length == 0:
            return b""  # HTTP has no way to ask for an empty range

        def attempt() -> bytes:
            with closing(self._open_range(key, name, start, length)) as body:
                data = self._read(body)
            if len(data) != length:
                raise self._too_short(key, start, length, len(data))
            return data

        return self._request(f"read {key}", attempt)

    def get_range_into(
        self,
        key: str,
        start: int,
        views: Sequence[memoryview],
        arrived: Callable[[int], None] = ignore,
    ) -> None:
        """Fill ``views`` with the bytes from ``start`` on; see ``get_range``."""
        if start < 0:
            raise ValueError(f"negative range from {start}")
        name = self._name(key)
        length = sum(map(len, views))
        if length == 0:
            return

        def attempt() -> None:
            got = 0
            with closing(self._open_range(key, name, start, length)) as body:
                for view in views:
                    at = 0
                    while at < len(view):
                        step = body.readinto(view[at : at + _STEP])
                        if not step:
                            raise self._too_short(key, start, length, got)
                        self.traffic.add(bytes_in=step)
                        at += step
                        got += step
                        arrived(step)
                # Until the end is seen, for the connection to be free for others.
                got += len(body.read(1))
            if got != length:
                raise self._too_short(key, start, length, got)

        self._request(f"read {key}", attempt)

    def iter_range(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yield exactly ``length`` bytes from ``start`` as they arrive, in one attempt.

        Raises as ``get_range``. A connection that cannot be made, or on which nothing arrives,
        is given up after 0.45 of the time-out.
        """
        if start < 0 or length < 0:
            raise ValueError(f"negative range {start}+{length}")
        name = self._name(key)
        if length == 0:
            return
        try:
            with closing(self._open_range(key, name, start, length)) as body:
                got = 0
                # Until the end is seen, and not only the last byte: then the connection is free
                # for others, and an answer that broke off is told from an object too short.
                while piece := body.read(_PIECE):
                    self.traffic.add(bytes_in=len(piece))
                    got += len(piece)
                    if got > length:
                        break
                    yield piece
        except s3_errors.RAISED as error:
            raise self._failure(error, f"read {key}").error from error
        if got != length:
            raise self._too_short(key, start, length, got)
        self._bucket_seen = True

    def _open_range(self, key: str, name: str, start: int, length: int) -> Any:
        wanted = f"bytes={start}-{start + length - 1}"
        try:
            answer = self._client.get_object(Bucket=self._location.bucket, Key=name, Range=wanted)
        except aws.ClientError as error:
            if s3_errors.status_of(error) == 416:
                raise self._too_short(key, start, length, 0) from error
            raise
        if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            answer["Body"].close()
            # Reading on could mean a whole pack for every few bytes.
            raise CorruptError(
                f"cannot read {key}: {self._endpoint} did not honour a Range header",
                hint="whatever stands between here and the server must pass it on",
            )
        return answer["Body"]

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key`` in one PUT of at most 5 GiB."""
        name = self._name(key)
        self._check_size(key, data)
        small = length(data) < _JOINED
        whole = joined(data) if small or isinstance(data, bytes) else None

        def attempt() -> None:
            body: Any = BodyFile(data) if whole is None else whole
            self._client.put_object(
                Bucket=self._location.bucket, Key=name, Body=body, **self._digest(data)
            )

        self._request(f"write {key}", attempt)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` if the object's ETag still is ``version`` (``None``: does not exist).

        Returns the new ETag. Raises ``ConflictError`` when it certainly lost and
        ``UnavailableError`` when it may have landed.
        """
        name = self._name(key)
        self._check_size(key, data)

        def attempt() -> str | None:
            condition: dict[str, Any] = (
                {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
            )
            try:
                answer = self._client.put_object(
                    Bucket=self._location.bucket,
                    Key=name,
                    Body=data,
                    **self._digest(data),
                    **condition,
                )
            except aws.ClientError as error:
                # Amazon says 404 for If-Match on a missing key, others 412; 409 is for two
                # conditional writes at once, of which this one was not stored.
                lost = s3_errors.status_of(error) in (404, 409, 412)
                if lost and s3_errors.code_of(error) != "NoSuchBucket":
                    raise ConflictError(f"{key} was changed by somebody else") from error
                raise
            return answer.get("ETag")

        return self._told(
            self._request(f"write {key}", attempt, repeatable=False), f"write {key}", "an ETag"
        )

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or ``None`` if it does not exist.

        One request; the first time that an object is missing, a second one asks for the bucket.
        """
        name = self._name(key)

        def attempt() -> int | None:
            try:
                answer = self._client.head_object(Bucket=self._location.bucket, Key=name)
            except aws.ClientError as error:
                if s3_errors.status_of(error) == 404:
                    return None
                raise
            return self._told(answer.get("ContentLength"), f"look for {key}", "a length")

        size = self._request(f"look for {key}", attempt, proves_bucket=False)
        if size is None and not self._bucket_seen:
            # The answer to a HEAD has no body to say which of the two is missing.
            self.check_bucket()
        return size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``, in no particular order."""
        check_prefix(prefix)
        query: dict[str, Any] = {"Bucket": self._location.bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._request(f"list {prefix}*", lambda: self._client.list_objects_v2(**query))
            for entry in page.get("Contents", ()):
                # Consoles store "folders" as empty objects with a slash at the end, and a server
                # may list whatever it likes.
                key = str(entry.get("Key", ""))
                found = key.removeprefix(self._prefix)
                if key.startswith(query["Prefix"]) and is_key(found):
                    yield ObjectInfo(found, entry.get("Size", 0))
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == query.get("ContinuationToken"):
                raise UnavailableError(
                    f"cannot list {prefix}*: {self._endpoint} does not get on with its listing",
                    hint="this is a fault of the server: look into its log",
                )
            query["ContinuationToken"] = token

    def delete(self, key: str) -> None:
        """Remove the object; not an error if it does not exist."""
        name = self._name(key)

        def attempt() -> None:
            self._client.delete_object(Bucket=self._location.bucket, Key=name)

        try:
            self._request(f"delete {key}", attempt)
        except NotFoundError:
            # Some servers say so of a missing object; a missing bucket is another matter.
            self.check_bucket()

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object by a presigned URL that the server takes for ``seconds``.

        It is made before ``check``. What was clearly refused is tried again with a new one; a
        request that may still arrive is not.
        """
        bucket, name = self._location.bucket, self._name(key)

        def attempt() -> None:
            self._check_clock()
            begun = _elapsed()
            url = self._client.generate_presigned_url(
                "delete_object", Params={"Bucket": bucket, "Key": name}, ExpiresIn=int(seconds)
            )
            check()
            self._presigned.url = url
            try:
                self._client.delete_object(Bucket=bucket, Key=name)
            except s3_errors.RAISED as error:
                if not s3_errors.outcome_known(error):
                    raise self._failure(error, f"delete {key}").error from error
                # Not every server says so of a URL that has expired.
                late = _elapsed() - begun > seconds - _CLOCKS_APART
                if s3_errors.is_expired(error, late=late):
                    raise TooLateError(
                        f"{key} was not deleted: the request came too late to {self._endpoint}",
                        hint="nothing is lost; try again",
                    ) from error
                raise
            finally:
                self._presigned.url = None

        try:
            self._request(f"delete {key}", attempt)
        except NotFoundError:
            self.check_bucket()
        except EnvstoreError as error:
            # What botocore raised can repeat the URL, which is a secret.
            error.__context__ = None
            raise error from None

    def _check_clock(self) -> None:
        ahead = time.time() - self.now()
        if abs(ahead) > _CLOCKS_APART:
            where = "ahead of" if ahead > 0 else "behind"
            raise UnavailableError(
                f"this machine's clock is {abs(ahead):.0f} s {where} that of {self._endpoint}, "
                f"which must know until when to delete",
                hint="set this machine's clock",
            )

    def _leave_out(self, signature_version: Any, **_: Any) -> Any:
        # What goes by a presigned URL needs no other signature.
        url = getattr(self._presigned, "url", None)
        return None if url is None else botocore.UNSIGNED

    def _replace_url(self, request: Any, **_: Any) -> None:
        # By then botocore has logged the request: the URL is a secret while it is valid.
        url = getattr(self._presigned, "url", None)
        if url is not None:
            request.url = url

    def settle(self, seconds: float) -> None:
        """Wait for ``seconds``: later the server takes none of those requests any more."""
        if self._closed.wait(seconds):
            raise UnavailableError(f"{self.url} was closed", hint="open it again")

    def check_bucket(self) -> None:
        """Ask whether the bucket exists. Raises ``NotFoundError``."""

        def attempt() -> bool:
            try:
                self._client.head_bucket(Bucket=self._location.bucket)
            except aws.ClientError as error:
                if s3_errors.status_of(error) == 404:
                    return False
                raise
            return True

        if not self._request("look for the bucket", attempt, proves_bucket=False):
            raise s3_errors.missing_bucket(self._location, self._endpoint)
        self._bucket_seen = True

    def now(self) -> float:
        """Return the time by the ``Date`` of the server's answers.

        No request if it answered one within the last ten seconds: since then the time is that of
        this machine's clock, which is only trusted to run. Else one request.
        """
        told = self._told_date
        if told is None or _elapsed() - told[1] > _DATE_SECONDS:
            self.size(_ANYTHING)
            told = self._told_date
        date, seen = self._told(told, "tell the time", "a Date")
        return date + (_elapsed() - seen)

    def close(self) -> None:
        """Close the connections and end the pauses of requests that wait for another attempt."""
        self._closed.set()
        self._client.close()

    def _request(
        self,
        action: str,
        attempt: Callable[[], _T],
        *,
        repeatable: bool = True,
        proves_bucket: bool = True,
    ) -> _T:
        begun = time.monotonic()
        latest = begun + self._timeout * (1 - _SILENCE_SHARE)
        attempts = 0
        while True:
            attempts += 1
            try:
                result = attempt()
            except s3_errors.RAISED as error:
                failure = self._failure(error, action, proves_bucket=proves_bucket)
                pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempts - 1)))  # noqa: S311
                again = failure.passing and (repeatable or not failure.sent)
                # A long transfer that fails late has a second chance all the same.
                in_time = attempts == 1 or time.monotonic() + pause <= latest
                if not again or attempts == _MAX_ATTEMPTS or not in_time:
                    raise failure.error from error
                if self._closed.wait(pause):
                    raise failure.error from error
            else:
                self._bucket_seen |= proves_bucket
                return result

    def _failure(
        self, error: Exception, action: str, *, proves_bucket: bool = True
    ) -> s3_errors.Failure:
        failure = s3_errors.classify(error, self._location, self._endpoint, action)
        if self._keys is not None and isinstance(failure.error, AccessDeniedError):
            failure.error.hint = "those are the credentials that were given for this store"
            failure = replace(failure, passing=self._keys.refused())
        if proves_bucket and isinstance(failure.error, NotFoundError):
            self._require_bucket(error)
        return failure

    def _require_bucket(self, error: Exception) -> None:
        """Ask for the bucket, unless it is known to exist, before a 404 is taken at its word.

        A wrong endpoint, such as some other web server, answers 404 to everything.
        """
        if isinstance(error, aws.ClientError):
            code = s3_errors.code_of(error)
            if code == "NoSuchKey":
                self._bucket_seen = True
            elif code != "NoSuchBucket" and not self._bucket_seen:
                self.check_bucket()

    def _read(self, body: Any) -> bytes:
        data: bytes = body.read()
        self.traffic.add(bytes_in=len(data))
        return data

    def _count(self, request: Any, **_: Any) -> None:
        length = request.headers.get("Content-Length", 0)
        self.traffic.add(requests=1, bytes_out=int(length))

    def _note_date(self, http_response: Any, **_: Any) -> None:
        try:
            date = parsedate_to_datetime(http_response.headers.get("Date", "")).timestamp()
        except ValueError:
            self._told_date = None
        else:
            self._told_date = date, _elapsed()

    def _told(self, value: _T | None, action: str, what: str) -> _T:
        if value is None:
            raise CorruptError(
                f"cannot {action}: {self._endpoint} answered without {what}",
                hint="check that it is an S3 server, and what stands between here and there",
            )
        return value

    def _digest(self, data: Body) -> dict[str, Any]:
        # To Amazon, botocore adds a checksum by itself. Elsewhere only Content-MD5 is understood
        # by everybody; without it SeaweedFS 4.48 takes a connection that ends between header and
        # body for an empty object, although length and signature speak of another.
        if self._amazon:
            return {}
        found = hashlib.md5(usedforsecurity=False)
        for view in views(data):
            found.update(view)
        return {"ContentMD5": base64.b64encode(found.digest()).decode()}

    def _name(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _check_size(self, key: str, data: Body) -> None:
        size = length(data)
        if size > _MAX_OBJECT:
            raise UsageError(f"{key} is too large for one object: {size} bytes, 5 GiB at most")

    def _too_short(self, key: str, start: int, length: int, got: int) -> CorruptError:
        return CorruptError(
            f"{key} in {self._location.bucket} is too short: of {length} bytes from {start} on, "
            f"{got} are there",
            hint="run `envstore verify`",
        )


def _elapsed() -> float:
    # Goes on while the machine sleeps.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _timeout_from_environment() -> float:
    text = os.environ.get(_TIMEOUT_VARIABLE, "").strip()
    if not text:
        return _TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(
            f"{_TIMEOUT_VARIABLE} is {text[:40]!r}", hint="it is a number of seconds, such as 15"
        )
    return seconds
