"""What a failed S3 request means: for the user, and for whoever may send it again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.objects.url import S3Location

# Everything that botocore raises for a request; reading a body may raise urllib3's own errors.
RAISED: tuple[type[Exception], ...] = (
    aws.BotoCoreError,
    aws.ClientError,
    ResponseParserError,
    HTTPError,
)

# Making a client raises ValueError for an endpoint that is no URL.
RAISED_BY_CLIENT: tuple[type[Exception], ...] = (*RAISED, ValueError)

# Servers refuse what was signed more than 15 minutes before or after their time.
_MAX_SKEW = 840.0
_CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws: "
    "AWS_PROFILE or ?profile=.. in the store URL"
)

_NO_CREDENTIALS: tuple[type[Exception], ...] = (
    aws.NoCredentialsError,
    aws.NoAuthTokenError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.UnknownCredentialError,
    aws.MetadataRetrievalError,
    aws.SSOError,
    aws.LoginError,
)
_BAD_CONFIGURATION: tuple[type[Exception], ...] = (
    aws.ProfileNotFound,
    aws.ConfigParseError,
    aws.ConfigNotFound,
    aws.InvalidConfigError,
    aws.ParamValidationError,
    aws.ValidationError,
    aws.InvalidRegionError,
    aws.UnknownRegionError,
    aws.EndpointProviderError,
    aws.UnsupportedS3ConfigurationError,
    aws.InvalidEndpointConfigurationError,
    ValueError,
)
# The request never left: it can be sent again whatever it was.
_NOT_SENT = (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.ProxyConnectionError)

_WRONG_KEY = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_FULL = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "DiskFull"})
_WRONG_REGION = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
# Answers below 500 which a second attempt may turn into a success.
_PASSING = frozenset(
    {
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "RequestLimitExceeded",
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed request: the error to raise, and whether another attempt makes sense.

    ``sent`` is False if the server cannot have seen the request, so that even a conditional
    write may be sent again.
    """

    error: EnvstoreError
    passing: bool
    sent: bool = True


def classify(error: Exception, location: S3Location, endpoint: str, action: str) -> Failure:
    """Return what ``error``, raised by botocore while doing ``action``, means.

    The text of botocore's and the server's messages is never passed on: an answer can repeat
    parts of a request.
    """
    if isinstance(error, aws.ClientError):
        return _answered(error, location, endpoint, action)
    if isinstance(error, _NOT_SENT):
        return Failure(_unreachable(error, endpoint), passing=True, sent=False)
    if isinstance(error, aws.SSLError):
        return Failure(
            UnavailableError(
                f"no trusted TLS connection to {endpoint}: {reason(error)}",
                hint="check the endpoint's certificate; AWS_CA_BUNDLE names other authorities",
            ),
            passing=False,
        )
    if isinstance(error, (aws.IncompleteReadError, aws.ResponseStreamingError)):
        return Failure(
            UnavailableError(f"cannot {action}: {endpoint} broke off its answer", hint=_NETWORK),
            passing=True,
        )
    if isinstance(error, aws.FlexibleChecksumError):
        return Failure(
            CorruptError(f"cannot {action}: the bytes do not match the server's own checksum"),
            passing=True,
        )
    if isinstance(error, _NO_CREDENTIALS):
        return Failure(no_credentials(location, type(error).__name__), passing=False)
    if isinstance(error, _BAD_CONFIGURATION):
        return Failure(bad_configuration(location, error), passing=False)
    if isinstance(error, ResponseParserError):
        return Failure(
            UnavailableError(
                f"cannot {action}: {endpoint} answered what is not S3's XML",
                hint="check that it is an S3 server, and what stands between here and there",
            ),
            passing=True,
        )
    # What remains is the transport: connections closed early, silence, garbled answers.
    return Failure(_unreachable(error, endpoint), passing=True)


def no_credentials(location: S3Location, detail: str = "NoCredentialsError") -> AccessDeniedError:
    """Return the error for credentials that cannot be found or obtained."""
    what = {
        "NoCredentialsError": "none found",
        "PartialCredentialsError": "only half of a key pair is set",
    }.get(detail, f"they could not be obtained, {detail}")
    return AccessDeniedError(
        f"no credentials for s3://{location.bucket}: {what}", hint=_CREDENTIALS_HINT
    )


def bad_configuration(location: S3Location, error: Exception) -> UsageError:
    """Return the error for a profile, region or endpoint that botocore refuses."""
    if isinstance(error, aws.ProfileNotFound):
        return UsageError(
            f"the AWS profile for s3://{location.bucket} does not exist",
            hint="check AWS_PROFILE, ?profile=.. in the store URL, and `aws configure list`",
        )
    return UsageError(
        f"the AWS configuration for s3://{location.bucket} is not usable: {type(error).__name__}",
        hint="check ~/.aws/config, AWS_REGION, AWS_ENDPOINT_URL and the store URL",
    )


def reason(error: BaseException) -> str:
    """Return the operating system's words for why a connection failed, or the error's type."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror.lower()
        if isinstance(seen, TimeoutError):
            return "timed out"
        inner = getattr(seen, "kwargs", {}).get("error")
        seen = inner if isinstance(inner, BaseException) else seen.__cause__ or seen.__context__
    if isinstance(error, (aws.ReadTimeoutError, aws.ConnectTimeoutError)):
        return "timed out"
    return type(error).__name__


_NETWORK = (
    "check the endpoint (AWS_ENDPOINT_URL, or ?endpoint=.. in the store URL) and the network; "
    "ENVSTORE_S3_TIMEOUT is how many seconds to keep trying"
)


def _unreachable(error: Exception, endpoint: str) -> UnavailableError:
    return UnavailableError(f"cannot reach {endpoint}: {reason(error)}", hint=_NETWORK)


def _answered(error: aws.ClientError, location: S3Location, endpoint: str, action: str) -> Failure:
    status = status_of(error)
    code = code_of(error)
    bucket = f"s3://{location.bucket}"
    said = f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    final: EnvstoreError | None = None
    if code == "NoSuchBucket":
        final = missing_bucket(location, endpoint)
    elif code in _FULL or status == 507:
        final = NoSpaceError(
            f"cannot {action}: {endpoint} has no space left ({said})",
            hint="free space on the server or raise its quota",
        )
    elif code in _WRONG_KEY or code in _EXPIRED:
        expired = code in _EXPIRED
        final = AccessDeniedError(
            f"{endpoint} refused the {'expired ' if expired else ''}credentials ({said})",
            hint="renew the session" if expired else f"wrong key or secret: {_CREDENTIALS_HINT}",
        )
    elif code == "RequestTimeTooSkewed" or (status == 403 and _other_time(error)):
        final = AccessDeniedError(
            f"{endpoint} refused the request's time ({said})",
            hint="set this machine's clock",
        )
    elif code in _WRONG_REGION or status in (301, 307):
        final = UsageError(
            f"{bucket} is in another region than asked ({said})",
            hint="name its region: AWS_REGION, or ?region=.. in the store URL",
        )
    elif status in (401, 403):
        final = AccessDeniedError(
            f"cannot {action}: {endpoint} denied access ({said})",
            hint=f"these credentials lack a permission on {bucket}; docs/security.md lists all",
        )
    elif status == 404:
        final = NotFoundError(f"cannot {action}: it does not exist")
    if final is not None:
        return Failure(final, passing=False)
    return Failure(
        UnavailableError(
            f"cannot {action}: {endpoint} answered {said}",
            hint="look into the server's log, and try again later",
        ),
        passing=status >= 500 or status == 429 or code in _PASSING,
    )


def missing_bucket(location: S3Location, endpoint: str) -> NotFoundError:
    """Return the error for a bucket that does not exist."""
    create = f"aws s3 mb s3://{location.bucket} --endpoint-url {endpoint}"
    return NotFoundError(
        f"the bucket {location.bucket} does not exist at {endpoint}",
        hint=f"check both, or create it: {create}",
    )


def outcome_known(error: Exception) -> bool:
    """Return whether the request that raised ``error`` certainly was not, and will not be, done."""
    if isinstance(error, aws.ClientError):
        # A gateway that gives up says nothing of what the server behind it goes on to do.
        status = status_of(error)
        return 300 <= status < 500 or status == 503
    return isinstance(error, _NOT_SENT)


def is_expired(error: Exception, *, late: bool) -> bool:
    """Return whether a presigned request was, or when ``late`` may have been, refused as such."""
    if not isinstance(error, aws.ClientError) or status_of(error) not in (400, 401, 403):
        return False
    message = str(error.response.get("Error", {}).get("Message", ""))
    return late or "request has expired" in message.lower()


def _other_time(error: aws.ClientError) -> bool:
    """Whether the server's clock is far off ours: to a HEAD it does not say that that is why."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        date = parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return False
    return abs(date - time.time()) > _MAX_SKEW


def status_of(error: aws.ClientError) -> int:
    """Return the HTTP status that the server answered, 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: aws.ClientError) -> str:
    """Return the S3 error code, such as ``NoSuchKey``; for a HEAD request, the status."""
    return str(error.response.get("Error", {}).get("Code", ""))
