"""The way to an NBD export that a job writes: whoever ends the job may have it given up at any moment."""

import threading

from qcow2.driver.nbdconnection import load_library
from qcow2.driver.nbdexport import NbdExport
from qcow2.error import UnsupportedImage
from qcow2.job.pace import Cancelled
from vhost.option import Options


class ExportLine:
    """The way to the export at *uri*, of which one is open at a time."""

    def __init__(self, uri: str, options: Options, *, exists: bool, patience: float | None = None) -> None:
        """*patience* is as of `NbdExport`; *exists* is what was said of the export.

        Raises: UnsupportedImage, ValueError.
        """
        if options.sandbox:
            raise UnsupportedImage(uri, "a daemon with --sandbox connects to nobody")
        if not exists:
            raise ValueError(f"{uri}: an export is there already: say that it may be overwritten")
        load_library(uri)
        self.uri = uri
        self._patience = patience
        self._lock = threading.Lock()
        self._export: NbdExport | None = None
        self._is_given_up = False

    def reach(self) -> NbdExport:
        """Connect, once more if that was done before. Raises: OSError; Cancelled if it is given up."""
        self.close()
        export = NbdExport(self.uri, writable=True, patience=self._patience)
        with self._lock:
            self._export = export
        self.require_going()
        try:
            return export.connect()
        except OSError:
            self.require_going()  # who gave it up knows why
            raise

    def require_going(self) -> None:
        """Raises: Cancelled once it is given up."""
        if self._is_given_up:
            raise Cancelled

    def give_up(self) -> None:
        """Let whoever waits for the server wait no more. For any thread; does not wait itself."""
        with self._lock:
            self._is_given_up = True
            if self._export is not None:
                self._export.connection.abort()

    def close(self) -> None:
        """Leave the server; a second time does nothing."""
        with self._lock:
            export, self._export = self._export, None
        if export is not None:
            export.close()
