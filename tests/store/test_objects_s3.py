from __future__ import annotations

import base64
import hashlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store.objects import ObjectStore, open_objects, s3
from envstore.store.objects.base import TooLateError
from tests.s3server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.tcpproxy import tcp_proxy

# For tests whose server fails on purpose; what a pause lasts is not what they test.
IMPATIENT = "1"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", IMPATIENT)


def every_operation(objects: ObjectStore) -> list[Callable[[], object]]:
    return [
        lambda: objects.get("x"),
        lambda: objects.get_range("x", 0, 1),
        lambda: objects.get_versioned("x"),
        lambda: objects.put("x", b"1"),
        lambda: objects.put_if("x", b"1", None),
        lambda: objects.size("x"),
        lambda: list(objects.list("")),
        lambda: objects.delete("x"),
    ]


def assert_no_secret(error: EnvstoreError) -> None:
    seen: BaseException | None = error
    while seen is not None:
        assert SECRET_KEY not in str(seen)
        assert SECRET_KEY not in repr(seen)
        seen = seen.__cause__ or seen.__context__
    assert "\n" not in str(error)


# Credentials, buckets and configuration.


def test_a_bucket_that_does_not_exist(s3_server: S3Server) -> None:
    url = s3_server.url("no-such-bucket")
    with pytest.raises(NotFoundError, match="bucket no-such-bucket does not exist"):
        open_objects(url, create=True)
    with closing(open_objects(url)) as objects:
        for operation in every_operation(objects):
            with pytest.raises(NotFoundError, match="bucket no-such-bucket does not exist") as e:
                operation()
            assert "s3 mb s3://no-such-bucket" in str(e.value)


def test_a_missing_object_costs_one_request_once_the_bucket_is_known(s3_server: S3Server) -> None:
    with closing(open_objects(s3_server.url(s3_server.new_bucket()))) as objects:
        assert objects.size("x") is None
        assert objects.traffic.requests == 2
        assert objects.size("x") is None
        assert objects.traffic.requests == 3


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")],
)
def test_wrong_credentials(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    url = s3_server.url(s3_server.new_bucket())
    monkeypatch.setenv(variable, value)
    with pytest.raises(AccessDeniedError):
        open_objects(url, create=True)
    with closing(open_objects(url)) as objects:
        for operation in every_operation(objects):
            with pytest.raises(AccessDeniedError, match=r"127\.0\.0\.1") as caught:
                operation()
            assert caught.value.hint
            assert_no_secret(caught.value)


@pytest.mark.parametrize("kept", [(), ("AWS_ACCESS_KEY_ID",), ("AWS_SECRET_ACCESS_KEY",)])
def test_no_credentials(monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...]) -> None:
    for name in {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} - set(kept):
        monkeypatch.delenv(name)
    with pytest.raises(AccessDeniedError, match="no credentials") as caught:
        open_objects("s3://bucket?endpoint=http://127.0.0.1:1")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert "profile" in str(caught.value)
    assert_no_secret(caught.value)


def test_a_profile(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = s3_server.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    path = tmp_path / "credentials"
    path.write_text(
        f"[work]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with closing(open_objects(s3_server.url(bucket, profile="work"))) as objects:
        objects.put("x", b"1")
        assert objects.get("x") == b"1"
    with pytest.raises(UsageError, match="profile"):
        open_objects(s3_server.url(bucket, profile="play"))


@pytest.mark.parametrize("where", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "config"])
def test_the_endpoint_of_the_aws_configuration(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    if where == "config":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {s3_server.endpoint}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(where, s3_server.endpoint)
    with closing(open_objects(f"s3://{s3_server.new_bucket()}/p", create=True)) as objects:
        objects.put("x", b"1")
        assert objects.get("x") == b"1"


def test_a_password_in_a_configured_endpoint_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET_KEY}@127.0.0.1:{port}")
        with (
            closing(open_objects("s3://bucket")) as objects,
            pytest.raises(UnavailableError, match=f"cannot reach http://127.0.0.1:{port}:") as e,
        ):
            objects.get("x")
        assert SECRET_KEY not in str(e.value)


def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(UsageError, match="configuration"):
        open_objects("s3://bucket")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_malformed_timeout(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", value)
    with pytest.raises(UsageError, match="ENVSTORE_S3_TIMEOUT"):
        open_objects("s3://bucket?endpoint=http://127.0.0.1:1")


def test_an_unusable_region() -> None:
    with pytest.raises(UsageError, match="configuration"):
        open_objects("s3://bucket?endpoint=http://127.0.0.1:1&region=no%20region")


# The network.


@pytest.mark.usefixtures("impatient")
def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, and refusing, as long as it is not listening
        url = f"s3://bucket?endpoint=http://127.0.0.1:{bound.getsockname()[1]}"
        with closing(open_objects(url)) as objects:
            for operation in every_operation(objects):
                with pytest.raises(UnavailableError, match="connection refused") as caught:
                    operation()
                assert "ENVSTORE_S3_TIMEOUT" in str(caught.value)
                assert_no_secret(caught.value)
            # Even the conditional write is tried again: it certainly never arrived.
            before = objects.traffic.requests
            with pytest.raises(UnavailableError):
                objects.put_if("x", b"1", None)
            assert objects.traffic.requests >= before + 2


@pytest.mark.usefixtures("impatient")
def test_no_such_host() -> None:
    with (
        closing(open_objects("s3://bucket?endpoint=http://no-such-host.invalid")) as objects,
        pytest.raises(UnavailableError, match=r"cannot reach http://no-such-host\.invalid"),
    ):
        objects.get("x")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://bucket?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        with closing(open_objects(url)) as objects:
            with pytest.raises(UnavailableError, match="timed out"):
                objects.get("x")
            assert objects.traffic.requests == 2
            with pytest.raises(UnavailableError, match="timed out"):
                objects.put_if("x", b"", None)
            assert objects.traffic.requests == 3


def test_the_outcome_of_a_conditional_write_whose_answer_is_lost_is_unknown(
    s3_server: S3Server,
) -> None:
    bucket = s3_server.new_bucket()
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as objects,
    ):
        version = objects.put_if("refs/x", b"first", None)
        before = objects.traffic.requests
        proxy.swallow_answers()
        with pytest.raises(UnavailableError):
            objects.put_if("refs/x", b"second", version)
        assert objects.traffic.requests == before + 1
        proxy.restore()
        assert objects.get("refs/x") == b"second"  # it had landed


def test_reads_and_writes_survive_a_connection_that_breaks(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    data = bytes(range(256)) * 8192
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as objects,
    ):
        objects.put("x", data)
        proxy.cut_answers_after(100_000, times=2)
        assert objects.get("x") == data
        assert objects.traffic.requests == 1 + 3
        proxy.cut_answers_after(100_000, times=1)
        assert objects.get_range("x", 7, 1_000_000) == data[7:1_000_007]
        proxy.swallow_answers(times=1)
        objects.put("y", data)
        proxy.cut_requests_before_body(times=1)
        objects.put("z", data)
        assert objects.get("y") == objects.get("z") == data
        proxy.swallow_answers(times=1)
        objects.delete("y")
        assert [info.key for info in objects.list("y")] == []


@pytest.mark.usefixtures("impatient")
def test_answers_that_always_break_off_give_up(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as objects,
    ):
        objects.put("x", bytes(500_000))
        proxy.cut_answers_after(100_000)
        for read in (lambda: objects.get("x"), lambda: objects.get_range("x", 0, 400_000)):
            before = objects.traffic.requests
            with pytest.raises(UnavailableError, match="broke off"):
                read()
            assert 2 <= objects.traffic.requests - before <= 6
        proxy.restore()
        assert objects.get("x") == bytes(500_000)


@pytest.mark.usefixtures("impatient")
def test_ranges_in_pieces_are_asked_for_once(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as objects,
    ):
        data = os.urandom(1_000_000)
        objects.put("x", data)
        before = objects.traffic.requests, proxy.connections
        for _ in range(5):
            assert b"".join(objects.iter_range("x", 10, 900_000)) == data[10:900_010]
        # Each leaves its connection to the next.
        assert (objects.traffic.requests, proxy.connections) == (before[0] + 5, before[1])
        proxy.cut_answers_after(400_000, times=1)
        got = bytearray()
        # On a new connection, of which the proxy counts the bytes.
        with closing(open_objects(objects.url)) as fresh:
            pieces = fresh.iter_range("x", 0, 900_000)
            got += next(pieces)
            with pytest.raises(UnavailableError, match="broke off"):
                got += b"".join(pieces)
        assert 0 < len(got) < 400_000
        assert data.startswith(got)
        for status, error in ((503, UnavailableError), (403, AccessDeniedError)):
            proxy.answer(status, times=1)
            with pytest.raises(error):
                list(objects.iter_range("x", 0, 10))
        proxy.hang(times=1)
        with pytest.raises(UnavailableError, match="timed out"):
            list(objects.iter_range("x", 0, 10))
        assert objects.traffic.requests == before[0] + 8
        assert list(objects.iter_range("x", 0, 10)) == [data[:10]]


@pytest.mark.usefixtures("impatient")
def test_buffers_are_filled_anew_when_an_answer_breaks_off(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as objects,
    ):
        data = os.urandom(1_000_000)
        objects.put("x", data)
        buffers = [bytearray(size) for size in (300_000, 1, 500_000)]
        views = [memoryview(buffer) for buffer in buffers]
        proxy.cut_answers_after(400_000, times=2)
        before = objects.traffic.requests
        objects.get_range_into("x", 7, views)
        assert b"".join(buffers) == data[7:800_008]
        assert objects.traffic.requests == before + 3
        before = objects.traffic.requests, proxy.connections
        for _ in range(5):
            objects.get_range_into("x", 7, views)
        # Each leaves its connection to the next.
        assert (objects.traffic.requests, proxy.connections) == (before[0] + 5, before[1])
        proxy.cut_answers_after(400_000)
        with pytest.raises(UnavailableError, match="broke off"):
            objects.get_range_into("x", 7, views)


def test_closing_ends_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "100000")
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        objects = open_objects(f"s3://bucket?endpoint=http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr("envstore.store.objects.s3._FIRST_PAUSE", 1e6)
        monkeypatch.setattr("envstore.store.objects.s3._LONGEST_PAUSE", 1e6)
        caught: list[BaseException] = []

        def read() -> None:
            try:
                objects.get("x")
            except UnavailableError as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        client, _ = listener.accept()
        client.close()
        # Whether the pause has begun or is about to: closing ends it.
        objects.close()
        reader.join()
        assert caught


# A server that answers from a script.

LONG_AGO = "Mon, 01 Jan 2001 00:00:00 GMT"


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def xml(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())


@dataclass
class Script:
    """What a scripted server was asked, and what it answers: the last answer stays."""

    endpoint: str
    answers: list[Answer]
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def store(self) -> ObjectStore:
        return open_objects(f"s3://bucket?endpoint={self.endpoint}")


@contextmanager
def scripted(*answers: Answer) -> Iterator[Script]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            script.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.requests.append((self.command, self.path, headers))
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if "Date" in answer.headers:
                self.send_response_only(answer.status)
            else:
                self.send_response(answer.status)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    script = Script(f"http://127.0.0.1:{server.server_address[1]}", list(answers))
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OK = Answer(200, b"data", {"ETag": '"1"'})
STORED = Answer(200, b"", {"ETag": '"1"'})


@pytest.mark.parametrize(
    "passing",
    [
        xml(500, "InternalError"),
        xml(503, "SlowDown"),
        xml(502, "BadGateway"),
        xml(429, "TooManyRequests"),
        xml(400, "RequestTimeout"),
        Answer(504, b"<html>gateway</html>"),
    ],
)
def test_a_passing_error_is_tried_again(passing: Answer) -> None:
    with scripted(passing, passing, OK) as script, closing(script.store()) as objects:
        assert objects.get("x") == b"data"
        assert len(script.requests) == 3
        assert objects.traffic.requests == 3


@pytest.mark.parametrize(
    "final", [xml(400, "InvalidRequest"), xml(403, "AccessDenied"), xml(405, "MethodNotAllowed")]
)
def test_a_final_error_is_not_tried_again(final: Answer) -> None:
    with scripted(final, OK) as script, closing(script.store()) as objects:
        with pytest.raises(EnvstoreError):
            objects.get("x")
        assert len(script.requests) == 1


def expired() -> Answer:
    body = "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    return Answer(403, body.encode())


def test_a_deletion_with_a_deadline_is_signed_in_its_url(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    caplog.set_level("DEBUG", "botocore")
    with scripted(OK, Answer(204)) as script, closing(script.store()) as objects:
        objects.get("x")
        objects.delete_within("a b/c+d", 30, lambda: None)
        assert objects.traffic.requests == 2
        objects.delete("x")
    command, path, headers = script.requests[1]
    assert command == "DELETE"
    split = urlsplit(path)
    assert split.path == "/bucket/a%20b/c%2Bd"
    query = dict(parse_qsl(split.query))
    assert query["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert query["X-Amz-Expires"] == "30"
    assert query["X-Amz-Security-Token"] == "the-token"
    assert not [name for name in headers if name.startswith(("authorization", "x-amz-"))]
    assert f"X-Amz-Signature={query['X-Amz-Signature']}" not in caplog.text
    # Any other is signed as before.
    assert "authorization" in script.requests[2][2]
    assert not urlsplit(script.requests[2][1]).query


def test_a_deletion_that_was_clearly_refused_is_checked_anew() -> None:
    checks: list[int] = []
    answers = OK, xml(503, "SlowDown"), xml(429, "TooManyRequests"), Answer(204)
    with scripted(*answers) as script, closing(script.store()) as objects:
        objects.get("x")
        objects.delete_within("y", 30, lambda: checks.append(len(script.requests)))
    assert checks == [1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (xml(500, "InternalError"), UnavailableError),
        (xml(502, "BadGateway"), UnavailableError),
        (Answer(200, b"12", {"Content-Length": "900"}), UnavailableError),
        (xml(403, "AccessDenied"), AccessDeniedError),
        (expired(), TooLateError),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_deletion_that_may_arrive_is_not_sent_again(
    answer: Answer, error: type[EnvstoreError]
) -> None:
    with scripted(OK, answer) as script, closing(script.store()) as objects:
        objects.get("x")
        with pytest.raises(error) as caught:
            objects.delete_within("y", 30, lambda: None)
        assert len(script.requests) == 2
    assert caught.type is error
    assert "Signature" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.usefixtures("impatient")
def test_where_nobody_listens_a_deletion_tells_no_url() -> None:
    with scripted(OK) as script:
        objects = script.store()
        objects.get("x")
    with closing(objects), pytest.raises(UnavailableError) as caught:
        objects.delete_within("y", 30, lambda: None)
    assert "Signature" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("off", [-20.0, 20.0])
def test_a_deadline_needs_clocks_that_agree(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time
    with scripted(OK) as script, closing(script.store()) as objects:
        objects.get("x")
        monkeypatch.setattr(s3.time, "time", lambda: wall() + off)
        where = "ahead of" if off > 0 else "behind"
        with pytest.raises(UnavailableError, match=f"clock is .* s {where} that of"):
            objects.delete_within("y", 30, lambda: None)
        assert len(script.requests) == 1


@pytest.mark.parametrize("size", [1000, 300_000, 700_000])
def test_buffers_are_sent_whole_at_every_attempt(size: int) -> None:
    data = os.urandom(3 * size)
    buffers = [memoryview(data)[:size], data[size : 2 * size], memoryview(data)[2 * size :]]
    script_of = scripted(xml(503, "SlowDown"), xml(500, "InternalError"), STORED)
    with script_of as script, closing(script.store()) as objects:
        objects.put("x", buffers)
        assert objects.traffic.bytes_out == 3 * len(data)
    assert script.bodies == [data] * 3
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    assert [sent["content-md5"] for _, _, sent in script.requests] == [md5] * 3


@pytest.mark.usefixtures("impatient")
def test_attempts_are_bounded() -> None:
    with scripted(xml(503, "SlowDown")) as script, closing(script.store()) as objects:
        with pytest.raises(UnavailableError, match="HTTP 503 SlowDown"):
            objects.get("x")
        assert 2 <= len(script.requests) <= 6


@pytest.mark.parametrize("status", [500, 503, 504])
def test_a_conditional_write_is_sent_once(status: int) -> None:
    with scripted(xml(status, "Whatever"), STORED) as script, closing(script.store()) as objects:
        with pytest.raises(UnavailableError, match=f"HTTP {status}"):
            objects.put_if("x", b"1", None)
        assert len(script.requests) == 1
        assert objects.put_if("x", b"1", '"v"') == '"1"'
    assert script.requests[0][2]["if-none-match"] == "*"
    assert "if-match" not in script.requests[0][2]
    assert script.requests[1][2]["if-match"] == '"v"'


@pytest.mark.parametrize(
    "answer",
    [
        xml(412, "PreconditionFailed"),
        xml(409, "ConditionalRequestConflict"),
        xml(404, "NoSuchKey"),
        Answer(412),
        Answer(404),
    ],
)
def test_every_way_to_say_that_a_conditional_write_lost(answer: Answer) -> None:
    with scripted(answer) as script, closing(script.store()) as objects:
        with pytest.raises(ConflictError):
            objects.put_if("x", b"1", '"v"')
        assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (xml(403, "AccessDenied"), AccessDeniedError, "denied access"),
        (xml(403, "SignatureDoesNotMatch"), AccessDeniedError, "wrong key or secret"),
        (xml(400, "ExpiredToken"), AccessDeniedError, "expired"),
        (xml(403, "RequestTimeTooSkewed"), AccessDeniedError, "clock"),
        (Answer(403, headers={"Date": LONG_AGO}), AccessDeniedError, "clock"),
        (Answer(403, headers={"Date": "then"}), AccessDeniedError, "denied access"),
        (xml(507, "InsufficientStorage"), NoSpaceError, "no space"),
        (xml(403, "QuotaExceeded"), NoSpaceError, "no space"),
        (xml(404, "NoSuchBucket"), NotFoundError, "bucket bucket does not exist"),
        (Answer(404, b"<html>not found</html>"), NotFoundError, "bucket bucket does not exist"),
        (xml(413, "EntityTooLarge"), UnavailableError, "HTTP 413"),
    ],
)
@pytest.mark.parametrize("operation", ["put", "get"])
def test_what_an_answer_means(
    answer: Answer, error: type[EnvstoreError], words: str, operation: str
) -> None:
    with scripted(answer) as script, closing(script.store()) as objects:
        with pytest.raises(error, match=words) as caught:
            objects.put("x", b"1") if operation == "put" else objects.get("x")
        assert_no_secret(caught.value)


def test_a_range_that_the_server_ignores() -> None:
    whole = Answer(200, bytes(1000), {"ETag": '"1"'})
    with (
        scripted(whole) as script,
        closing(script.store()) as objects,
        pytest.raises(CorruptError, match="Range"),
    ):
        objects.get_range("x", 0, 10)


def test_a_listing_that_does_not_get_on() -> None:
    page = Answer(
        200,
        b"<ListBucketResult><IsTruncated>true</IsTruncated>"
        b"<NextContinuationToken>t</NextContinuationToken>"
        b"<Contents><Key>a</Key><Size>1</Size></Contents>"
        b"<Contents><Key>folder/</Key><Size>0</Size></Contents></ListBucketResult>",
    )
    with scripted(page) as script, closing(script.store()) as objects:
        listing = objects.list("")
        assert [next(listing).key, next(listing).key] == ["a", "a"]
        with pytest.raises(UnavailableError, match="does not get on"):
            next(listing)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_speak_s3() -> None:
    with scripted(Answer(200, b"hello")) as script, closing(script.store()) as objects:
        with pytest.raises(UnavailableError, match=r"cannot list \*"):
            list(objects.list(""))
        with pytest.raises(CorruptError, match="without an ETag"):
            objects.get_versioned("x")
        assert objects.get("x") == b"hello"
    with (
        scripted(Answer(200)) as script,
        closing(script.store()) as objects,
        pytest.raises(CorruptError, match="without an ETag"),
    ):
        objects.put_if("x", b"1", None)


def test_a_server_that_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(b"220 mail.example.org ESMTP\r\n")

        talker = threading.Thread(target=talk)
        talker.start()
        url = f"s3://bucket?endpoint=http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            closing(open_objects(url)) as objects,
            pytest.raises(UnavailableError, match="cannot reach"),
        ):
            objects.put_if("x", b"", None)
        talker.join()


@pytest.mark.usefixtures("impatient")
def test_a_body_shorter_than_announced() -> None:
    short = Answer(200, b"data", {"ETag": '"1"', "Content-Length": "5", "Connection": "close"})
    with scripted(short, OK) as script, closing(script.store()) as objects:
        assert objects.get("x") == b"data"
        assert len(script.requests) == 2
    with scripted(short) as script, closing(script.store()) as objects:
        with pytest.raises(UnavailableError, match="broke off"):
            objects.get("x")
        assert 2 <= len(script.requests) <= 6


@pytest.mark.parametrize("size", [10, 2 << 20])
def test_off_amazon_no_checksum_trailers_and_path_style(size: int) -> None:
    with scripted(STORED, OK) as script, closing(script.store()) as objects:
        objects.put("a/x", bytes(size))
        objects.get("a/x")
    (put, path, sent), (_, _, asked) = script.requests
    assert (put, path) == ("PUT", "/bucket/a/x")
    assert "content-encoding" not in sent
    assert not [name for name in sent if "checksum" in name or "trailer" in name]
    assert not [name for name in asked if "checksum" in name]
    md5 = hashlib.md5(bytes(size)).digest()
    assert base64.b64decode(sent["content-md5"]) == md5
    # Worth a round trip only before a large body.
    assert ("expect" in sent) == (size > 1 << 20)


@pytest.mark.usefixtures("impatient")
def test_a_write_cut_off_before_its_body_stores_nothing(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    with closing(open_objects(s3_server.url(bucket))) as objects:
        version = objects.put_if("refs/x", b"first", None)
        with tcp_proxy(s3_server.endpoint) as proxy:
            proxy.cut_requests_before_body()
            with closing(open_objects(f"s3://{bucket}?endpoint={proxy.endpoint}")) as cut:
                with pytest.raises(UnavailableError):
                    cut.put_if("refs/x", b"second", version)
                with pytest.raises(UnavailableError):
                    cut.put("packs/y", bytes(2 << 20))
        assert objects.get_versioned("refs/x") == (b"first", version)
        assert objects.size("packs/y") is None


def test_virtual_hosts_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def loopback(host: str, *rest: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host.endswith(".example.org") else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", loopback)
    with scripted(OK) as script:
        endpoint = script.endpoint.replace("127.0.0.1", "s3.example.org")
        with closing(open_objects(f"s3://bucket?endpoint={endpoint}&path_style=0")) as objects:
            assert objects.get("x") == b"data"
    _, path, headers = script.requests[0]
    assert path == "/x"
    assert headers["host"].startswith("bucket.s3.example.org")


def test_an_object_too_large_for_one_put_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envstore.store.objects.s3._MAX_OBJECT", 10)
    with scripted(OK) as script, closing(script.store()) as objects:
        with pytest.raises(UsageError, match="too large"):
            objects.put("x", bytes(11))
        assert script.requests == []


def test_a_large_object(s3_server: S3Server) -> None:
    data = bytes(range(256)) * (300 << 10)  # 75 MiB
    with closing(open_objects(s3_server.url(s3_server.new_bucket()))) as objects:
        objects.put("packs/x", data)
        assert objects.traffic.requests == 1
        assert objects.size("packs/x") == len(data)
        assert objects.get("packs/x") == data
        assert objects.get_range("packs/x", 70 << 20, 1000) == data[70 << 20 :][:1000]


def test_the_time_is_that_of_the_last_answer_or_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed = [1000.0]
    monkeypatch.setattr(s3, "_elapsed", lambda: elapsed[0])
    with scripted(Answer(200, b"x")) as server, closing(server.store()) as store:
        store.get("key")
        before = store.now()
        assert abs(before - time.time()) < 60
        elapsed[0] += 9.0
        assert store.now() == before + 9.0
        assert [command for command, _, _ in server.requests] == ["GET"]
        elapsed[0] += 2.0
        assert store.now() < before + 9.0
        assert [command for command, _, _ in server.requests] == ["GET", "HEAD"]


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_a_server_that_does_not_tell_the_time_is_told_of(
    date: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda self: date)
    with (
        scripted(Answer(200, b"x")) as server,
        closing(server.store()) as store,
        pytest.raises(CorruptError, match="without a Date"),
    ):
        store.now()
