"""Two sides on one image, between which a guest migrates: a daemon each, and QEMU where the guest is."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from guest import Backend, Guest, vhost_user_disk

from tests.vm.conftest import Boot, Serve
from tests.vm.journey import Journey
from vhost import Control


class Sides:
    """The guest that does *job* is on one side; the daemon of the other one is idle, or not there.

    *options()* are those of each daemon that begins. *stack* ends them, and the guest.
    """

    def __init__(
        self, image: Path, serve: Serve, boot: Boot, stack: ExitStack, options: Callable[[], list[str]]
    ) -> None:
        self._image = image
        self._serve = serve
        self._boot = boot
        self._stack = stack
        self._options = options
        self._here, self._there = "here", "there"
        self.idle: Backend | None = None
        self.begin()

    def boot(self, job: str, *, queues: int, packed: bool) -> None:
        """Let the guest begin on the daemon that is there."""

        def start(daemon: Backend, arguments: list[str]) -> Guest:
            disk = vhost_user_disk(daemon.socket_path, queues=queues, packed=packed, reconnect=1)
            flag = ["-device", "virtio-rng-pci,id=flag,addr=1e.0"]
            return self._boot(job, [*disk, *flag, *arguments], cpus=queues)

        journey = Journey(start, self.daemon, self._image.with_name("migration"))
        self._journey = self._stack.enter_context(journey)

    @property
    def guest(self) -> Guest:
        return self._journey.guest

    def begin(self) -> None:
        """Another daemon where the guest is; the one that was there has ended."""
        self.daemon = self._begin(self._here)

    def _begin(self, side: str, *more: str) -> Backend:
        options = [*self._options(), f"--control={self._control_path(side)}", *more]
        return self._stack.enter_context(self._serve(self._image, *options, name=side))

    def _control_path(self, side: str) -> str:
        return f"{self._image}.{side}.control"

    def control(self) -> Control:
        """That of the daemon where the guest is."""
        return Control(self._control_path(self._here))

    def idle_control(self) -> Control:
        """That of the other one, which is there."""
        return Control(self._control_path(self._there))

    def move(self) -> None:
        """Migrate the guest to the other side: to the daemon that it has left there, or to a new one."""
        to = self._require_idle()
        self._journey.move(to)
        self.daemon, self.idle = to, self.daemon
        self._here, self._there = self._there, self._here

    def cancel(self, status: str) -> None:
        """The same, and think better of it when the migration is at *status*."""
        self._journey.cancel(self._require_idle(), status)

    def _require_idle(self) -> Backend:
        self.idle = self.idle or self._begin(self._there, "--incoming")
        return self.idle

    def end_idle(self, *, kill: bool) -> None:
        """Let the idle daemon, which is there, end."""
        assert self.idle is not None
        if kill:
            self.idle.process.kill()
            self.idle.process.wait()
        else:
            self.idle.stop()
        self.idle = None
