"""Archives are fetched whole and right or not at all, from servers as they are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envstore.errors import (
    AccessDeniedError,
    CorruptError,
    EnvstoreError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.resolver.packages import download as download_module
from envstore.resolver.packages.credentials import Credentials, shown
from envstore.resolver.packages.download import (
    Archive,
    download_unknown,
    fetch_archives,
    iter_archives,
)
from tests.s3server import S3Server
from tests.webserver import (
    Web,
    cut,
    redirect,
    reset,
    running_web,
    silence,
    stall,
    status,
    wrong,
)

DATA = random.Random(4).randbytes(3_000_000)
SMALL = b"a small archive"
SECRET = "hunter2-secret"


@pytest.fixture
def web() -> Iterator[Web]:
    with running_web() as running:
        yield running


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "_ca_bundle")) or name.startswith(
            ("UV_", "PIP_", "RATTLER_", "NETRC", "SSL_CERT_")
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "archives"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def archive(web: Web, data: bytes = DATA, path: str = "/a-1-py3-none-any.whl") -> Archive:
    web.files[path] = data
    return Archive(web.url(path), digest(data), len(data), "a")


def fetched(item: Archive, there: Path) -> bytes:
    (path,) = fetch_archives([item], there).values()
    assert path.name.startswith(item.sha256)
    assert no_partials(there)
    return path.read_bytes()


def no_partials(there: Path) -> bool:
    return not [path for path in there.iterdir() if path.name.startswith(".")]


def test_many_archives_are_fetched_at_once_over_few_connections(web: Web, there: Path) -> None:
    items = [archive(web, b"%d" % n * 1000, f"/p-{n}.conda") for n in range(60)]
    told: list[tuple[int, int]] = []
    found = fetch_archives(
        items, there, progress=lambda done, total: told.append((done, total)), parallel=4
    )
    assert {key: digest(path.read_bytes()) for key, path in found.items()} == {
        item.sha256: item.sha256 for item in items
    }
    assert all(path.suffix == ".conda" for path in found.values())
    assert len(web.seen) == 60
    assert web.connections <= 4
    total = sum(item.size for item in items)
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_what_is_there_is_not_fetched_again(web: Web, there: Path) -> None:
    item = archive(web)
    assert fetched(item, there) == fetched(item, there) == DATA
    assert len(web.seen) == 1


def test_what_is_there_but_damaged_is_fetched_again(web: Web, there: Path) -> None:
    item = archive(web)
    (path,) = fetch_archives([item], there).values()
    path.write_bytes(bytes(len(DATA)))
    assert fetched(item, there) == DATA


def test_one_archive_named_twice_is_fetched_once(web: Web, there: Path) -> None:
    item = archive(web)
    assert len(fetch_archives([item, item], there)) == 1
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    "faults",
    [
        [status(503), status(500), status(429), status(408)],
        [reset, reset],
        [cut(1_000_000), cut(500_000)],
        [status(503, ("Retry-After", "0")), cut(10), reset, cut(2_000_000)],
        [stall(200_000)],
        [silence],
    ],
)
def test_passing_trouble_is_overcome(
    web: Web, there: Path, faults: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSTORE_HTTP_TIMEOUT", "0.5")
    item = archive(web)
    web.faults["/a-1-py3-none-any.whl"] = list(faults)  # type: ignore[arg-type]
    assert fetched(item, there) == DATA
    assert len(web.seen) == len(faults) + 1


def test_a_transfer_that_breaks_off_is_resumed(web: Web, there: Path) -> None:
    item = archive(web)
    web.faults["/a-1-py3-none-any.whl"] = [cut(1_000_000)]
    assert fetched(item, there) == DATA
    assert [request.headers["Range"] for request in web.seen] == [None, "bytes=1000000-"]


def test_many_breaks_do_not_matter_while_there_is_progress(web: Web, there: Path) -> None:
    data = random.Random(5).randbytes(12_000_000)
    item = archive(web, data)
    web.always["/a-1-py3-none-any.whl"] = cut(1_100_000)
    assert fetched(item, there) == data
    assert len(web.seen) == 11


def test_a_server_without_ranges_is_asked_for_everything_again(web: Web, there: Path) -> None:
    item = archive(web)
    web.ranges = False
    web.faults["/a-1-py3-none-any.whl"] = [cut(1_000_000)]
    assert fetched(item, there) == DATA


@pytest.mark.parametrize("left", [DATA[:1_234_567], DATA, b"something else", DATA + b"more"])
def test_what_an_earlier_process_left_is_resumed_or_replaced(
    web: Web, there: Path, left: bytes
) -> None:
    item = archive(web)
    there.mkdir()
    (there / f".{item.sha256}.part").write_bytes(left)
    assert fetched(item, there) == DATA
    assert [request.headers["Range"] for request in web.seen][:1] == (
        [] if left == DATA else [f"bytes={len(left)}-"]
    )


def test_a_wrong_digest_is_refused_naming_both(web: Web, there: Path) -> None:
    item = archive(web)
    web.always["/a-1-py3-none-any.whl"] = wrong
    with pytest.raises(CorruptError) as caught:
        fetched(item, there)
    assert item.sha256 in str(caught.value)
    assert digest(bytes(len(DATA))) in str(caught.value)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_wrong_size_is_refused(web: Web, there: Path, size: int) -> None:
    item = archive(web)
    with pytest.raises(CorruptError, match=f"has {len(DATA)} bytes, not {size}"):
        fetched(Archive(item.url, item.sha256, size), there)
    assert list(there.iterdir()) == []


def test_a_body_without_end_is_cut_off(web: Web, there: Path) -> None:
    item = archive(web)

    def endless(handler: object, data: bytes) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.send_header("Connection", "close")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        while True:
            handler.wfile.write(bytes(1 << 20))  # type: ignore[attr-defined]

    web.always["/a-1-py3-none-any.whl"] = endless  # type: ignore[assignment]
    with pytest.raises(CorruptError, match=f"has more than {len(DATA)} bytes"):
        fetched(item, there)


@pytest.mark.parametrize("code", [404, 410])
def test_what_vanished_is_said_to_be_gone(web: Web, there: Path, code: int) -> None:
    item = archive(web)
    web.always["/a-1-py3-none-any.whl"] = status(code)
    with pytest.raises(NotFoundError, match=rf"a-1-py3-none-any.whl is not there \(HTTP {code}\)"):
        fetched(item, there)
    assert len(web.seen) == 1
    assert list(there.iterdir()) == []


def test_trouble_that_lasts_is_given_up(web: Web, there: Path) -> None:
    item = archive(web)
    web.always["/a-1-py3-none-any.whl"] = status(503)
    with pytest.raises(UnavailableError, match="HTTP 503"):
        fetched(item, there)
    assert len(web.seen) == 5


def test_no_network_is_one_line(there: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cannot reach nowhere\.invalid: ") as caught:
        fetch_archives([Archive("https://nowhere.invalid/a.whl", "0" * 64)], there)
    assert "\n" not in str(caught.value)


def test_one_failure_ends_the_others_and_keeps_what_they_have(web: Web, there: Path) -> None:
    slow = archive(web, DATA, "/slow.whl")
    web.always["/slow.whl"] = stall(500_000)
    gone = Archive(web.url("/gone.whl"), "0" * 64)
    before = threading.active_count()

    def later(handler: object, data: bytes) -> None:
        deadline = time.monotonic() + 30
        left = there / f".{slow.sha256}.part"
        while time.monotonic() < deadline and not (left.exists() and left.stat().st_size):
            time.sleep(0.01)
        handler.say(404)  # type: ignore[attr-defined]

    web.always["/gone.whl"] = later  # type: ignore[assignment]
    with pytest.raises(NotFoundError):
        fetch_archives([slow, gone], there)
    assert [t for t in threading.enumerate() if t.name == "envstore-fetch"] == []
    assert threading.active_count() <= before + 2  # the server's own
    del web.always["/slow.whl"]
    web.seen.clear()
    assert fetched(slow, there) == DATA
    assert web.seen[0].headers["Range"]


def test_a_caller_who_stops_asking_leaves_no_threads(web: Web, there: Path) -> None:
    items = [archive(web, b"%d" % n, f"/p-{n}.whl") for n in range(4)]
    for n in range(3):
        web.always[f"/p-{n}.whl"] = silence
    iterator = iter_archives(items, there)
    assert next(iterator).archive == items[3]
    iterator.close()  # type: ignore[attr-defined]
    assert [t for t in threading.enumerate() if t.name == "envstore-fetch"] == []


def test_an_interrupted_process_leaves_nothing_under_a_final_name(web: Web, there: Path) -> None:
    item = archive(web)
    web.faults["/a-1-py3-none-any.whl"] = [stall(1_500_000)]
    program = (
        "import sys; from pathlib import Path\n"
        "from envstore.resolver.packages.download import *\n"
        "try: fetch_archives([Archive(sys.argv[1], sys.argv[2])], Path(sys.argv[3]))\n"
        "except KeyboardInterrupt: sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, item.url, item.sha256, str(there)])
    left = there / f".{item.sha256}.part"
    deadline = time.monotonic() + 60
    while not (left.exists() and left.stat().st_size > 1_000_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(2)
    assert process.wait(30) == 7
    assert [path.name for path in there.iterdir()] == [left.name]
    assert fetched(item, there) == DATA
    assert int(web.seen[-1].headers["Range"][6:-1]) > 1_000_000


def test_two_processes_share_one_download(web: Web, there: Path) -> None:
    item = archive(web)
    there.mkdir()
    with open(there / f".{item.sha256}.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(fetched(item, there)))
        thread.start()
        other.write(DATA)
        other.flush()
        time.sleep(0.1)
        os.rename(other.name, there / f"{item.sha256}.whl")
    thread.join()
    assert found == [DATA]
    assert web.seen == []


def test_what_another_process_removes_meanwhile_is_fetched_again(
    web: Web, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = archive(web)
    (path,) = fetch_archives([item], there).values()
    real = hashlib.file_digest

    def removed_meanwhile(file: Any, name: str) -> Any:
        found = real(file, name)
        path.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", removed_meanwhile)
        (again,) = fetch_archives([item], there).values()
    assert again.read_bytes() == DATA
    assert len(web.seen) == 2


def test_leftovers_go_after_a_week(web: Web, there: Path) -> None:
    there.mkdir()
    for name, days in (("old.whl", 8), (".old.part", 8), ("new.whl", 6)):
        (there / name).write_bytes(b"left")
        then = time.time() - days * 86400
        os.utime(there / name, (then, then))
    item = archive(web)
    fetched(item, there)
    assert sorted(path.name for path in there.iterdir()) == sorted(
        [f"{item.sha256}.whl", "new.whl"]
    )


# Without a digest


def test_what_has_no_digest_gets_one(web: Web, there: Path) -> None:
    web.files["/x.tar.gz"] = DATA
    path, sha256, size = download_unknown(web.url("/x.tar.gz"), there)
    assert (path.name, sha256, size) == (f"{digest(DATA)}.tar.gz", digest(DATA), len(DATA))
    assert path.read_bytes() == DATA
    assert no_partials(there)


def test_an_md5_is_checked_where_there_is_nothing_better(web: Web, there: Path) -> None:
    web.files["/x.conda"] = DATA
    right = hashlib.md5(DATA).hexdigest()
    assert download_unknown(web.url("/x.conda"), there, md5=right)[1] == digest(DATA)
    with pytest.raises(CorruptError, match=f"has the md5 {right}, not {'0' * 32}"):
        download_unknown(web.url("/x.conda"), there, md5="0" * 32)


@pytest.mark.parametrize(("etag", "resumed"), [('"v1"', True), ("", False), ('W/"v1"', False)])
def test_unknown_bytes_are_put_together_only_if_the_server_vouches(
    web: Web, there: Path, etag: str, resumed: bool
) -> None:
    web.files["/x.whl"] = DATA
    web.etag = etag
    web.faults["/x.whl"] = [cut(1_000_000)]
    assert download_unknown(web.url("/x.whl"), there)[1] == digest(DATA)
    assert (web.seen[1].headers["Range"] is not None) == resumed


def test_unknown_bytes_that_change_meanwhile_are_fetched_again(web: Web, there: Path) -> None:
    web.files["/x.whl"] = DATA
    web.etag = '"v1"'

    def change(handler: object, data: bytes) -> None:
        handler.serve(data, stop_after=1_000_000)  # type: ignore[attr-defined]
        web.etag, web.files["/x.whl"] = '"v2"', DATA[::-1]

    web.faults["/x.whl"] = [change]  # type: ignore[list-item]
    assert download_unknown(web.url("/x.whl"), there)[1] == digest(DATA[::-1])


# Other places


def test_files_are_fetched_like_anything_else(tmp_path: Path, there: Path) -> None:
    path = tmp_path / "ä b+1.whl"
    path.write_bytes(DATA)
    assert fetched(Archive(path.as_uri(), digest(DATA), len(DATA)), there) == DATA
    assert path.exists()
    with pytest.raises(NotFoundError, match="is not there"):
        fetch_archives([Archive((tmp_path / "gone.whl").as_uri(), "0" * 64)], there)


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, there: Path) -> None:
    os.mkfifo(tmp_path / "pipe.whl")
    (tmp_path / "endless.whl").symlink_to("/dev/zero")
    (tmp_path / "directory.whl").mkdir()
    for name in ("pipe.whl", "endless.whl", "directory.whl"):
        with pytest.raises(UsageError, match=f"{name} is not a regular file"):
            fetch_archives([Archive((tmp_path / name).as_uri(), "0" * 64)], there)


def test_buckets_are_fetched_from(
    s3_server: S3Server, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    client = s3_server.client()
    client.put_object(Bucket=bucket, Key="channel/noarch/a+b-1.conda", Body=DATA)
    client.close()
    item = Archive(s3_server.url(bucket, "channel/noarch/a%2Bb-1.conda"), digest(DATA), len(DATA))
    there.mkdir()
    (there / f".{item.sha256}.part").write_bytes(DATA[:1_000_000])
    assert fetched(item, there) == DATA
    with pytest.raises(NotFoundError, match=r"gone\.conda"):
        fetch_archives([Archive(s3_server.url(bucket, "gone.conda"), "0" * 64)], there)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDeniedError, match="refused the credentials"):
        fetch_archives([Archive(s3_server.url(bucket, "gone.conda"), "0" * 64)], there)


def test_mirrors_come_first_and_need_not_be_right(
    web: Web, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a-1-py3-none-any.whl"
    item = archive(web)
    with running_web() as mirror:
        places = [mirror.url("/one/"), mirror.url("/two"), (tmp_path / "three").as_uri()]
        monkeypatch.setenv("ENVSTORE_MIRRORS", " ".join(f"{web.url('')}={to}" for to in places))
        mirror.files[f"/one/{name}"] = bytes(len(DATA))
        assert fetched(item, there) == DATA
        assert [request.path for request in mirror.seen] == [f"/one/{name}", f"/two/{name}"]
        assert len(web.seen) == 1
        (there / f"{item.sha256}.whl").unlink()
        mirror.files[f"/one/{name}"] = DATA
        assert fetched(item, there) == DATA
        assert len(web.seen) == 1


def test_a_mirror_that_is_down_is_asked_once(
    web: Web, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_web() as mirror:
        down = mirror.url("/m")
    monkeypatch.setenv("ENVSTORE_MIRRORS", f"{web.url('')}={down}")
    items = [archive(web, b"%d" % n, f"/p-{n}.whl") for n in range(3)]
    assert len(fetch_archives(items, there, parallel=1)) == 3


@pytest.mark.parametrize("text", ["nonsense", "https://a.example", "a=b"])
def test_malformed_mirrors_are_refused(
    there: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ENVSTORE_MIRRORS", text)
    with pytest.raises(UsageError, match="ENVSTORE_MIRRORS"):
        fetch_archives([], there)


@pytest.mark.parametrize(
    "url",
    ["ftp://host.example/a", "nonsense", "http://", "http://[::1", "http://h:99999/a", "s3://", ""],
)
def test_what_is_no_url_is_refused(there: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_archives([Archive(url, "0" * 64)], there)
    assert "\n" not in str(caught.value)


def test_a_digest_that_is_a_path_is_refused(there: Path) -> None:
    with pytest.raises(UsageError, match="malformed sha256"):
        fetch_archives([Archive("file:///etc/passwd", "../../evil")], there)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvstoreError, match="cannot keep archives in"):
        fetch_archives([], tmp_path / "file" / "archives")


def test_a_full_disk_is_named_and_what_fitted_is_kept(web: Web, there: Path) -> None:
    item = archive(web)
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from envstore.errors import NoSpaceError\n"
        "from envstore.resolver.packages.download import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: fetch_archives([Archive(sys.argv[1], sys.argv[2])], Path(sys.argv[3]))\n"
        "except NoSpaceError as error: sys.exit(7 if sys.argv[3] in str(error) else 8)\n"
    )
    command = [sys.executable, "-c", program, item.url, item.sha256, str(there)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 7
    assert [path.name for path in there.iterdir()] == [f".{item.sha256}.part"]
    assert fetched(item, there) == DATA
    assert web.seen[-1].headers["Range"] == "bytes=1000000-"


# Logins


def basic(user: str, password: str) -> str:
    import base64

    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_logins_are_found_where_other_tools_keep_them(
    web: Web, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = archive(web)
    path = "/a-1-py3-none-any.whl"
    home = tmp_path / "home"
    (home / ".rattler").mkdir(parents=True)

    def wanted(login: str) -> None:
        web.logins[path] = login
        assert fetched(item, there) == DATA
        (there / f"{item.sha256}.whl").unlink()

    (home / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    wanted(basic("me", SECRET))
    rattler = home / ".rattler/credentials.json"
    rattler.write_text(json.dumps({"127.0.0.1": {"BasicHTTP": {"username": "u", "password": "p"}}}))
    wanted(basic("u", "p"))
    chosen = tmp_path / "auth.json"
    chosen.write_text(json.dumps({"*.0.0.1": {"BearerToken": "t0ken"}}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(chosen))
    rattler.unlink()
    (home / ".netrc").unlink()
    wanted("Bearer t0ken")
    monkeypatch.setenv("UV_INDEX", f"my-own={web.url('/simple')}")
    monkeypatch.setenv("UV_INDEX_MY_OWN_USERNAME", "index")
    monkeypatch.setenv("UV_INDEX_MY_OWN_PASSWORD", "pw")
    wanted(basic("index", "pw"))
    monkeypatch.setenv("PIP_INDEX_URL", web.url("/simple").replace("//", "//a%40b:c%2Fd@"))
    monkeypatch.delenv("UV_INDEX")
    wanted(basic("a@b", "c/d"))


def test_a_conda_token_goes_into_the_path(
    web: Web, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "auth.json"
    chosen.write_text(json.dumps({"127.0.0.1": {"CondaToken": f"tk-{SECRET}"}}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(chosen))
    web.files[f"/t/tk-{SECRET}/c/noarch/a.conda"] = DATA
    assert fetched(Archive(web.url("/c/noarch/a.conda"), digest(DATA)), there) == DATA
    with pytest.raises(NotFoundError) as caught:
        fetch_archives([Archive(web.url("/c/noarch/b.conda"), "0" * 64)], there)
    assert SECRET not in str(caught.value)
    assert shown(f"https://u:{SECRET}@h.example/t/{SECRET}/c?sig={SECRET}") == (
        "https://h.example/t/***/c"
    )


def test_a_login_in_a_lock_is_not_used(web: Web, there: Path) -> None:
    item = archive(web)
    web.logins["/a-1-py3-none-any.whl"] = basic("me", SECRET)
    url = item.url.replace("//", f"//me:{SECRET}@")
    with pytest.raises(AccessDeniedError, match="no login for its host is known") as caught:
        fetched(Archive(url, item.sha256), there)
    assert SECRET not in str(caught.value)
    assert "Authorization" not in web.seen[0].headers


def test_a_refused_login_is_named_not_shown(web: Web, there: Path, tmp_path: Path) -> None:
    item = archive(web)
    web.logins["/a-1-py3-none-any.whl"] = basic("me", "another")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    with pytest.raises(
        AccessDeniedError, match=r"HTTP 403\) with the login of ~/\.netrc"
    ) as caught:
        fetched(item, there)
    assert SECRET not in str(caught.value)
    assert "Basic" not in str(caught.value)
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RATTLER_AUTH_FILE", f'{{"h": "{SECRET}"'),
        ("RATTLER_AUTH_FILE", f'["{SECRET}"]'),
        ("RATTLER_AUTH_FILE", f'{{"h": {{"BearerToken": "{SECRET}\\r\\nX: y"}}}}'),
        ("NETRC", f"machine h login u passwort {SECRET}\n"),
    ],
)
def test_a_malformed_file_of_logins_is_named_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    path = tmp_path / "logins"
    path.write_text(text)
    monkeypatch.setenv(name, str(path))
    with pytest.raises(UsageError, match=name) as caught:
        Credentials()
    assert SECRET not in str(caught.value)
    monkeypatch.setenv(name, str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="cannot be read"):
        Credentials()


def test_a_login_does_not_follow_a_redirect_to_another_host(
    web: Web, there: Path, tmp_path: Path
) -> None:
    item = archive(web)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    with running_web() as other:
        other.files["/elsewhere"] = DATA
        web.faults["/a-1-py3-none-any.whl"] = [
            redirect(other.url("/elsewhere?sig=1", host="localhost"))
        ]
        assert fetched(item, there) == DATA
        assert "Authorization" in web.seen[0].headers
        assert "Authorization" not in other.seen[0].headers
        assert other.seen[0].path == "/elsewhere?sig=1"


@pytest.mark.parametrize("where", ["/loop", "file:///etc/passwd", "", "http://[", "//"])
def test_redirects_that_lead_nowhere_are_refused(web: Web, there: Path, where: str) -> None:
    web.always["/loop"] = redirect(where)
    with pytest.raises(EnvstoreError, match=r"redirected|not a URL"):
        fetch_archives([Archive(web.url("/loop"), "0" * 64)], there)


def test_a_proxy_is_asked_where_one_is_set(
    web: Web, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{SECRET}@127.0.0.1:{web.port}")
    web.files["/a.whl"] = DATA
    item = Archive("http://files.example/a.whl", digest(DATA))
    assert fetched(item, there) == DATA
    assert web.seen[0].path == "http://files.example/a.whl"
    assert web.seen[0].headers["Proxy-Authorization"] == basic("me", SECRET)
    assert web.seen[0].headers["Host"] == "files.example"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    direct = archive(web, SMALL, "/direct.whl")
    assert fetched(direct, there) == SMALL
    assert web.seen[1].path == "/direct.whl"
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(UsageError, match="the proxy of https"):
        fetch_archives([Archive("https://files.example/b.whl", "0" * 64)], there)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", path, "-out", path),
            *("-addext", "subjectAltName=DNS:localhost,DNS:files.example"),
        ],
        check=True,
        capture_output=True,
    )
    text = path.read_text()
    if "PRIVATE KEY" not in text or "CERTIFICATE" not in text:
        pytest.skip("this openssl writes one file only")
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Web]:
    with running_web(certificate) as running:
        yield running


def secure_archive(web: Web, host: str = "localhost") -> Archive:
    web.files["/a.whl"] = DATA
    return Archive(web.url("/a.whl", host=host), digest(DATA), len(DATA), "a")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_certificate_counts_only_if_it_is_trusted(
    secure: Web, there: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with pytest.raises(UnavailableError, match="no trusted TLS connection to localhost"):
        fetched(secure_archive(secure), there)
    monkeypatch.setenv(variable, str(certificate))
    assert fetched(secure_archive(secure), there) == DATA
    with pytest.raises(UnavailableError, match=r"no trusted TLS connection to 127\.0\.0\.1"):
        fetch_archives([Archive(secure.url("/a.whl"), "0" * 64)], there)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.parent / "gone"))
    with pytest.raises(UsageError, match="REQUESTS_CA_BUNDLE"):
        fetch_archives([Archive(secure.url("/a.whl"), "0" * 64)], there)


def test_a_redirect_from_https_to_http_is_refused(
    secure: Web, web: Web, there: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    item = secure_archive(secure)
    secure.always["/a.whl"] = redirect(archive(web).url)
    with pytest.raises(UnavailableError, match="redirected from https to http"):
        fetched(item, there)
    assert web.seen == []


def test_what_waits_on_a_secure_connection_can_be_stopped(
    secure: Web, there: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    item = secure_archive(secure)
    secure.always["/a.whl"] = stall(100_000)
    secure.files["/b.whl"] = SMALL
    iterator = iter_archives([item, Archive(secure.url("/b.whl", host="localhost"))], there)
    assert next(iterator).size == len(SMALL)
    iterator.close()  # type: ignore[attr-defined]
    assert [t for t in threading.enumerate() if t.name == "envstore-fetch"] == []


def test_secure_connections_go_through_a_proxy(
    secure: Web, web: Web, there: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@127.0.0.1:{web.port}")
    item = secure_archive(secure, host="files.example")
    assert fetched(item, there) == DATA
    assert web.tunnels == [f"files.example:{secure.port}"]
    assert web.seen[0].headers["Proxy-Authorization"] == basic("me", SECRET)
    assert "Proxy-Authorization" not in secure.seen[0].headers
