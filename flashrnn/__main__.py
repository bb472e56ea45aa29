"""The command line: ``python -m flashrnn``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flashrnn import __version__, info
from flashrnn.demo import command as demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        arguments: ``None``: those of the process.

    Returns:
        The exit code: 0, 2 for a command that cannot be carried out, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flashrnn",
        description="FlashRNN: recurrent networks with multi-head recurrence.",
    )
    parser.add_argument("--version", action="version", version=f"flashrnn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module, summary in (
        ("info", info, "say what is installed, and which backends run here or why not"),
        ("demo", demo, "train a small network on a task that needs state, or on text"),
    ):
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
