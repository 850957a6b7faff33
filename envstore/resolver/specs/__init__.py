"""Reads what people have: specifications of environments, and other tools' locks.

``read_specs`` is the way in; every format has a module, and ``detect`` tells them apart.
"""

from __future__ import annotations

from envstore.resolver.specs.detect import detect_format
from envstore.resolver.specs.reading import Prefix, read_specs

__all__ = ["Prefix", "detect_format", "read_specs"]
