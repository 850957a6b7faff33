"""Whether what a server says can be: it reads what strangers have written, and its holder relies
on it no further than that.
"""

from __future__ import annotations

from typing import Any

from envstore.fuse.channel import Message

_FACTS: dict[str, type] = {
    "name": str, "snapshot": str, "manifest": str, "store": str, "fast": bool,
}  # fmt: skip
_MOST_KEY = 256


def makes_sense(message: Message) -> bool:
    """Return whether a message has the fields that its kind needs, and nothing odd in them."""
    body = message.body
    match message.kind:
        case "keep":
            return _is_key(body.get("key")) and isinstance(body.get("body"), dict)
        case "drop":
            return _is_key(body.get("key"))
        case "loaded":
            plain = all(type(body.get(name)) is kind for name, kind in _FACTS.items())
            # The name becomes an option of the mount, and a line of tables.
            return plain and body["name"].isprintable() and "," not in body["name"]
        case "failed":
            return _is_error(body.get("error"))
    return True


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and len(key) <= _MOST_KEY


def _is_error(error: Any) -> bool:
    return (
        isinstance(error, dict)
        and isinstance(error.get("kind"), str)
        and isinstance(error.get("message"), str)
        and isinstance(error.get("hint"), str | None)
    )
