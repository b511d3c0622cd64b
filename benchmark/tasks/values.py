"""Values as data files write them: lists and dicts in the text of a cell, one value where a list is expected."""

import ast
import io
import json
import tokenize
import warnings
from itertools import pairwise
from typing import Any

from sparse_attention_hub.errors import UserError, quoted

MAX_LITERAL = 1_000_000  # characters of a Python literal: its parser needs a hundred bytes for each


def parse_text(text: str) -> Any:
    """The value that a text writes as JSON or as a Python literal, which is how pandas writes lists; None if it writes none.

    Nothing is evaluated as code. Raises UserError for a list as NumPy prints it, without commas.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return parse_literal(text)


def parse_literal(text: str, longest: int = MAX_LITERAL) -> Any:
    """The value that a text writes as a Python literal, and nothing but it, else None."""
    if len(text) > longest:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in a model's text
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if isinstance(value, list) and _lacks_commas(text):
        raise UserError(f"a list without commas, as NumPy prints it, got {quoted(text)}: write it as JSON")
    return value


def _lacks_commas(text: str) -> bool:
    """Whether two texts follow each other: Python would join them to one."""
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)


def as_list(value: Any) -> list[Any]:
    """A list, also one written as text, as a list; null is an empty one, any other value is a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = parse_text(value)
        return parsed if isinstance(parsed, list) else [value]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if value is None else [value]


def as_texts(value: Any, what: str = "the answer") -> list[str]:
    """`as_list` with texts, for gold answers. UserError if one of them is neither a text nor a number."""
    try:
        values = as_list(value)
    except UserError as error:
        raise UserError(f"{what} is {error}") from None
    for item in values:
        if not isinstance(item, (str, int, float)) or item != item:
            raise UserError(f"{what} must be a text, a number or a list of them, got {quoted(value)}")
    return [str(item) for item in values]
