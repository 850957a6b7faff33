"""docs/format.md is right about runs: what counts can be found out with that document alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from envstore.checkpoint import bodies, holds
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.protocol import RunStore
from tests.checkpoint.rankfiles import RUN, make_part
from tests.checkpoint.test_epochs import at
from tests.checkpoint.test_protocol import newest, save
from tests.stores import Store

pytestmark = pytest.mark.usefixtures("_no_fsync")

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
SECTION = DOCUMENT.read_text().partition("## 18. Runs")[2].partition("\n## ")[0]


def objects_of(root: Path) -> dict[str, dict[str, Any]]:
    """Return all objects of the run, by what follows its prefix."""
    top = root / "objects/runs/team/llm"
    found = {}
    for path in top.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            value = json.loads(data)
            text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            assert data == text.encode()
            check = value.pop("check")
            text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            assert check == blake3(text.encode()).hexdigest()[:16]
            assert value["format"] == 1
            found[str(path.relative_to(top))] = value
    return found


def line_of(objects: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return for each epoch on the line, as in names, the last checkpoint that counts."""
    starts = {
        key.split("/")[1]: value
        for key, value in objects.items()
        if re.fullmatch("epochs/[0-9]{8}/start", key) and "void" not in value
    }
    epoch, limit, limits = max(starts), "~", {max(starts): "~"}
    while starts[epoch]["resumed_from"]:
        resumed_from = starts[epoch]["resumed_from"]
        epoch, limit = resumed_from.split("-")[1], min(limit, resumed_from)
        limits[epoch] = limit
    return limits


def counting(objects: dict[str, dict[str, Any]]) -> list[str]:
    limits = line_of(objects)
    names = [key.partition("/")[2] for key in objects if key.startswith("commits/")]
    return sorted(name for name in names if name <= limits.get(name.split("-")[1], ""))


def test_what_counts_is_found_by_the_document(store: Store) -> None:
    run = RunStore(store.repository, RUN)
    seen = []

    def look() -> None:
        found = counting(objects_of(store.root))
        assert found == [str(commit.checkpoint) for commit in run.commits()]
        seen.append(len(found))

    run.open_epoch("a", 1, newest)
    for step in (1, 2, 3):
        save(run, step, 1)
    look()
    run.open_epoch("b", 1, at(2))
    look()
    save(run, 3, 2)
    save(run, 4, 2)
    look()
    run.open_epoch("c", 2, newest)
    save(run, 5, 3, world_size=2)
    look()
    run.open_epoch("d", 1, lambda commits: CheckpointId(3, 1))
    look()
    save(run, 1, 4)
    run.open_epoch("e", 1, lambda commits: CheckpointId(1, 4))
    look()
    run.open_epoch("f", 1, lambda commits: None)
    look()
    assert seen == [3, 2, 4, 5, 3, 2, 0]


def test_every_field_is_documented(store: Store) -> None:
    run = RunStore(store.repository, RUN)
    run.open_epoch("a", 2, newest)
    commit = save(run, 7, 1, world_size=2)
    run.pin(commit, "release")
    with run.lease(commit):
        objects = objects_of(store.root)
    rows = dict(re.findall(r"^\| (claim|start|part|commit|pin|lease) \| (.*) \|$", SECTION, re.M))
    rows["start"] = f"{rows['claim']} {rows['start'].partition('. Or')[0]}"
    id = "000000000007-00000001-0000"
    patterns = {
        "claim": "epochs/00000001/claim",
        "start": "epochs/00000001/start",
        "part": f"parts/{id}/0000[01]-of-00002",
        "commit": f"commits/{id}",
        "pin": f"pins/{id}",
        "lease": f"leases/{id}/[0-9a-f]{{16}}",
    }
    for kind, pattern in patterns.items():
        found = [objects.pop(key) for key in list(objects) if re.fullmatch(pattern, key)]
        assert found, kind
        for value in found:
            assert set(value) - {"format"} == set(re.findall(r"`(\w+)`", rows[kind])), kind
    assert not objects
    assert f"at most {bodies.MAX_NAMES:,} members" in SECTION
    assert f"no text more than {bodies.MAX_TEXT:,} characters" in SECTION
    assert f"at most {bodies.MAX_WORLD:,} ranks" in SECTION
    assert f"run out {holds.SKEW_SECONDS} s after" in SECTION


def test_the_bytes_of_a_commit_follow_from_the_parts(store: Store) -> None:
    run = RunStore(store.repository, RUN)
    run.open_epoch("a", 2, newest)
    id = CheckpointId(7, 1)
    times = "2026-01-02T03:04:05.5+00:00", "2026-01-02T03:04:06Z"
    for rank, metrics in enumerate(({"loss": 0.1}, {"loss": 5.0, "acc": float("inf")})):
        run.put_part(make_part(run.repository, id, rank, 2, saved=times[rank], metrics=metrics))
    commit = run.try_commit(id)
    assert commit is not None
    objects = objects_of(store.root)
    parts = [objects[f"parts/{id}/{rank:05d}-of-00002"] for rank in (0, 1)]
    assert objects[f"commits/{id}"] == {
        "format": 1,
        "checkpoint": str(id),
        "snapshot": commit.snapshot.hex(),
        "parts": [part["snapshot"] for part in parts],
        "created": times[1],
        "size": sum(part["size"] for part in parts),
        "metrics": {"loss": "0.1", "acc": "inf"},
        "lineage": {},
    }
