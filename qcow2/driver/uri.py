"""Names that are no paths."""

PROTOCOLS = (  # that QEMU knows by the front of a name
    "blkdebug blkverify fat ftp ftps gluster host_cdrom host_device http https iscsi iser "
    "json nbd nbds nfs null-aio null-co nvme rbd sheepdog ssh tftp vxhs"
)
SCHEMES = tuple(f"nbd{secure}{transport}://" for secure in ("", "s") for transport in ("", "+unix", "+vsock"))


def is_nbd(name: str) -> bool:
    """Whether *name* is an NBD URI, and no file's."""
    return name.startswith(SCHEMES)


def protocol_of(name: str) -> str | None:
    """The protocol that QEMU would reach *name* by, "nbd" for "nbd+unix://..."; None if it is a file's."""
    front, colon, _ = name.partition(":")
    protocol = front.partition("+")[0]
    return protocol if colon and protocol in PROTOCOLS.split() else None
