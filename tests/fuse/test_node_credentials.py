"""Credentials that callers give a node server: whose they are good for, and how long they live."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError, UsageError
from envstore.fuse.sockets import ask
from envstore.store.config import init_store
from envstore.store.objects import Credentials, KeyRing, open_objects
from envstore.store.repository import Repository
from tests.fuse.lives import PATIENCE, ROOT, gone, kill, lived, until
from tests.fuse.test_node import BIG, Site
from tests.s3keys import Keys, running_keys
from tests.s3server import S3Server
from tests.tcpproxy import tcp_proxy
from tests.trees import noise
from tests.webserver import running_web

pytestmark = pytest.mark.skipif(not ROOT, reason="a node server takes root")


@pytest.fixture(scope="module")
def keys() -> Iterator[Keys]:
    with (
        tempfile.TemporaryDirectory(prefix="envstore-s3-", ignore_cleanup_errors=True) as directory,
        running_keys(Path(directory)) as running,
    ):
        yield running


class Guarded(Site):
    """A node server without credentials of its own, and a store that takes some."""

    keys: Keys
    bucket: str
    url: str

    def guard(self, keys: Keys) -> None:
        self.keys = keys
        self.bucket = keys.server.new_bucket()
        self.url = keys.server.url(self.bucket)
        objects = open_objects(self.url, create=True, keys=KeyRing(keys.root))
        config, _ = init_store(objects)
        self.store.repository.close()
        self.store.repository = Repository(objects, config, None)

    def grant(self, name: str) -> Credentials:
        return self.keys.grant(name, self.bucket)

    def digest(self, ref: str) -> str:
        return self.store.repository.resolve(ref).hex()

    def take(self, ref: str, given: Credentials | None, **words: object) -> dict[str, Any]:
        question: dict[str, object] = {
            "store": self.url, "ref": ref, "target": "/pods/one", "prefix": "/opt/envstore",
            "profile": "none", "fast_path": "off", "namespace": 0, "owner": "csi",
        }  # fmt: skip
        if given is not None:
            question["credentials"] = given.encode()
        found = ask(self.socket, PATIENCE, ask="mount", **{**question, **words})
        assert isinstance(found, dict)
        return found

    def inside(self, found: dict[str, Any]) -> Path:
        return Path(found["root"], found["subtree"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Keys) -> Iterator[Guarded]:
    monkeypatch.setenv("ENVSTORE_NODE_SOCKET", str(tmp_path / "node.sock"))
    with lived(tmp_path, monkeypatch, Guarded) as made:
        made.guard(keys)
        made.mount()
        yield made


def test_only_credentials_that_read_the_store_get_what_is_served_already(site: Guarded) -> None:
    site.add("one", {"file": b"content"})
    digest = "@" + site.digest("one")
    good = site.grant("good")
    first = site.take(digest, good)
    assert (site.inside(first) / "file").read_bytes() == b"content"
    wrong = Credentials(good.access_key_id, "not the secret".replace(" ", "-"))
    nobody = Credentials("nobody", "nothing")
    elsewhere = site.keys.grant("elsewhere", site.keys.server.new_bucket())
    for bad in (wrong, nobody, elsewhere, None):
        for ref in (digest, "one", "default/one:latest@" + site.digest("one")):
            with pytest.raises(AccessDeniedError) as caught:
                site.take(ref, bad)
            for secret in (bad or wrong).encode().values():
                assert not secret or secret not in str(caught.value) + repr(caught.value)
    assert len(site.told()["mounts"]) == 1
    # Others whose credentials are as good share what is served.
    second = site.take(digest, site.grant("other"), target="/pods/two")
    assert (second["subtree"], second["id"] == first["id"]) == (first["subtree"], False)
    assert [one["owner"] for one in site.told()["mounts"]] == ["csi", "csi"]


def test_the_environments_credentials_are_another_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Keys
) -> None:
    for name, value in keys.server.env.items():
        monkeypatch.setenv(name, value)
    with lived(tmp_path, monkeypatch, Guarded) as site:
        site.guard(keys)
        site.mount()
        site.add("one", {"file": BIG})
        own = site.take("one", None)
        with pytest.raises(AccessDeniedError):
            site.take("one", Credentials("nobody", "nothing"))
        given = site.grant("given")
        theirs = site.take("one", given)
        assert theirs["snapshot"] == own["snapshot"]
        assert theirs["subtree"] != own["subtree"]
        # What was given away goes on for itself: it never falls back on what the node has.
        site.keys.revoke(given, site.bucket)
        site.add("two", {"file": b"two"})
        with pytest.raises(AccessDeniedError):
            site.take("two", given)
        assert site.inside(site.take("two", None)).joinpath("file").read_bytes() == b"two"


def test_what_runs_goes_on_with_credentials_that_replace_revoked_ones(site: Guarded) -> None:
    site.add("one", {name: noise(name, 1 << 20) for name in "ab"})
    old = site.grant("tenant")
    lease = "0123456789abcdef"
    found = site.take("one", old, id=lease)
    place = site.inside(found)
    assert (place / "a").read_bytes() == noise("a", 1 << 20)
    site.keys.revoke(old, site.bucket)
    with subprocess.Popen(["cat", place / "b"], stdout=subprocess.PIPE) as reader:
        until(lambda: "refused the credentials" in site.log())
        assert reader.poll() is None, "whoever reads meanwhile waits, as for a store that is away"
        new = site.grant("tenant")
        assert site.take("one", new, id=lease) == found
        out, _ = reader.communicate(timeout=PATIENCE)
    assert out == noise("b", 1 << 20)
    assert site.told()["restarts"] == 0


def test_nobody_waits_for_credentials_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Keys
) -> None:
    with lived(tmp_path, monkeypatch, Guarded) as site:
        site.guard(keys)
        site.mount(patience=1.0)
        site.add("one", {"a": noise("a", 10_000)})
        given = site.grant("tenant")
        place = site.inside(site.take("one", given))
        keys.revoke(given, site.bucket)
        with pytest.raises(OSError, match="Errno 5"):
            (place / "a").read_bytes()


def test_one_tenants_revoked_credentials_do_not_end_anothers_reading(site: Guarded) -> None:
    site.add("one", {"a": BIG})
    stays, goes = site.grant("stays"), site.grant("goes")
    place = site.inside(site.take("one", stays))
    site.take("one", goes, target="/pods/two")
    site.keys.revoke(goes, site.bucket)
    assert (place / "a").read_bytes() == BIG


def test_credentials_outlive_servers_and_holders(site: Guarded) -> None:
    site.add("one", {name: noise(name, 1 << 20) for name in "abcd"})
    given = site.grant("tenant")
    place = site.inside(site.take("one", given, id="0123456789abcdef"))
    rotated = site.grant("tenant")
    site.take("one", rotated, id="0123456789abcdef")
    site.kill_server()
    assert (place / "a").read_bytes() == noise("a", 1 << 20)
    site.kill_server()
    assert (place / "b").read_bytes() == noise("b", 1 << 20)
    holder = site.settled()["holder_pid"]
    kill(holder)
    until(lambda: gone(holder))
    site.kill_server()
    assert (place / "c").read_bytes() == noise("c", 1 << 20)
    site.upgrade_to("")
    assert (place / "d").read_bytes() == noise("d", 1 << 20)
    assert [one["id"] for one in site.told()["mounts"]] == ["0123456789abcdef"]


def test_what_is_still_open_when_its_lease_ends_is_read_with_the_credentials_given(
    site: Guarded,
) -> None:
    site.add("one", {"a": BIG})
    place = site.inside(site.take("one", site.grant("tenant"), id="0123456789abcdef"))
    script = "import sys\nfile = open(sys.argv[1], 'rb')\nprint('open', flush=True)\n"
    script += "sys.stdin.readline()\nsys.stdout.buffer.write(file.read())"
    with subprocess.Popen(
        [sys.executable, "-c", script, place / "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"open\n"
        ask(site.socket, PATIENCE, ask="unmounted", id="0123456789abcdef")
        assert site.told()["snapshots"] == 0
        site.kill_server()
        out, _ = user.communicate(b"\n", timeout=PATIENCE)
    assert out == BIG


def test_an_upgrade_to_other_images_builds_them_with_the_credentials_given(site: Guarded) -> None:
    site.add("one", {"a": BIG})
    lease = "0123456789abcdef"
    found = site.take("one", site.grant("tenant"), id=lease)
    # What is kept last is told last: the credentials come after the snapshot that they are for.
    last = site.grant("tenant")
    site.take("one", last, id=lease)
    site.settled()
    site.upgrade_to("from envstore.fuse import image\nimage.MAGIC = b'ESTREE99'")
    assert (site.inside(found) / "a").read_bytes() == BIG
    assert site.take("one", last, id=lease)["subtree"] == found["subtree"]


def test_a_store_that_does_not_answer_delays_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Keys
) -> None:
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "60")
    with lived(tmp_path, monkeypatch, Guarded) as site:
        site.guard(keys)
        site.mount()
        site.add("one", {"file": b"content"})
        given = site.grant("tenant")
        with tcp_proxy(keys.server.endpoint) as proxy, ThreadPoolExecutor(12) as pool:
            away = S3Server(proxy.endpoint, "", "", 0).url(site.bucket)
            proxy.hang()
            waiting = [
                pool.submit(site.take, "one", Credentials(f"key{number}", "secret"), store=away)
                for number in range(12)
            ]
            until(lambda: proxy.connections >= 8, "that many have asked")
            assert (site.inside(site.take("one", given)) / "file").read_bytes() == b"content"
            assert not any(one.done() for one in waiting)
            proxy.answer(403)
            for one in waiting:
                with pytest.raises(AccessDeniedError):
                    one.result(PATIENCE)
        assert len(site.told()["mounts"]) == 1


def test_secrets_are_nowhere_to_be_seen(site: Guarded) -> None:
    site.add("one", {"a": BIG})
    given = site.grant("tenant")
    site.take("one", given, id="0123456789abcdef")
    with pytest.raises(EnvstoreError):
        site.take("nothing", given)
    with pytest.raises(EnvstoreError):
        site.take("one", Credentials(given.access_key_id, given.secret_access_key + "x"))
    site.kill_server()
    site.settled()
    secrets = [given.secret_access_key.encode(), given.access_key_id.encode()]
    seen = {
        "status": str(site.told()).encode(),
        "holder": str(site.status()).encode(),
        "stats": str(site.stats()).encode(),
        "state": str(ask(site.socket, PATIENCE, ask="state")).encode(),
        "log": site.log().encode(),
        "repr": repr(given).encode() + repr(KeyRing(given)).encode(),
    }
    for process in site.processes():
        for name in ("cmdline", "environ", "comm"):
            seen[f"{name} of {process}"] = Path(f"/proc/{process}/{name}").read_bytes()
    for path in site.base.rglob("*"):
        if path.is_file() and site.place not in path.parents:
            seen[str(path)] = path.read_bytes()
    assert len(seen) > 15
    for where, text in seen.items():
        for secret in secrets:
            assert secret not in text, where


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        "key",
        {"access_key_id": "hidden"},
        {"access_key_id": "", "secret_access_key": "hidden"},
        {"access_key_id": "hidden", "secret_access_key": ""},
        {"access_key_id": "hidden", "secret_access_key": "hidden\n"},
        {"access_key_id": "hid den", "secret_access_key": "hidden"},
        {"access_key_id": "hidden", "secret_access_key": 5},
        {"access_key_id": "hidden", "secret_access_key": "hidden", "session_token": ["hidden"]},
        {"access_key_id": "hidden", "secret_access_key": "hidden", "profile": "hidden"},
        {"access_key_id": "hidden" * 100, "secret_access_key": "hidden"},
        {"access_key_id": "hidden", "secret_access_key": "hidden" * 1000},
        {"access_key_id": "hidden", "secret_access_key": "x", "session_token": "hidden" * 2000},
    ],
)
def test_malformed_credentials_are_refused_without_being_repeated(given: object) -> None:
    with pytest.raises(UsageError) as caught:
        Credentials.parse(given)
    assert "hidden" not in str(caught.value)


def test_credentials_for_what_takes_none(site: Guarded, tmp_path: Path) -> None:
    given = Credentials("key", "secret")
    with pytest.raises(UsageError, match="S3"):
        site.take("one", given, store=str(tmp_path))
    with pytest.raises(UsageError, match="profile"):
        site.take("one", given, store=f"{site.url}&profile=work")


def test_a_store_whose_credentials_were_given_has_no_others(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in keys.server.env.items():
        monkeypatch.setenv(name, value)
    ring = KeyRing()
    with closing(open_objects(keys.server.url(keys.server.new_bucket()), keys=ring)) as objects:
        with pytest.raises(AccessDeniedError, match="no credentials"):
            objects.get("x")
        ring.add(Credentials("nobody", "nothing"))
        with pytest.raises(AccessDeniedError, match="refused the credentials"):
            objects.get("x")
        ring.add(keys.root)
        with pytest.raises(NotFoundError):
            objects.get("x")


def test_a_session_token_is_sent() -> None:
    with running_web() as web:
        url = f"s3://bucket?endpoint={web.url('').rstrip('/')}"
        web.files["/bucket/x"] = b"data"
        ring = KeyRing(Credentials("key", "secret", "token"))
        with closing(open_objects(url, keys=ring)) as objects:
            assert objects.get("x") == b"data"
            ring.add(Credentials("second", "secret"))
            assert objects.get("x") == b"data"
        first, second = (seen.headers for seen in web.seen)
        assert "Credential=key/" in first["Authorization"]
        assert first["X-Amz-Security-Token"] == "token"
        assert "Credential=second/" in second["Authorization"]
        assert second["X-Amz-Security-Token"] is None


def test_a_key_ring() -> None:
    one, two = Credentials("one", "1"), Credentials("two", "2")
    ring = KeyRing()
    assert ring.take() is None
    assert not ring.refused()
    assert ring.add(one)
    assert not ring.add(one)
    assert ring.take() == one
    assert not ring.refused(), "there are no others"
    assert ring.add(two)
    assert ring.take() == two
    assert ring.refused()
    assert ring.all() == (one, two)
    assert ring.refused(), "somebody has put others first meanwhile"
    assert ring.take() == one
    for number in range(99):
        ring.add(Credentials(f"key {number}", "x"))
    assert [one.access_key_id for one in ring.all()] == [f"key {n}" for n in range(98, 82, -1)]
    ring.add(Credentials("key", "x", "x" * 40_000))
    ring.add(Credentials("other", "x", "x" * 40_000))
    assert ring.take() == Credentials("other", "x", "x" * 40_000)
    assert sum(one.length for one in ring.all()) < 50_000
    assert not re.search("one|secret|x", repr(ring.all()) + repr(one))
