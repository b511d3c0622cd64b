"""What all command lines share: bad input is one line on stderr with exit code 2; checks of numbers, texts and folders."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sparse_attention_hub.errors import UserError, print_any_text, quoted

#: Bytes of a folder's whole path: what is written below it needs the rest of the 4096 that a system takes.
LONGEST_PATH = 3000
_LONGEST_MESSAGE = 1000


class Parser(argparse.ArgumentParser):
    """Prints the usage only with --help; of bad flags one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message, 300)}; --help lists the flags\n")


def run_command(command: Callable[[], int]) -> int:
    """Run a command. Errors of input and files become one line on stderr. Returns the exit code."""
    print_any_text()
    try:
        return command()
    except UserError as error:
        flag = "" if error.parameter is None else f" ({flag_of(error.parameter)})"
        print(f"error: {_one_line(str(error), _LONGEST_MESSAGE)}{flag}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        return 0
    except OSError as error:
        print(f"error: {_one_line(f'{error.filename}: {error.strerror or error}', _LONGEST_MESSAGE)}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2


def _one_line(text: str, longest: int) -> str:
    """Without control characters, which could change what a terminal shows, and cut to `longest` characters."""
    shown = "".join(character if character.isprintable() else " " for character in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def flag_of(name: str) -> str:
    """ "search_timeout" -> "--search-timeout"."""
    return f"--{name.replace('_', '-')}"


def text(value: str) -> str:
    """Type of a flag that takes any text but an empty one."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"must be a text, got {quoted(value)}")
    return value


def folder(value: str) -> Path:
    """Type of a flag that names a file or folder; "~" is the home folder, as a shell has it."""
    try:
        return Path(text(value)).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{quoted(value)}: {error}") from None


def check_folder(flag: str, path: Path, *, write: bool = True) -> None:
    """UserError unless the folder exists or can be made; write: and files can be written into it.

    Writes one to find out: permission bits say too little for root, and on a read-only disk."""
    problem = _folder_problem(Path(os.path.abspath(path)), write)
    if problem:
        raise UserError(f"{flag} {quoted(str(path))}: {problem}; choose another folder")


def _folder_problem(path: Path, write: bool) -> str | None:
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > 255 for part in path.parts):
        return f"the path is too long (at most {LONGEST_PATH} bytes, and 255 per name)"
    try:
        there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not there.is_dir():
            kind = "a symbolic link to nothing" if there.is_symlink() else "a file, not a folder"
            return f"is {kind}" if there == path else f"{there.name} is {kind}"
        if write:
            with tempfile.TemporaryDirectory(dir=there, prefix=".probe_"):
                pass
    except (OSError, ValueError) as error:
        return f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return None
