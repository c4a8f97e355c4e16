"""What coverage-guided fuzzing of the rings found worth keeping, once more, with sanitizers and canaries."""

import shutil
import subprocess
from pathlib import Path

from ring.build import FLAGS, FUZZ, ROOT, SANITIZERS, native_sources
from tests.patience import TIMEOUT


def test_the_ring_corpus_touches_nothing_but_guest_memory(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    assert compiler is not None
    binary = tmp_path / "replay"
    sources = [*(str(ROOT / source) for source in native_sources()), str(FUZZ / "replay.c"), str(FUZZ / "ring.c")]
    command = [compiler, *FLAGS, *SANITIZERS["--asan"], "-O0", "-g0", f"-I{ROOT}", *sources]
    subprocess.run([*command, "-luring", "-ldeflate", "-lcrypto", "-pthread", "-o", str(binary)], check=True)
    done = subprocess.run([binary, FUZZ / "corpus" / "ring.hex"], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 500
