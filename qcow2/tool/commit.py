"""`qcow2 commit`: bring what an overlay has into an image under it."""

import argparse

from qcow2.error import ImageError
from qcow2.job.visible import SeenBySnapshot
from qcow2.library.commit import NoBacking, NotInChain, commit_opened, open_to_commit
from qcow2.library.disk import Disk
from qcow2.tool.cache import CACHE_MODES
from qcow2.tool.failure import Failure
from qcow2.tool.file import add_log_options, how_to_open
from qcow2.tool.identity import is_qemu_img
from qcow2.tool.named import Named, add_format_option, add_image_options, the_image
from qcow2.tool.opening import cannot_open
from qcow2.tool.progress import shown
from qcow2.tool.quantity import size_of
from qcow2.tool.stdio import is_of_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `qcow2 commit`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_format_option(parser)
    add_image_options(parser)
    parser.add_argument("-b", "--base", metavar="FILE", help="commit to this image of the chain, and empty nothing")
    parser.add_argument("-d", "--drop", action="store_true", help="do not empty the image: it will be deleted")
    parser.add_argument("-r", "--rate-limit", metavar="RATE", help="bytes a second")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-t", "--cache", choices=CACHE_MODES, help="accepted; the images are synced")
    add_log_options(parser)
    parser.add_argument("filename")


def run_command(arguments: argparse.Namespace) -> int:
    """Commit.

    Raises: Failure, ValueError, OSError, ImageError; what the image shows is as before then.
    """
    image = the_image(arguments)
    rate = 0 if arguments.rate_limit is None else size_of("rate limit", arguments.rate_limit)
    with shown(is_wanted=arguments.progress and not arguments.quiet, rate=rate) as pace:
        disk = _opened(image, arguments)
        try:
            commit_opened(disk, pace, empties=not arguments.drop and arguments.base is None)
        except SeenBySnapshot as error:
            raise Failure(str(error)) from error
        except OSError as error:
            if is_of_output(error):
                raise
            raise Failure(f"Block job failed: {_place_of(error)}{error.strerror or error}") from error
        except ImageError as error:
            raise Failure(f"Block job failed: {error}") from error
    if not arguments.quiet:
        print("Image committed.")
    return 0


def _opened(image: Named, arguments: argparse.Namespace) -> Disk:
    path = image.path
    try:
        return open_to_commit(path, arguments.base, image_format=image.image_format, **how_to_open(arguments))
    except NoBacking as error:
        if arguments.base is not None:
            raise Failure(_not_found(arguments.base, path)) from error
        raise Failure("Image does not have a backing file") from error
    except NotInChain as error:
        raise Failure(_not_found(arguments.base, path)) from error
    except OSError as error:
        raise Failure(cannot_open(path, error)) from error
    except ImageError as error:
        raise Failure(f"Could not open '{path}': {error}") from error


def _place_of(error: OSError) -> str:
    """The file that something was wrong with, in front of what that was; QEMU names none."""
    return "" if is_qemu_img() or error.filename is None else f"{error.filename}: "


def _not_found(base: str, path: str) -> str:
    return f"Did not find '{base}' in the backing chain of '{path}'"
