"""InfiniteBench's scores (OpenBMB, arXiv 2402.13718), as its authors compute them.

A label is the gold answer: a text, number or list.
One score is more lenient than the original, which raises there: math_find takes "88.0" for 88.
"""

import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.values import as_list, as_texts
from sparse_attention_hub.errors import quoted

LETTERS = "ABCD"


def _first(label: Any) -> Any:
    """The first value of a list, or the value itself."""
    values = as_list(label)
    return values[0] if values else label


def _blank(text: str, marks: Sequence[str]) -> str:
    """The text with blanks for the marks, and single ones for several."""
    for mark in marks:
        text = text.replace(mark, " ")
    return re.sub(" {2,}", " ", text)


def first_digits(prediction: str, label: Any) -> float:
    """passkey, number_string: the first run of digits is the label."""
    match = re.search(r"[0-9]+", prediction)
    return float((match.group() if match else "") == str(_first(label)))


def kv_retrieval(prediction: str, label: Any) -> float:
    """The label, not unwrapped from a list, is one of the words."""
    label = _first(label) if isinstance(label, str) else label
    return float(str(label) in _blank(prediction, "\n:\"'.,?!{}").split())


def code_run(prediction: str, label: Any) -> float:
    """The last word is the integer."""
    words = _blank(prediction, "\n.`'\":").split()
    expected = integer(label)
    try:
        return float(int(words[-1]) == expected)
    except (IndexError, ValueError):
        return 0.0


def code_debug(prediction: str, label: Any) -> float:
    """Label [function, letter]: starts with "X." or "X:", or names either after the first of four lead-ins."""
    function, letter = choice(label)
    prediction = prediction.strip()
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _blank(prediction, ("\n", "`", "'", '"', "-", "*", "Option", "option"))
    for lead in ("answer is:", "is:", "answer:", "correct option is:"):
        _, found, rest = text.partition(lead)
        if found:
            return float(rest[1:].startswith((letter, function)))
    return 0.0


def math_find(prediction: str, label: Any) -> float:
    """The first number, without its sign, equals the label."""
    match = re.search(r"\d+\.\d+|\d+", prediction)  # digits of any script, as for float()
    return float(match is not None and float(match.group()) == number(label))


def math_calc(prediction: str, label: Any) -> float:
    """Length of the correct leading run of numbers, signs lost, over the number of values."""
    values = integers(label)
    correct = 0
    for number, value in zip(re.findall(r"[0-9]+", prediction), values, strict=False):
        if (number.lstrip("0") or "0") != str(value):  # as text: int() refuses very many digits
            break
        correct += 1
    return correct / len(values)


def longdialogue(prediction: str, label: Any) -> float:
    """Only the first name counts, as written, among the upper-cased words."""
    return float(str(_first(label)) in _blank(prediction, "\n:\"'.,?!{}").upper().split())


def best_of(measure: Callable[[str, str], float], prediction: str, label: Any) -> float:
    """The highest score over the texts of the label."""
    return metrics.best(measure, prediction, as_texts(label))


def longbook_choice(prediction: str, label: Any) -> float:
    """Label [option text, letter], tested in turn: first letter, whole text, text after a lead-in, first A-D word."""
    text, label = prediction.strip(), as_texts(label)
    if not text:
        return 0.0
    if text[0] in LETTERS:
        return float(text[0] in label)
    if text in label:
        return 1.0
    text = _blank(text, "\n\"'.,?!{}")
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = text.partition(lead)
        if found:
            return float(rest[1:].startswith(tuple(label)))
    for word in text.split():
        if word in LETTERS:  # a substring: "BC" counts too
            return float(word in label)
    return 0.0


# Labels: the gold answer from one that may be a value or a list. ValueError for an answer that is impossible.


def integer(answer: Any) -> int:
    try:
        return int(_first(answer))
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"the answer must be an integer, got {quoted(answer)}") from None


def number(answer: Any) -> int | float:
    value = _first(answer)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,300}(\.[0-9]+)?", value.strip()):
        return float(value) if "." in value else int(value)
    try:
        if isinstance(value, numbers.Real) and math.isfinite(float(value)):
            return int(value) if isinstance(value, numbers.Integral) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise ValueError(f"the answer must be a number, got {quoted(answer)}")


def integers(answer: Any) -> list[int]:
    """The integers of a list, of its text, or of a list that holds one of them."""
    values = as_list(answer) if isinstance(answer, (list, tuple, str)) else []
    while len(values) == 1 and (inner := as_list(values[0])) != values:
        values = inner
    try:
        found = [int(value) for value in values]
    except (ValueError, TypeError, OverflowError):
        found = []
    if not found or answer == values[0]:
        raise ValueError(f"the answer must be a list of integers, got {quoted(answer)}")
    return found


def choice(answer: Any, options: list[str] | None = None) -> list[str]:
    """[option text, letter], from both or one of them."""
    texts = as_texts(answer)
    if len(texts) == 2 and texts[1] in list(LETTERS):
        return texts
    if len(texts) != 1:
        raise ValueError(f"the answer must be an option's text and letter, or one of them, got {quoted(texts)}")
    given = texts[0]
    if not options or len(options) > len(LETTERS):
        raise ValueError(f"the answer must be an option's text and letter, got {quoted(given)} and no options A to D")
    if given in options:
        return [given, LETTERS[options.index(given)]]
    if given in list(LETTERS[: len(options)]):
        return [options[LETTERS.index(given)], given]
    raise ValueError(f"the answer {quoted(given)} is none of the options")


def text(answer: Any) -> str:
    """The first text of a list, or the text itself."""
    found = as_texts(answer)
    if not found:
        raise ValueError(f"the answer must be a text or number, got {quoted(answer)}")
    return found[0]
