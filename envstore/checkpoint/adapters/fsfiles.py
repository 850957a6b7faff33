"""Open files of ``envstore://``, and what becomes of several at once."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractBufferedFile
from fsspec.transaction import Transaction

from envstore.checkpoint.adapters.fspaths import as_os_errors
from envstore.checkpoint.adapters.sharing import Hold
from envstore.checkpoint.adapters.storing import StoredFile, Upload
from envstore.store.refs import RefName

if TYPE_CHECKING:
    from envstore.checkpoint.adapters.filesystem import EnvstoreFileSystem


class EnvstoreFile(AbstractBufferedFile):
    """A file that is read by ranges, or stored while it is written."""

    fs: EnvstoreFileSystem
    _upload: Upload | None = None
    _ref: RefName | None = None
    _stored: StoredFile | None = None
    _hold: Hold | None = None

    def __init__(self, fs: EnvstoreFileSystem, path: str, mode: str, *args: Any, **kw: Any) -> None:
        if mode == "rb":
            # The tree as it is now, whatever the ref is moved to while this is open.
            self._view, self._entry = fs._find(path)
            kw["size"] = self._entry.size
        super().__init__(fs, path, mode, *args, **kw)

    def _fetch_range(self, start: int, end: int) -> bytes:
        with as_os_errors(self.path):
            span = start, min(end, self._entry.size)
            return self._view.read(self._entry.path, [span])[0]

    def _initiate_upload(self) -> None:
        with as_os_errors(self.path):
            self._hold = self.fs._hold()
            self._ref, self._upload = self.fs._upload(self.path, self._hold)

    def _upload_chunk(self, final: bool = False) -> bool:
        assert self._upload is not None  # noqa: S101 - fsspec initiates first
        with as_os_errors(self.path):
            self._upload.write(self.buffer.getbuffer())
            if final:
                self._stored = self._upload.finish()
                self._upload = None
                if self.autocommit:
                    self.commit()
        return True

    def commit(self) -> None:
        """Make the file part of its tree."""
        try:
            if self._ref is not None and self._stored is not None:
                with as_os_errors(self.path), self.fs._inside(self._hold):
                    self.fs._land(self._ref, [self._stored])
        finally:
            self._release()

    def _release(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    def discard(self) -> None:
        """Leave the tree as it is."""
        self.closed = True
        if self._upload is not None:
            self._upload.abandon()
            self._upload = None
        self._release()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # What was being written when something failed is not what was to be written.
        if kind is not None and self.mode != "rb":
            self.discard()
        else:
            self.close()

    def __del__(self) -> None:
        if not self.closed and self.mode != "rb":
            warnings.warn(f"{self.path} was not closed: it is not kept", ResourceWarning, 2)
            self.discard()


class TreeTransaction(Transaction):
    """Files that become part of their trees together, one change for each tree."""

    fs: EnvstoreFileSystem

    def complete(self, commit: bool = True) -> None:
        """Commit or discard everything."""
        files = [*self.files]
        self.files.clear()
        try:
            by_ref: dict[RefName, list[EnvstoreFile]] = {}
            for file in files:
                if not commit:
                    file.discard()
                elif file._ref is not None and file._stored is not None:
                    by_ref.setdefault(file._ref, []).append(file)
            for ref, landing in by_ref.items():
                with as_os_errors(str(ref)):
                    for file in landing:
                        if file._hold is not None:
                            file._hold.session.check()
                    with self.fs._inside(landing[-1]._hold):
                        self.fs._land(ref, [file._stored for file in landing if file._stored])
        finally:
            for file in files:
                file._release()
            self.fs._intrans = False
            self.fs._transaction = None
