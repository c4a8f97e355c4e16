"""How a command fails: what is said, and the exit status."""


class UsageError(Exception):
    """The command line makes no sense; one line says what."""


class Failure(Exception):
    """The command has failed; the text says why."""

    def __init__(self, text: str, status: int = 1, *, hint: str = "") -> None:
        """*hint* is printed after the line that *text* becomes: words of ours, of one line or more."""
        super().__init__(text)
        self.status = status
        self.hint = hint


def reason_of(failure: Exception) -> str:
    """Why: what the host says, or the image."""
    cause = failure.__cause__ or failure
    return getattr(cause, "strerror", None) or str(cause)
