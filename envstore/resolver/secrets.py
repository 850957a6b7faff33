"""Finds credentials in URLs, so that none of them is written where others can read it."""

from __future__ import annotations

import re
from urllib.parse import unquote

# No scheme is longer, and without a bound a long word would be looked at once for each letter.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>]+")
_CONDA_TOKEN = re.compile(r"/t/(?!\$|<)[^/]+/")
# A user name by itself is the usual way to write an address of SSH, and no secret there.
_NAMELY_SSH = ("ssh://", "git+ssh://")
_SECRET_PARAMETER = re.compile(
    r"sig|(x-(amz|goog|ms)-)?(signature|credential|security-token)|awsaccesskeyid|key-pair-id"
    r"|.*(token|secret|passw(or)?d|api[-_]?key|access[-_]?key).*|auth(orization)?",
    re.IGNORECASE,
)


def secret_in(text: str) -> str:
    """Say what secret a URL somewhere in ``text`` holds; empty if none does.

    Known are a user name or password before the host, conda's ``/t/<token>/``, and query
    parameters that sign a request or name a token, secret or password. What is found is described
    and never repeated.
    """
    if "://" not in text:
        return ""
    return next(filter(None, map(_secret_of, _URL.findall(text))), "")


def _secret_of(url: str) -> str:
    rest = url.partition("#")[0].partition("://")[2]
    place, _, query = rest.partition("?")
    host, slash, path = place.partition("/")
    user, at, _ = host.rpartition("@")
    if at and (":" in unquote(user) or not url.lower().startswith(_NAMELY_SSH)):
        return "a user name or password"
    if _CONDA_TOKEN.search(f"{slash}{path}"):
        return "a channel's token"
    for parameter in re.split("[&;]", query):
        name, equals, _ = parameter.partition("=")
        if equals and _SECRET_PARAMETER.fullmatch(unquote(name)):
            return f"the query parameter {unquote(name)!r}"
    return ""
