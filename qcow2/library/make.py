"""New images from Python."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from itertools import count
from operator import index
from typing import TypeVar

from qcow2.driver.file import HostFile, run
from qcow2.engine.create import Options, max_size, plan, require_possible, write_header, write_tables
from qcow2.engine.plain import Preallocation, write_raw
from qcow2.format.geometry import whole_sectors
from qcow2.format.layout import COMPRESSIONS, MAX_CLUSTER_SIZE, MIN_CLUSTER_SIZE, VERSIONS
from qcow2.format.luks import DEFAULT_ITER_TIME_MS, DEFAULT_SPEC, Encryption
from qcow2.library.hostfile import are_one_file, created, opened, reserve
from qcow2.library.key import Phrase, phrase_of
from qcow2.library.newdata import KEEP, data_file_size, new_data_file
from qcow2.node.formats import FORMATS, format_of
from qcow2.node.gate import DATA, backing_path, named_path, require_room

T = TypeVar("T")

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def create(
    path: PathLike,
    size: int | None = None,
    *,
    format: str = "qcow2",
    backing: PathLike | None = None,
    backing_format: str = "qcow2",
    cluster_size: int = 64 << 10,
    compat: str = "1.1",
    lazy_refcounts: bool = False,
    refcount_bits: int = 16,
    extended_l2: bool = False,
    compression: str = "zlib",
    preallocation: str = "off",
    data_file: PathLike | None = None,
    data_file_raw: bool = False,
    data_file_use: str | None = None,
    key: Phrase | None = None,
    iter_time: int = DEFAULT_ITER_TIME_MS,
) -> None:
    """Make a new image at *path* of whatever is there; open it then to use it. The format is qcow2, raw or luks.

    *size* is in bytes, rounded up to 512; without one it is that of the *backing* file. The names of that and of the
    *data_file* are recorded as they are: relative ones start at the directory of the image. Of a data file that exists
    *data_file_use* says whether to "keep" what it holds, which *data_file_raw* then shows, or to "empty" it.
    With a *key* it is encrypted with LUKS (AES-256 in XTS mode); to try a key takes *iter_time* milliseconds.
    Raises: ValueError for what cannot be; TypeError; OSError, ImageError. A file that was not there is gone then.
    """
    name = os.fsdecode(path)
    _require_flags(lazy_refcounts=lazy_refcounts, extended_l2=extended_l2, data_file_raw=data_file_raw)
    if format not in FORMATS:
        raise ValueError(f"{name}: format {format!r} cannot be created, only {', '.join(FORMATS)}")
    encryption = None if key is None else Encryption(DEFAULT_SPEC, "sha256", bytes(phrase_of(key)), iter_time)
    below = None if backing is None else os.fsdecode(backing)
    if below is not None:
        below_size = _size_of(backing_path(name, below), backing_format)
        size = below_size if size is None else size
    if size is None and data_file is not None and data_file_use == KEEP:
        size = data_file_size(name, os.fsdecode(data_file))
    if size is None:
        raise ValueError(f"{name}: no size, and neither a backing file nor the content of a data file to take it from")
    size = whole_sectors(name, index(size))
    if format != "qcow2":
        if below is not None or data_file is not None:
            raise ValueError(f"{name}: a {format} image has no {'data' if below is None else 'backing'} file")
        refuse_others(
            f"{name}: a {format} image",
            create,
            backing_format=backing_format,
            cluster_size=cluster_size,
            compat=compat,
            lazy_refcounts=lazy_refcounts,
            refcount_bits=refcount_bits,
            extended_l2=extended_l2,
            compression=compression,
            data_file_raw=data_file_raw,
            data_file_use=data_file_use,
        )
        _make_raw(name, format, size, preallocation, encryption)
        return
    if below is None and backing_format != "qcow2":
        raise ValueError(f"{name}: backing_format {backing_format!r} without a backing file")
    if data_file is None and data_file_use is not None:
        raise ValueError(f"{name}: data_file_use {data_file_use!r} without a data file")
    options = Options(
        size=size,
        version=chosen("compat", compat, VERSIONS),
        cluster_bits=cluster_bits_of(cluster_size),
        refcount_order=_power("refcount_bits", refcount_bits, 1, 64),
        lazy_refcounts=lazy_refcounts,
        has_subclusters=extended_l2,
        compression=chosen("compression", compression, COMPRESSIONS),
        backing_name=below,
        backing_format=None if below is None else backing_format,
        preallocation=chosen("preallocation", preallocation, {kind.value: kind for kind in Preallocation}),
        encryption=encryption,
        data_file_name=None if data_file is None else os.fsdecode(data_file),
        data_file_raw=data_file_raw,
    )
    if data_file_raw and options.preallocation is Preallocation.OFF:  # there is no other way to say that all is data
        options = replace(options, preallocation=Preallocation.METADATA)
    if size > (limit := max_size(options.cluster_bits)):
        raise ValueError(f"{name}: size {size}, limit {limit} with clusters of {cluster_size} bytes")
    make_qcow2(name, options, data_file_use)


def make_qcow2(
    path: str,
    options: Options,
    data_file_use: str | None,
    announce: Callable[[], None] = lambda: None,
    *,
    looks_below: bool = True,
) -> None:
    """Make it of whatever is at *path*, with its data file if it has one. *announce()* once nothing is in the way.

    Unless it *looks_below*, nothing is known of a backing file but its name.
    Raises: as of `create`.
    """
    whole = plan(options)
    if options.backing_name is not None:
        _refuse_what_it_rests_on(path, options, looks_below=looks_below)
    with ExitStack() as stack:
        file = stack.enter_context(created(path))
        require_possible(file, whole)
        if options.data_file_name is not None:
            stack.enter_context(new_data_file(path, options, data_file_use))
        announce()
        run(write_tables(file, whole))
        if options.preallocation is Preallocation.FALLOC:
            reserve(file)
        run(write_header(file, whole))


def _refuse_what_it_rests_on(path: str, options: Options, *, looks_below: bool) -> None:
    """Raises: ValueError if a file to be made is the backing file, or one that this needs; OSError, ImageError.

    UnsupportedImage if the chain is full.
    """
    assert options.backing_name is not None
    assert options.backing_format is not None
    below = backing_path(path, options.backing_name)
    if are_one_file(path, below):
        raise ValueError(f"{path}: an image cannot be its own backing file")
    made = [path]
    if options.data_file_name is not None:
        made.append(named_path(path, DATA, options.data_file_name))
    for needed in _files_of(below, options.backing_format) if looks_below else [below]:
        for each in made:
            if are_one_file(each, needed):
                raise ValueError(f"{each}: the backing file {below} is this file, or rests on it")


def _files_of(path: str, image_format: str | None) -> Iterator[str]:
    """The files of the image at *path* and of all that is under it, as their headers say now; no locks are taken.

    Below one whose format nobody says nothing is known.
    Raises: OSError, ImageError; UnsupportedImage if they take no overlay.
    """
    top = path
    for nfiles in count(1):
        require_room(top, nfiles)
        yield path
        if image_format is None:
            return
        known = format_of(path, image_format)
        with HostFile.open(path) as file:
            below, data = known.below(file), known.data(file)
        if data:
            yield named_path(path, DATA, data)
        if below is None:
            return
        path, image_format = backing_path(path, below.name), below.image_format


def _make_raw(name: str, image_format: str, size: int, preallocation: str, encryption: Encryption | None) -> None:
    if (image_format == "luks") != (encryption is not None):
        raise ValueError(f"{name}: a luks image needs a key, and a raw one has none")
    kinds = ("off", "falloc", "full")
    kind = chosen("preallocation", preallocation, {each: Preallocation(each) for each in kinds})
    with created(name) as file:
        if encryption is None:
            run(write_raw(file, size, kind))
        else:
            from qcow2.node.luks import write_luks  # and with it libcrypto

            run(write_luks(file, encryption, size, is_full=kind is Preallocation.FULL))
        if kind is Preallocation.FALLOC:
            reserve(file)


def _size_of(path: str, image_format: str) -> int:
    with opened(path) as file:
        return format_of(path, image_format).outline(file).size


def cluster_bits_of(cluster_size: int) -> int:
    """The exponent of a cluster size. Raises: ValueError."""
    return _power("cluster_size", cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE)


def _power(name: str, value: int, low: int, high: int) -> int:
    """The exponent of a power of two in [low, high]."""
    if value & (value - 1) or not low <= value <= high:
        raise ValueError(f"{name} {value} is not a power of two from {low} to {high}")
    return value.bit_length() - 1


def _require_flags(**given: object) -> None:
    """Raises: TypeError for "off", which would be taken for True."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} {value!r} is not True or False")


def refuse_others(what: str, function: Callable[..., None], **given: object) -> None:
    """Raises: ValueError unless what is *given*, which makes no sense here, is as *function* has it by default."""
    defaults = signature(function).parameters
    if others := [name for name, value in given.items() if value != defaults[name].default]:
        raise ValueError(f"{what} has no {', '.join(others)}")


def chosen(name: str, text: str, choices: dict[str, T]) -> T:
    """What the option *name* stands for. Raises: ValueError."""
    if text not in choices:
        raise ValueError(f"{name} {text!r} is not one of {', '.join(choices)}")
    return choices[text]
