"""Where guest bytes are: the addresses of a C extent map."""

from typing import NamedTuple


class ExtentMap(NamedTuple):
    """An `extent_translate`, its context, its `struct extent_places` if any: valid as long as their owner lives."""

    translate_address: int
    context_address: int
    places_address: int = 0
