"""When memory runs out to the last byte, whoever fails can still be told so."""

import subprocess
import sys

import pytest

EXHAUST = """
import ctypes, resource
from types import SimpleNamespace
from qcow2.error import no_memory
from vhost.admission import Admission
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
admission, request = Admission(print), SimpleNamespace(queue=0)
resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
for nbytes in (1 << 20, 1 << 12, *range(1032, 8, -16)):
    while libc.malloc(nbytes):
        pass
outcome = %s
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(outcome)
"""


@pytest.mark.parametrize(
    ("what", "outcome"), [("no_memory()", "[Errno 12] Cannot allocate memory"), ("admission.offer(request)", "False")]
)
def test_a_failure_can_be_told_without_memory(what: str, outcome: str) -> None:
    done = subprocess.run([sys.executable, "-c", EXHAUST % what], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{outcome}\n", "")
