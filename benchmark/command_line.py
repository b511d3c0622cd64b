"""The command lines' parser: bad input is one line here as it is everywhere else."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line which flag is at fault, instead of the whole usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")
