"""Which interpreter makes an environment's bytecode: one of exactly the version that runs it.

Bytecode is the same whichever build of a version made it, so any will do that runs here: the one
this program runs on, the one that is named, or the environment's own, unpacked for the purpose.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from envstore.resolver.lock import CondaPackage, LocalPython, Lock, PythonFacts, python_of
from envstore.resolver.target import own_platform


def base_interpreter() -> Path:
    """Return the interpreter behind the one that runs this, outside of any virtual environment."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


class Compiler:
    """Finds the interpreter for one lock.

    ``python`` are the facts of the lock's interpreter, ``None`` if it has none. ``program`` is what
    makes the bytecode; without one it is the interpreter in ``package``. ``able`` says whether
    bytecode can be made here; if not, ``trouble`` says why.
    """

    def __init__(self, lock: Lock, local: Path | None = None) -> None:
        self.python: PythonFacts | None = python_of(lock)
        self.package: CondaPackage | LocalPython | None = None
        self.program: Path | None = None
        self.able = True
        self.trouble = ""
        if self.python is None:
            return
        own = lock.local_python()
        if own is not None and local is not None:
            self.program = local
        elif platform.python_version() == self.python.version and _is_cpython():
            self.program = base_interpreter()
        elif lock.platform == own_platform():
            self.package = own or next(item for item in lock.conda() if item.name == "python")
        else:
            self.able = False
            self.trouble = (
                f"bytecode is left out, imports will be slower: Python {self.python.version} for "
                f"{lock.platform} does not run here, and this is Python {platform.python_version()}"
            )


def _is_cpython() -> bool:
    return sys.implementation.name == "cpython"
