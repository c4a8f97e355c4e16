"""What `qemu-img create` says of what it cannot create, for scripts that read it; we say it under its name only."""

import os

from qcow2.engine.create import max_size
from qcow2.format.layout import (
    ENTRY_SIZE,
    MAX_CLUSTER_SIZE,
    MIN_CLUSTER_BITS_OF_SUBCLUSTERS,
    MIN_CLUSTER_SIZE,
    VERSIONS,
)
from qcow2.tool.option import DETACHED, HINTS, LEGACY, OPTIONS, PREALLOCATIONS, SWITCH
from qcow2.tool.quantity import parse_size

NEWER = "compatibility level 1.1 {} above (use version=v3 or greater)"
MIN_EXTENDED = 1 << MIN_CLUSTER_BITS_OF_SUBCLUSTERS
NO_CLUSTERS = "Cluster size must be a power of two between 512 and 2048k"
NO_REFCOUNTS = "Refcount width must be a power of two and may not exceed 64 bits"
OTHER_REFCOUNTS = "Different refcount widths than 16 bits require"
TOO_FEW_FOR_EXTENDED = f"Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED} bytes"
NO_BACKING = "Backing format cannot be used without backing file"
NO_SIZE = "Image creation needs a size parameter"
ANY_SIZE = (
    "Parameter '{}' expects a non-negative number below 2^64\n"
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
)


def unreadable(given: dict[str, str], image_format: str) -> str | None:
    """Its complaint about options that it cannot read; None if it has none."""
    for name in given:
        if name not in (*OPTIONS[image_format], *HINTS, *([LEGACY] if image_format == "qcow2" else [])):
            return f"Invalid parameter '{name}'"
    if given.get("nocow", "off") not in SWITCH:
        return "Parameter 'nocow' expects 'on' or 'off'"
    if _size(given.get("extent_size_hint", "0")) is None:
        return ANY_SIZE.format("extent_size_hint")
    if image_format != "qcow2":
        return None
    for name in ("size", "cluster_size"):
        if _size(given.get(name, "0")) is None:
            return ANY_SIZE.format(name)
    for name in ("lazy_refcounts", "extended_l2", "data_file_raw", "keep_data_file", LEGACY):
        if given.get(name, "off") not in SWITCH:
            return f"Parameter '{name}' expects 'on' or 'off'"
    if not (given.get("refcount_bits", "16").lstrip("-").isdigit()):
        return "Parameter 'refcount_bits' expects a number"
    return None


def before_it_begins(path: str, given: dict[str, str], image_format: str) -> str | None:
    """The same, or about a backing file that is not there; None if it has none."""
    if (text := unreadable(given, image_format)) is not None:
        return text
    if image_format != "qcow2":
        return None if {"size", DETACHED} & {*given} else NO_SIZE
    backing = given.get("backing_file")
    if backing and ":" not in backing and not os.path.exists(below := os.path.join(os.path.dirname(path), backing)):
        return f"Could not open '{below}': No such file or directory\nCould not open backing image."
    if "size" not in given and not backing:
        return NO_SIZE
    if backing and not given.get("backing_fmt"):
        return "Backing file specified without backing format"
    return None


def once_it_has_begun(given: dict[str, str], size: int) -> str | None:
    """Its complaint about an image that cannot be; None if we do not know it."""
    version = VERSIONS.get(given.get("compat", "1.1"))
    cluster_size, bits = _size(given.get("cluster_size", "64k")) or 0, int(given.get("refcount_bits", "16"))
    preallocation = given.get("preallocation", "off")
    if version is None:
        return f"Parameter 'version' does not accept value '{given['compat']}'"
    if preallocation not in PREALLOCATIONS:
        return f"Parameter 'preallocation' does not accept value '{preallocation}'"
    if cluster_size & (cluster_size - 1) or not MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE:
        return NO_CLUSTERS
    if given.get("backing_fmt") and not given.get("backing_file"):
        return NO_BACKING
    if given.get("backing_file") and preallocation != "off" and not SWITCH[given.get("extended_l2", "off")]:
        return "Backing file and preallocation can only be used at the same time if extended_l2 is on"
    if version < 3 and SWITCH[given.get("lazy_refcounts", "off")]:
        return f"Lazy refcounts only supported with {NEWER.format('and')}"
    if bits < 1 or bits > 64 or bits & (bits - 1):
        return NO_REFCOUNTS
    if version < 3 and bits != 16:
        return f"{OTHER_REFCOUNTS} {NEWER.format('or')}"
    if version < 3 and given.get("compression_type", "zlib") != "zlib":
        return f"Non-zlib compression type is only supported with {NEWER.format('and')}"
    is_extended = SWITCH[given.get("extended_l2", "off")]
    if is_extended and version < 3:
        return f"Extended L2 entries are only supported with {NEWER.format('and')}"
    if is_extended and cluster_size < MIN_EXTENDED:
        return TOO_FEW_FOR_EXTENDED
    if size > max_size(cluster_size.bit_length() - 1, ENTRY_SIZE << is_extended):
        return "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
    return None


def unmeasurable(given: dict[str, str], size: int) -> str | None:
    """Why an image of such *given* options has no measures; None if it has, whether it can be created or not."""
    cluster_size, bits = _size(given.get("cluster_size", "64k")) or 0, int(given.get("refcount_bits", "16"))
    is_extended = SWITCH[given.get("extended_l2", "off")]
    version = VERSIONS.get(given.get("compat", "1.1"))
    if version is None:
        return f"Invalid compatibility level: '{given['compat']}'"
    if cluster_size & (cluster_size - 1) or not MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE:
        return NO_CLUSTERS
    if given.get("preallocation", "off") not in PREALLOCATIONS:
        return f"invalid parameter value: {given['preallocation']}"
    if bits < 1 or bits > 64 or bits & (bits - 1):
        return NO_REFCOUNTS
    if version < 3 and bits != 16:
        return f"{OTHER_REFCOUNTS} compatibility level 1.1 or above (use compat=1.1 or greater)"
    if is_extended and cluster_size < MIN_EXTENDED:
        return TOO_FEW_FOR_EXTENDED
    if size > max_size(cluster_size.bit_length() - 1, ENTRY_SIZE << is_extended):
        return "The image size is too large (try using a larger cluster size)"
    return None


def announcement(path: str, given: dict[str, str], size: int) -> str:
    """Its line about what it begins to make, sound or not."""
    words = [f"Formatting '{path}', fmt=qcow2", f"cluster_size={_size(given.get('cluster_size', '64k'))}"]
    words.append(f"extended_l2={given.get('extended_l2', 'off')}")
    words += [f"preallocation={given['preallocation']}"] if "preallocation" in given else []
    words += [f"compression_type={given.get('compression_type', 'zlib')}", f"size={size}"]
    words += [f"{name}={given[name]}" for name in ("compat", "backing_file", "backing_fmt") if name in given]
    words.append(f"lazy_refcounts={given.get('lazy_refcounts', 'off')}")
    return " ".join([*words, f"refcount_bits={given.get('refcount_bits', '16')}"])


def _size(text: str) -> int | None:
    try:
        return parse_size(text)
    except ValueError:
        return None
