"""A part, or the parts of many ranks, in plain memory: what a slot or a store would hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from envstore.checkpoint.layout import Captured, Want
from envstore.errors import NotFoundError


class MemoryTree:
    """Files as bytes; remembers what was read."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.wanted: list[tuple[str, int, int]] = []

    @classmethod
    def of(cls, *parts: Captured) -> MemoryTree:
        files = {}
        for part in parts:
            for file in part.files:
                content = bytearray(b"\xa5" * file.size)
                view = memoryview(content)
                at = 0
                for piece in file.pieces:
                    piece.copy_into(view[at : at + piece.nbytes])
                    at += piece.nbytes
                assert file.path not in files
                files[file.path] = bytes(content)
        return cls(files)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {path: len(content) for path, content in self.files.items()}

    @property
    def read_bytes(self) -> int:
        return sum(size for _, _, size in self.wanted)

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise NotFoundError(path)
        return self.files[path]

    def read_into(self, wants: Sequence[Want]) -> None:
        for want in wants:
            content = self.files[want.path]
            end = want.start + want.view.nbytes
            assert 0 <= want.start < end <= len(content)
            want.view[:] = content[want.start : end]
            self.wanted.append((want.path, want.start, want.view.nbytes))

    def close(self) -> None:
        pass
