from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envstore.errors import UsageError
from envstore.store.objects import FileLocation, S3Location, open_objects, parse_url

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCY"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///srv/store", "/srv/store"),
        ("FILE:///srv/store/", "/srv/store"),
        ("file://localhost/srv/store", "/srv/store"),
        ("file:///srv/a%20b%3Fc", "/srv/a b?c"),
        ("file:///srv/../opt/x", "/opt/x"),
        ("/srv/store", "/srv/store"),
        ("/srv/a?b#c", "/srv/a?b#c"),
        ("store", f"{os.getcwd()}/store"),
        ("./a/../store", f"{os.getcwd()}/store"),
        ("~/store", f"{Path.home()}/store"),
    ],
)
def test_a_directory(url: str, path: str) -> None:
    assert parse_url(url) == FileLocation(Path(path))


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("s3://bucket", S3Location("bucket")),
        ("s3://bucket/", S3Location("bucket")),
        ("S3://bucket/a/b/", S3Location("bucket", "a/b")),
        (
            "s3://bucket/p?endpoint=http://127.0.0.1:9000&region=eu-west-1&path_style=1&profile=x",
            S3Location("bucket", "p", "http://127.0.0.1:9000", "eu-west-1", True, "x"),
        ),
        (
            "s3://bucket?endpoint=https%3A%2F%2Fs3.example.org/&path_style=0",
            S3Location("bucket", endpoint="https://s3.example.org", path_style=False),
        ),
    ],
)
def test_a_bucket(url: str, location: S3Location) -> None:
    assert parse_url(url) == location


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/a\0b",
        "http://bucket/x",
        "gs://bucket",
        "s3:bucket",
        "s3:/bucket",
        "file:store",
        "file:/srv/store",
        "file://srv/store",
        "file:///srv?x=1",
        "file:///srv#x",
        "file://",
        "s3://",
        "s3:///prefix",
        "s3://b",
        "s3://buc ket",
        "s3://-bucket",
        "s3://bucket:80/x",
        "s3://bucket/a//b",
        "s3://bucket/a/../b",
        "s3://bucket/%2e%2e/b",
        "s3://bucket/.hidden",
        "s3://bucket/sch%C3%B6n",
        "s3://bucket#x",
        "s3://bucket?endpoint",
        "s3://bucket?endpoint=",
        "s3://bucket?endpoint=127.0.0.1:9000",
        "s3://bucket?endpoint=ftp://host",
        "s3://bucket?endpoint=http://host:port",
        "s3://bucket?endpoint=http://host:0",
        "s3://bucket?endpoint=http://host/path",
        "s3://bucket?endpoint=http://host:99999",
        "s3://bucket?path_style=maybe",
        "s3://bucket?region=a&region=b",
        "s3://bucket?colour=red",
        "s3://[::1/x",
    ],
)
def test_malformed(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_objects(url)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/prefix",
        f"s3://AKIAEXAMPLE:{SECRET}/half@bucket/prefix",
        f"s3://AKIAEXAMPLE:{SECRET}@bucket?endpoint=http://host",
        f"s3://bucket?endpoint=http://AKIAEXAMPLE:{SECRET}@host",
        f"s3://bucket?aws_secret_access_key={SECRET}",
        f"s3://bucket?{SECRET}",
        f"s3://AKIAEXAMPLE:{SECRET}",
    ],
)
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_objects(url)
    assert SECRET not in str(caught.value)
    assert "AKIAEXAMPLE" not in str(caught.value)


_words = st.text("abcXYZ019-_+ %?=&~", min_size=1, max_size=8)


@given(
    prefix=st.lists(_words, max_size=3).map("/".join),
    endpoint=st.sampled_from([None, "http://127.0.0.1:9000", "https://s3.example.org"]),
    region=st.none() | _words,
    path_style=st.sampled_from([None, True, False]),
    profile=st.none() | _words,
)
def test_the_canonical_url_leads_back(
    prefix: str,
    endpoint: str | None,
    region: str | None,
    path_style: bool | None,
    profile: str | None,
) -> None:
    location = S3Location("bucket", prefix, endpoint, region, path_style, profile)
    assert parse_url(location.url) == location


# Any bytes but these make a file name; Python shows those that are not UTF-8 as surrogates.
_names = (
    st.binary(min_size=1, max_size=20)
    .map(lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_")))
    .filter(lambda name: name not in (".", ".."))
)


@given(st.lists(_names, min_size=1, max_size=4))
def test_the_canonical_url_of_a_directory_leads_back(parts: list[str]) -> None:
    location = FileLocation(Path("/", *parts))
    assert parse_url(location.url) == location


@pytest.mark.parametrize("path", ["~nobody-of-this-name/store", "/srv/\ud800"])
def test_a_path_that_cannot_be(path: str) -> None:
    with pytest.raises(UsageError):
        open_objects(path)
