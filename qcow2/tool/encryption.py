"""Options of creation that say how an image is encrypted; defaults as QEMU has them."""

from qcow2.format.layout import SECTOR_SIZE
from qcow2.format.luks import (
    DEFAULT_ITER_TIME_MS,
    HASHES,
    IV_GENERATORS,
    MAX_ITER_TIME_MS,
    MODES,
    ONE_KEY,
    STRIPES,
    TWO_KEYS,
    CipherSpec,
    Encryption,
)
from qcow2.tool.secret import Secrets

LUKS_OPTIONS = {  # kind, caption
    "key-secret": ("<str>", "ID of the secret that provides the keyslot passphrase"),
    "cipher-alg": ("<str>", "Name of encryption cipher algorithm"),
    "cipher-mode": ("<str>", "Name of encryption cipher mode"),
    "ivgen-alg": ("<str>", "Name of IV generator algorithm"),
    "ivgen-hash-alg": ("<str>", "Name of IV generator hash algorithm"),
    "hash-alg": ("<str>", "Name of encryption hash algorithm"),
    "iter-time": ("<num>", "Time to spend in PBKDF in milliseconds"),
}
ALGORITHMS = {f"{name}-{nbytes * 8}": (name, nbytes) for name, keys in ONE_KEY.items() for nbytes in keys}


def captions(prefix: str = "") -> dict[str, str]:
    """What `-o help` says of each option, aligned as QEMU does."""
    told = {}
    for name, (kind, text) in LUKS_OPTIONS.items():
        if prefix and name == "key-secret":
            text = "ID of secret providing qcow AES key or LUKS passphrase"
        told[prefix + name] = f"{f'{prefix}{name}={kind}':<22} - {text}".removeprefix(f"{prefix}{name}=")
    return told


def encryption_of(given: dict[str, str], secrets: Secrets | None, prefix: str = "") -> Encryption | None:
    """How an image with the options *given*, each with *prefix*, is encrypted; None if it is not.

    Raises: ValueError, OSError.
    """
    wanted = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    image_format = wanted.pop("format", None) if prefix else "luks"
    if image_format is None:
        if any(name in LUKS_OPTIONS for name in wanted):
            raise ValueError(f"option {prefix}format is missing: it says that the image is encrypted")
        return None
    if image_format != "luks":
        raise ValueError(f"{prefix}format={image_format}: only luks can be created")
    if secrets is None or "key-secret" not in wanted:
        raise ValueError(f"Parameter '{prefix}key-secret' is required for cipher")
    return Encryption(
        _spec(wanted, prefix),
        _choice(wanted, prefix, "hash-alg", "sha256", HASHES),
        secrets.for_new_slot(wanted["key-secret"]),
        parse_iter_time(wanted.get("iter-time"), prefix),
    )


def _spec(wanted: dict[str, str], prefix: str) -> CipherSpec:
    algorithm = _choice(wanted, prefix, "cipher-alg", "aes-256", tuple(ALGORITHMS))
    mode = _choice(wanted, prefix, "cipher-mode", "xts", MODES)
    generator = _choice(wanted, prefix, "ivgen-alg", "plain64", IV_GENERATORS)
    if "ivgen-hash-alg" in wanted and generator != "essiv":
        raise ValueError(f"{prefix}ivgen-hash-alg goes with {prefix}ivgen-alg=essiv alone")
    iv_hash = _choice(wanted, prefix, "ivgen-hash-alg", "sha256", HASHES) if generator == "essiv" else None
    name, key_bytes = ALGORITHMS[algorithm]
    known = ONE_KEY
    if mode == "xts":
        known, key_bytes = TWO_KEYS, 2 * key_bytes
    # Stripes of aes-192-cbc end inside a sector: QEMU aborts at the sight of such an image.
    if key_bytes not in known.get(name, ()) or key_bytes * STRIPES % SECTOR_SIZE:
        raise ValueError(f"{prefix}cipher-alg={algorithm} is not possible with {prefix}cipher-mode={mode}")
    return CipherSpec(name, mode, generator, iv_hash, key_bytes)


def parse_iter_time(text: str | None, prefix: str) -> int:
    """Milliseconds. Raises: ValueError."""
    if text is None:
        return DEFAULT_ITER_TIME_MS
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_ITER_TIME_MS):
        raise ValueError(f"{prefix}iter-time={text} is not a number of milliseconds from 1 to {MAX_ITER_TIME_MS}")
    return int(text)


def _choice(wanted: dict[str, str], prefix: str, name: str, default: str, choices: tuple[str, ...]) -> str:
    text = wanted.get(name, default)
    if text not in choices:
        raise ValueError(f"{prefix}{name}={text} is not supported, only {', '.join(choices)}")
    return text
