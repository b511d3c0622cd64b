"""The command lines' parser: bad input is one line here as it is everywhere else."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from sparse_attention_hub.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says in one line which flag is at fault, instead of the whole usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def fail(error: UserError) -> int:
    """Print an error in one line, with the flag of the parameter at fault; the exit code."""
    flag = "" if error.parameter is None else f" (--{error.parameter.replace('_', '-')})"
    print(f"error: {error}{flag}", file=sys.stderr)
    return 2
