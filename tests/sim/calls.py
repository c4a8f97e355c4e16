"""What C asks of the simulated kernel: callbacks that find the kernel of this history."""

import errno
from typing import TYPE_CHECKING, Any

from ring.native import ffi

if TYPE_CHECKING:
    from tests.sim.kernel import Kernel

_kernel: "Kernel"


def answer_with(kernel: "Kernel") -> None:
    """From now on C asks *kernel*."""
    global _kernel
    _kernel = kernel


def _failed(kind: Any, error: Any, traceback: Any) -> Any:
    """A callback raised: the process ends here."""
    if _kernel.error is None:
        _kernel.error = error
    _kernel.state.dead = 1
    return None


@ffi.def_extern(name="sim_turn", onerror=_failed)
def _turn() -> None:
    _kernel.turn()


@ffi.def_extern(name="sim_sleep", onerror=_failed, error=-errno.ESHUTDOWN)
def _sleep(milliseconds: int) -> int:
    return _kernel.sleep(milliseconds)


@ffi.def_extern(name="sim_begin", onerror=_failed)
def _begin(job: int, opcode: int, fd: int, offset: int, nbytes: int, mode: int) -> None:
    _kernel.begin(job, opcode, fd, offset, nbytes, mode)


@ffi.def_extern(name="sim_perform", onerror=_failed, error=-errno.EIO)
def _perform(job: int, opcode: int, fd: int, offset: int, nbytes: int, mode: int) -> int:
    return _kernel.perform(job, opcode, fd, offset, nbytes, mode)


@ffi.def_extern(name="sim_length", onerror=_failed, error=-errno.EIO)
def _length(fd: int) -> int:
    return _kernel.length(fd)


@ffi.def_extern(name="sim_write_ahead", onerror=_failed)
def _write_ahead(fd: int) -> int:
    return _kernel.write_ahead(fd)


@ffi.def_extern(name="sim_store", onerror=_failed)
def _store(address: int, data: Any, nbytes: int) -> None:
    _kernel.store(address, bytes(ffi.buffer(data, nbytes)))


@ffi.def_extern(name="sim_signal", onerror=_failed)
def _signal(fd: int) -> None:
    _kernel.signal(fd)
