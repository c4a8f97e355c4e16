"""QEMU's judgement of a state: `qemu-img check`, and its reading against ours."""

from pathlib import Path

from tests.crash.driver import SimulatedFile
from tests.crash.explorer import Violation
from tests.crash.history import SECTOR
from tests.crash.opening import SIZE, Seen
from tests.engine import PASSPHRASE
from tests.oracle import qemu_img

LEAKS = 3  # exit code of qemu-img check
CRYPT_METHOD = 32  # where the header says it, four bytes


def judge_outside(directory: Path, file: SimulatedFile, backing: SimulatedFile | None, seen: Seen) -> None:
    """Write *file* to *directory* and let QEMU check it, and compare it with *seen*.

    Raises: Violation.
    """
    image, raw = directory / "image.qcow2", directory / "seen.raw"
    write_sparse(image, file.sectors, file.size)
    if backing is not None:
        write_sparse(directory / backing.path, backing.sectors, backing.size)
    write_sparse(raw, {sector: data for sector, data in seen.items() if sector != SIZE}, int(seen[SIZE][:15]))
    words = ["--object", f"secret,id=key,data={PASSPHRASE.decode()}", "--image-opts"]
    opened = f"driver=qcow2,file.filename={image}"
    if int.from_bytes(file.read(CRYPT_METHOD, 4), "big"):
        opened += ",encrypt.key-secret=key"
    checked = qemu_img("check", *words, opened, check=False)
    if checked.returncode not in (0, LEAKS):
        raise Violation(f"qemu-img check: {checked.stdout}{checked.stderr}")
    compared = qemu_img("compare", *words, opened, f"driver=raw,file.filename={raw}", check=False)
    if compared.returncode:
        raise Violation(f"qemu-img compare: {compared.stdout}{compared.stderr}")


def write_sparse(path: Path, sectors: dict[int, bytes], size: int) -> None:
    """A file of *size* bytes with holes where nothing is."""
    with path.open("wb") as file:
        for sector in sorted(sectors):
            file.seek(sector * SECTOR)
            file.write(sectors[sector])
        file.truncate(size)
