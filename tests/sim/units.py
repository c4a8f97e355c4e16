"""What the files of a history hold for sure, and what a death may leave of the rest."""

from collections.abc import Iterable

from tests.crash.driver import Completed, Effect, Issued, SimulatedFile, Synced
from tests.sim.trouble import Lost

Contents = dict[SimulatedFile, SimulatedFile]  # of a file at some moment


class Units:
    """What of a journal is stable, pending and in flight."""

    def __init__(self, stable: Contents) -> None:
        self.pending: dict[int, Effect] = {}  # in the order they took effect
        self.in_flight: set[int] = set()
        self._stable = {file: content.copy() for file, content in stable.items()}

    def take(self, entry: object) -> None:
        """Go past *entry*."""
        match entry:
            case Issued(number, effect):
                self.pending[number] = effect
                self.in_flight.add(number)
            case Completed(number, is_late) if number in self.pending:
                self.in_flight.discard(number)
                if is_late:
                    self.pending[number] = self.pending.pop(number)
            case Lost(number):
                self.in_flight.discard(number)
                del self.pending[number]
            case Synced(file, numbers):
                for number in [number for number in self.pending if number in numbers]:
                    self.pending.pop(number).apply(self._stable[file])
            case _:
                pass

    def after(self, effects: Iterable[Effect]) -> Contents:
        """The stable files after *effects*."""
        files = {file: content.copy() for file, content in self._stable.items()}
        for effect in effects:
            effect.apply(files[effect.file])
        return files
