"""Who may use a file that is made in the place of another."""

import errno
import os
import stat

from qcow2.driver.file import HostFile

OURS = stat.S_IRUSR | stat.S_IWUSR


def own_as(file: HostFile, like: HostFile) -> None:
    """Give *file*, which is new and our user's, the owner, group and mode of *like*.

    It stays our user's if we may not give it away; in a group that we may not give it to, that one may what all may.
    Raises: PermissionError if our user, as its owner, could not use it; OSError.
    """
    wanted = os.fstat(like.fd)
    mode = stat.S_IMODE(wanted.st_mode)
    if not _has_given(file, wanted.st_uid, wanted.st_gid):
        if mode & OURS != OURS:
            raise PermissionError(
                errno.EPERM, f"a file that replaces it would not be user {wanted.st_uid}'s, nor ours to use", like.path
            )
        if not _has_given(file, -1, wanted.st_gid):
            mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    os.fchmod(file.fd, mode)


def _has_given(file: HostFile, user: int, group: int) -> bool:
    """Whether *file* is of *user*, or of anyone if that is -1, and of *group* now. Raises: OSError."""
    status = os.fstat(file.fd)
    if user in (-1, status.st_uid) and group == status.st_gid:
        return True
    try:
        os.fchown(file.fd, user, group)
    except PermissionError:
        return False
    return True
