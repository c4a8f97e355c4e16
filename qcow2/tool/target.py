"""What convert and dd write to: a new image, or one that is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qcow2.driver.file import HostFile, run
from qcow2.engine.create import Options, plan, require_possible
from qcow2.engine.encryption import Keyring
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.plain import Preallocation, write_zeros
from qcow2.error import ImageError
from qcow2.job.newcompressed import NewCompressedImage
from qcow2.job.newimage import NewImage
from qcow2.job.target import CompressedInPlace, InNew, InPlace, Target, create_all_but_magic
from qcow2.library.hostfile import created, is_at, reserve
from qcow2.node.formats import format_of
from qcow2.node.gate import DATA, named_path
from qcow2.node.luks import LuksImage
from qcow2.node.node import Node
from qcow2.node.raw import RawImage
from qcow2.tool.encryption import encryption_of
from qcow2.tool.failure import Failure
from qcow2.tool.identity import say
from qcow2.tool.opening import cannot_open
from qcow2.tool.option import DETACHED, image_options, is_detached, luks_preallocation, raw_preallocation
from qcow2.tool.secret import Secrets

if TYPE_CHECKING:
    from qcow2.library.disk import Disk


@dataclass(frozen=True, slots=True)
class Wish:
    """What the target shall be."""

    path: str
    image_format: str
    size: int
    given: dict[str, str]  # options of creation
    is_compressed: bool = False
    level: int | None = None  # of the compression; None: the default
    secrets: Secrets = field(default_factory=lambda: Secrets([]))
    luks_header: str | None = None  # the file of its LUKS header, if that is another one


@contextmanager
def new_target(wish: Wish, sources: list[Node], base: Node | None) -> Iterator[Target]:
    """A new image, over *base* if there is one; after an error it is gone, or what was there before is no image.

    Raises: Failure before the file is touched; ImageError.
    """
    refuse_source(wish.path, sources)
    if name := wish.given.get("data_file"):
        refuse_source(named_path(wish.path, DATA, name), sources)
    try:
        with created(wish.path) as file, _new(file, wish, base) as target:
            yield target
    except ValueError as error:
        raise Failure(f"{wish.path}: error while converting {wish.image_format}: {error}") from error
    except OSError as error:
        if error.filename != wish.path:
            raise
        text = f"Could not create '{wish.path}': {error.strerror}"
        raise Failure(f"{wish.path}: error while converting {wish.image_format}: {text}") from error


@contextmanager
def _new(file: HostFile, wish: Wish, base: Node | None) -> Iterator[Target]:
    known = format_of(wish.path, wish.image_format)
    if known.has_key_slots:
        yield _new_luks(file, wish)
        return
    if not known.has_metadata:
        yield _new_raw(file, wish)
        return
    options = image_options(wish.given, wish.size, secrets=wish.secrets)
    if options.data_file_name is not None:
        yield from _new_with_data_file(file, wish, options, base)
    elif options.encryption is not None:
        yield _new_encrypted(file, wish, options, base)
    elif wish.is_compressed:
        yield NewCompressedImage(file, options, base, level=wish.level, reads_zeros=not file.is_device)
    else:
        yield NewImage(file, options, base, reads_zeros=not file.is_device)


def _new_encrypted(file: HostFile, wish: Wish, options: Options, base: Node | None) -> Target:
    if wish.is_compressed:
        raise Failure("Compression and encryption not supported at the same time")
    header = run(create_all_but_magic(file, options))
    if options.preallocation is Preallocation.FALLOC:
        reserve(file)
    image = run(Image.open(file, backing=base, options=_to_write(options), header=header))
    return InNew(file, image, wish.size, is_zero=base is None)


def _only(passphrase: bytes | bytearray) -> Keyring:
    return Keyring(lambda path: [bytearray(passphrase)])


def _new_luks(file: HostFile, wish: Wish) -> Target:
    from qcow2.format.luks import MAGIC
    from qcow2.node import luks

    encryption = encryption_of(wish.given, wish.secrets)
    assert encryption is not None  # there is no other such image
    if is_detached(wish.given):
        raise Failure(f"{DETACHED}: create the header, then copy with -n and --target-image-opts")
    preallocation = luks_preallocation(wish.given)
    image = run(luks.create_all_but_magic(file, encryption, wish.size, _only(encryption.passphrase)))
    if preallocation is Preallocation.FALLOC:  # else all of it is written in any case
        reserve(file)
    return InNew(file, image, wish.size, is_zero=False, magic=MAGIC)


def _new_with_data_file(file: HostFile, wish: Wish, options: Options, base: Node | None) -> Iterator[Target]:
    if wish.is_compressed:
        raise Failure("Compression not supported with an external data file")
    from qcow2.library.newdata import KEEP, new_data_file

    require_possible(file, plan(options))
    use = wish.given.get("data_file_use")
    with new_data_file(wish.path, options, use) as data_file:
        header = run(create_all_but_magic(file, options))
        image = run(Image.open(file, backing=base, data_file=data_file, options=_to_write(options), header=header))
        is_noise = options.data_file_raw and options.encryption is not None
        yield InNew(file, image, wish.size, is_zero=use != KEEP and base is None and not is_noise)


def _to_write(options: Options) -> OpenOptions:
    """How to open a new image with *options*."""
    if options.encryption is None:
        return OpenOptions(writable=True)
    return OpenOptions(writable=True, keys=_only(options.encryption.passphrase))


def _new_raw(file: HostFile, wish: Wish) -> Target:
    if file.is_device and file.size() < wish.size:
        raise Failure(f"{wish.path}: the device has {file.size()} bytes, the disk {wish.size}")
    preallocation = raw_preallocation(wish.given)
    if not file.is_device:
        file.set_length(0)
        if preallocation is Preallocation.FALLOC:
            file.set_length(wish.size)
            reserve(file)
        elif preallocation is Preallocation.FULL:
            run(write_zeros(file, 0, wish.size))
    image = RawImage(file, wish.size, read_only=False)
    return InPlace(image, wish.size, is_zero=not file.is_device, length=wish.size)


@contextmanager
def present_target(wish: Wish, sources: list[Node], *, is_zero: bool) -> Iterator[Target]:
    """The image at the path, which keeps what it is; its content goes.

    Raises: Failure before it is touched; OSError, ImageError.
    """
    refuse_source(wish.path, sources)
    with _opened(wish) as disk:
        for file in (disk.image.data_file, *disk.chain.headers):
            refuse_source(file.path, sources)
        warn_of_bitmaps(disk)
        if is_zero and disk.image.backing is not None:
            raise Failure("Cannot use --target-is-zero when the destination image has a backing file")
        if disk.size < wish.size:
            raise Failure("output file is smaller than input file")
        if wish.is_compressed:
            assert isinstance(disk.image, Image)
            yield CompressedInPlace(disk.image, wish.size, wish.level, is_zero=is_zero)
        else:
            yield InPlace(disk.image, wish.size, is_zero=is_zero)


def _opened(wish: Wish) -> "Disk":
    from qcow2.library.disk import open_disk

    try:
        return open_disk(
            wish.path,
            writable=True,
            format=wish.image_format,
            key=Keyring(wish.secrets.keys),
            luks_header=wish.luks_header,
        )
    except OSError as error:
        raise Failure(cannot_open(wish.path, error)) from error
    except ImageError as error:
        raise Failure(f"Could not open '{wish.path}': {error}") from error


def warn_of_bitmaps(disk: "Disk") -> None:
    """Say so when the first change of *disk* makes its persistent bitmaps void."""
    text = f"warning: {disk.files[0].path}: its persistent bitmaps are void from now on"
    disk.image.on_bitmaps_void = lambda: say(text)


def refuse_source(path: str, sources: list[Node]) -> None:
    """Raises: Failure if the target, a file or a URI, is what is read."""
    for image in sources:
        for link in image.chain:
            header = link.header_file if isinstance(link, LuksImage) else link.file
            for file in (link.file, link.data_file, header):
                if path == file.path or is_at(file, path):
                    raise Failure(f"{path}: the target is the source, or under it")
