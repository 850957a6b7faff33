"""The store's own description: what makes a place a store, and which format it has."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from envstore.errors import ConflictError, CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store import canonical
from envstore.store.chunking import CHUNKER_ID
from envstore.store.digest import HASH_ID
from envstore.store.objects.base import ObjectStore

KEY = "envstore.json"
FORMAT = 1
CODEC_ID = "zstd"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The format version, the store's random identity and the algorithms in use."""

    format: int
    id: str
    hash: str
    chunker: str
    codec: str


def init_store(objects: ObjectStore) -> tuple[StoreConfig, bool]:
    """Make the place a store unless it is one; returns its config and whether it was created.

    Safe to race: the description is created by one conditional PUT.
    """
    try:
        return load_config(objects), False
    except NotFoundError:
        pass
    config = StoreConfig(FORMAT, str(uuid.uuid4()), HASH_ID, CHUNKER_ID, CODEC_ID)
    body = {
        "format": config.format,
        "id": config.id,
        "hash": config.hash,
        "chunker": config.chunker,
        "codec": config.codec,
    }
    try:
        objects.put_if(KEY, canonical.encode_checked(body), None)
    except ConflictError:
        return load_config(objects), False
    return config, True


def load_config(objects: ObjectStore) -> StoreConfig:
    """Read the description. One request.

    Raises ``NotFoundError`` (not a store), ``UnsupportedFormatError`` (newer, or unknown
    algorithms), ``CorruptError``.
    """
    what = f"{objects.url}/{KEY}"
    try:
        data = objects.get(KEY)
    except NotFoundError as error:
        if error.hint and "envstore init" not in error.hint:
            raise
        raise NotFoundError(
            f"{objects.url} is not an envstore store", hint="create one with: envstore init"
        ) from None
    value = canonical.decode(data, what)
    version = canonical.field(value, "format", int, what)
    if version > FORMAT:
        raise UnsupportedFormatError(
            f"{objects.url} has format {version}, this version reads up to {FORMAT}",
            hint="upgrade envstore",
        )
    text: dict[str, Any] = {
        name: canonical.field(value, name, str, what) for name in ("id", "hash", "chunker", "codec")
    }
    try:
        uuid.UUID(text["id"])
    except ValueError:
        raise CorruptError(f"{what} has no valid 'id'") from None
    if text["hash"] != HASH_ID or text["codec"] != CODEC_ID:
        raise UnsupportedFormatError(
            f"{objects.url} uses {text['hash']} and {text['codec']}, unknown here",
            hint="upgrade envstore",
        )
    return StoreConfig(version, **text)
