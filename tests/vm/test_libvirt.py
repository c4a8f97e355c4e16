"""This host's libvirt boots a guest from our XML: the system's, whose QEMU is another user, and a user's own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from guest import Backend, Kernel, installed_program

from tests.patience import TIMEOUT
from tests.vm.tool import make_image, run

SCRIPT = Path(__file__).with_name("libvirt.sh")
NOBODY = 65534
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The shell, process 1 of the namespace, buries every QEMU: libvirt waits for that.
WORLD = [*NAMESPACES, "sh", "-c", '"$@" & wait $!', "sh"]
DOMAIN = """<domain type='qemu'>
<name>guest</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<os><type machine='pc'>hvm</type><kernel>{directory}/kernel</kernel><initrd>{directory}/initrd</initrd>
<cmdline>console=ttyS0 quiet panic=0 mitigations=off nokaslr no_timer_check</cmdline></os>
<features><acpi/></features>
<sysinfo type='fwcfg'><entry name='opt/guest/job' file='{directory}/job'/></sysinfo>
<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
<devices>{disk}<serial type='file'><source path='{directory}/console'/></serial><memballoon model='none'/></devices>
</domain>"""
JOB = """
set -x
dd if=/dev/urandom of=/tmp/data bs=64k count=8
dd if=/tmp/data of=/dev/vda bs=64k conv=fsync
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=8 | cmp - /tmp/data
echo "wants a second disk"
until test -b /dev/vdb; do sleep 0.1; done
dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync
"""

pytestmark = [
    pytest.mark.xdist_group("libvirt"),  # one at a time
    pytest.mark.skipif(None in map(shutil.which, ("libvirtd", "virtlogd", "virsh")), reason="no libvirt here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who makes namespaces and acts as other users"),
]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="libvirt-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.sample(8, of="guests")
@pytest.mark.parametrize("mode", ["system", "session"])
def test_libvirt_boots_a_guest_and_plugs_in_a_disk(directory: Path, kernel: Kernel, initrd: Path, mode: str) -> None:
    shutil.copy(kernel.image, directory / "kernel")
    shutil.copy(initrd, directory / "initrd")
    (directory / "job").write_text(JOB)
    user = [] if mode == "system" else ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*NAMESPACES, "true"], check=False).returncode:
        pytest.skip("no namespaces here")
    if user and subprocess.run([*user, "test", "-x", SCRIPT], check=False).returncode:
        pytest.skip(f"another user may not enter {SCRIPT.parent}")
    access = ["--socket-group=kvm"] if mode == "system" else []
    first, second = (make_image(directory / f"{name}.qcow2", "64M", "compat=1.1") for name in ("first", "second"))
    if user:
        for path in (directory, *directory.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    (directory / "domain.xml").write_text(DOMAIN.format(directory=directory, disk=printed_disk(first)))
    (directory / "second.xml").write_text(printed_disk(second).replace("'vda'", "'vdb'"))
    with ExitStack() as stack:
        for image in (first, second):
            stack.enter_context(serve(image, *access, user=user))
        if mode == "system":
            # Its socket is root's alone: QEMU cannot open it, and says so at once.
            denied = make_image(directory / "denied.qcow2", "64M", "compat=1.1")
            (directory / "denied.xml").write_text(printed_disk(denied).replace("'vda'", "'vdc'"))
            stack.enter_context(serve(denied, user=user))
        done = subprocess.run(
            [*WORLD, *user, SCRIPT, mode, directory],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    console = (directory / "console").read_text() if (directory / "console").exists() else ""
    print(done.stdout, console)
    assert (done.returncode, done.stderr) == (0, "")
    assert "@@ exit 0" in console
    assert mode != "system" or "Permission denied" in (directory / "denied").read_text()
    for image in (first, second):
        run("qemu-img", "check", image)
    assert first.stat().st_size == second.stat().st_size  # both have what the guest wrote


def socket_of(image: Path) -> Path:
    return image.with_suffix(".sock")


def printed_disk(image: Path) -> str:
    """What `libvirt-xml` prints."""
    program = installed_program("vhost-user-qcow2")
    options = [f"--socket-path={socket_of(image)}", f"--blk-file={image}"]
    return subprocess.run([program, "libvirt-xml", *options], capture_output=True, text=True, check=True).stdout


def serve(image: Path, *options: str, user: list[str]) -> Backend:
    program = installed_program("vhost-user-qcow2")
    return Backend(
        [*user, program, f"--socket-path={socket_of(image)}", f"--blk-file={image}", *options], socket_of(image)
    )
