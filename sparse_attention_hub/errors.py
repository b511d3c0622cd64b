"""UserError means "the input is at fault": commands print its message, one line, and exit with 2."""

import io
import sys
import tempfile
from pathlib import Path


class UserError(ValueError):
    """Bad input of any kind. The message says what was got and what to do, in one line.

    parameter: the one at fault, where one is, so that a command line can name its flag.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class NonFiniteError(ArithmeticError):
    """Logits that are NaN or infinite: the answer means nothing. The failure is that of one sample and attention."""


class SeveralLayersError(RuntimeError):
    """A masker does not take a call whose items are of several layers: it asks for the one layer, or cannot join what it learned of
    each. Replay then takes them one by one."""


def quoted(value: object, limit: int = 200) -> str:
    """The value for a message: one line of at most `limit` characters, control characters escaped or replaced by blanks.

    Texts and other values as repr() shows them; of an error, its message without quotes.
    """
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value[:limit] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an integer of over 4300 digits, deep nesting
        text = f"a value of type {type(value).__name__} that is too large to show"
    cut = len(text) > limit or (isinstance(value, str) and len(value) > limit)
    text = "".join(character if character.isprintable() else " " for character in text[: limit - 3 if cut else limit])
    return text + "..." if cut else text


def print_any_text() -> None:
    """From now on characters that the console's encoding lacks are printed as escapes: names and answers may have any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
