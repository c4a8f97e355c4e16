"""What opens an encrypted image, as the library's callers have it."""

from collections.abc import Callable, Iterable

from qcow2.engine.encryption import Keyring

Phrases = bytes | bytearray | Iterable[bytes]
Key = Phrases | Callable[[str], Phrases] | Keyring | None


def keys_of(key: Key) -> Keyring | None:
    """What the engine asks for keys; None if there is none."""
    if key is None or isinstance(key, Keyring):
        return key

    def keys(path: str) -> Iterable[bytearray]:
        found = key(path) if callable(key) else key
        return map(bytearray, [found] if isinstance(found, bytes | bytearray) else found)  # theirs stays

    return Keyring(keys)
