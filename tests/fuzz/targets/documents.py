"""The small JSON objects of a store: its description, snapshots, refs, runs, drafts, collection."""

from __future__ import annotations

import json
from typing import Any, cast

from envstore.checkpoint.adapters.drafts import Drafts
from envstore.checkpoint.epochs import Epochs
from envstore.checkpoint.holds import Holds
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.policies import decode_keep, encode_keep, every, last
from envstore.checkpoint.records import Commit, Part, parse_commit, parse_part
from envstore.store import canonical, config, damage, doomed
from envstore.store.digest import digest
from envstore.store.refs import RefName, list_refs, read_ref
from envstore.store.snapshots import Snapshot, parse_snapshot
from tests.fuzz.harness import expect, target
from tests.fuzz.mutating import mutate_json, unchecked
from tests.memory import Memory

_NAME = digest(b"name")
_CHECKPOINT = CheckpointId(500, 2, 1)
_RUN = RunName("team", "run")
_TIME = "2026-01-02T03:04:05+00:00"
_WORDS = (b'"format":1', b"\\ud800", b"[[[[[[[[", b"1e999", b"NaN", b"-0", b"99999999999999999999")


def _json(**fields: object) -> list[bytes]:
    return [json.dumps({"format": 1, **fields}, sort_keys=True, separators=(",", ":")).encode()]


@target(
    "canonical-json",
    lambda: [canonical.encode({"a": 1, "b": ["x", {"y": "é\n"}], "c": -5}), b'{"a":1,"a":2}'],
    mutate_json,
    _WORDS,
)
def canonical_json(data: bytes) -> None:
    """What was taken can be written, and is read again as it was."""
    value = canonical.decode(data, "an object")
    expect(_plain(value), "something that is neither text nor number, list or object")
    again = canonical.encode(value)
    expect(canonical.decode(again, "again") == value, "a value is not read as written")


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _config_seed() -> list[bytes]:
    return _json(
        id="6a5c6b0e-8f0e-4e1c-9d7b-0f3f2a1b4c5d", hash="blake3-256", codec="zstd",
        chunker="fastcdc-2020/16384/65536/262144/nc1",
    )  # fmt: skip


@target("store-description", _config_seed, mutate_json, _WORDS)
def store_description(data: bytes) -> None:
    config.load_config(Memory({config.KEY: data}))


def _snapshot_seed() -> list[bytes]:
    whole = Snapshot("env", _NAME, 3, 1 << 40, _TIME, (_NAME,), _NAME, "why", {"a": "b"})
    return [whole.encode(), Snapshot("dir", _NAME, 0, 0, _TIME).encode()]


@target("snapshot", _snapshot_seed, mutate_json, _WORDS)
def snapshot(data: bytes) -> None:
    found = parse_snapshot(data, digest(data))
    again = found.encode()
    expect(parse_snapshot(again, digest(again)) == found, "a snapshot is not read as written")


@target(
    "ref",
    lambda: _json(snapshot=_NAME.hex(), sequence=7, nonce="ab" * 16, updated=_TIME),
    mutate_json,
    _WORDS,
)
def ref(data: bytes) -> None:
    name = RefName("default", "x", "latest")
    memory = Memory({name.key: data})
    found = read_ref(memory, name)
    again = read_ref(Memory({name.key: found.encode(name)}), name)
    expect(again == found, "a ref is not read as written")


def _part() -> Part:
    return Part(_CHECKPOINT, 1, 2, _NAME, _TIME, "plan", 5, 3, {"loss": 0.5}, {"git": "abc"})


@target("run-part", lambda: [unchecked(_part().encode())], mutate_json, _WORDS)
def run_part(data: bytes) -> None:
    found = parse_part(data, _CHECKPOINT, 1, 2)
    again = parse_part(found.encode(), _CHECKPOINT, 1, 2)
    # Of metrics that are no numbers none is equal to itself.
    expect(again.encode() == found.encode(), "a part is not read as written")


def _commit() -> Commit:
    return Commit(_CHECKPOINT, _NAME, (_NAME, _NAME), _TIME, 10, {"loss": 0.5}, {"git": "abc"})


@target("run-commit", lambda: [unchecked(_commit().encode())], mutate_json, _WORDS)
def run_commit(data: bytes) -> None:
    found = parse_commit(data, _CHECKPOINT)
    again = parse_commit(found.encode(), _CHECKPOINT)
    expect(again.encode() == found.encode(), "a commit is not read as written")


def _epoch_seeds() -> list[bytes]:
    started = _json(
        incarnation="x", world_size=2, resumed_from=str(CheckpointId(5, 1, 0)), created=_TIME
    )
    return [*started, *_json(void=1), *_json(incarnation="x", world_size=1, created=_TIME)]


@target("run-epoch", _epoch_seeds, mutate_json, _WORDS)
def run_epoch(data: bytes) -> None:
    """The same bytes as claim and as start of two epochs."""
    keys = [f"runs/team/run/epochs/{number:08d}/{kind}" for number in (1, 2)
            for kind in ("start", "claim")]  # fmt: skip
    epochs = Epochs((Memory(dict.fromkeys(keys, data))), _RUN)
    try:
        epochs.look()
    finally:
        epochs.claim(1)


def _hold_seeds() -> list[bytes]:
    return [*_json(reason="best"), *_json(snapshot=_NAME.hex(), holder="h:1", until=2_000_000_000)]


@target("run-hold", _hold_seeds, mutate_json, _WORDS)
def run_hold(data: bytes) -> None:
    """The same bytes as a pin and as a lease."""
    pin = f"runs/team/run/pins/{_CHECKPOINT}"
    lease = f"runs/team/run/leases/{_CHECKPOINT}/0123456789abcdef"
    holds = Holds((Memory({pin: data, lease: data})), _RUN)
    try:
        holds.pins()
    finally:
        holds.leases(1_900_000_000.0)


class _Repository:
    def __init__(self, objects: Memory) -> None:
        self.objects = objects


@target(
    "draft",
    lambda: _json(path="a/b", size=5, snapshot=_NAME.hex(), created=_TIME),
    mutate_json,
    _WORDS,
)
def draft(data: bytes) -> None:
    drafts = Drafts(cast(Any, _Repository(Memory(default=data))))
    found = drafts.find(RefName("a", "b", "c"), b"a/b")
    expect(found is None or found.path == b"a/b", "a draft of another path")


def _keep_seeds() -> list[bytes]:
    return [encode_keep(last(2) | every(10_000)).encode(), encode_keep(last(1)).encode()]


@target("keep-policy", _keep_seeds, mutate_json)
def keep_policy(data: bytes) -> None:
    found = decode_keep(data.decode("utf-8", "surrogatepass") if _is_text(data) else "")
    expect(found is None or decode_keep(encode_keep(found)) == found, "a policy is read otherwise")


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _gc_seeds() -> list[bytes]:
    owner = doomed.Owner("ab" * 8, "boot:1:2:3", 1_800_000_000)
    state = doomed.State(5, "ab" * 16, 1_800_000_000, _NAME, None, owner)
    return [state.encode(), unchecked(state.encode()), unchecked(doomed.State().encode())]


@target("gc-state", _gc_seeds, mutate_json, _WORDS)
def gc_state(data: bytes) -> None:
    found = doomed.parse_state(data)
    expect(doomed.parse_state(found.encode()) == found, "the state is not read as written")


@target(
    "damage-note",
    lambda: [unchecked(damage.Damage(_NAME, "a bit flipped", 1_800_000_000).encode())],
    mutate_json,
    _WORDS,
)
def damage_note(data: bytes) -> None:
    damage.read_damage((Memory(default=data)), _NAME)


def _key_seeds() -> list[bytes]:
    return [b"refs/default/x/latest\nrefs/a/b/c\nrefs/../x/y\nrefs/a/b\n", b"refs/\x1b[2J/x/y"]


@target("listed-keys", _key_seeds, words=(b"refs/", b"/../", b"damaged/" + b"ab" * 32, b"\x1b"))
def listed_keys(data: bytes) -> None:
    """Keys as a server may list them: any text at all."""
    from envstore.store.profiles import list_profiles

    keys = data.decode("utf-8", "replace").split("\n")
    prefixes = (
        f"profiles/{_NAME.hex()}/", "runs/team/run/pins/", "runs/team/run/epochs/", "damaged/",
    )  # fmt: skip
    more = [f"{prefix}{key}" for key in keys for prefix in prefixes]
    memory = Memory(dict.fromkeys([*keys, *more], b"{}"))
    for name in list_refs(memory):
        expect(str(name).isprintable() and RefName.parse(str(name)) == name, f"a ref {name}")
    for name in list_profiles(memory, _NAME):
        expect(name.isprintable() and "/" not in name, "a profile's name")
    damage.damaged_packs(memory)
    Holds(memory, _RUN).pins()
