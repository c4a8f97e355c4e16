"""TLS: a client's stream, encrypted, and the server's certificates, in a directory as QEMU and nbdkit have it."""

import contextlib
import os
import ssl
import threading
from collections.abc import Callable

from qcow2.nbd.error import ClientGone
from qcow2.nbd.stream import Stream

CERTIFICATE, KEY = "server-cert.pem", "server-key.pem"
AUTHORITY, REVOKED = "ca-cert.pem", "ca-crl.pem"
TLS_STEP = 64 << 10


def server_context(directory: str, *, verifies: bool) -> ssl.SSLContext:
    """What TLS needs of *directory*; *verifies*: a client without a certificate of the authority there is refused.

    Raises: OSError naming the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    key = os.path.join(directory, KEY)
    _load(key, lambda: context.load_cert_chain(os.path.join(directory, CERTIFICATE), key, password=_no_password))
    if verifies:
        context.verify_mode = ssl.CERT_REQUIRED
        for name in (AUTHORITY, REVOKED):
            path = os.path.join(directory, name)
            if name == AUTHORITY or os.path.exists(path):
                _load(path, lambda path=path: context.load_verify_locations(path))  # type: ignore[misc]
            if name == REVOKED and os.path.exists(path):
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _no_password() -> str:
    raise ValueError("a key with a passphrase is not supported")


def _load(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise OSError(error.errno, f"not what TLS needs: {error.reason}", path) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


class TlsStream(Stream):
    """The same, encrypted; takes *plain*'s socket over.

    What OpenSSL keeps of a connection is for one thread at a time, so it is not given the socket: only buffers.
    """

    is_encrypted = True

    def __init__(self, plain: Stream, context: ssl.SSLContext) -> None:
        self.socket = plain.socket
        self.deadline = plain.deadline
        self.sending = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._using = threading.Lock()  # of `_tls`
        self._passing = threading.Lock()  # what was encrypted first is sent first

    def shake_hands(self) -> None:
        """Agree on keys with the client. Raises: ClientGone."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._pass_on()
                self._take_in()
            except ssl.SSLError:
                with contextlib.suppress(ClientGone):
                    self._pass_on()  # the alert that says why
                raise ClientGone from None
            else:
                self._pass_on()
                return

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*. Raises: ClientGone."""
        while len(view):
            try:
                with self._using:
                    count = self._tls.read(len(view), view)
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._pass_on()
                self._take_in()
                continue
            except ssl.SSLError:
                raise ClientGone from None
            if not count:
                raise ClientGone
            view = view[int(count) :]

    def send(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Send *pieces*, one after the other, with `sending` held. Raises: ClientGone."""
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                try:
                    with self._using:
                        count = self._tls.write(view[:TLS_STEP])
                except ssl.SSLError:
                    raise ClientGone from None
                view = view[count:]
                self._pass_on()

    def _pass_on(self) -> None:
        with self._passing:
            with self._using:
                data = self._outgoing.read()
            if data:
                super().send(data)

    def _take_in(self) -> None:
        self.hurry()
        try:
            data = self.socket.recv(TLS_STEP)
        except OSError:
            raise ClientGone from None
        if not data:
            raise ClientGone
        with self._using:
            self._incoming.write(data)
