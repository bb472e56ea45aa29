"""The command line: ``python -m flashrnn``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from flashrnn import __version__, ahead, info
from flashrnn.bench import command as bench
from flashrnn.demo import command as demo


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``run`` of what it returns does the work."""
    parser = argparse.ArgumentParser(
        prog="python -m flashrnn",
        description="FlashRNN: recurrent networks with multi-head recurrence.",
    )
    parser.add_argument("--version", action="version", version=f"flashrnn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module, summary in (
        ("info", info, "say what is installed, and which backends run here or why not"),
        ("compile", ahead, "compile kernels ahead of their first call, with no GPU"),
        ("demo", demo, "train a small network on a task that needs state, or on text"),
        ("bench", bench, "measure speed, memory and start-up time beside those of others"),
    ):
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        arguments: ``None``: those of the process.

    Returns:
        The exit code: 0, 2 for a command that cannot be carried out, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal or a file cannot show is no reason to lose what was computed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = make_parser().parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
