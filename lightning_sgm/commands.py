"""What the light commands (import, export) share: arguments, one line for what goes wrong, exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Arguments of ``python -m lightning_sgm COMMAND``; a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and leave with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class Refusal(Exception):
    """The command was used wrongly; exit code 2."""


def run_command(parser: CommandParser, action: Callable[[argparse.Namespace], None], arguments: list[str]) -> int:
    """Run ``action`` with the arguments; exit code 0, 1 (it failed), 2 (wrong usage, a missing file) or 130 (Ctrl-C).

    ``--debug`` among the arguments shows the traceback of what went wrong.
    """
    try:
        action(parser.parse_args([argument for argument in arguments if argument != "--debug"]))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _failed("stopped by Ctrl-C; nothing was written", 130)
    except Refusal as refusal:
        return _failed(str(refusal), 2)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        from lightning_sgm.messages import one_line

        return _failed(one_line(error), 2 if isinstance(error, FileNotFoundError) else 1)
    return 0


def _failed(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
