"""The server's certificates, in a directory as QEMU and nbdkit have it."""

import os
import ssl
from collections.abc import Callable

CERTIFICATE, KEY = "server-cert.pem", "server-key.pem"
AUTHORITY, REVOKED = "ca-cert.pem", "ca-crl.pem"


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
