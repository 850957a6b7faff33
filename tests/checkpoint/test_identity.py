"""Who a rank is, and which start of the job it belongs to."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from envstore.checkpoint.agreement import Decision, Decisions, agree_on_incarnation
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import (
    Ranks,
    find_ranks,
    given_incarnation,
    scheduled_incarnation,
)
from envstore.checkpoint.places import find_place
from envstore.errors import UsageError


class LocalBoard:
    """A launcher's store within one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key], timedelta(seconds=60))
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.check(keys), timeout.total_seconds()):
                raise RuntimeError("timeout")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Ranks(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Ranks(3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Ranks(1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Ranks(0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Ranks(1, 2)),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, Ranks(1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
         Ranks(0, 2)),
    ],
)  # fmt: skip
def test_the_launcher_says_the_rank(environ: dict[str, str], expected: Ranks) -> None:
    assert find_ranks(None, None, environ) == expected
    assert find_ranks(4, 5, environ) == Ranks(4, 5)
    assert find_ranks(None, 1, environ) == Ranks(0, 1)


@pytest.mark.parametrize(
    ("rank", "size", "environ"),
    [
        (0, None, {}),
        (None, 2, {}),
        (2, 2, {}),
        (-1, 2, {}),
        (0, 0, {}),
        (None, None, {"RANK": "2", "WORLD_SIZE": "2"}),
        (None, None, {"RANK": "x", "WORLD_SIZE": "2"}),
        (None, None, {"JOB_COMPLETION_INDEX": "0"}),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    rank: int | None, size: int | None, environ: dict[str, str]
) -> None:
    with pytest.raises(UsageError):
        find_ranks(rank, size, environ)


def test_schedulers_say_the_incarnation() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert scheduled_incarnation(slurm) == "slurm-7.0-0"
    assert scheduled_incarnation({**slurm, "SLURM_RESTART_COUNT": "2"}) == "slurm-7.0-2"
    jobset = {"JOBSET_UID": "u", "JOBSET_RESTART_ATTEMPT": "1"}
    assert scheduled_incarnation(jobset) == "jobset-u-1"
    assert scheduled_incarnation({"TORCHELASTIC_RUN_ID": "none"}) is None


def test_an_incarnation_is_a_text() -> None:
    assert given_incarnation(None, {}) is None
    assert given_incarnation(None, {"ENVSTORE_INCARNATION": "a"}) == "a"
    assert given_incarnation("b", {"ENVSTORE_INCARNATION": "a"}) == "b"
    for wrong in ("", "a\nb", "x" * 257):
        with pytest.raises(UsageError):
            given_incarnation(wrong, {})


def agree(board: LocalBoard, world_size: int) -> list[str]:
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        found[rank] = agree_on_incarnation(board, Ranks(rank, world_size), "job")

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


def test_all_ranks_get_one_incarnation_and_the_next_start_another() -> None:
    board = LocalBoard()
    board.set("hello/1", "of-a-start-that-died-before-it-was-answered")
    first = agree(board, 3)
    second = agree(board, 3)
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(CheckpointError, match="rank 1 did not come"):
        agree_on_incarnation(LocalBoard(), Ranks(0, 2), "job", patience=0.05)
    with pytest.raises(CheckpointError, match="rank 0 did not come"):
        agree_on_incarnation(LocalBoard(), Ranks(1, 2), "job", patience=0.05)


def test_ranks_save_at_the_same_calls() -> None:
    board = LocalBoard()
    calls = 40
    seen: dict[int, list[Decision]] = {0: [], 1: [], 2: []}

    def one(rank: int) -> None:
        decisions = Decisions(board, Ranks(rank, 3), "i", every_call=True)
        for call in range(calls):
            # Only what rank 0 wants counts; the fourth of every ten calls is due for all.
            seen[rank].append(
                decisions.step(
                    due=call % 10 == 3,
                    free=call != 13,
                    wanted=call % 7 == rank,
                    leaving=rank == 2 and call >= 30,
                )
            )

    threads = [threading.Thread(target=one, args=(rank,)) for rank in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] == seen[2]
    saves = {call for call, decision in enumerate(seen[0]) if decision.save}
    assert saves >= {1, 3, 8, 15, 22, 23, 29, 33}
    assert 13 not in saves
    leaves = [call for call, decision in enumerate(seen[0]) if decision.leave]
    # Rank 0 may be ahead of rank 2, so that it hears of it only in the end, or not at all.
    assert leaves == list(range(min(leaves, default=calls), calls))
    assert not leaves or (leaves[0] >= 31 and leaves[0] in saves)


@pytest.mark.parametrize(
    ("name", "store", "run", "url"),
    [
        ("team/llm", "/data/s", "team/llm", "file:///data/s"),
        ("llm", "file:///data/s", "default/llm", "file:///data/s"),
        ("s3://bk/p?region=x#team/llm", None, "team/llm", "s3://bk/p?region=x"),
        ("/data/a#b#team/llm", None, "team/llm", "file:///data/a%23b"),
    ],
)
def test_a_name_may_carry_its_store(name: str, store: str | None, run: str, url: str) -> None:
    place = find_place(name, store, {"ENVSTORE_URL": "s3://other"})
    assert (str(place.run), place.store, place.default) == (run, url, False)


def test_a_store_is_named_by_the_environment_or_not_at_all() -> None:
    assert find_place("llm", None, {"ENVSTORE_URL": "s3://other"}).store == "s3://other"
    assert find_place("llm", None, {}).default


@pytest.mark.parametrize("name", ["", "a:b", "s3://bk/p", "#team/llm", "s3://bk/p#", "a/b/c"])
def test_what_names_no_run_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        find_place(name, None, {})


def test_two_stores_for_one_run_are_refused() -> None:
    with pytest.raises(UsageError, match="too"):
        find_place("/a#team/llm", "/b", {})
