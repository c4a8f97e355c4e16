"""Coverage-guided fuzzing of the NBD server; see `tests.fuzz.__main__`.

`python -m tests.fuzz.nbd` takes libFuzzer's options: atheris is libFuzzer for Python. An input is what
`tests.fuzz.visit` reads.
"""

import sys

import atheris

with atheris.instrument_imports(include=["qcow2.nbd"], enable_loader_override=False):
    from tests.fuzz.visit import visits


if __name__ == "__main__":
    command = f"{sys.executable} -m tests.fuzz.nbd"  # libFuzzer gives it to a shell to merge corpora
    with visits() as found:
        atheris.Setup([command, *sys.argv[1:]], found.visit)
        atheris.Fuzz()
