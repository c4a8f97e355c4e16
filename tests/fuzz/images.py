"""Coverage-guided fuzzing of open, check, read, repair, write and grow; see `tests.fuzz.__main__`.

`python -m tests.fuzz.images` takes libFuzzer's options: atheris is libFuzzer for Python. An input is what
`tests.fuzz.mutation` reads.
"""

import sys

import atheris

with atheris.instrument_imports(include=["qcow2"], exclude=["qcow2.driver"], enable_loader_override=False):
    from tests.fuzz.trial import try_out

from tests.fuzz.mutation import bases, mutate


def test_one_input(data: bytes) -> None:
    """One mutant, tried out."""
    try_out(mutate(data).content)


if __name__ == "__main__":
    bases()
    command = f"{sys.executable} -m tests.fuzz.images"  # libFuzzer gives it to a shell to merge corpora
    atheris.Setup([command, *sys.argv[1:]], test_one_input)
    atheris.Fuzz()
