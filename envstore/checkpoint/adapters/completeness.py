"""Whether what a program writes is a whole checkpoint yet, judged from the outside.

Frameworks that write a sign when they are done are taken at their word; of everything else it is
seen whether its files are whole and rest.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from envstore.checkpoint.adapters.storing import claimed_size
from envstore.store.digest import digest

_FILES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")
_MAX_HEADER = 4 << 20
_MAX_STATE = 64 << 20
_STEPS = (
    re.compile(r"step[-_=]?(\d{1,12})(?!\d)", re.IGNORECASE),
    re.compile(r"(?:checkpoint|ckpt|iter|iteration)[-_=]?(\d{1,12})(?!\d)", re.IGNORECASE),
    re.compile(r"(?<!\d)(\d{1,12})(?!\d)(?!.*\d)"),
)
_HIDDEN = (".", "tmp", "_tmp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file or directory that looks like a checkpoint of ``step``.

    ``files`` has size and mtime (ns) of every file by its relative path; ``signature`` changes
    with any of them.
    """

    path: Path
    step: int
    files: Mapping[str, tuple[int, int]]

    @property
    def signature(self) -> str:
        """Names what is there now, as far as ``stat`` can tell."""
        lines = (f"{size} {mtime} {name}\n" for name, (size, mtime) in sorted(self.files.items()))
        return digest("".join(lines).encode("utf-8", "surrogateescape")).hex()


def find_candidates(directory: Path) -> list[Candidate]:
    """Return what looks like a checkpoint directly in ``directory``, by step."""
    found = []
    with os.scandir(directory) as listing:
        items = sorted(listing, key=lambda item: item.name)
    for item in items:
        step = step_of(item.name)
        if step is None or item.name.lower().startswith(_HIDDEN) or item.is_symlink():
            continue
        try:
            if item.is_dir():
                files = _files_below(Path(item.path))
                if any(_is_content(name) for name in files):
                    found.append(Candidate(Path(item.path), step, files))
            elif item.is_file() and item.name.endswith(_FILES):
                st = item.stat()
                files = {item.name: (st.st_size, st.st_mtime_ns)}
                found.append(Candidate(Path(item.path), step, files))
        except FileNotFoundError:
            continue  # being renamed or removed: the next look shows what it is
    return sorted(found, key=lambda one: (one.step, one.path))


def signature_of(path: Path) -> str:
    """Return the ``Candidate.signature`` of the directory at ``path``, whatever it is called."""
    return Candidate(path, 0, _files_below(path)).signature


def step_of(name: str) -> int | None:
    """Return the step that a file's or directory's name says, ``None`` if it says none."""
    for pattern in _STEPS:
        match = pattern.search(os.path.splitext(name)[0] if name.endswith(_FILES) else name)
        if match:
            return int(match[1])
    return None


def what_lacks(candidate: Candidate) -> str | None:
    """Return what a candidate still waits for, ``None`` if it is whole as far as can be seen."""
    files = candidate.files
    for sign in (_torch_lacks, _hugging_face_lacks, _deepspeed_lacks):
        lacking = sign(candidate)
        if lacking is not None:
            return lacking
    single = candidate.path.name in files and len(files) == 1
    for name in files:
        path = candidate.path if single and candidate.path.is_file() else candidate.path / name
        if not _is_whole(path, files[name][0]):
            return f"the rest of {name}"
    return None


def metrics_of(candidate: Candidate) -> dict[str, float]:
    """Return what a Hugging Face trainer logged at this step, else nothing."""
    name = "trainer_state.json"
    if candidate.files.get(name, (_MAX_STATE, 0))[0] >= _MAX_STATE:
        return {}
    try:
        state = json.loads((candidate.path / name).read_bytes())
        logged = [entry for entry in state["log_history"] if entry["step"] == candidate.step]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    found: dict[str, float] = {}
    for entry in logged:
        found.update({k: float(v) for k, v in entry.items() if type(v) in (int, float)})
    return {key: value for key, value in found.items() if key not in ("step", "epoch")}


def _torch_lacks(candidate: Candidate) -> str | None:
    """Of torch.distributed.checkpoint: the metadata is renamed into place last."""
    for name in candidate.files:
        above, _, last = name.rpartition("/")
        start = f"{above}/" if above else ""
        if not last.endswith(".distcp"):
            continue
        rank = re.match(r"__(\d+)_", last)
        own = f"{start}__{rank[1]}.metadata" if rank else ""
        if f"{start}.metadata" not in candidate.files and own not in candidate.files:
            return f"{start}.metadata"
        if f"{start}.metadata.tmp" in candidate.files:
            return f"{start}.metadata to take its place"
        if candidate.path.suffix == ".ckpt" and "meta.pt" not in candidate.files:
            return "meta.pt"  # which Lightning writes after it
    return None


def _hugging_face_lacks(candidate: Candidate) -> str | None:
    """Of transformers.Trainer, whose ``trainer_state.json`` comes last; of Accelerate the RNGs."""
    if "checkpoint-is-incomplete.txt" in candidate.files:
        return "checkpoint-is-incomplete.txt to go"
    theirs = re.fullmatch(r"checkpoint-\d+", candidate.path.name) is not None
    if not theirs and "training_args.bin" not in candidate.files:
        return None
    done = any(
        name == "trainer_state.json" or re.fullmatch(r"random_states_\d+\.pkl", name)
        for name in candidate.files
    )
    return None if done else "trainer_state.json"


def _deepspeed_lacks(candidate: Candidate) -> str | None:
    """Of DeepSpeed: ``latest`` beside the directories names the last one that is whole."""
    if not any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in candidate.files):
        return None
    try:
        tag = (candidate.path.parent / "latest").read_text()[:256].strip()
    except (FileNotFoundError, UnicodeDecodeError):
        tag = ""
    named = step_of(tag) if tag else None
    return None if named is not None and named >= candidate.step else "`latest` to name it"


def _is_whole(path: Path, size: int) -> bool:
    """Whether a file whose format says where it ends is that long."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                claimed = claimed_size(file.read(_MAX_HEADER))
                return claimed == size
            if path.suffix in _FILES and file.read(4) == b"PK\3\4":
                return zipfile.is_zipfile(file)
    except OSError:
        return False
    return path.suffix not in _FILES or size > 0


def _is_content(name: str) -> bool:
    return name.endswith((*_FILES, ".distcp")) or name.rpartition("/")[2] == ".metadata"


def _files_below(directory: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for above, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(above, name)
            st = os.lstat(path)
            if stat.S_ISREG(st.st_mode):
                found[os.path.relpath(path, directory)] = (st.st_size, st.st_mtime_ns)
    return found
