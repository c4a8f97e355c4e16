"""The guest's console, line by line, and the marks by which init talks to the host."""

from dataclasses import dataclass, field

MARK = "@@"
PANIC = "Kernel panic - not syncing"
PANIC_END = "---[ end Kernel panic"


@dataclass
class Transcript:
    """What the console said so far.

    The marks are "@@ begin", "@@ file NAME" with its content up to "@@ end", "@@ exit STATUS" and "@@ broken WHY".
    """

    lines: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    status: int | None = None
    trouble: str | None = None
    _open_file: str | None = None

    def add(self, line: str) -> bool:
        """Take in one line; True if it is for people: neither a mark nor part of a reported file."""
        self.lines.append(line)
        match line.split(maxsplit=2):
            case [mark, word, *rest] if mark == MARK:
                self._obey(word, rest[0] if rest else "")
                return False
            case _ if self._open_file is not None:
                self.files[self._open_file] += line + "\n"
        if PANIC in line:
            self.trouble = line
        return self._open_file is None

    def _obey(self, word: str, rest: str) -> None:
        match word:
            case "begin":
                self.begun, self.status = True, None
            case "file":
                self._open_file = rest
                self.files[rest] = ""
            case "end":
                self._open_file = None
            case "exit":
                self.status = int(rest)
            case "broken":
                self.trouble = rest

    @property
    def is_over(self) -> bool:
        """True once a panic has been printed in full or init gave up: nothing worth waiting for follows."""
        return self.trouble is not None and (PANIC not in self.trouble or PANIC_END in self.lines[-1])
