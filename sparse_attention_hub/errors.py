"""The one exception that means "the input is at fault": commands print its message, one line, and exit with 2."""


class UserError(ValueError):
    """Bad input of any kind. The message says what was got and what to do, in one line, without a traceback."""
