"""The last line before secrets in what people and logs are told.

Nothing here is relied on: messages are made without secrets. But libraries put what they were
given into their own, and configuration ends up in URLs.
"""

from __future__ import annotations

import logging
import os
import re

HIDDEN = "***"

_NAMES = re.compile(
    r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|SECURITY_TOKEN)"
    r"|.*_(PASSWORD|TOKEN|SECRET|SECRET_KEY|API_KEY)"
)
# A shorter one cannot be told from ordinary words.
_TELLING = 6

_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        # A user and password before a host.
        (r"(://)[^\s/@'\"<>]{1,4096}@", rf"\1{HIDDEN}@"),
        # A channel's token.
        (r"(https?://[^\s'\"<>/]{1,256}(?:/[^\s'\"<>/]+){0,8}?/t/)[^\s'\"<>/]+", rf"\1{HIDDEN}"),
        # What signs a request, in its query and in its headers.
        (
            r"([?&;](?:x-amz-)?(?:signature|credential|security-token|awsaccesskeyid|token|"
            r"secret|password|api[-_]?key)=)[^&;\s'\"<>]+",
            rf"\1{HIDDEN}",
        ),
        (
            r"((?:authorization|x-amz-security-token)b?['\"]?\s*[:=]\s*b?['\"]?)[^'\"\r\n}]+",
            rf"\1{HIDDEN}",
        ),
    )
)


def redacted(text: str) -> str:
    """Return ``text`` without what is secret in this process's environment or looks like it.

    That are values of variables such as ``AWS_SECRET_ACCESS_KEY`` and ``UV_INDEX_X_PASSWORD``, a
    user and password in a URL, conda's ``/t/<token>/``, and what signs a request.
    """
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    if ":" in text or "=" in text:
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
    return text


def _secrets() -> list[str]:
    """Return the secrets in the environment, as they are and as Python quotes them."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _TELLING and _NAMES.fullmatch(name.upper())
    }
    return sorted(found | {repr(one)[1:-1] for one in found}, key=len, reverse=True)


class _Redacting(logging.Formatter):
    """Formats as another does, and hides secrets: also those in a traceback."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return redacted(self._formatter.format(record))


def protect_logs() -> None:
    """Have what is logged from now on redacted; call after ``logging.basicConfig``.

    The libraries that log requests by the line of HTTP do so no longer.
    """
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _Redacting):
            handler.setFormatter(_Redacting(handler.formatter or logging.Formatter()))
    for name in ("botocore", "urllib3", "kubernetes"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))
