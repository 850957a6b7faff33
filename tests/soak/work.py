"""What workers do, each in a loop until told to stop: every result is held against the ledger."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tests.soak import trees
from tests.soak.ledger import ABSENT, ANYTHING
from tests.soak.processes import marked
from tests.soak.world import Done, Op, World

FAMILIES = 3
"""Refs that are pushed to, each by whoever likes."""
UMOUNT = ("umount", "-l") if os.geteuid() == 0 else ("fusermount3", "-u", "-z")
_KEPT = 16
"""Tags of old versions, above which some are removed."""

ROLES = ("push", "collect", "train", "read", "push", "read", "tag", "collect")


class Worker:
    """One worker: a thread here, and one program at a time of its own."""

    def __init__(self, world: World, number: int, seed: int, without: Collection[str] = ()) -> None:
        self.world = world
        self.name = f"w{number}"
        self.role = ROLES[number % len(ROLES)]
        self._without = {"collect" if what == "gc" else what for what in without}
        self._choose = random.Random(f"{seed}.{number}")
        self._home = world.root / self.name
        self._home.mkdir()
        self._garden = trees.Gardener(f"{seed}.{number}")
        self._old: list[tuple[str, trees.Recipe]] = []
        self._there: trees.Recipe = {}
        self._version = ""
        self._count = itertools.count(1)
        self._acknowledged = 0
        self._life = 0

    @property
    def run_name(self) -> str:
        """The run that a trainer here trains."""
        return f"runs/{self.name}"

    def work(self) -> None:
        """Do what its role says until told to stop."""
        does: dict[str, list[tuple[Callable[[], None], int]]] = {
            "push": [(self.push, 8), (self.tag_old, 2), (self.remove, 1)],
            "read": [(self.pull, 5), (self.mount, 4), (self.remove, 1), (self.look, 1)],
            "tag": [(self.tag_old, 3), (self.move_tag, 4), (self.remove, 2), (self.look, 2),
                    (self.verify, 1), (self.push, 2)],
            "train": [(self.train, 1)],
            "collect": [(self.collect, 9), (self.verify, 1)],
        }  # fmt: skip
        chances = [one for one in does[self.role] if one[0].__name__ not in self._without]
        steps = [step for step, _ in chances or does["tag"]]
        weights = [weight for _, weight in chances or does["tag"]]
        while not self.world.stop.is_set():
            try:
                self._choose.choices(steps, weights)[0]()
            except Exception as error:  # noqa: BLE001 - a mistake in the rig must not look like success
                import traceback

                self.world.fail(f"the rig itself: {error!r} {traceback.format_exc()}")
                return

    def _cli(self, op: Op, *arguments: str | Path, **more: str) -> Done:
        env = self.world.environment(self._home, op.id, **more)
        return self.world.run(op, "envstore", ["--json", *arguments], env)

    # Writers.

    def push(self) -> None:
        """Push a tree: the next version, the same once more, or one that was there before."""
        root = self._home / "tree"
        root.mkdir(exist_ok=True)
        chance = self._choose.random()
        if self._version and chance < 0.1:
            recipe = self._there
        elif self._old and chance < 0.3:
            self._version, recipe = self._choose.choice(self._old)
        else:
            self._version = f"{self.name}.{next(self._count)}"
            recipe = self._garden.grow(self._version)
            self.world.ledger.plant(self._version, recipe)
            self._old = [*self._old[-20:], (self._version, recipe)]
        trees.write(root, recipe, self._there)
        self._there = recipe
        ref = f"soak/t{self._choose.randrange(FAMILIES)}"
        kind = self._choose.choice(("model", "dir"))
        with self.world.op("push", self.name, f"{self._version} to {ref}") as op:
            claim = self.world.ledger.begin(ref, self._version)
            done = self._cli(op, "push", ref, root, "--kind", kind, "-m", self._version)
            how = self.world.judge(op, done, ("conflict",))
            changed = True
            if how == "done":
                said = done.json
                changed = not said["unchanged"]
                self._met(op, said["digest"], self._version)
            self.world.ledger.end(ref, claim, how, changed=changed)
        if how == "done" and self._choose.random() < 0.4:
            self._tag(f"@{said['digest']}", f"{ref}:{self._version}", self._version)

    def tag_old(self) -> None:
        """Give what a ref is now a name that stays."""
        ref = f"soak/t{self._choose.randrange(FAMILIES)}"
        self._tag(ref, f"{ref}:{self.name}-{next(self._count)}", ANYTHING)

    def move_tag(self) -> None:
        """Move a tag that others move too."""
        source = f"soak/t{self._choose.randrange(FAMILIES)}"
        self._tag(source, "soak/stable", ANYTHING, "--force")

    def _tag(self, source: str, target: str, tree: str, *options: str) -> None:
        with self.world.op("tag", self.name, f"{source} as {target}") as op:
            claim = self.world.ledger.begin(target, tree)
            done = self._cli(op, "tag", source, target, *options)
            how = self.world.judge(op, done, ("conflict", "not_found"))
            changed = True
            if how == "done":
                said = done.json
                changed = not said["unchanged"]
                claim.value = self.world.ledger.tree_of(said["digest"]) or claim.value
                if tree not in (ANYTHING, claim.value):
                    self.world.fail(f"{target} was to be {tree} and is {claim.value}")
            self.world.ledger.end(target, claim, how, changed=changed)

    def remove(self) -> None:
        """Remove a tag of an old version, for good."""
        tags = [ref for ref in self.world.ledger.present() if ":" in ref]
        if len(tags) <= _KEPT:
            return
        ref = self._choose.choice(tags)
        with self.world.op("rm", self.name, ref) as op:
            claim = self.world.ledger.retire(ref)
            if claim is not None:
                done = self._cli(op, "rm", "--yes", ref)
                self.world.ledger.end(ref, claim, self.world.judge(op, done))

    # Readers.

    def pull(self) -> None:
        """Write a tree to a directory, and compare every byte of it."""
        ref = self._some_ref()
        if ref is None:
            return
        place = self._home / "pulled"
        trees.remove(place)
        self._sometimes_forget()
        with self.world.op("pull", self.name, ref) as op:
            done = self._cli(op, "pull", ref, place)
            if self.world.judge(op, done, self._gone(op, ref)) == "done":
                self._compare(op, ref, done.json["digest"], trees.seen(place))
            elif place.exists() and "killed" not in op.hurt:
                self.world.fail(f"{op.about}: a pull that failed has left {place}")
        trees.remove(place)
        for left in self._home.glob(".envstore-*.partial"):
            if "killed" not in op.hurt:
                self.world.fail(f"a pull that nobody killed has left {left}")
            trees.remove(left)

    def mount(self) -> None:
        """Mount a tree, read all of it, maybe with a pause in the middle, and unmount it."""
        ref = self._some_ref()
        if ref is None:
            return
        place = self._home / "mnt"
        place.mkdir(exist_ok=True)
        self._sometimes_forget()
        pause = self._choose.choice((0, 0, 3, 8))
        with self.world.op("mount", self.name, f"{ref} for {pause} s") as op:
            try:
                done = self._cli(op, "mount", "--node", "off", ref, place)
                if self.world.judge(op, done, self._gone(op, ref)) != "done":
                    return
                self._read(op, ref, done.json["digest"], place, pause)
                umount = self._cli(op, "umount", place)
                if umount.status == 0:
                    self.world.counts["umount: done"] += 1
                elif not op.hurt:
                    self.world.judge(op, umount)
            finally:
                self._clear(op, place)

    def _read(self, op: Op, ref: str, digest: str, place: Path, pause: float) -> None:
        env = self.world.environment(self._home, op.id)
        done = self.world.run(op, "tests.soak.reading", [place, str(pause)], env)
        said = json.loads(done.out) if done.out else {}
        if done.status == 0:
            self.world.counts["read: done"] += 1
            self._compare(op, ref, digest, said["seen"])
        elif done.status == os.EX_IOERR:
            troubles = self.world.troubles(op)
            if not troubles:
                self.world.fail(
                    f"reading {op.about} @{digest[:12]}: {said['error']}: {self._mount_log()}"
                )
            self.world.counts["read: failed as injected"] += 1
        elif done.status is None or "killed" not in op.hurt:
            self.world.fail(f"reading {op.about}: status {done.status} {done.err[-2000:]}")
        else:
            self.world.counts["read: killed"] += 1

    def _mount_log(self) -> str:
        logs = (self._home / ".local/state/envstore/mounts").glob("*.log")
        return " | ".join(path.read_text(errors="replace")[-1500:] for path in logs)

    def _clear(self, op: Op, place: Path) -> None:
        """See that nothing of a mount is left, whatever became of its processes."""
        self.world.look_at_logs(self._home / ".local/state/envstore/mounts")
        for number in (signal.SIGCONT, signal.SIGKILL):
            for found in marked(self.world.token):
                if found.op == op.id:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(found.pid, number)
        for _ in range(100):  # one mount may lie on another
            if not os.path.ismount(place) and os.path.exists(place):
                break
            # Not with `envstore`: whoever is killed often enough leaves nobody to ask.
            subprocess.run([*UMOUNT, place], check=False, capture_output=True)
            time.sleep(0.02)
        for left in (self._home / ".local/state/envstore/mounts").glob("*"):
            left.unlink()

    def look(self) -> None:
        """List what there is."""
        words = self._choose.choice((["ls"], ["du"], ["log", "soak/t0"], ["ls", "-R", "soak/t1"]))
        with self.world.op(words[0], self.name) as op:
            allowed = ("not_found",) if len(words) > 1 else ()
            self.world.judge(op, self._cli(op, *words), allowed)

    def verify(self) -> None:
        """Look for damage while all others go on."""
        with self.world.op("verify", self.name) as op:
            done = self._cli(op, "verify", *self._choose.choice(([], ["--read-data"])))
            if self.world.judge(op, done) != "done" and '"problems": [{' in done.out:
                self.world.fail(f"verify found {done.out[-3000:]}")

    def _some_ref(self) -> str | None:
        refs = self.world.ledger.present()
        if not refs:
            time.sleep(0.2)
            return None
        return self._choose.choice(refs)

    def _gone(self, op: Op, ref: str) -> tuple[str, ...]:
        """Return ``not_found`` if what ``ref`` was has been removed, or replaced, meanwhile."""
        values = self.world.ledger.possible(ref, op.began)
        return ("not_found",) if len(values) > 1 or ABSENT in values else ()

    def _compare(self, op: Op, ref: str, digest: str, seen: dict[str, str]) -> None:
        """Hold a tree that was read against the ledger."""
        tree = judge_tree(self.world, f"{op.kind} {op.about} @{digest[:12]}", seen)
        if tree is None:
            return
        self._met(op, digest, tree)
        self.world.counts["trees compared"] += 1
        if not self.world.ledger.allows(ref, tree, op.began):
            possible = self.world.ledger.possible(ref, op.began)
            self.world.fail(f"{op.kind}: {ref} is {tree} @{digest[:12]}, not one of {possible}")

    def _met(self, op: Op, digest: str, tree: str) -> None:
        before = self.world.ledger.met(digest, tree)
        if before is not None:
            self.world.fail(f"{op.kind}: @{digest[:12]} is {tree}, and was {before}")

    def _sometimes_forget(self) -> None:
        """Have a cold cache."""
        if self._choose.random() < 0.4:
            for path in (self._home / "cache").glob("*"):
                if path.is_dir():
                    trees.remove(path)

    # Collectors.

    def collect(self) -> None:
        """Free what nothing leads to, at once."""
        with self.world.op("gc", self.name) as op:
            done = self._cli(op, "gc", "--grace", "0s")
            if self.world.judge(op, done) == "done":
                self.world.counts["bytes freed"] += done.json.get("freed_bytes", 0)

    # Trainers.

    def train(self) -> None:
        """Live one life of a training job; what it was told is durable must be there ever after."""
        self._life += 1
        steps = self._choose.randint(2, 12)
        self._train(self.world.store, steps, 0.1 * self._choose.random())

    def settle(self, store: str) -> None:
        """Have one life in peace, so that what was staged by others is stored and cleared away."""
        self._life += 1
        self._train(store, 2, 0.0)

    def _train(self, store: str, steps: int, pause: float) -> None:
        words = [store, self.run_name, str(self._life), str(steps), f"{pause:.3f}"]
        with self.world.op("train", self.name, f"life {self._life}") as op:
            env = self.world.environment(self._home, op.id, ENVSTORE_SLOTS=self.slots)
            done = self.world.run(op, "tests.soak.trainer", words, env)
            self.world.judge(op, done, ("fenced",) if self._life > 1 else ())
            for line in done.out.splitlines():
                self._heard(op, json.loads(line))
            self.world.look_at_logs(Path(self.slots))

    @property
    def slots(self) -> str:
        """Where the states of trainers are staged."""
        return str(self.world.root / "shm" / self.name)

    @property
    def acknowledged(self) -> int:
        """The newest step that was said to be durable."""
        return self._acknowledged

    def _heard(self, op: Op, said: dict[str, object]) -> None:
        if said["say"] == "restored":
            self.world.counts["checkpoints restored"] += 1
            step, life = said["step"], said["life"]
            assert isinstance(step, int)
            assert isinstance(life, int)
            if said["wrong"]:
                self.world.fail(f"{op.about}: step {step} is damaged: {said['wrong']}")
            if step < self._acknowledged or life > self._life:
                self.world.fail(
                    f"{op.about}: restored step {step} of life {life}, but step "
                    f"{self._acknowledged} was acknowledged"
                )
        elif said["say"] == "durable":
            self.world.counts["checkpoints acknowledged"] += 1
            step = said["step"]
            assert isinstance(step, int)
            self._acknowledged = max(self._acknowledged, step)


def judge_tree(world: World, what: str, seen: dict[str, str]) -> str | None:
    """Return which tree this is, if every byte of it is as it was pushed."""
    tree = world.ledger.tree_with(seen.get(trees.VERSION, ""))
    recipe = None if tree is None else world.ledger.recipe(tree)
    if tree is None or recipe is None:
        world.fail(f"{what}: holds a tree that nobody pushed: {str(seen)[:2000]}")
        return None
    wrong = trees.differences(seen, trees.expected(recipe))
    if wrong:
        world.fail(f"{what}: {len(wrong)} files of {tree} are wrong: {wrong[:5]}")
        return None
    return tree
