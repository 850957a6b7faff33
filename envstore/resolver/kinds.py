"""Says what a path holds (an environment, a model, any directory) and opens it for a push."""

from __future__ import annotations

import os
import re
from pathlib import Path

from envstore.errors import UsageError
from envstore.resolver.interpreter import find_interpreter
from envstore.resolver.prefix import PrefixSource
from envstore.store.source import DirectorySource, Source, access_error

KINDS = ("env", "model", "dir")

_WEIGHTS = (".safetensors", ".gguf")
_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
_DESCRIPTIONS = ("config.json", "model_index.json", "params.json", "adapter_config.json")
_PROGRAM = re.compile(r"python3(\.\d+t?)?")


def detect_kind(root: Path) -> str:
    """Return ``env``, ``model`` or ``dir``; a path that is not there is ``dir``.

    An environment has ``conda-meta``, ``pyvenv.cfg``, or ``bin/python3`` and ``lib/python3.X``.
    A model is a file of weights, or a directory with one; ``.bin``, ``.pt`` and the like may
    hold anything and count only beside a ``config.json``.
    """
    if os.path.isfile(root):
        return "model" if root.name.endswith(_WEIGHTS) else "dir"
    if not os.path.isdir(root):
        return "dir"
    if _is_environment(root):
        return "env"
    names = _names(root)
    if any(name in _DESCRIPTIONS for name in names):
        # Pipelines of several models keep their weights one level deeper.
        below = [os.path.join(root, name) for name in names]
        names += [name for path in below if os.path.isdir(path) for name in _names(Path(path))]
        if any(name.endswith(_PICKLED_WEIGHTS) for name in names):
            return "model"
    return "model" if any(name.endswith(_WEIGHTS) for name in names) else "dir"


def open_source(
    root: Path, kind: str | None = None, *, workers: int = 0, patience: float = 120
) -> Source:
    """Return the source for ``root``; ``kind`` overrides what ``detect_kind`` says.

    ``workers`` and ``patience`` concern environments: see ``BytecodePool``. Raises
    ``NotFoundError``, ``AccessDeniedError``, ``UsageError`` (unknown kind, an environment that
    is not a directory).
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}", hint=f"one of {', '.join(KINDS)}")
    kind = kind or detect_kind(root)
    if kind != "env":
        return DirectorySource(root, kind=kind, normalise=kind == "model")
    if os.path.isfile(root):
        raise UsageError(f"{root} is a file, not an environment", hint="push with --kind dir")
    return PrefixSource(root, workers=workers, patience=patience)


def _is_environment(root: Path) -> bool:
    if os.path.isdir(root / "conda-meta") or os.path.isfile(root / "pyvenv.cfg"):
        return True
    programs = _names(root / "bin") if os.path.isdir(root / "bin") else []
    return any(map(_PROGRAM.fullmatch, programs)) and find_interpreter(root) is not None


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise access_error(error, os.fsencode(directory)) from error
