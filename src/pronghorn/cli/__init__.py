"""The command line: `serve` and `run` compose the system, every other command is an HTTP client."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the arguments name; a mistake of the user's is one line on stderr and a status."""
    from pronghorn.cli.commands import app
    from pronghorn.errors import PronghornError, UsageError

    try:
        app()
    except PronghornError as error:
        print(f"pronghorn: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
