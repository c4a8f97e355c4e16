"""Run the coverage-guided fuzzers, one after the other: `python -m tests.fuzz [--minutes N] [--keep] [TARGET...]`.

They start from the corpus of the tree and go on from `.cache/fuzz`; a finding ends the run and is left there.
--keep writes the smallest set of inputs with the same coverage back into the tree.
"""

import argparse
import os
import shutil
import subprocess
import sys

from ring.build import FLAGS, ROOT, native_sources
from tests.fuzz import corpus

WORK = ROOT / ".cache" / "fuzz"
SANITIZERS = [
    "-DASSERTIONS",
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
COVERAGE = ["-fprofile-instr-generate", "-fcoverage-mapping"]
LIMITS = {
    "ring": ["-max_len=3200", "-timeout=20"],
    "images": ["-max_len=289", "-timeout=60", "-rss_limit_mb=1024"],
    "nbd": ["-max_len=440", "-timeout=60", "-rss_limit_mb=1024"],
}


def build_ring(*, coverage: bool = False) -> list[str]:
    """Compile the ring fuzzer; the command that runs it."""
    binary = WORK / ("ring-fuzzer-coverage" if coverage else "ring-fuzzer")
    sources = [str(ROOT / "tests" / "fuzz" / "ring.c"), *(str(ROOT / source) for source in native_sources())]
    flags = [*FLAGS, *SANITIZERS, *(COVERAGE if coverage else [])]
    compiler = os.environ.get("CLANG", "clang")
    libraries = ["-luring", "-ldeflate", "-lcrypto", "-pthread"]
    command = [compiler, *flags, f"-I{ROOT}", *sources, *libraries, "-o", str(binary)]
    subprocess.run(command, cwd=WORK, check=True)
    return [str(binary)]


def command_of(target: str) -> list[str]:
    """How to run *target*, but for libFuzzer's options."""
    return build_ring() if target == "ring" else [sys.executable, "-m", f"tests.fuzz.{target}"]


def fuzz(target: str, minutes: float) -> int:
    """Fuzz *target* for so long; libFuzzer's exit status."""
    found = WORK / target
    corpus.unpack(target, found)
    options = [f"-max_total_time={round(minutes * 60)}", "-print_final_stats=1", f"-artifact_prefix={WORK}/{target}-"]
    print(f"{target}: {minutes:g} minutes", flush=True)
    return subprocess.run([*command_of(target), *options, *LIMITS[target], str(found)], cwd=ROOT).returncode


def keep(target: str) -> None:
    """Put the smallest set of inputs with the coverage of all that were found into the tree."""
    smallest = WORK / f"{target}-smallest"
    shutil.rmtree(smallest, ignore_errors=True)
    smallest.mkdir()
    command = [*command_of(target), "-merge=1", *LIMITS[target], str(smallest), str(WORK / target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    print(f"{target}: {corpus.pack(target, smallest)} inputs kept")


def report_coverage() -> None:
    """Print which lines of the C the corpus of `ring` reaches, file by file."""
    found, profile = WORK / "ring", WORK / "ring.profraw"
    corpus.unpack("ring", found)
    (binary,) = build_ring(coverage=True)
    environment = {**os.environ, "LLVM_PROFILE_FILE": str(profile)}
    subprocess.run([binary, "-runs=0", str(found)], env=environment, check=True, capture_output=True)
    merged = WORK / "ring.profdata"
    subprocess.run([_llvm("profdata"), "merge", "-sparse", str(profile), "-o", str(merged)], check=True)
    command = [_llvm("cov"), "report", binary, f"-instr-profile={merged}", "-ignore-filename-regex=tests/"]
    subprocess.run(command, check=True)


def _llvm(tool: str) -> str:
    """The LLVM tool of the compiler's version: profiles of another one cannot be read."""
    return subprocess.run(
        [os.environ.get("CLANG", "clang"), f"--print-prog-name=llvm-{tool}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> int:
    """Run what the command line asks for; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", default=[*LIMITS], metavar="TARGET", help="ring, images, nbd; default: all"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--keep", action="store_true", help="write the corpus back into the tree")
    parser.add_argument("--coverage", action="store_true", help="only report what the corpus of ring reaches in the C")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.coverage:
        report_coverage()
        return 0
    for target in arguments.targets:
        if fuzz(target, arguments.minutes):
            print(f"{target}: found something, see {WORK}", file=sys.stderr)
            return 1
        if arguments.keep:
            keep(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
