"""A real S3 server whose users come and go while it runs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from envstore.store.objects import Credentials
from tests.s3server import S3Server, running_s3

_WITHIN = 60.0


class Keys:
    """Who may use a server of the tests' own."""

    def __init__(self, server: S3Server, config: Path) -> None:
        self.server = server
        self._config = config
        self._users: dict[str, dict[str, Any]] = {}
        self._root = json.loads(config.read_text())["identities"]

    @property
    def root(self) -> Credentials:
        """The credentials of who may do everything."""
        return Credentials(self.server.access_key, self.server.secret_key)

    def grant(self, name: str, bucket: str) -> Credentials:
        """Return credentials that can read ``bucket``, new ones if ``name`` had some before."""
        given = Credentials(f"key-of-{name}", f"secret-{name}-{os.urandom(6).hex()}")
        self._set(given, [f"Read:{bucket}", f"List:{bucket}"])
        self._until(given, bucket, able=True)
        return given

    def revoke(self, given: Credentials, bucket: str) -> None:
        """See that credentials are refused from now on."""
        self._set(Credentials(given.access_key_id, os.urandom(16).hex()), [])
        self._until(given, bucket, able=False)

    def _set(self, given: Credentials, actions: list[str]) -> None:
        self._users[given.access_key_id] = {
            "name": given.access_key_id,
            "credentials": [
                {"accessKey": given.access_key_id, "secretKey": given.secret_access_key}
            ],
            "actions": actions,
        }
        fresh = self._config.with_suffix(".new")
        fresh.write_text(json.dumps({"identities": [*self._root, *self._users.values()]}))
        fresh.rename(self._config)

    def _until(self, given: Credentials, bucket: str, *, able: bool) -> None:
        end = time.monotonic() + _WITHIN
        user = S3Server(self.server.endpoint, given.access_key_id, given.secret_access_key, 0)
        client = user.client()
        try:
            while self._can_list(client, bucket) is not able:
                assert time.monotonic() < end, "the S3 server does not hear of its users"
                # Again and again: a signal that comes in the middle of another is lost.
                os.kill(self.server.pid, signal.SIGHUP)
                time.sleep(0.05)
        finally:
            client.close()

    def _can_list(self, client: Any, bucket: str) -> bool:
        try:
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except ClientError:
            return False
        return True


@contextmanager
def running_keys(directory: Path) -> Iterator[Keys]:
    """Start a server with its data in ``directory``, and nobody but its root."""
    with running_s3(directory) as server:
        yield Keys(server, directory / "s3.json")
