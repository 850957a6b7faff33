from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError
from envstore.store import statcache
from envstore.store.digest import EMPTY, digest
from envstore.store.statcache import Recipe, StatCache
from tests.trees import noise

_TREE = "/a/tree\0dir\x000"
_ONE = Recipe(digest(b"one"), ((digest(b"1"), 5), (digest(b"2"), 2**31)))
_TWO = Recipe(EMPTY)

_recipes = st.builds(
    Recipe,
    st.binary(min_size=32, max_size=32),
    st.lists(
        st.tuples(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1)), max_size=4
    ).map(tuple),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "stat.sqlite"


@pytest.fixture
def cache(path: Path) -> Iterator[StatCache]:
    opened = StatCache(path)
    yield opened
    opened.close()


def _save(cache: StatCache, *, signature: bytes = b"s", manifest: bytes = b"m" * 32) -> None:
    cache.save(_TREE, signature, manifest, [(b"one", b"1", _ONE), (b"caf\xe9", b"2", _TWO)], [])


def test_nothing_is_known_at_first(cache: StatCache) -> None:
    assert cache.manifest(_TREE, b"s") is None
    assert cache.recipes(_TREE) == {}


def test_what_was_saved_is_known_to_the_next(cache: StatCache, path: Path) -> None:
    _save(cache)
    other = StatCache(path)
    assert other.manifest(_TREE, b"s") == b"m" * 32
    assert other.recipes(_TREE) == {b"one": (b"1", _ONE), b"caf\xe9": (b"2", _TWO)}
    other.close()


def test_another_signature_is_another_tree(cache: StatCache) -> None:
    _save(cache)
    assert cache.manifest(_TREE, b"other") is None
    assert cache.manifest("/elsewhere", b"s") is None
    assert cache.recipes("/elsewhere") == {}


def test_a_tree_that_was_not_settled_never_matches(cache: StatCache) -> None:
    # It has the empty signature, and so would any other unsettled state of it.
    _save(cache, signature=b"")
    assert cache.manifest(_TREE, b"") is None
    assert set(cache.recipes(_TREE)) == {b"one", b"caf\xe9"}


def test_changes_and_removals(cache: StatCache) -> None:
    _save(cache)
    cache.save(_TREE, b"t", b"n" * 32, [(b"one", b"9", _TWO), (b"new", b"3", _ONE)], [b"caf\xe9"])
    assert cache.manifest(_TREE, b"s") is None
    assert cache.manifest(_TREE, b"t") == b"n" * 32
    assert cache.recipes(_TREE) == {b"one": (b"9", _TWO), b"new": (b"3", _ONE)}


def test_trees_do_not_mix(cache: StatCache) -> None:
    _save(cache)
    names = ["/b", "/b\0", "/é", os.fsdecode(b"/\xff"), "/" + "é".encode().hex()]
    for i, name in enumerate(names):
        cache.save(name, b"%d" % i, b"%32d" % i, [(b"f", b"%d" % i, _ONE)], [])
    for i, name in enumerate(names):
        assert cache.manifest(name, b"%d" % i) == b"%32d" % i
        assert cache.recipes(name) == {b"f": (b"%d" % i, _ONE)}
    assert len(cache.recipes(_TREE)) == 2


def test_files_cut_another_way_are_unknown(
    cache: StatCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(cache)
    monkeypatch.setattr(statcache, "CHUNKER_ID", "another")
    assert cache.recipes(_TREE) == {}
    assert cache.manifest(_TREE, b"s") is None


@given(st.dictionaries(st.binary(min_size=1, max_size=300), st.tuples(st.binary(), _recipes)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_recipes_round_trip(cache: StatCache, recipes: dict[bytes, tuple[bytes, Recipe]]) -> None:
    old = cache.recipes(_TREE)
    changed = [(path, *item) for path, item in recipes.items()]
    cache.save(_TREE, b"s", b"m", changed, [path for path in old if path not in recipes])
    assert cache.recipes(_TREE) == recipes


def test_saving_is_all_or_nothing(cache: StatCache) -> None:
    _save(cache)
    broken = Recipe(b"x", ((b"y", 2**32),))  # a size that no column holds
    with pytest.raises(OverflowError):
        cache.save(_TREE, b"t", b"n" * 32, [(b"one", b"9", _TWO), (b"bad", b"9", broken)], [])
    assert cache.manifest(_TREE, b"s") == b"m" * 32
    assert cache.recipes(_TREE)[b"one"] == (b"1", _ONE)
    _save(cache, signature=b"after")
    assert cache.manifest(_TREE, b"after") == b"m" * 32


@pytest.mark.parametrize(
    "damage", [b"", b"not a database" * 100, b"SQLite format 3\0" + bytes(200), bytes(50_000)]
)
def test_a_damaged_file_is_started_anew(path: Path, damage: bytes) -> None:
    first = StatCache(path)
    _save(first)
    first.close()
    path.write_bytes(damage)
    again = StatCache(path)
    assert again.recipes(_TREE) == {}
    _save(again)
    assert len(again.recipes(_TREE)) == 2
    again.close()


def test_a_file_of_another_version_is_started_anew(path: Path) -> None:
    StatCache(path).close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE files")
    db.execute("PRAGMA user_version=99")
    db.close()
    again = StatCache(path)
    _save(again)
    assert len(again.recipes(_TREE)) == 2
    again.close()


def test_damage_that_shows_while_reading(path: Path) -> None:
    first = StatCache(path)
    many = [(b"%d" % i, b"s", Recipe(noise(i, 32), ((noise(-i, 32), i),))) for i in range(3000)]
    first.save(_TREE, b"s", b"m" * 32, many, [])
    first.close()
    # The header, which is looked at when a file is opened, stays as it is.
    with open(path, "r+b") as file:
        file.seek(3 * 4096)
        file.write(noise("damage", 20 * 4096))
    again = StatCache(path)
    assert again.recipes(_TREE) == {}
    _save(again)
    assert len(again.recipes(_TREE)) == 2
    again.close()


def test_damage_that_shows_while_saving(path: Path) -> None:
    first = StatCache(path)
    many = [(b"%d" % i, b"s", _ONE) for i in range(3000)]
    first.save(_TREE, b"s", b"m" * 32, many, [])
    first.close()
    with open(path, "r+b") as file:
        file.seek(3 * 4096)
        file.write(noise("damage", 30 * 4096))
    again = StatCache(path)
    again.save(_TREE, b"t", b"n" * 32, many, [])
    assert again.manifest(_TREE, b"t") == b"n" * 32
    assert len(again.recipes(_TREE)) == 3000
    again.close()


def test_places_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvstoreError, match="cannot use the cache") as caught:
        StatCache(tmp_path / "file" / "stat.sqlite")
    assert "ENVSTORE_CACHE_DIR" in str(caught.value)
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(AccessDeniedError):
        StatCache(tmp_path / "folder.sqlite")
    assert (tmp_path / "folder.sqlite").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_permission_nothing_is_removed(path: Path) -> None:
    first = StatCache(path)
    _save(first)
    first.close()
    for folder in (path.parent, *path.parents):
        if folder.name.startswith("pytest-of"):
            break
        folder.chmod(0o755)
    before = path.read_bytes()
    path.chmod(0o600)
    code = """
import os, sys
from pathlib import Path
from envstore.errors import AccessDeniedError
from envstore.store.statcache import StatCache
os.setresuid(65534, 65534, 65534)
try:
    StatCache(Path(sys.argv[1]))
except AccessDeniedError as error:
    print("denied:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "denied: cannot use the cache" in done.stdout, done.stderr
    assert path.read_bytes() == before


def test_a_full_disk_is_told_and_what_was_known_stays(path: Path) -> None:
    cache = StatCache(path)
    _save(cache)
    cache._db.execute("PRAGMA max_page_count=20")
    many = [(b"%d" % i, noise(i, 40), _ONE) for i in range(3000)]
    with pytest.raises(NoSpaceError, match=r"stat\.sqlite"):
        cache.save(_TREE, b"t", b"n" * 32, many, [])
    assert cache.manifest(_TREE, b"s") == b"m" * 32
    _save(cache, signature=b"after")
    cache.close()


def test_somebody_who_never_lets_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statcache, "_PATIENCE", 0.01)
    cache = StatCache(path)
    _save(cache)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(EnvstoreError, match="locked"):
        _save(cache)
    # Readers do not wait for writers, and nobody takes a lock for damage.
    assert len(cache.recipes(_TREE)) == 2
    other.execute("ROLLBACK")
    other.close()
    _save(cache)
    cache.close()


_CREATOR = """
import sys
from pathlib import Path
from envstore.store.statcache import Recipe, StatCache

print("ready", flush=True)
sys.stdin.readline()
cache = StatCache(Path(sys.argv[1]))
cache.save("/tree " + sys.argv[2], b"s", b"m" * 32, [(b"one", b"1", Recipe(b"d" * 32))], [])
cache.close()
"""


def test_many_processes_make_it_at_once(tmp_path: Path) -> None:
    for round_ in range(4):
        path = tmp_path / f"{round_}.sqlite"
        creators = [
            subprocess.Popen(
                [sys.executable, "-c", _CREATOR, str(path), str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number in range(6)
        ]
        for creator in creators:
            assert creator.stdout is not None
            assert creator.stdout.readline() == b"ready\n"
        for creator in creators:
            assert creator.stdin is not None
            creator.stdin.write(b"\n")
            creator.stdin.flush()
        for creator in creators:
            _, errors = creator.communicate()
            assert (creator.returncode, errors) == (0, b"")
        cache = StatCache(path)
        assert cache._db.execute("SELECT count(*) FROM trees").fetchone() == (6,)
        cache.close()
