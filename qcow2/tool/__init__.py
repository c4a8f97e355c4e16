"""The `qcow2` command: arguments in, text or JSON out; one module a subcommand."""

from qcow2.tool.interruption import run_to_end


def program() -> int:
    """Run the tool as a program of its own; the exit status."""
    return run_to_end(_main)


def _main() -> int:
    """Nothing more is imported before signals are seen to."""
    from qcow2.tool.command import main

    return main()
