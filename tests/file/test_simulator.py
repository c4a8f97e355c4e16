"""The data plane that ships, and the engine, on a simulated kernel: nothing is lost, nobody waits for ever."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ring.build import FLAGS
from tests.sim.mutant import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
LIVE = ("backup", "backup of a bitmap", "bitmap add", "commit", "mirror", "mirror left", "snapshot", "stream")
QUICK = ("refused_work_is_forgotten", "fetched_chain_is_not_noted", "cluster_is_handed_out_twice")


def simulate(*options: str, what: str = "tests.sim") -> subprocess.CompletedProcess[str]:
    """A simulation is a process of its own: its data plane is another than ours."""
    command = [sys.executable, "-m", what, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def test_histories_of_many_lives_keep_every_promise_and_are_the_same_each_time() -> None:
    done = simulate("--histories", "20", "--twice")
    assert done.returncode == 0, done.stdout + done.stderr


def test_histories_of_data_that_goes_by_o_direct_keep_every_promise() -> None:
    done = simulate("--histories", "12", "--direct")
    assert done.returncode == 0, done.stdout + done.stderr


def test_histories_on_a_host_that_stays_full_keep_every_promise() -> None:
    """In one of these an acknowledged write went with somebody else's link that neither log nor file took."""
    done = simulate("--histories", "10", "--sort", "overlay", "--sort", "compressed-base", "--filled")
    assert done.returncode == 0, done.stdout + done.stderr


def test_whoever_finds_no_operation_free_gets_one_later() -> None:
    """Twice in these histories the engine waited for one that had long been free, and nobody told it."""
    done = simulate("--histories", "9", "--seed", "76", "--few")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_death_in_a_life_leaves_what_the_laws_allow() -> None:
    done = simulate("--histories", "4", "--seed", "1", "--states", "2000")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", QUICK)  # all: make simulate-mutants
def test_what_is_broken_in_c_is_found(name: str) -> None:
    done = simulate("--mutant", name, "--histories", "600")
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr  # it was built


@pytest.mark.sample(10)
@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.edit], ids=lambda mutant: mutant.name)
def test_what_breaks_the_c_is_c(mutant: Mutant) -> None:
    """Where the C around it has changed, it may be none any more."""
    assert mutant.edit
    text = (ROOT / mutant.edit.file).read_text().replace(mutant.edit.old, mutant.edit.new)
    command = ["gcc", *FLAGS, "-Wno-unused", f"-I{ROOT}", "-fsyntax-only", "-x", "c", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_deaths_within_live_operations_leave_what_the_laws_allow() -> None:
    done = simulate("--states", "1000", "--more", "100", what="tests.sim.live")  # all: make simulate-live
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in LIVE if not re.search(rf"\b{name} \d", done.stdout)] == []


def test_data_files_with_ciphers_keep_every_promise() -> None:
    """In this history a read met the hole that a discard had made under it, which decrypted to noise."""
    words = ["--sort", "data-file-encrypted", "--sort", "data-file-encrypted-overlay"]
    done = simulate(*words, "--histories", "1", "--seed", "7108")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
