"""Opening a qcow2 image of a chain, with what it names opened before it."""

from typing import TYPE_CHECKING

from qcow2.driver.file import HostFile, run
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import UnsupportedImage
from qcow2.format.header import Header, read_header
from qcow2.node.node import Node

if TYPE_CHECKING:
    from qcow2.node.chain import Chain
    from qcow2.plane.linklog import LinkLog


def open_qcow2(chain: "Chain", file: HostFile, options: OpenOptions) -> Image:
    """The image in *file*, which is locked. Raises: OSError, UnsupportedImage, CorruptImage."""
    log: LinkLog | None = None
    header = run(read_header(file, trust_refcounts=False))
    data_file = None if not header.record.has_data_file else chain.open_data_file(file, header.data_file_name, options)
    if options.writable:
        from qcow2.node.ordered import begin_log, bring_links_in, repair_unclean  # all that changes images

        bring_links_in(chain, file, data_file)
        header = run(read_header(file, trust_refcounts=False))
    backing = _open_backing(chain, file, header, options) if options.has_below else None
    if options.writable:
        repair_unclean(file, header, chain.progress)
        log = begin_log(chain, file, header) if file is chain.files[0] else None
    elif header.log_mark and not chain.force_share:
        from qcow2.node.recovery import tell_of_waiting

        tell_of_waiting(file, header.log_mark, needs_all=chain.needs_all and options.snapshot is None)
    return run(Image.open(file, backing=backing, data_file=data_file, options=options, log=log))


def _open_backing(chain: "Chain", file: HostFile, header: Header, options: OpenOptions) -> Node | None:
    if header.backing_name is None:
        return None
    if header.backing_format is None:
        message = f"the format of backing file {header.backing_name!r} is not recorded, and never guessed"
        raise UnsupportedImage(file.path, message)
    return chain.open_below(file, header.backing_name, header.backing_format, options)
