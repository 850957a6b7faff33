from __future__ import annotations

import pytest

from envstore.resolver.secrets import secret_in


@pytest.mark.parametrize(
    "text",
    [
        "https://user:word@host.example/",
        "https://token@host.example/simple",
        "https://user%3Aword@host.example/simple",
        "demo @ git+https://word@code.example/demo",
        "ssh://git:word@code.example/demo",
        "https://host.example/t/abcd/channel",
        "-i https://host.example/simple?token=abcd",
        "https://host.example/a.whl?X-Goog-Signature=ab&x=1",
        "https://host.example/a.whl?x=1;sig=ab",
        "https://a.example/x https://user:word@b.example/",
        "https://host.example/a?client%5Fsecret=1",
        "s3://key:word@bucket/prefix",
    ],
)
def test_secrets_are_found_and_not_repeated(text: str) -> None:
    said = secret_in(text)
    assert said
    assert "word" not in said.replace("password", "")
    assert "abcd" not in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "numpy >=2",
        "user:word@host",
        "https://host.example/simple",
        "https://host.example/@scope/a.tgz",
        "https://host.example/t/page.html",
        "https://host.example/t/${TOKEN}/channel",
        "https://host.example/a.whl#sha256=abcd&token=no",
        "https://host.example/a?version=1&significance=2&design=3",
        "ssh://git@code.example/demo",
        "git+ssh://git@code.example/demo@main",
        "file:///home/me@work/wheels",
        "s3://bucket/prefix?endpoint=https://s3.example",
    ],
)
def test_what_is_no_secret_passes(text: str) -> None:
    assert secret_in(text) == ""
