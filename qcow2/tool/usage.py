"""What `qemu-img` says of a command line without sense, for scripts that read it; we say it under its name only."""

import re

from qcow2.tool.failure import Failure, UsageError

WORDS = (  # argparse's, and its own
    (r"argument .*--output: invalid choice: .*", "--output must be used with human or json as argument."),
    (
        r"argument .*--repair: invalid choice: '(.*?)' .*",
        r"Unknown option value for -r (expecting 'leaks' or 'all'): \1",
    ),
    (
        r"argument (?:-T|.*--source-cache|.*--backing-cache).*: invalid choice: '(.*?)' .*",
        r"Invalid source cache option: \1",
    ),
    (r"argument .*cache: invalid choice: '(.*?)' .*", r"Invalid cache option: \1"),
    (r"argument COMMAND: invalid choice: '(.*?)' .*", r"Command not found: \1"),
    (r"argument ([^/:]+).*: expected one argument", r"missing argument for option '\1'"),
    (r"unrecognized arguments: (-\S+).*", r"unrecognized option '\1'"),
    (r"unrecognized arguments: .*|the following arguments are required: filename", "Expecting one image file name"),
    (r"the following arguments are required: COMMAND", "Not enough arguments"),
    (r"argument -i/--aio: invalid choice: '(.*?)' .*", r"Invalid aio option: \1"),
    (r"argument -[lacd]/.*: not allowed with argument -[lacd]/.*", "Cannot mix '-l', '-a', '-c', '-d'"),
)


def in_its_words(message: str, status: int = 1) -> Exception:
    """What ends the program for *message* of argparse, as `qemu-img` says it: it tells of its help, or has *status*."""
    for pattern, words in WORDS:
        if match := re.fullmatch(pattern, message):
            text = match.expand(words)
            return Failure(text, status) if text.startswith(("--output", "Invalid")) else UsageError(text)
    return UsageError(message)
