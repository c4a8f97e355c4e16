"""`-o name=value,...`: what a new image shall be."""

import os
from collections.abc import Iterator
from typing import TypeVar

from qcow2.engine.create import Options, max_size
from qcow2.engine.plain import Preallocation
from qcow2.format.layout import (
    COMPRESSIONS,
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_SIZE,
    MIN_CLUSTER_SIZE,
    SECTOR_SIZE,
    VERSIONS,
)
from qcow2.library.newdata import EMPTY, KEEP
from qcow2.node.formats import FORMATS
from qcow2.tool.commas import split_commas
from qcow2.tool.encryption import captions, encryption_of
from qcow2.tool.quantity import parse_size
from qcow2.tool.secret import Secrets

T = TypeVar("T")

DETACHED = "detached-header"
OPTIONS = {
    "qcow2": {
        "backing_file": "<str>     - File name of a base image",
        "backing_fmt": "<str>      - Image format of the base image",
        "cluster_size": "<size>    - qcow2 cluster size",
        "compat": "<str>           - Compatibility level (v2 [0.10] or v3 [1.1])",
        "compression_type": "<str> - Compression method used for image cluster compression",
        "extended_l2": "<bool (on/off)> - Extended L2 tables",
        "lazy_refcounts": "<bool (on/off)> - Postpone refcount updates",
        "preallocation": "<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)",
        "data_file": "<str>        - File name of an external data file",
        "data_file_raw": "<bool (on/off)> - The external data file must stay valid as a raw image",
        "data_file_use": "<str>    - What to do with one that exists: keep its content, or empty it",
        "keep_data_file": "<bool (on/off)> - Assume the external data file already exists and do not overwrite it",
        "encrypt.format": "<str>   - Encrypt the image, format choices: 'aes', 'luks'",
        **captions("encrypt."),
        "refcount_bits": "<num>    - Width of a reference count entry in bits",
        "size": "<size>            - Virtual disk size",
    },
    "luks": {
        **captions(),
        DETACHED: "<bool (on/off)> - Create a detached LUKS header",
        "preallocation": "<str>    - Preallocation mode (allowed values: off, falloc, full)",
        "size": "<size>            - Virtual disk size",
    },
    "raw": {
        "preallocation": "<str>    - Preallocation mode (allowed values: off, falloc, full)",
        "size": "<size>            - Virtual disk size",
    },
}
HINTS = ("extent_size_hint", "nocow")  # to one kind of host file system: taken, and not passed on
LEGACY = "encryption"  # with AES
SWITCH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
QEMU_FORMATS = (  # which a header may name beside ours, for QEMU to open; of one that is none it opens nothing
    "blkdebug blklogwrites blkverify bochs cloop compress copy-before-write copy-on-read dmg file ftp ftps gluster "
    "host_cdrom host_device http https iscsi iser nbd nfs null-aio null-co nvme parallels preallocate qcow qed quorum "
    "rbd replication snapshot-access ssh throttle vdi vhdx vmdk vpc vvfat"
)
RAW_PREALLOCATIONS = {kind.value: kind for kind in Preallocation if kind is not Preallocation.METADATA}
PREALLOCATIONS = {kind.value: kind for kind in Preallocation}


def asks_for_help(texts: list[str]) -> bool:
    """Whether one of the options is no option, but a question for them."""
    return any(part in ("help", "?") for text in texts for part in text.split(","))


def print_help(image_format: str) -> None:
    """Say what options an image of *image_format* has."""
    print(f"Supported {image_format} options:")
    for name, caption in OPTIONS[image_format].items():
        print(f"  {name}={caption}")


def split_options(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Split `name=value,name=value`; a comma in a value is doubled. Raises: ValueError for one without a value."""
    if empty := next((text for text in texts if not text.strip(",")), None):
        raise ValueError(f"Invalid option list: {empty}")
    for part in (part for text in texts for part in split_commas(text)):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"option {name!r} needs a value: {name}=VALUE")
        yield name, value


def parse_options(texts: list[str], image_format: str) -> dict[str, str]:
    """The options of a new image, by their names. Raises: ValueError naming what is not one."""
    known = OPTIONS[image_format]
    parsed = {}
    for name, value in split_options(texts):
        if name in HINTS:
            continue
        if name == LEGACY and image_format == "qcow2":
            if _choice({name: value}, name, "off", SWITCH):
                raise ValueError(f"{name}={value}: legacy AES is not created, say encrypt.format=luks")
        elif name not in known:
            raise ValueError(f"option {name!r} is unknown, known are {', '.join(known)}")
        parsed[name] = value
    _translate_keep(parsed)
    return parsed


def _translate_keep(given: dict[str, str]) -> None:
    """Say in our words what `keep_data_file` says in those of QEMU 11. Raises: ValueError."""
    if "keep_data_file" in given:
        is_kept = _choice(given, "keep_data_file", "off", SWITCH)
        if is_kept and not given.get("data_file"):
            raise ValueError("Must not use 'keep_data_file=on' without 'data_file'")
        use = KEEP if is_kept else EMPTY
        if given.setdefault("data_file_use", use) != use:
            raise ValueError(f"keep_data_file={given['keep_data_file']} contradicts data_file_use={KEEP}, or {EMPTY}")


def image_options(
    given: dict[str, str], size: int, typed: str | None = None, secrets: Secrets | None = None
) -> Options:
    """What a new qcow2 image with a disk of *size* bytes, perhaps *typed* so, shall be; its key is one of *secrets*.

    Raises: ValueError.
    """
    cluster_bits = _power(given, "cluster_size", "64k", MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE)
    limit = max_size(cluster_bits)
    if size + -size % SECTOR_SIZE > limit:
        raise ValueError(f"size {typed or size} is too large, limit {limit} with cluster_size {1 << cluster_bits}")
    is_raw_data = _choice(given, "data_file_raw", "off", SWITCH)
    preallocation = _choice(given, "preallocation", "off", PREALLOCATIONS)
    if is_raw_data and preallocation is Preallocation.OFF:  # there is no other way to say that all of it is data
        preallocation = Preallocation.METADATA
    return Options(
        size=size + -size % SECTOR_SIZE,
        version=_choice(given, "compat", "1.1", VERSIONS),
        cluster_bits=cluster_bits,
        refcount_order=_power(given, "refcount_bits", "16", 1, 64),
        lazy_refcounts=_choice(given, "lazy_refcounts", "off", SWITCH),
        has_subclusters=_choice(given, "extended_l2", "off", SWITCH),
        compression=_choice(given, "compression_type", "zlib", COMPRESSIONS),
        backing_name=given.get("backing_file") or None,
        backing_format=given.get("backing_fmt") or None,
        preallocation=preallocation,
        data_file_name=given.get("data_file") or None,
        data_file_raw=is_raw_data,
        encryption=encryption_of(given, secrets, "encrypt."),
    )


def is_detached(given: dict[str, str]) -> bool:
    """Whether of a new luks image only the header is made, whose disk is another file. Raises: ValueError."""
    return _choice(given, DETACHED, "off", SWITCH)


def raw_preallocation(given: dict[str, str]) -> Preallocation:
    """What of a new raw image is reserved.

    Raises: ValueError.
    """
    return _choice(given, "preallocation", "off", RAW_PREALLOCATIONS)


def luks_preallocation(given: dict[str, str]) -> Preallocation:
    """The same of a new luks image, which has no metadata but its header. Raises: ValueError."""
    return _choice(given, "preallocation", "off", PREALLOCATIONS)


def validate_backing_format(name: str) -> None:
    """Raises: ValueError if nobody knows a format of that *name*."""
    if name not in FORMATS and name not in QEMU_FORMATS.split():
        raise ValueError(f"Invalid format name: '{name}'")


def validate_backing(name: str, backing_format: str) -> None:
    """Raises: ValueError if a header cannot or should not say so."""
    validate_backing_format(backing_format)
    if len(os.fsencode(name)) > MAX_BACKING_NAME_BYTES:
        nbytes = len(os.fsencode(name))
        raise ValueError(f"backing file name of {nbytes} bytes, limit {MAX_BACKING_NAME_BYTES}: {name[:40]!r}...")


def _power(given: dict[str, str], name: str, default: str, low: int, high: int) -> int:
    """The exponent of an option that is a power of two in [low, high]."""
    text = given.get(name, default)
    try:
        value = parse_size(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error
    if value & (value - 1) or not low <= value <= high:
        raise ValueError(f"{name}={text} is not a power of two from {low} to {high}")
    return value.bit_length() - 1


def _choice(given: dict[str, str], name: str, default: str, choices: dict[str, T]) -> T:
    text = given.get(name, default)
    if text not in choices:
        raise ValueError(f"{name}={text} is not one of {', '.join(choices)}")
    return choices[text]
