#!/usr/bin/env bash
# Prints the path of a Python that .venv can be made with, the one on PATH first; fails if there is none.
# It must be 3.11 or newer and have ensurepip (for venv) and the C headers (pyfuse3 is compiled).
# Made by root, .venv must also work for other users, as the tests mount as one: so an interpreter
# inside a private home directory is taken only with --private.
set -euo pipefail

check='
import importlib.util, os, sys, sysconfig
usable = (
    sys.version_info >= (3, 11)
    and importlib.util.find_spec("ensurepip") is not None
    and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
)
folder = os.path.realpath(sys.executable)
while usable and os.getuid() == 0 and "--private" not in sys.argv and folder != "/":
    folder = os.path.dirname(folder)
    usable = bool(os.stat(folder).st_mode & 0o001)
if usable:
    print(os.path.realpath(sys.executable))
sys.exit(not usable)
'

for candidate in ${PYTHON:-python3 /usr/bin/python3 /usr/local/bin/python3 python3.13 python3.12 python3.11}; do
    # A candidate that is not there, or that cannot even start, is the ordinary case here.
    "$candidate" -I -c "$check" "$@" 2>/dev/null && exit 0
done
exit 1
