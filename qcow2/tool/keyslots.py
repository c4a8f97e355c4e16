"""`qcow2 amend -o encrypt.state=...`: key slots of an encrypted image, added and erased."""

from typing import TYPE_CHECKING

from qcow2.driver.file import HostFile, run
from qcow2.error import UnsupportedImage
from qcow2.format.header import read_header
from qcow2.format.layout import CryptMethod
from qcow2.node.formats import format_of
from qcow2.tool.encryption import parse_iter_time
from qcow2.tool.failure import Failure
from qcow2.tool.secret import Secrets

if TYPE_CHECKING:
    from qcow2.engine.slots import Addition, Erasure

SLOT_OPTIONS = {
    "state": "<str>    - Select new state of affected keyslots (active/inactive)",
    "new-secret": "<str> - New secret to set in the matching keyslots. Empty string to erase",
    "old-secret": "<str> - Select all keyslots that match this password",
    "keyslot": "<num>  - Select a single keyslot to modify explicitly",
    "iter-time": "<num> - Time to spend in PBKDF in milliseconds",
}
BELONGS = {"active": ("new-secret", "keyslot", "iter-time"), "inactive": ("old-secret", "keyslot")}


def amend_slots(
    file: HostFile, image_format: str, given: dict[str, str], secrets: Secrets, *, is_detached: bool = False
) -> None:
    """Do what *given*, SLOT_OPTIONS without their prefix, says to the image in *file*; stable on return.

    Raises: Failure, ValueError, OSError, ImageError; the key slots are as before.
    """
    from qcow2.engine.luks import Vault  # and with it libcrypto
    from qcow2.engine.slots import change_slots
    from qcow2.plane.cipher import wipe

    host_offset, nbytes = (0, file.size()) if format_of(file.path, image_format).has_key_slots else _area(file)
    change = _change(given, secrets)
    vault = run(Vault.read(file, host_offset, nbytes, is_detached=is_detached))
    keys = secrets.keys(file.path)
    try:
        run(change_slots(vault, keys, change))
    except ValueError as error:
        raise Failure(str(error)) from error
    finally:
        wipe(*keys)


def _area(file: HostFile) -> tuple[int, int]:
    header = run(read_header(file, trust_refcounts=False))
    if header.record.crypt_method != CryptMethod.LUKS:
        raise UnsupportedImage(file.path, "not encrypted with LUKS: it has no key slots")
    return header.luks_area


def _change(given: dict[str, str], secrets: Secrets) -> "Addition | Erasure":
    from qcow2.engine.slots import Addition, Erasure

    state = given.get("state")
    if state is None:
        raise Failure("Parameter 'encrypt.state' is missing")
    if state not in BELONGS:
        raise Failure(f"Parameter 'encrypt.state' does not accept value '{state}'")
    for name in given:
        if name != "state" and name not in BELONGS[state]:
            raise Failure(f"Parameter 'encrypt.{name}' makes no sense with encrypt.state={state}")
    number = _number(given.get("keyslot"))
    if state == "active":
        if "new-secret" not in given:
            raise Failure("Parameter 'encrypt.new-secret' is required when adding a keyslot")
        return Addition(
            secrets.for_new_slot(given["new-secret"]), number, parse_iter_time(given.get("iter-time"), "encrypt.")
        )
    if number is None and "old-secret" not in given:
        text = "either explicit keyslot index or the password currently contained in them must be given"
        raise Failure(f"To erase keyslot(s), {text}")
    return Erasure(secrets[given["old-secret"]] if "old-secret" in given else None, number)


def _number(text: str | None) -> int | None:
    if text is not None and not (text.isascii() and text.isdigit()):
        raise Failure(f"Parameter 'encrypt.keyslot' expects a number, not '{text}'")
    return None if text is None else int(text)
