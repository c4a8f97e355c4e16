"""The program `qcow2`: makes sure that the package of that name is ours, and runs it.

Python looks through PYTHONPATH first, and there may be a qcow2.py: QEMU's own tests have one.
"""

import sys
from importlib.util import find_spec
from os.path import abspath, dirname


def main() -> int:
    """Run the tool; the exit status."""
    while (found := find_spec("qcow2")) is not None and found.submodule_search_locations is None:
        others = [entry for entry in sys.path if abspath(entry) != dirname(abspath(str(found.origin)))]
        if others == sys.path:  # who imports it has to say what is wrong
            break
        sys.path[:] = others
    from qcow2.tool import program

    return program()
