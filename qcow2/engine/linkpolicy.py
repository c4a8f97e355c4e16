"""What the owner of an image has to say about links that wait."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """What an image's owner decides about waiting links, and wants to know."""

    has_log: bool = True  # not if nobody cares for barriers
    may_wait: Callable[[], bool] = lambda: True  # the engine's own; in writethrough that would only be more work
    on_waiting: Callable[[bool], None] = lambda is_waiting: None  # whether a sync is no flush: links wait
    on_log_lost: Callable[[OSError], None] = lambda error: None  # there can be no log, so none will wait
