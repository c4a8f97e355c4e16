"""The stock: what Python has added is there for it, whatever the extent map has taken out of C meanwhile."""

from qcow2.native import ffi, lib
from qcow2.plane.stock import Stock


def test_what_has_no_room_in_c_is_taken_when_c_is_empty() -> None:
    """2 KiB clusters in the holes of a fragmented file come as more runs than C has room for."""
    stock, first = Stock(), ffi.new("uint64_t *")
    stock.add(range(start, start + 1) for start in range(0, 4000, 2))
    taken = 0
    while stock.native.left:
        taken += lib.stock_take(stock.native, 1, first)
    assert 0 < taken < 2000
    for _ in range(2000 - taken):
        assert len(stock.take(1)) == 1
    assert len(stock.take(1)) == len(stock) == 0
