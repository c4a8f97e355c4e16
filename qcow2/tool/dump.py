"""`qcow2 dump-header`: every field and every extension of a header, known or not."""

import argparse
from dataclasses import fields
from enum import IntFlag
from typing import Any

from qcow2.driver.file import run
from qcow2.format import layout
from qcow2.format.header import Extension, Header, feature_entries, feature_names, load_header
from qcow2.format.layout import Autoclear, Compatible, ExtensionMagic, FeatureNameType, Incompatible
from qcow2.library.hostfile import opened
from qcow2.tool.file import print_json

EXTENSION_NAMES = {
    ExtensionMagic.BACKING_FORMAT: "backing file format",
    ExtensionMagic.FEATURE_NAMES: "feature name table",
    ExtensionMagic.BITMAPS: "bitmaps",
    ExtensionMagic.CRYPTO: "full disk encryption header",
    ExtensionMagic.DATA_FILE: "external data file name",
}
HEXADECIMAL = ("magic", "_offset")  # endings of the fields that are read best so
SHOWN_BYTES = 32  # of an unknown extension, in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 dump-header`."""
    parser.add_argument("--output", default="human", choices=["human", "json"])
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the header of any qcow2 image that can be taken apart, whatever features it uses.

    Raises: OSError, ImageError.
    """
    with opened(arguments.filename, force_share=arguments.force_share) as file:
        header = run(load_header(file))
    if arguments.output == "json":
        print_json(_facts(header))
    else:
        print("\n".join(_lines(header)))
    return 0


def _fields(header: Header) -> dict[str, int]:
    """The fields that the header has; version 2 ends early."""
    names = [field.name for field in fields(header.record)]
    count = len(names)
    if header.record.version < 3:
        count = names.index("incompatible_features")
    elif header.record.header_length <= layout.V3_HEADER_LENGTH:
        count = names.index("compression_type")
    return {name: int(getattr(header.record, name)) for name in names[:count]}


def _facts(header: Header) -> dict[str, Any]:
    return {
        "fields": _fields(header),
        "unknown-fields": header.later_fields.hex(),
        "backing-filename": header.backing_name,
        "extensions": [
            {
                "magic": extension.magic,
                "name": _name(extension.magic),
                "length": len(extension.data),
                "data": extension.data.hex(),
            }
            for extension in header.extensions
        ],
    }


def _name(magic: int) -> str | None:
    return EXTENSION_NAMES[ExtensionMagic(magic)] if magic in list(EXTENSION_NAMES) else None


def _lines(header: Header) -> list[str]:
    names = feature_names(header)
    lines = [_line(name, _shown(name, value, names)) for name, value in _fields(header).items()]
    if header.later_fields.strip(b"\0"):
        lines.append(_line("unknown fields", header.later_fields.hex()))
    if header.backing_name is not None:
        lines.append(_line("backing file", repr(header.backing_name)))
    for extension in header.extensions:
        lines += ["", "Header extension:", *_extension_lines(extension)]
    return lines


def _line(name: str, value: str) -> str:
    return f"{name:<26}{value}".rstrip()


def _shown(name: str, value: int, names: dict[tuple[int, int], str]) -> str:
    words = {
        "incompatible_features": (FeatureNameType.INCOMPATIBLE, Incompatible),
        "compatible_features": (FeatureNameType.COMPATIBLE, Compatible),
        "autoclear_features": (FeatureNameType.AUTOCLEAR, Autoclear),
    }
    if name not in words:
        return f"{value:#010x}" if name.endswith(HEXADECIMAL) else str(value)
    kind, known = words[name]
    bits = [bit for bit in range(64) if value >> bit & 1]
    meanings = [names.get((kind, bit)) or _known_name(known, bit) for bit in bits]
    return f"{value:#x}" + (f" ({', '.join(meanings)})" if meanings else "")


def _known_name(known: type[IntFlag], bit: int) -> str:
    flag = next((flag for flag in known if flag == 1 << bit), None)
    return f"bit {bit}" if flag is None else str(flag.name).lower().replace("_", " ")


def _extension_lines(extension: Extension) -> list[str]:
    lines = [
        _line("magic", f"{extension.magic:#010x} ({_name(extension.magic) or 'unknown'})"),
        _line("length", str(len(extension.data))),
    ]
    if extension.magic == ExtensionMagic.FEATURE_NAMES:
        return lines + _feature_lines(extension.data)
    shown = repr(extension.data[:SHOWN_BYTES])[1:]
    return [*lines, _line("data", shown + ("..." if len(extension.data) > SHOWN_BYTES else ""))]


def _feature_lines(data: bytes) -> list[str]:
    """The table's entries, one a line."""
    kinds = {int(kind): kind.name.lower() for kind in FeatureNameType}
    return [
        _line(f"  {kinds.get(kind, f'type {kind}')} bit {bit}", repr(name.rstrip(b"\0"))[1:])
        for kind, bit, name in feature_entries(data)
    ]
