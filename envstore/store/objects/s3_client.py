"""A boto3 client for a store's bucket: credentials, endpoint, time-outs."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore import exceptions as aws
from botocore.config import Config
from botocore.credentials import (
    CredentialProvider,
    CredentialResolver,
    ReadOnlyCredentials,
)
from botocore.credentials import Credentials as BotoCredentials

from envstore.errors import UsageError
from envstore.store.objects import s3_errors
from envstore.store.objects.credentials import KeyRing
from envstore.store.objects.url import S3Location

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECTIONS = 32
_EXPECT_FROM = 1 << 20

_AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")


class _Ring(BotoCredentials):
    """Whatever is on a key ring when a request is signed."""

    def __init__(self, keys: KeyRing) -> None:
        super().__init__("", "", method="given")
        self._keys = keys

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        found = self._keys.take()
        if found is None:
            raise aws.NoCredentialsError
        return ReadOnlyCredentials(
            found.access_key_id, found.secret_access_key, found.session_token or None
        )


class _Provider(CredentialProvider):
    """The only place where a client with a key ring looks for credentials."""

    METHOD = "given"

    def __init__(self, keys: KeyRing) -> None:
        super().__init__()
        self._keys = keys

    def load(self) -> BotoCredentials:
        return _Ring(self._keys)


def make_client(location: S3Location, silence: float, keys: KeyRing | None = None) -> S3Client:
    """Return a client for ``location`` that waits ``silence`` seconds for a connection or a word.

    With ``keys`` it signs with what is on that ring at the time, and with nothing else.

    Raises ``AccessDeniedError`` without credentials, ``UsageError`` for a configuration that
    cannot be used.
    """
    try:
        session = _session(location, keys)
        if session.get_credentials() is None:
            raise s3_errors.no_credentials(location)
        # botocore looks for an endpoint in ~/.aws too, and tells only once there is a client.
        guess = location.endpoint or _endpoint_from_environment()
        guessed = not is_amazon(guess)
        client = _create(session, location, silence, off_amazon=guessed)
        off_amazon = not is_amazon(client.meta.endpoint_url)
        if off_amazon != guessed:
            client.close()
            client = _create(session, location, silence, off_amazon=off_amazon)
        client.meta.events.register_last("before-call.s3", _expect_nothing)
        events: Any = client.meta.events  # typed as if handlers returned nothing
        events.register_first("choose-signer.s3.DeleteObject", _sign_urls_by_v4)
        return client
    except s3_errors.RAISED_BY_CLIENT as error:
        raise s3_errors.classify(
            error, location, location.endpoint or "S3", "connect"
        ).error from error


def _session(location: S3Location, keys: KeyRing | None) -> boto3.session.Session:
    if keys is None:
        return boto3.session.Session(profile_name=location.profile)
    if location.profile is not None:
        raise UsageError("the store URL names a profile, and other credentials were given")
    session = botocore.session.Session()
    session.register_component("credential_provider", CredentialResolver([_Provider(keys)]))
    return boto3.session.Session(botocore_session=session)


def _create(
    session: boto3.session.Session, location: S3Location, silence: float, *, off_amazon: bool
) -> S3Client:
    addressing: Literal["path", "virtual", "auto"] = "path" if off_amazon else "auto"
    if location.path_style is not None:
        addressing = "path" if location.path_style else "virtual"
    checksums: Literal["when_required", "when_supported"] = (
        "when_required" if off_amazon else "when_supported"
    )
    config = Config(
        connect_timeout=silence,
        read_timeout=silence,
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1, "mode": "standard"},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        s3={"addressing_style": addressing},
    )
    region = location.region or session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    return session.client("s3", region_name=region, endpoint_url=location.endpoint, config=config)


def _endpoint_from_environment() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def is_amazon(endpoint: str | None) -> bool:
    """Return whether ``endpoint`` is AWS's own; so is none at all."""
    host = urlsplit(endpoint).hostname if endpoint else None
    return endpoint is None or (host or "").endswith(_AWS_DOMAINS)


def shown(endpoint: str) -> str:
    """Return ``endpoint`` as messages may show it: a user name and password in it are left out."""
    split = urlsplit(endpoint)
    return f"{split.scheme}://{split.netloc.rpartition('@')[2]}"


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    # Asking the server to say "100 Continue" first doubles the time of a small PUT, and saves
    # nothing: the body is no longer than the question.
    body = params["body"]
    if isinstance(body, io.BytesIO) and body.getbuffer().nbytes < _EXPECT_FROM:
        params["headers"].pop("Expect", None)


def _sign_urls_by_v4(signature_version: Any, **_: Any) -> str | None:
    # Left to itself botocore signs URLs in the old way, which newer regions refuse.
    by_v4 = isinstance(signature_version, str) and signature_version.endswith("v4-query")
    return "s3v4-query" if by_v4 else None
