"""Many processes, one store: nobody loses anything, and of those who race for a ref one wins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests import trees
from tests.stores import Store

ROOT = Path(__file__).parents[2]
PROCESSES = 4

# Speaks JSON lines: what to do comes in, what became of it goes out. Told to meet others, it waits
# at the writing of the ref until all of them are there.
_PUSHER = """
import json, sys
from pathlib import Path

from envstore.errors import ConflictError
from envstore.store import packs
from tests.faulty import FaultyStore
from tests.stores import Store

packs.TARGET_SIZE = 1 << 20
root = Path(sys.argv[1])

def say(**what):
    print(json.dumps(what), flush=True)

with Store(root, wrap=FaultyStore) as store:
    def wait():
        say(state="at the gate")
        sys.stdin.readline()
    say(state="ready")
    for line in sys.stdin:
        order = json.loads(line)
        fault = None
        if order["meet"]:
            fault = store.repository.objects.fail("put_if", AssertionError(), key="refs/", times=1)
            fault.before = wait
        try:
            result = store.push(Path(order["tree"]), order["ref"])
        except ConflictError as error:
            say(state="lost", error=str(error))
        else:
            say(
                state="won",
                snapshot=result.snapshot.hex(),
                manifest=result.manifest.hex(),
                new=result.new_chunk_bytes,
            )
        if fault is not None:
            fault.remove()
"""


class _Pusher:
    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PUSHER, str(root)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "a pusher died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **order: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def push(self, tree: Path, ref: str, *, meet: bool = False) -> None:
        self.tell(tree=str(tree), ref=ref, meet=meet)

    def __enter__(self) -> _Pusher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        assert kind is not None or self._process.returncode == 0


@pytest.fixture
def pushers(tmp_path: Path) -> Iterator[list[_Pusher]]:
    """Processes with one store, one stat cache and one directory of notes between them."""
    with Store(tmp_path / "store"):
        pass
    with ExitStack() as stack:
        found = [stack.enter_context(_Pusher(tmp_path / "store")) for _ in range(PROCESSES)]
        assert [pusher.hear()["state"] for pusher in found] == ["ready"] * PROCESSES
        yield found


def _tree(root: Path, name: str) -> Path:
    """Make a tree of which half is in every other tree too."""
    trees.plain(root, f"own {name}", files=60, size=40_000)
    (root / "shared").write_bytes(trees.noise("shared", 3 << 20))
    (root / "own").write_bytes(trees.noise(f"own {name}", 2 << 20))
    return root


def test_different_trees_at_once(pushers: list[_Pusher], tmp_path: Path) -> None:
    places = [_tree(tmp_path / f"tree {i}", str(i)) for i in range(PROCESSES)]
    for i, pusher in enumerate(pushers):
        pusher.push(places[i], f"ref-{i}")
    assert [pusher.hear()["state"] for pusher in pushers] == ["won"] * PROCESSES
    with Store(tmp_path / "store") as store:
        assert store.verify().problems == []
        for i, place in enumerate(places):
            copy = tmp_path / f"copy {i}"
            store.pull(copy, f"ref-{i}")
            assert trees.describe(copy) == trees.describe(place)
        # Another round finds all of it.
        for i, place in enumerate(places):
            assert store.push(place, f"again-{i}").new_chunk_bytes == 0
        assert list(store.state.glob("*")) == []


def test_the_same_tree_at_once(pushers: list[_Pusher], tmp_path: Path) -> None:
    place = _tree(tmp_path / "tree", "same")
    for i, pusher in enumerate(pushers):
        pusher.push(place, f"ref-{i}", meet=True)
    assert [pusher.hear()["state"] for pusher in pushers] == ["at the gate"] * PROCESSES
    for pusher in pushers:
        pusher.tell(go=True)
    answers = [pusher.hear() for pusher in pushers]
    assert {answer["state"] for answer in answers} == {"won"}
    assert len({answer["manifest"] for answer in answers}) == 1
    with Store(tmp_path / "store") as store:
        assert store.verify().problems == []
        assert len(store.object_keys("manifests/")) == 1


@pytest.mark.parametrize("existing", [False, True])
def test_of_those_who_race_for_a_ref_one_wins(
    pushers: list[_Pusher], tmp_path: Path, existing: bool
) -> None:
    places = [_tree(tmp_path / f"tree {i}", str(i)) for i in range(PROCESSES)]
    history = []
    if existing:
        pushers[0].push(places[0], "shared")
        history.append(pushers[0].hear()["snapshot"])
    for round_ in range(4):
        for i, pusher in enumerate(pushers):
            (places[i] / "round").write_text(f"{round_} of {i}")
            pusher.push(places[i], "shared", meet=True)
        # All have read the ref, stored everything, and are about to move it.
        assert [pusher.hear()["state"] for pusher in pushers] == ["at the gate"] * PROCESSES
        for pusher in pushers:
            pusher.tell(go=True)
        answers = [pusher.hear() for pusher in pushers]
        won = [i for i, answer in enumerate(answers) if answer["state"] == "won"]
        assert len(won) == 1
        assert all("shared:latest" in a["error"] for a in answers if a["state"] == "lost")
        history.append(answers[won[0]]["snapshot"])
        with Store(tmp_path / "store") as store:
            assert store.repository.resolve("shared").hex() == history[-1]
        # The losers try again, one after the other, and have nothing left to send.
        for i in set(range(PROCESSES)) - set(won):
            pushers[i].push(places[i], "shared")
            answer = pushers[i].hear()
            assert (answer["state"], answer["new"]) == ("won", 0)
            history.append(answer["snapshot"])
    with Store(tmp_path / "store") as store:
        # Every snapshot ever committed is there, in the order in which the ref moved.
        head = store.repository.resolve("shared")
        found = [name.hex() for name, _ in store.repository.history(head)]
        assert found == history[::-1]
        assert store.verify().problems == []
        targets = [(name, bytes.fromhex(name)) for name in history]
        assert store.verify_targets(targets).problems == []
