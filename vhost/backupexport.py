"""An NBD export that a backup goes to: reached when there is something for it, on the thread that puts it there."""

from qcow2.driver.nbdexport import NbdExport
from qcow2.error import ImageError
from qcow2.job.target import InPlace, Over, Target
from qcow2.node.raw import RawImage
from vhost.backuptarget import BackupTarget
from vhost.exportline import ExportLine
from vhost.frozen import Saved
from vhost.option import Options


class BackupExport(BackupTarget):
    """The export at *uri*, which becomes a disk of *size* bytes.

    If *is_whole* it is none before the end: its first bytes come last. Else what is put changes what is there.
    """

    def __init__(self, uri: str, size: int, options: Options, *, exists: bool, is_whole: bool) -> None:
        """Raises: UnsupportedImage, ValueError."""
        super().__init__(uri)
        self._line = ExportLine(uri, options, exists=exists)
        self._size = size
        self._is_whole = is_whole
        self._target: Target | None = None
        self._export: NbdExport | None = None

    def put(self, saved: Saved) -> None:
        try:
            super().put(saved)
        except (OSError, ImageError):
            self._line.require_going()  # who gave it up knows why
            raise

    def _begun(self) -> Target:
        if self._target is None:
            self._target = self._reach()
        elif self._export is not None and self._export.is_lost:
            raise ImageError(self.path, "the connection is lost, and what the server had taken may be, too")
        return self._target

    def _reach(self) -> Target:
        """Raises: OSError, and it may be tried again; ImageError."""
        self._export = export = self._line.reach()
        if export.size() < self._size:
            raise ImageError(self.path, f"the export has {export.size()} bytes, the disk {self._size}")
        image = RawImage(export, self._size, read_only=False)
        target = InPlace(image, self._size, is_zero=False) if self._is_whole else Over(image, self._size)
        self._driver.run(target.begin())
        return target

    def _zero(self, target: Target, saved: Saved) -> None:
        self._driver.run(target.zero(saved.guest_offset, saved.nbytes))  # which may be done once more

    def finish(self) -> None:
        """As `BackupTarget.finish`. Raises: Cancelled, too."""
        try:
            super().finish()
        except (OSError, ImageError):
            self._line.require_going()
            raise

    def abort(self) -> None:
        self._line.give_up()

    def close(self) -> None:
        self._line.close()
