"""Who of those that wait for Python goes next: a limit on requests under way, shared among the queues."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

LIMIT = 512  # requests that the engine has at a time; each is a coroutine and its buffers
SHARE = 4  # of one queue that it has in any case, whatever others wait for


class Queued(Protocol):
    """Something that came from a queue."""

    @property
    def queue(self) -> int: ...


R = TypeVar("R", bound=Queued)


class Admission(Generic[R]):
    """Begins requests, at once or when others have ended: those of one queue in order, the queues by turns."""

    def __init__(self, begin: Callable[[R], None]) -> None:
        self._begin = begin
        self._under_way: Counter[int] = Counter()  # by queue
        self._total = 0
        self._waiting: dict[int, deque[R]] = {}  # never empty; the queue whose turn it is comes first
        self._changed: deque[int] = deque()  # queues to look at
        self._is_beginning = False

    def offer(self, request: R) -> bool:
        """Begin *request* when it is its turn. False: there is no memory to let it wait, and it is forgotten."""
        waiting = self._waiting.get(request.queue)
        try:
            if waiting is not None:
                waiting.append(request)
            else:
                self._waiting[request.queue] = deque((request,))
        except MemoryError:
            return False
        self._look_at(request.queue)
        return True

    def end(self, queue: int) -> None:
        """A request of *queue* has ended, perhaps while it was being begun."""
        self._total -= 1
        self._under_way[queue] -= 1
        if self._waiting:
            self._look_at(queue)

    def _look_at(self, queue: int) -> None:
        self._changed.append(queue)
        if self._is_beginning:
            return
        self._is_beginning = True
        try:
            while self._changed:
                self._begin_from(self._changed.popleft())
        finally:
            self._is_beginning = False

    def _begin_from(self, queue: int) -> None:
        while self._waiting and (request := self._next(queue)) is not None:
            self._total += 1
            self._under_way[request.queue] += 1
            self._begin(request)

    def _next(self, queue: int) -> R | None:
        """The request to begin; *queue* is where something has changed, which matters once the limit is reached."""
        if self._total < LIMIT:
            queue = next(iter(self._waiting), queue)
        elif self._under_way[queue] >= SHARE:
            return None
        waiting = self._waiting.pop(queue, None)
        if waiting is None:
            return None
        request = waiting.popleft()
        if waiting:
            self._waiting[queue] = waiting  # last: the others come first
        return request
