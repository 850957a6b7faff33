"""Entry points: the small scripts that call a function of a package.

conda and PyPA installers write different ones. Both start with the interpreter below
``PLACEHOLDER``; relocation makes that the prefix, and a detour through ``/bin/sh`` of it where
the kernel would not follow.
"""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass

from envstore.store.relocation import PLACEHOLDER

_OBJECT = re.compile(r"([\w.-]+)\s*:\s*([\w.-]+)\s*(?:\[[^\]]*\]\s*)?")
_NAME = re.compile(r"[^/\\\0\n]{1,255}")
_INTERPRETERS = re.compile(r"pythonw?|python3(\.\d+)?t?")
_PIP = re.compile(r"pip3\.\d+")

_CONDA = """\
#!{python}
# -*- coding: utf-8 -*-
import re
import sys

from {module} import {name}

if __name__ == '__main__':
\tsys.argv[0] = re.sub(r'(-script\\.pyw?|\\.exe)?$', '', sys.argv[0])
\tsys.exit({function}())
"""

_PYPA = """\
#!{python}
# -*- coding: utf-8 -*-
import sys
from {module} import {name}
if __name__ == "__main__":
    if sys.argv[0].endswith("-script.pyw"):
        sys.argv[0] = sys.argv[0][:-11]
    elif sys.argv[0].endswith(".exe"):
        sys.argv[0] = sys.argv[0][:-4]
    sys.exit({function}())
"""


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A command and what it calls: ``function`` (``main`` or ``app.main``) of ``module``."""

    command: str
    module: str
    function: str

    @classmethod
    def parse(cls, command: str, value: str) -> EntryPoint:
        """Return the entry point for ``value``, ``module:function [extras]``.

        Raises ``ValueError`` for anything else and for commands that are no file names.
        """
        match = _OBJECT.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"the entry point {command} = {value} is not valid")
        if not _NAME.fullmatch(command) or command in (".", ".."):
            raise ValueError(f"the entry point {command!r} is no name of a command")
        if _INTERPRETERS.fullmatch(command):
            raise ValueError(f"the entry point {command} would replace the interpreter")
        return cls(command, match[1], match[2])

    def conda_script(self, minor: str) -> bytes:
        """Return the script as conda's installers write it, for Python ``minor`` (``3.11``)."""
        return self._script(_CONDA, f"bin/python{minor}")

    def pypa_script(self) -> bytes:
        """Return the script as uv writes it."""
        return self._script(_PYPA, "bin/python")

    def _script(self, template: str, python: str) -> bytes:
        return template.format(
            python=f"{PLACEHOLDER.decode()}/{python}",
            module=self.module,
            name=self.function.partition(".")[0],
            function=self.function,
        ).encode()


def parse_conda(line: str) -> EntryPoint:
    """Return the entry point of a line of ``link.json``, ``command = module:function``."""
    command, mark, value = line.partition("=")
    if not mark:
        raise ValueError(f"the entry point {line} is not valid")
    return EntryPoint.parse(command.strip(), value)


def parse_groups(text: str) -> dict[str, dict[str, str]]:
    """Return the groups of an ``entry_points.txt``, names and values. Raises ``ValueError``."""
    parser = configparser.RawConfigParser(
        delimiters=("=",), comment_prefixes=("#", ";"), strict=False, default_section="\0"
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(text)
    except configparser.Error as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"its entry_points.txt is not valid: {reason}") from None
    return {group: dict(parser.items(group)) for group in parser.sections()}


def scripts(groups: dict[str, dict[str, str]], minor: str) -> list[EntryPoint]:
    """Return the entry points that become scripts, a command of both kinds only once.

    As in pip and uv, ``pip3.X`` is made for the X of this interpreter, whatever the wheel says.
    """
    wanted = groups.get("gui_scripts", {}) | groups.get("console_scripts", {})
    wanted = {name: value for name, value in wanted.items() if not _PIP.fullmatch(name)}
    if "pip3" in wanted:
        wanted[f"pip{minor}"] = wanted["pip3"]
    return [EntryPoint.parse(name, value) for name, value in sorted(wanted.items())]
