"""Verify: walks from refs to bytes and reports every object that is not as it should be.

Structure: ref -> snapshot -> manifest -> parts -> locations -> packs present, long enough, and
listing the very frames and chunks the locations name. With data: packs are read, all or a sample,
and every frame and every chunk of them is hashed. Of the whole store also the index and stored
packages are checked, and every pack they name: the next push will rely on them. So are profiles.
Of what is damaged the files are named that it keeps from being read. Packs that are on the damaged
list are always read: what is known must not be passed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from envstore.errors import CorruptError, NotFoundError
from envstore.store.damage import damaged_packs
from envstore.store.digest import parse_hex
from envstore.store.examining import Examiner, Looked, look
from envstore.store.expected import Expected, Plans
from envstore.store.harm import Losses, examine_tree, in_packs, places_of_files
from envstore.store.locks import load_lock_bytes
from envstore.store.manifest import read_entries
from envstore.store.objects.limited import LimitedObjects, Limiter
from envstore.store.packages import decode_package
from envstore.store.problems import DAMAGE, LostFile, Problem, Report
from envstore.store.profiles import open_profile
from envstore.store.repository import PARALLEL, Repository
from envstore.store.samples import open_sample, sample_key
from envstore.store.sampling import Journal, Run, Sample
from envstore.wording import counted

__all__ = ["DAMAGE", "LostFile", "Problem", "Report", "Sample", "verify"]

_READERS = 4
_SHOWN = 3
_Progress = Callable[[int, int], None]


def verify(
    repository: Repository,
    targets: Sequence[tuple[str, bytes]],
    *,
    read_data: bool = False,
    whole: bool = False,
    also: Collection[bytes] = (),
    sample: Sample | None = None,
    journal: Path | None = None,
    resume: bool = False,
    rate: float | None = None,
    progress: _Progress = lambda done, total: None,
) -> Report:
    """Check ``targets``, pairs of a name for the report and a snapshot digest.

    ``whole`` adds what no target leads to: profiles, index segments, samples, and their packs.
    With ``read_data`` packs are read, all or a ``sample``; those in ``also`` always are.
    ``journal`` is a file that remembers which, so that ``resume`` goes on where an earlier run was
    broken off. ``rate`` is the bytes a second that may be read of the store. ``progress`` is told
    bytes of packs that are done and in all, without ``read_data`` packs.

    Damage is collected, not raised; ``UnavailableError`` and ``AccessDeniedError`` are raised.
    Nothing is written to the store. Memory: about 16 bytes a chunk, and a few MiB for packs.
    """
    limiter = None if rate is None else Limiter(rate)
    objects = repository.objects
    if limiter is not None:
        objects = LimitedObjects(objects, limiter)
    # What is cached here says nothing about what is in the store.
    check = _Check(Repository(objects, repository.config, None), targets)
    check.suspects.update(also)
    check.walk_targets()
    if whole:
        check.walk_index()
    notes = Journal(journal) if journal is not None and read_data else None
    run = Run(sample or Sample(), "", {})
    if notes is not None:
        run = notes.begin(run.sample, resume=resume)
    check.report.started = run.started
    try:
        check.look_at_packs(run if read_data else None, notes, whole, limiter, progress)
        check.judge(whole)
    except BaseException:
        if notes is not None:
            notes.close()
        raise
    if notes is not None:
        notes.end()
    return check.report


@dataclass(slots=True)
class _Tree:
    """A manifest, the targets that lead to it, and its bit in ``Expected.users``."""

    number: int
    names: list[str]


@dataclass(slots=True)
class _Check:
    """One run of ``verify``: what it expects, what it has looked at, and what it found."""

    repository: Repository
    targets: Sequence[tuple[str, bytes]]
    report: Report = field(default_factory=Report)
    plans: Plans = field(default_factory=Plans)
    trees: dict[bytes, _Tree] = field(default_factory=dict)
    suspects: set[bytes] = field(default_factory=set)
    packages: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))
    looked: dict[bytes, Looked] = field(default_factory=dict)
    noted: frozenset[bytes] = frozenset()

    def walk_targets(self) -> None:
        """Read the metadata of all targets, and plan for what it leads to."""
        names: dict[bytes, list[str]] = defaultdict(list)
        for name, snapshot in self.targets:
            names[snapshot].append(name)
        for snapshot, users in names.items():
            self.report.snapshots += 1
            problem = self._walk(snapshot, users)
            if problem is not None:
                self.report.problems.append(problem)

    def _walk(self, name: bytes, users: list[str]) -> Problem | None:
        what = f"snapshot {name.hex()}"
        try:
            snapshot = self.repository.snapshot(name)
            what = f"manifest {snapshot.manifest.hex()}"
            tree = self.trees.setdefault(snapshot.manifest, _Tree(len(self.trees), []))
            tree.names += users
            root = self.repository.root(snapshot.manifest)
            what = f"locations of manifest {snapshot.manifest.hex()}"
            try:
                locations = self.repository.locations(snapshot.manifest, root)
            except DAMAGE:
                self.report.false_locations.add(snapshot.manifest)
                raise
            what = f"manifest {snapshot.manifest.hex()}"
            self.plans.expect_frames(tree.number, locations.frames)
            try:
                entries = read_entries(self.repository.parts(root, locations))
                self.plans.expect_tree(root, locations, entries, snapshot)
            except DAMAGE:
                # Whether the packs are to blame is to be seen in their bytes.
                frames = (locations.frames[number] for number in locations.part_frames)
                self.suspects.update(frame.pack for frame in frames)
                raise
            if snapshot.lock is not None:
                what = f"lock {snapshot.lock.hex()}"
                load_lock_bytes(self.repository.objects, snapshot.lock)
        except DAMAGE as error:
            return Problem(what, error.message, tuple(users))
        return None

    def walk_index(self) -> None:
        """Read what no snapshot leads to, and plan for the packs that it lists."""
        objects = self.repository.objects

        def each(prefix: str, read: Callable[[bytes], object]) -> None:
            for info in objects.list(prefix):
                name = parse_hex(info.key.removeprefix(prefix))
                try:
                    if name is None:
                        raise CorruptError(f"{info.key} is not a digest")
                    read(name)
                except NotFoundError:
                    continue  # removed since it was listed
                except DAMAGE as error:
                    self._problem(info.key, error.message)

        def segment(name: bytes) -> None:
            self.plans.expect_listed(f"index/{name.hex()}", self.repository.segment(name))

        def package(data: bytes, key: str) -> None:
            found = decode_package(data, key)
            self.plans.expect_package(found)
            for pack in {frame.pack for frame in found.locations.frames}:
                self.packages[pack].append(key)

        each("index/", segment)
        each("samples/", lambda name: open_sample(objects.get(sample_key(name)), name))
        each("locks/", lambda name: load_lock_bytes(objects, name))
        for prefix, check in (("profiles/", open_profile), ("packages/", package)):
            for info in objects.list(prefix):
                try:
                    check(objects.get(info.key), info.key)
                except NotFoundError:
                    continue
                except DAMAGE as error:
                    self._problem(info.key, error.message)

    def _problem(self, what: str, reason: str, harms: tuple[str, ...] = ()) -> None:
        self.report.problems.append(Problem(what, reason, harms))

    def look_at_packs(
        self,
        run: Run | None,
        journal: Journal | None,
        whole: bool,
        limiter: Limiter | None,
        progress: _Progress,
    ) -> None:
        """Look at every pack that something expects, and read those that ``run`` chooses."""
        repository, report = self.repository, self.report
        self.noted = damaged_packs(repository.objects)
        sizes = {
            parse_hex(info.key.rpartition("/")[2]): info.size
            for info in repository.objects.list("packs/")
        }
        deep = self.suspects | self.noted
        if run is not None:
            here = {name: sizes[name] for name in self.plans if name in sizes}
            earlier = {name for name, size in run.done.items() if here.get(name) == size}
            report.earlier_packs = len(earlier)
            report.earlier_bytes = sum(here[name] for name in earlier)
            deep |= set(run.sample.choose(here)) - earlier
        if whole:
            report.unneeded = set(self.noted) - set(self.plans)
        # What is known to be damaged, and that nothing needs, may be gone or whole by now.
        work = sorted(set(self.plans) | self.noted if whole else self.plans)
        weights = [(sizes.get(name) or 0) if name in deep else 0 for name in work]
        total = sum(weights) if run is not None else len(work)
        done = 0

        def check(pack: bytes) -> Looked:
            plan = self.plans.get(pack) or Expected()
            size = sizes.get(pack)
            fetcher = repository.fetcher
            return look(repository.objects, fetcher, pack, size, plan, read_data=pack in deep)

        progress(0, total)
        pool = ThreadPoolExecutor(PARALLEL if run is None else _READERS)
        try:
            results = zip(work, weights, pool.map(check, work), strict=True)
            for pack, weight, found in results:
                report.packs += pack in self.plans
                report.frames += found.frames
                report.chunks += found.chunks
                report.bytes_read += found.read
                if found.reasons or found.lacking or found.anchors or found.claims:
                    self.looked[pack] = found
                if pack in deep and not found.reasons:
                    report.data_packs += 1
                    report.sound.add(pack)
                    if journal is not None:
                        journal.add(pack, weight)
                done += weight if run is not None else 1
                progress(done, total)
        finally:
            if limiter is not None:
                limiter.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def judge(self, whole: bool) -> None:
        """Say of what was found who is to blame and who suffers."""
        broken = {pack: found for pack, found in self.looked.items() if found.reasons}
        if whole:
            self._judge_index(broken)
        suspects = {pack for pack, found in self.looked.items() if found.reasons or found.lacking}
        examiner = Examiner(self.repository.fetcher)
        losses, false, explained = self._losses(examiner, broken, suspects)
        for pack, found in broken.items():
            reasons = dict.fromkeys(found.reasons)
            self.report.damaged[pack] = "; ".join(reasons)
            users = self._users(pack)
            if not users and pack in self.noted and pack not in self.packages:
                self.report.quarantined.add(pack)
                continue
            lost = losses[pack]
            for reason in reasons:
                what = f"pack {pack.hex()}"
                self.report.problems.append(Problem(what, reason, users, lost.files(), lost.count))
        self.report.false_locations.update(false)
        for manifest, lost in false.items():
            what = f"locations of manifest {manifest.hex()}"
            reason = "they lead to what is not there"
            names = tuple(self.trees[manifest].names)
            self.report.problems.append(Problem(what, reason, names, lost.files(), lost.count))
        explained |= self._judge_packages(examiner, suspects)
        for pack, found in self.looked.items():
            for key in found.claims:
                self._problem(key, f"it lists pack {pack.hex()} otherwise than that is")
            if found.anchors and not found.reasons:
                reason = f"{found.anchors} frames have another anchor than is said"
                self._problem(f"pack {pack.hex()}", reason, self._users(pack))
            if found.lacking and pack not in explained and pack not in broken:
                reason = f"{found.lacking} frames or chunks are looked for in it, and it has none"
                self._problem(f"pack {pack.hex()}", reason, self._users(pack))

    def _judge_index(self, broken: Collection[bytes]) -> None:
        """Name packs that the index lacks, but for ``broken`` ones: those belong into none."""
        unlisted = [
            name
            for name, plan in self.plans.items()
            if plan.users and not plan.listed and name not in broken
        ]
        # Those of a damaged segment are in none, either.
        if unlisted and not any(one.object.startswith("index/") for one in self.report.problems):
            some = ", ".join(name.hex() for name in sorted(unlisted)[:_SHOWN])
            packs = counted(len(unlisted), "pack")
            self._problem("index/", f"{packs} in use, but in no segment, such as {some}")

    def _users(self, pack: bytes) -> tuple[str, ...]:
        plan = self.plans.get(pack)
        bits = plan.users if plan else 0
        trees = (tree for tree in self.trees.values() if bits >> tree.number & 1)
        return tuple(sorted({name for tree in trees for name in tree.names}))

    def _losses(
        self, examiner: Examiner, broken: Mapping[bytes, Looked], suspects: set[bytes]
    ) -> tuple[dict[bytes, Losses], dict[bytes, Losses], set[bytes]]:
        """Return the files lost by damaged pack, by manifest whose locations are wrong, and where
        the latter lead to.
        """
        by_pack: dict[bytes, Losses] = defaultdict(Losses)
        false: dict[bytes, Losses] = {}
        explained: set[bytes] = set()
        bits = 0
        for pack in suspects:
            plan = self.plans.get(pack)
            bits |= plan.users if plan else 0
        for manifest, tree in self.trees.items():
            if not bits >> tree.number & 1:
                continue
            try:
                for path, place in examine_tree(self.repository, examiner, manifest, suspects):
                    guilty = in_packs(place[0], broken)
                    for pack in guilty:
                        by_pack[pack].add(path, tree.names)
                    if not guilty:
                        explained.update(in_packs(place[0], suspects))
                        false.setdefault(manifest, Losses()).add(path, tree.names)
            except DAMAGE:
                continue  # told of already, with all that is in the tree
        return by_pack, false, explained

    def _judge_packages(self, examiner: Examiner, suspects: set[bytes]) -> set[bytes]:
        """Name the stored packages that lead to what is not there; returns to which packs."""
        explained: set[bytes] = set()
        for key in sorted({key for pack in suspects for key in self.packages.get(pack, ())}):
            try:
                package = decode_package(self.repository.objects.get(key), key)
                places = places_of_files(package.locations, package.entries)
                wanted = {place for _, place in places if in_packs(place[0], suspects)}
                examiner.examine(wanted)
            except DAMAGE:
                continue
            lost = {
                pack
                for place in wanted
                if examiner.reason(place) is not None
                for pack in in_packs(place[0], suspects)
            }
            if lost:
                names = ", ".join(sorted(pack.hex() for pack in lost))
                self._problem(key, f"it leads to what is not there any more, in pack {names}")
            explained |= lost
        return explained
