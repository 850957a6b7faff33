"""Reads the points in time that projects limit themselves to."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from envstore.resolver.specs.context import Context

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def exclude_newer(value: Any, path: Path, context: Context) -> str:
    """Return a point in time as RFC 3339; a mere date includes that day, as pixi and uv have it.

    A span before now (``7d``) would mean something else every day: it is told and not followed.
    """
    if value is None:
        return ""
    text = str(value)
    try:
        if _DATE.fullmatch(text):
            day = datetime.date.fromisoformat(text) + datetime.timedelta(days=1)
            return f"{day.isoformat()}T00:00:00Z"
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        context.warn(
            f"{path}: exclude-newer = {json.dumps(text)} is not a point in time, and not followed"
        )
        return ""
    return when.isoformat() if when.tzinfo else f"{when.isoformat()}Z"
