"""The one exception that means "the input is at fault": commands print its message, one line, and exit with 2."""

import tempfile
from pathlib import Path


class UserError(ValueError):
    """Bad input of any kind. The message says what was got and what to do, in one line.

    parameter: the one at fault, where one is, so that a command line can name its flag.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


def check_writable(out: str | Path) -> None:
    """UserError if a file of this name cannot be written: to be asked before the work, not after it."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"{out} is a folder, name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{out}: {path.parent} cannot be written ({error.strerror}); choose another folder") from None
