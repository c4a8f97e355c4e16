"""What of a key is in the memory of who uses it: the passphrase once, in pages of its own, and nothing it gives."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2.driver.file import HostFile, run
from qcow2.engine.luks import Vault
from qcow2.format.luks import LuksRecord
from tests.program import qcow2_tool_ok

PASSPHRASE = hashlib.sha256(b"a passphrase").hexdigest().encode()  # and not a line of this test's memory
CBC = "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256"
USER = """
import gc
import sys
import qcow2
from qcow2.engine.encryption import Keyring
from vhost.keys import Keys

keyring = Keyring(Keys([], [sys.argv[2]]))
disk = qcow2.open(sys.argv[1], format="luks", key=keyring, writable=True)
disk.write(0, bytes(1 << 16))
print("open", flush=True)
sys.stdin.readline()
disk.close()
del disk, keyring
gc.collect()
print("closed", flush=True)
sys.stdin.readline()
"""


def memory_of(process: "subprocess.Popen[str]") -> bytes:
    """All that it may write to."""
    found = bytearray()
    with open(f"/proc/{process.pid}/maps") as maps, open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(each, 16) for each in span.split("-"))
                memory.seek(start)
                found += memory.read(end - start)
    return bytes(found)


@pytest.mark.parametrize("cipher", ["cipher-mode=xts", CBC])
def test_what_a_passphrase_gives_is_not_left_in_memory(tmp_path: Path, cipher: str) -> None:
    path, key = tmp_path / "disk", tmp_path / "key"
    key.write_bytes(PASSPHRASE)
    options = f"key-secret=s0,iter-time=10,{cipher}"
    qcow2_tool_ok("create", "-q", "--object", f"secret,id=s0,file={key}", "-f", "luks", "-o", options, path, "1M")
    record = LuksRecord.parse(path.read_bytes()[: LuksRecord.NBYTES])
    slot = record.slots[0]
    derived = hashlib.pbkdf2_hmac("sha256", PASSPHRASE, slot.salt, slot.iterations, record.key_bytes)
    with HostFile.open(str(path)) as file:
        master = bytes(run(run(Vault.read(file, 0, file.size())).open([PASSPHRASE])).key)[:32]  # XTS has two keys
    secrets = [master, derived, hashlib.sha256(master).digest()]  # the last is that of ESSIV
    command = [sys.executable, "-c", USER, path, key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        assert user.stdout.readline() == "open\n"
        memory = memory_of(user)
        assert memory.count(PASSPHRASE) == 1
        assert derived not in memory
        assert master in memory, "libcrypto needs it"
        user.stdin.write("\n")
        user.stdin.flush()
        assert user.stdout.readline() == "closed\n"
        memory = memory_of(user)
        assert [secret in memory for secret in secrets] == [False] * 3
        user.stdin.write("\n")
