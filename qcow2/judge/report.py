"""What a check has found, in numbers and in lines."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Report:
    """The numbers of a check; *say*, if given, gets one line for each finding."""

    say: Callable[[str], None] | None = None
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    is_dark: bool = False  # references cannot be followed: what seems to be free may be in use

    def corruption(self, text: str) -> None:
        """The image contradicts itself."""
        self.corruptions += 1
        self._tell(f"ERROR {text}")

    def loss(self, text: str) -> None:
        """The image contradicts itself where it refers to something, which is not found, then."""
        self.is_dark = True
        self.corruption(text)

    def leak(self, text: str) -> None:
        """Space is lost, nothing else."""
        self.leaks += 1
        self._tell(f"Leaked {text}")

    def error(self, text: str) -> None:
        """Something cannot be checked, and so cannot what it refers to."""
        self.is_dark = True
        self.check_errors += 1
        self._tell(f"ERROR {text}")

    def _tell(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
