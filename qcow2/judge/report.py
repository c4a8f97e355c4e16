"""What a check has found, in numbers and in lines."""

from collections.abc import Callable
from dataclasses import dataclass

MAX_LINES = 10_000  # what an image says of itself must not fill a disk with log; the rest is counted, which is quicker


@dataclass
class Report:
    """The numbers of a check; *say*, if given, gets one line for each finding, of MAX_LINES at most."""

    say: Callable[[str], None] | None = None
    check_errors: int = 0
    corruptions: int = 0
    voids: int = 0  # of them: what nobody can use, and nothing else depends on
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    is_dark: bool = False  # references cannot be followed: what seems to be free may be in use
    is_dirty: bool = False  # the image was not closed cleanly
    said: int = 0  # lines

    def corruption(self, text: str) -> None:
        """The image contradicts itself."""
        self.corruptions += 1
        self.tell(f"ERROR {text}")

    def loss(self, text: str) -> None:
        """The image contradicts itself where it refers to something, which is not found, then."""
        self.is_dark = True
        self.corruption(text)

    def void(self, text: str) -> None:
        """Something contradicts itself that the disk can do without."""
        self.voids += 1
        self.corruption(text)

    @property
    def unsound(self) -> int:
        """How many findings forbid to write to the image."""
        return self.check_errors + self.corruptions - self.voids

    def leak(self, text: str) -> None:
        """Space is lost, nothing else."""
        self.leaks += 1
        self.tell(f"Leaked {text}")

    def error(self, text: str) -> None:
        """Something cannot be checked, and so cannot what it refers to."""
        self.is_dark = True
        self.check_errors += 1
        self.tell(f"ERROR {text}")

    def tell(self, line: str) -> None:
        """Say *line* of a finding that is counted already."""
        if self.say is None:
            return
        self.say(line)
        self.said += 1
        if self.said == MAX_LINES:
            self.say = None
