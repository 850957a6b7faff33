"""What a path is taken for, and what overrides it."""

from __future__ import annotations

from pathlib import Path

import pytest

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.kinds import detect_kind, open_source
from envstore.resolver.prefix import PrefixSource
from envstore.store.source import DirectorySource


def fill(root: Path, names: tuple[str, ...]) -> Path:
    root.mkdir()
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(b"{}")
    return root


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("pyvenv.cfg",), "env"),
        (("conda-meta/history",), "env"),
        (("bin/python3", "lib/python3.11/os.py"), "env"),
        (("bin/python3.12", "lib/python3.12/os.py"), "env"),
        (("bin/python3",), "dir"),
        (("bin/tool", "lib/python3.11/os.py"), "dir"),
        (("bin", "lib/python3.11/os.py"), "dir"),
        (("model.safetensors",), "model"),
        (("config.json", "model-00001-of-00002.safetensors"), "model"),
        (("llama.Q4_K_M.gguf", "README.md"), "model"),
        (("config.json", "pytorch_model.bin"), "model"),
        (("params.json", "consolidated.00.pth"), "model"),
        (("model_index.json", "unet/diffusion_pytorch_model.safetensors"), "model"),
        (("model_index.json", "unet/diffusion_pytorch_model.bin"), "model"),
        (("pytorch_model.bin",), "dir"),
        (("config.json", "main.py"), "dir"),
        (("data/model.safetensors", "train.py"), "dir"),
        (("pyvenv.cfg", "model.safetensors"), "env"),
        ((), "dir"),
    ],
)
def test_directories(tmp_path: Path, names: tuple[str, ...], kind: str) -> None:
    root = fill(tmp_path / "root", names)
    assert detect_kind(root) == kind
    source = open_source(root)
    assert source.kind == kind
    assert isinstance(source, PrefixSource if kind == "env" else DirectorySource)
    source.close()


def test_files(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", ("a.safetensors", "b.gguf", "c.bin", "d.txt"))
    kinds = {path.name: detect_kind(path) for path in root.iterdir()}
    assert kinds == {"a.safetensors": "model", "b.gguf": "model", "c.bin": "dir", "d.txt": "dir"}


def test_links_are_followed(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", ("pyvenv.cfg", "a.safetensors"))
    (tmp_path / "env").symlink_to(root)
    (tmp_path / "weights").symlink_to(root / "a.safetensors")
    assert detect_kind(tmp_path / "env") == "env"
    assert detect_kind(tmp_path / "weights") == "dir"


@pytest.mark.parametrize("kind", ["env", "model", "dir"])
def test_the_user_knows_better(tmp_path: Path, kind: str) -> None:
    root = fill(tmp_path / "root", ("pyvenv.cfg",))
    source = open_source(root, kind)
    assert source.kind == kind
    (entry,) = source.scan()
    assert (entry.mtime_ns == 0) == (kind != "dir")
    source.close()


def test_wrong_requests(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", ("file",))
    with pytest.raises(UsageError, match="unknown kind 'zip'"):
        open_source(root, "zip")
    with pytest.raises(UsageError, match="is a file"):
        open_source(root / "file", "env")
    for kind in ("env", "dir", None):
        with pytest.raises(NotFoundError):
            open_source(tmp_path / "none", kind)
