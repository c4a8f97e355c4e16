"""What opens an encrypted image, as the library's callers have it."""

from collections.abc import Callable, Iterable
from typing import Any

from qcow2.engine.encryption import Keyring

Phrase = bytes | bytearray | memoryview  # or whatever else has the buffer interface
Phrases = Phrase | Iterable[Phrase]
Key = Phrases | Callable[[str], Phrases] | Keyring | None


def keys_of(key: Key) -> Keyring | None:
    """What the engine asks for keys; None if there is none. Raises: TypeError for what is no key."""
    if key is None or isinstance(key, Keyring):
        return key
    if callable(key):
        return Keyring(lambda path: [phrase_of(each) for each in _listed(key(path))])
    given = _listed(key)
    for each in given:
        _require_buffer(each)
    return Keyring(lambda path: [phrase_of(each) for each in given])


def phrase_of(key: Phrase) -> bytearray:
    """The bytes of *key*, which stays its owner's. Raises: TypeError."""
    _require_buffer(key)
    return bytearray(memoryview(key))


def _require_buffer(key: object) -> None:
    if not _is_buffer(key):
        raise TypeError(f"a key is bytes, not {type(key).__name__}")


def _listed(key: Any) -> list[Phrase]:
    if isinstance(key, str) or _is_buffer(key) or not isinstance(key, Iterable):
        return [key]
    return list(key)


def _is_buffer(key: object) -> bool:
    try:
        memoryview(key)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
