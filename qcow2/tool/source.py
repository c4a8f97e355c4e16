"""Opening what a command reads: with its chain, read-only, complaints in qemu-img's words."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.chain import Chain
from qcow2.error import ImageError
from qcow2.image import Image, OpenOptions
from qcow2.raw import RawImage
from qcow2.tool.failure import Failure

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Declare what every command has that reads disks."""
    parser.add_argument("-U", "--force-share", action="store_true", help="though others may be writing to it")
    parser.add_argument("-T", "--source-cache", choices=CACHE_MODES, help="accepted; the host's page cache is used")


@contextmanager
def open_source(path: str, image_format: str, arguments: argparse.Namespace) -> Iterator[Image | RawImage]:
    """The disk in the image at *path*.

    Raises: Failure.
    """
    with Chain(force_share=arguments.force_share) as chain:
        yield _open(chain, path, image_format)


def _open(chain: Chain, path: str, image_format: str) -> Image | RawImage:
    try:
        return chain.open(path, image_format, OpenOptions())
    except OSError as error:
        raise Failure(cannot_open(path, error)) from error
    except ImageError as error:
        raise Failure(f"Could not open '{path}': {str(error).removeprefix(f'{path}: ')}") from error


def cannot_open(path: str, error: OSError) -> str:
    """As QEMU says it: the file of the image may be another one of the chain."""
    return f"Could not open '{path}': Could not open '{error.filename or path}': {error.strerror or error}"
