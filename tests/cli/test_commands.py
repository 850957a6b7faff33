"""What each command does and says when all is well."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.commands import Cli
from tests.faulty import FaultyStore
from tests.s3server import S3Server
from tests.trees import describe, noise, settle

_PUSH = {
    "ref", "digest", "manifest", "kind", "files", "logical_bytes", "read_bytes", "new_chunk_bytes",
    "stored_bytes", "uploaded_bytes", "requests", "seconds", "unchanged", "warnings",
}  # fmt: skip
_SHOW = {
    "ref", "digest", "kind", "files", "logical_bytes", "created", "parents", "manifest", "message",
    "attributes", "lock",
}  # fmt: skip
_DU = {"logical_bytes", "unique_bytes", "stored_bytes", "exclusive_bytes"}


def test_the_first_push_makes_the_users_own_store(cli: Cli, tree: Path) -> None:
    del cli.env["ENVSTORE_URL"]
    own = cli.home / ".local" / "share" / "envstore" / "store"
    first = cli("push", "analysis", tree)
    assert first.status == 0
    assert f"made a store in {own}" in first.err
    assert (own / "envstore.json").is_file()
    again = cli("push", "analysis", tree)
    assert (again.status, again.err) == (0, "")
    assert "unchanged analysis:latest" in again.out
    assert "analysis:latest" in cli.ok("ls")
    elsewhere = {"XDG_DATA_HOME": str(cli.root / "data")}
    assert "made a store" in cli("push", "analysis", tree, env=elsewhere).err
    assert (cli.root / "data" / "envstore" / "store" / "envstore.json").is_file()


def test_init(cli: Cli) -> None:
    made = cli.json("init")
    assert made["created"] is True
    assert made["conditional_writes"] is True
    assert made["store"] == f"file://{cli.store}"
    again = cli.json("init")
    assert (again["created"], again["id"]) == (False, made["id"])
    assert sorted(os.listdir(cli.store)) == [".locks", ".tmp", "envstore.json", "probe"] or (
        "envstore.json" in os.listdir(cli.store)
    )
    other = cli.root / "other"
    assert f"export ENVSTORE_URL='file://{other}'" in cli.ok("init", other)
    assert f"already a store: file://{other}" in cli.ok("init", other)
    assert cli.json("--store", str(other), "ls")["refs"] == []
    assert cli.json("init", cli.root / "third", "--no-probe")["conditional_writes"] is None


def test_push_says_what_it_did(cli: Cli, tree: Path) -> None:
    cli.ok("init")
    (tree / "noise").write_bytes(noise(3, 1 << 20))
    settle(tree)
    first = cli.json("push", "team/tree:1", tree, "--kind", "dir", "-m", "the first")
    assert set(first) == _PUSH
    assert first["ref"] == "team/tree:1"
    assert (first["kind"], first["unchanged"], first["warnings"]) == ("dir", False, [])
    sizes = [p.lstat().st_size for p in tree.rglob("*") if stat.S_ISREG(p.lstat().st_mode)]
    assert (first["files"], first["logical_bytes"]) == (len(sizes), sum(sizes))
    assert first["new_chunk_bytes"] > 1 << 20
    assert first["uploaded_bytes"] >= first["stored_bytes"] > 1 << 20
    assert len(bytes.fromhex(first["digest"])) == len(bytes.fromhex(first["manifest"])) == 32
    second = cli.json("push", "team/tree:1", tree, "--kind", "dir")
    assert second["unchanged"] is True
    assert second["digest"] == first["digest"]
    assert second["new_chunk_bytes"] == second["stored_bytes"] == second["uploaded_bytes"] == 0
    elsewhere = cli.json("push", "copy", tree, "--kind", "dir", "--parent", "team/tree:1")
    assert elsewhere["manifest"] == first["manifest"]
    assert elsewhere["new_chunk_bytes"] == 0


def test_kinds(cli: Cli, tmp_path: Path) -> None:
    cli.ok("init")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(noise(4, 5000))
    assert cli.json("push", "m", model)["kind"] == "model"
    assert cli.json("push", "d", model, "--kind", "dir")["kind"] == "dir"
    assert cli.json("show", "d")["kind"] == "dir"


def test_level(cli: Cli, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("".join(f"{i * i % 977} is a number of some kind\n" for i in range(40_000)))
    stored = []
    for level in ("1", "19"):
        cli.ok("init", cli.root / level)
        done = cli.json("--store", cli.root / level, "push", "w", words, "--level", level)
        stored.append(done["stored_bytes"])
    assert stored[1] < stored[0]


def test_pull(stored: Cli, tree: Path) -> None:
    stored.ok("push", "mine", tree, "--kind", "dir")
    out = stored.root / "out"
    done = stored.json("pull", "mine", out)
    assert describe(out) == describe(tree)
    assert done["digest"] == stored.json("show", "mine")["digest"]
    assert done["path"] == str(out)
    assert done["files"] == stored.json("show", "mine")["files"]
    by_digest = stored.root / "again"
    stored.ok("pull", f"@{done['digest'][:8]}", by_digest)
    assert describe(by_digest) == describe(tree)


def test_ls_of_refs(stored: Cli, tree: Path) -> None:
    stored.ok("push", "team/tree:v1", tree, "--kind", "dir")
    lines = stored.ok("ls").splitlines()
    assert lines[0].split() == ["REF", "DIGEST", "KIND", "FILES", "SIZE", "MOVED"]
    assert [line.split()[0] for line in lines[1:]] == ["tree:latest", "team/tree:v1"]
    found = stored.json("ls")
    assert found["store"] == f"file://{stored.store}"
    assert [item["ref"] for item in found["refs"]] == ["tree:latest", "team/tree:v1"]
    assert set(found["refs"][0]) == {
        "ref", "digest", "updated", "kind", "files", "logical_bytes", "created"
    }  # fmt: skip
    assert [item["ref"] for item in stored.json("ls", "team/")["refs"]] == ["team/tree:v1"]
    assert stored.json("ls", "tea/")["refs"] == []


def test_ls_names_a_damaged_ref_and_lists_the_others(stored: Cli) -> None:
    stored.ok("tag", "tree", "other")
    (stored.store / "refs" / "default" / "tree" / "latest").write_text("{")
    done = stored("ls")
    assert done.status == 1
    assert [line.split()[2] for line in done.out.splitlines()[1:]] == ["dir", "damaged"]
    assert done.err.count("\n") == 1
    assert "tree:latest" in done.err
    found = stored("--json", "ls")
    assert ["error" in item for item in found.json["refs"]] == [False, True]


def test_ls_of_files(stored: Cli) -> None:
    top = stored.ok("ls", "tree").splitlines()
    assert [line.split("  ")[-1] for line in top] == [
        "bin", "caf\\xe9", "lib", "two\\nlines\\x1b[31m"
    ]  # fmt: skip
    (program,) = stored.ok("ls", "tree:/bin").splitlines()
    assert program.startswith("-rwxr-xr-x")
    assert program.endswith("  hello")
    for what in ("tree:latest:/lib/", "tree:/lib", "tree://lib/.", "tree:/bin/../lib"):
        names = [line.split("  ")[-1] for line in stored.ok("ls", what).splitlines()]
        assert names == ["deep", "empty", "link -> text", "text"]
    (data,) = stored.ok("ls", "tree:/lib/deep/data").splitlines()
    assert "768,000" in data
    below = [line.split("  ")[-1] for line in stored.ok("ls", "-R", "tree:/lib").splitlines()]
    assert below == ["deep", "deep/data", "empty", "link -> text", "text"]
    digest = stored.json("show", "tree")["digest"]
    assert stored.ok("ls", f"@{digest}:/bin") == stored.ok("ls", "tree:/bin")
    found = stored.json("ls", "tree:/lib")
    assert (found["ref"], found["digest"], found["path"]) == ("tree", digest, "/lib")
    link = next(entry for entry in found["entries"] if entry["path"] == "lib/link")
    assert (link["kind"], link["target"], link["size"]) == ("symlink", "text", 0)
    stored.fails(1, "ls", "tree:/li", says=["there is no /li"])
    stored.fails(2, "ls", "tree:latest:lib", says=["a path begins with :/"])


def test_show(stored: Cli, tree: Path) -> None:
    first = stored.json("show", "tree")
    assert set(first) == _SHOW | {"updated", "sequence"}
    assert (first["ref"], first["parents"], first["sequence"]) == ("tree:latest", [], 1)
    (tree / "new").write_text("new")
    pushed = stored.json("push", "tree", tree, "--kind", "dir", "--message", "a new file\n\x1b[1m")
    second = stored.json("show", "tree")
    assert (second["digest"], second["parents"]) == (pushed["digest"], [first["digest"]])
    assert second["message"] == "a new file\n\x1b[1m"
    text = stored.ok("show", "tree")
    assert "a new file\\n\\x1b[1m" in text
    assert second["manifest"] in text
    by_digest = stored.json("show", f"@{second['digest'][:10]}")
    assert set(by_digest) == _SHOW
    assert by_digest["digest"] == second["digest"]
    pinned = stored.json("show", f"tree@{first['digest'][:10]}")
    assert pinned["digest"] == first["digest"]


def test_log(stored: Cli, tree: Path) -> None:
    digests = [stored.json("show", "tree")["digest"]]
    for number in range(3):
        (tree / "number").write_text(str(number))
        push = ("push", "tree", tree, "--kind", "dir", "-m", f"number {number}")
        digests.insert(0, stored.json(*push)["digest"])
    found = stored.json("log", "tree")
    assert [item["digest"] for item in found["snapshots"]] == digests
    assert found["complete"] is True
    assert [item["message"] for item in found["snapshots"]][:2] == ["number 2", "number 1"]
    lines = stored.ok("log", "tree", "-n", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["DIGEST", *(f"@{d[:12]}" for d in digests[:2])]
    (stored.store / "snapshots" / digests[2]).unlink()
    shutil.rmtree(stored.home / ".cache")
    done = stored("log", "tree")
    assert done.status == 0
    assert len(done.out.splitlines()) == 3
    assert "older snapshots are gone" in done.err
    assert digests[2] in done.err
    assert stored.json("log", "tree")["complete"] is False


def test_tag(stored: Cli, tree: Path) -> None:
    digest = stored.json("show", "tree")["digest"]
    made = stored.json("tag", "tree", "team/kept:1")
    assert made == {
        "ref": "team/kept:1", "digest": digest, "previous": None, "unchanged": False
    }  # fmt: skip
    assert stored.json("tag", f"@{digest[:8]}", "team/kept:1")["unchanged"] is True
    (tree / "more").write_text("more")
    moved = stored.json("push", "tree", tree, "--kind", "dir")["digest"]
    before = stored.refs()
    line = stored.fails(1, "tag", "tree", "team/kept:1", says=["team/kept:1 exists", "--force"])
    assert f"@{digest[:12]}" in line
    assert stored.refs() == before
    forced = stored.json("tag", "--force", "tree", "team/kept:1")
    assert (forced["digest"], forced["previous"]) == (moved, digest)
    assert stored.json("show", "team/kept:1")["digest"] == moved


def test_rm(stored: Cli) -> None:
    for name in ("a", "b", "c"):
        stored.ok("tag", "tree", name)
    digest = stored.json("show", "a")["digest"]
    before = stored.refs()
    stored.fails(2, "rm", "a", says=["--yes"])
    assert stored.refs() == before
    done = stored("rm", "--yes", "a")
    assert f"undo: envstore tag @{digest[:12]} a:latest" in done.out
    assert "garbage collection" in done.err
    stored.ok("tag", f"@{digest[:12]}", "a:latest")
    removed = stored.json("rm", "-y", "a", "b", "a:latest")["removed"]
    assert removed == [{"ref": f"{name}:latest", "digest": digest} for name in ("a", "b")]
    assert sorted(stored.refs()) == ["default/c/latest", "default/tree/latest"]
    damaged = stored.store / "refs" / "default" / "c" / "latest"
    damaged.write_text("{")
    assert stored.json("rm", "-y", "c")["removed"] == [{"ref": "c:latest", "digest": None}]
    assert not damaged.exists()


def test_diff(stored: Cli, tree: Path) -> None:
    stored.ok("push", "old", tree, "--kind", "dir")
    (tree / "lib" / "text").write_text("some longer text\n")
    (tree / "lib" / "empty").unlink()
    (tree / "lib" / "new\xe9").write_text("12345")
    (tree / "bin" / "hello").chmod(0o644)
    stored.ok("push", "new", tree, "--kind", "dir")
    found = stored.json("diff", "old", "new")
    changes = {item.pop("path"): item for item in found["changes"]}
    assert changes == {
        "bin/hello": {"status": "changed", "old_size": 43, "new_size": 43},
        "lib/empty": {"status": "removed", "old_size": 0, "new_size": None},
        "lib/new\xe9": {"status": "added", "old_size": None, "new_size": 5},
        "lib/text": {"status": "changed", "old_size": 10, "new_size": 17},
    }
    assert (found["added"], found["removed"], found["changed"]) == (1, 1, 2)
    assert found["logical_bytes"] == 12
    text = stored.ok("diff", "old", "new").splitlines()
    assert [line.split()[0] for line in text[:-1]] == ["M", "D", "A", "M"]
    assert text[-1] == "1 added, 1 removed, 2 changed; +12 B"
    assert stored.ok("diff", "--stat", "old", "new").splitlines() == [text[-1]]
    assert "changes" not in stored.json("diff", "--stat", "old", "new")
    assert stored.ok("diff", "new", "old").splitlines()[-1].endswith("-12 B")
    assert stored.json("diff", "new", "new")["changes"] == []


def test_du(stored: Cli, tree: Path) -> None:
    (tree / "noise").write_bytes(noise(5, 300_000))
    stored.ok("push", "more", tree, "--kind", "dir")
    found = stored.json("du")
    assert set(found) == _DU | {"store", "objects", "object_bytes", "refs"}
    more, plain = found["refs"]
    assert set(more) == set(plain) == _DU | {"ref"}
    assert (more["ref"], plain["ref"]) == ("more:latest", "tree:latest")
    assert more["logical_bytes"] == plain["logical_bytes"] + 300_000
    assert found["logical_bytes"] == more["logical_bytes"] + plain["logical_bytes"]
    assert found["unique_bytes"] == more["unique_bytes"]
    assert more["exclusive_bytes"] >= 300_000
    assert plain["exclusive_bytes"] == 0
    assert found["stored_bytes"] <= found["object_bytes"]
    one = stored.json("du", "tree")
    assert [item["ref"] for item in one["refs"]] == ["tree:latest"]
    assert one["logical_bytes"] == plain["logical_bytes"]
    lines = stored.ok("du").splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        "REF", "more:latest", "tree:latest", "total"
    ]  # fmt: skip


def test_verify(stored: Cli) -> None:
    stored.ok("tag", "tree", "other")
    found = stored.json("verify")
    assert found["ok"] is True
    assert (found["snapshots"], found["packs"], found["problems"]) == (1, 1, [])
    (pack,) = (p for p in (stored.store / "packs").rglob("*") if p.is_file())
    deep = stored.json("verify", "--read-data")
    assert deep["bytes_read"] == pack.stat().st_size
    assert "all is well" in stored.ok("verify", "tree")
    data = bytearray(pack.read_bytes())
    data[10] ^= 1
    pack.write_bytes(data)
    assert stored.json("verify")["ok"] is True, "contents are not looked at without --read-data"
    done = stored("--json", "verify", "--read-data")
    assert done.status == 1
    problem = done.json["problems"][0]
    assert pack.name in problem["object"]
    assert problem["harms"] == ["other:latest", "tree:latest"]
    text = stored("verify", "--read-data")
    assert (text.status, text.err.count("\n")) == (1, 1)
    assert f"damaged: pack {pack.name}" in text.out


def test_verify_does_not_trust_the_cache(stored: Cli) -> None:
    stored.ok("ls", "tree")  # fills it
    (snapshot,) = (stored.store / "snapshots").iterdir()
    snapshot.write_bytes(b"{}")
    assert stored("verify").status == 1


def test_cache(stored: Cli) -> None:
    stored.ok("ls", "tree")
    shown = stored.json("cache", "show")
    assert shown["directory"] == str(stored.home / ".cache" / "envstore")
    assert shown["bytes"] > 0
    assert shown["blobs"] > 0
    assert shown["capacity"] == 20 << 30
    assert stored.json("cache", "clear")["freed_bytes"] == shown["bytes"]
    assert stored.json("cache", "show")["blobs"] == 0
    assert "cap        1.0 GiB" in stored.ok("cache", "show", "--cache-size", "1G")
    other = stored.root / "other"
    stored.ok("ls", "tree", "--cache-dir", other)
    assert stored.json("--cache-dir", other, "cache", "show")["blobs"] > 0
    assert stored.json("cache", "show")["blobs"] == 0
    assert stored.json("cache", "show", env={"ENVSTORE_CACHE_DIR": str(other)})["blobs"] > 0


def test_options_before_and_after_the_command(stored: Cli, tmp_path: Path) -> None:
    url = str(stored.store)
    stored.env["ENVSTORE_URL"] = str(tmp_path / "nowhere")
    expected = stored.ok("--store", url, "--json", "ls", "tree")
    assert stored.ok("ls", "tree", "--store", url, "--json") == expected
    assert stored.ok("ls", "--json", "--store", url, "tree") == expected
    assert stored.ok("--store", str(tmp_path), "ls", "--json", "--store", url, "tree") == expected
    assert stored.ok("cache", "--cache-size", "3G", "show", "--json") == stored.ok(
        "cache", "show", "--json", "--cache-size", "3G"
    )


def test_quiet(stored: Cli, tree: Path) -> None:
    for command in (
        ["push", "tree", tree],
        ["tag", "tree", "other"],
        ["rm", "-y", "other"],
        ["pull", "tree", "out"],
        ["cache", "clear"],
    ):
        done = stored("-q", *command)
        assert (done.status, done.out, done.err) == (0, "", "")
    assert "tree:latest" in stored.ok("-q", "ls")


def test_verbose_logs_to_stderr(stored: Cli) -> None:
    done = stored("-vv", "show", "nope")
    assert done.status == 1
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("envstore: no ref nope")


def test_names_that_are_not_utf8(stored: Cli) -> None:
    for env in ({}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}):
        assert "caf\\xe9" in stored.ok("ls", "tree", env=env)
        entries = stored.json("ls", "tree", env=env)["entries"]
        assert "caf\udce9" in [entry["path"] for entry in entries]
    assert "caf\\xe9" in stored.ok("ls", os.fsdecode(b"tree:/caf\xe9"))


def test_names_that_are_not_ascii_on_a_terminal_that_is(stored: Cli, tmp_path: Path) -> None:
    (tmp_path / "naïve").mkdir()
    (tmp_path / "naïve" / "日本").touch()
    stored.ok("push", "n", tmp_path / "naïve", "--kind", "dir")
    assert "日本" in stored.ok("ls", "n")
    for env in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        assert len(stored.ok("ls", "n", env=env).splitlines()) == 1
        assert len(stored.json("ls", "n", env=env)["entries"]) == 1


def test_s3(cli: Cli, tree: Path, s3_server: S3Server) -> None:
    cli.env |= s3_server.env
    bucket = s3_server.new_bucket()
    cli.env["ENVSTORE_URL"] = url = s3_server.url(bucket, "a/b")
    assert cli.json("init")["conditional_writes"] is True
    pushed = cli.json("push", "tree", tree, "--kind", "dir")
    assert pushed["requests"] <= 12 + 7  # of the session
    out = cli.root / "out"
    cli.ok("pull", "tree", out)
    assert describe(out) == describe(tree)
    assert [item["ref"] for item in cli.json("ls")["refs"]] == ["tree:latest"]
    assert cli.json("verify", "--read-data")["ok"] is True
    cli.ok("rm", "-y", "tree")
    assert cli.json("ls")["refs"] == []
    cli.fails(2, "init", s3_server.url(bucket), says=["not empty", "a/b/"])
    assert cli.json("--store", url, "du")["objects"] > 0


def test_doctor(stored: Cli) -> None:
    found = stored("--json", "doctor")
    checks = {check["name"]: check for check in found.json["checks"]}
    assert set(checks) == {
        "python", "kernel", "/dev/fuse", "fusermount3", "pyfuse3", "fast path", "store",
        "conditional writes", "cache", "cache space", "confinement",
    }  # fmt: skip
    for name in ("python", "pyfuse3", "store", "conditional writes", "cache"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert found.json["ok"] is (found.status == 0)
    assert not (stored.store / "probe").exists() or not os.listdir(stored.store / "probe")
    unprobed = stored("--json", "doctor", "--no-probe")
    assert "conditional writes" not in [check["name"] for check in unprobed.json["checks"]]


def test_doctor_of_the_users_own_store(cli: Cli) -> None:
    del cli.env["ENVSTORE_URL"]
    checks = {check["name"]: check for check in cli("--json", "doctor").json["checks"]}
    assert checks["store"]["verdict"] == "note"
    assert "first push makes it" in checks["store"]["detail"]


@pytest.mark.parametrize(
    ("arguments", "bad", "mend"),
    [
        (["--store", "nowhere"], "store", "envstore init"),
        (["--store", "http://x"], "store", "file:///"),
        (["--cache-size", "much"], "cache", "512M"),
        (["--cache-dir", "home/file"], "cache", "ENVSTORE_CACHE_DIR"),
    ],
)
def test_doctor_finds_what_is_wrong(stored: Cli, arguments: list[str], bad: str, mend: str) -> None:
    (stored.home / "file").touch()
    done = stored(*arguments, "doctor")
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert bad in done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("FAIL"))
    assert line.split()[1] == bad
    assert mend in done.out
    found = stored("--json", *arguments, "doctor")
    assert found.status == 1
    assert found.json["ok"] is False
    assert json.loads(found.err)["error"]["exit_code"] == 1


def test_doctor_without_fusermount3(ordinary: Cli) -> None:
    ordinary.ok("init")
    plain = ordinary("--json", "doctor").json
    checks = {check["name"]: check for check in plain["checks"]}
    assert {checks[name]["verdict"] for name in ("/dev/fuse", "fusermount3")} == {"ok"}
    assert plain["ok"] is True
    programs = ordinary.root / "programs"
    programs.mkdir()
    for name in ("unshare", "sh", "mount", "mknod", "chmod", "setpriv"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    done = ordinary("--json", "doctor", env={"PATH": str(programs)})
    checks = {check["name"]: check for check in done.json["checks"]}
    assert done.status == 1
    assert checks["fusermount3"]["verdict"] == "failed"
    assert checks["fusermount3"]["mend"] == "apt-get install fuse3"


def test_init_refuses_a_server_that_does_not_keep_conditional_writes(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from envstore.errors import UnavailableError
    from envstore.store import creation
    from envstore.store.objects import open_objects

    class Careless(FaultyStore):
        def put_if(self, key: str, data: bytes, version: str | None) -> str:
            self.inner.put(key, data)
            return self.inner.get_versioned(key)[1]

    monkeypatch.setattr(
        creation, "open_objects", lambda url, *, create: Careless(open_objects(url, create=create))
    )
    with pytest.raises(UnavailableError, match="does not keep conditional writes"):
        creation.create_store(str(cli.store))
    assert not (cli.store / "envstore.json").exists()
    made = creation.create_store(str(cli.store), probe=False)
    assert made.created
    assert made.probe is None
