"""What one comparison measures, and how cases are chosen by name."""

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from bench.load import Job, Order
from bench.recipe import Recipe
from vhost.option import CacheMode


class Images(Enum):
    """How long an image lives."""

    SHARED = "one image, read by both servers"
    PER_SERVER = "one image for each server"
    PER_RUN = "a new image in every run"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. *target* is the ratio to QEMU that is aimed for, *limit* the name of the disk's own figure."""

    name: str
    title: str
    recipe: Recipe
    job: Job
    images: Images
    cache: CacheMode = CacheMode.WRITEBACK
    target: float | None = None
    limit: str | None = None
    on_tmpfs: bool = False
    options: tuple[str, ...] = ()  # of our daemon

    @property
    def warms_up(self) -> bool:
        """A job that visits everything once has nothing to repeat."""
        return self.job.order is not Order.ONCE

    @property
    def writable(self) -> bool:
        return self.images is not Images.SHARED


class UnknownCase(Exception):
    """No case has such a name."""


def select(patterns: list[str], cases: tuple[Case, ...]) -> list[Case]:
    """The cases whose names match any of *patterns*, all without patterns, in their own order. Raises: UnknownCase."""
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise UnknownCase(f"no case is called {pattern!r}; --list names them all")
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]
