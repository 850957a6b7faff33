"""Content-addressed environments, models and checkpoints, mounted lazily from one object store."""

from __future__ import annotations

__version__ = "0.1.0"
