"""`ring/uring.c` by itself: what lives until an entry is submitted."""

import subprocess
from pathlib import Path

import pytest

from ring.build import FLAGS

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
#include <stdio.h>
#include "ring/uring.h"

static struct uring uring;

int main(int argc, char **argv)
{
    struct iovec *first, *second;

    (void)argv;
    if (uring_init(&uring, argc > 1) < 0)
        return 77;
    for (int i = 0; i < URING_ENTRIES; i++)
        io_uring_prep_nop(uring_entry(&uring));
    first = uring_iovecs(&uring, 2);
    io_uring_prep_nop(uring_entry(&uring)); /* submits all before it */
    second = uring_iovecs(&uring, 2);
    puts(second >= first + 2 ? "apart" : "one over the other");
    return 0;
}
"""


@pytest.mark.parametrize("how", [[], ["threads"]], ids=["io_uring", "threads"])
def test_iovecs_of_an_entry_stay_its_own_when_the_entries_before_it_are_submitted(
    tmp_path: Path, how: list[str]
) -> None:
    """A write was prepared with the iovecs of the next one where 256 entries waited."""
    source, program = tmp_path / "uring.c", tmp_path / "uring"
    source.write_text(PROGRAM)
    files = [source, *(ROOT / "ring" / name for name in ("uring.c", "threads.c", "host.c", "loss.c"))]
    command = ["gcc", *FLAGS, "-Wno-unused", f"-I{ROOT}", *map(str, files), "-o", str(program), "-luring", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    done = subprocess.run([program, *how], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("no io_uring here")
    assert done.stdout == "apart\n"
