"""InfiniteBench's scores (OpenBMB, arXiv 2402.13718), as its authors compute them.

A label is the gold answer: a text, number or list. `label_of` makes it from an answer as the copies of the data write it.
One score is more lenient than the original, which raises there: math_find takes "88.0" for 88.
"""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.data import shown
from benchmark.tasks.sources import as_texts

LETTERS = "ABCD"
Scorer = Callable[[str, Any], float]


def _first(label: Any) -> Any:
    return label[0] if isinstance(label, list) and label else label


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
    return float(str(label) in _blank(prediction, "\n:\"'.,?!{}").split())


def code_run(prediction: str, label: Any) -> float:
    """The last word is the integer."""
    words = _blank(prediction, "\n.`'\":").split()
    expected = _integer(label)
    try:
        return float(int(words[-1]) == expected)
    except (IndexError, ValueError):
        return 0.0


def code_debug(prediction: str, label: Any) -> float:
    """Label [function, letter]: starts with "X." or "X:", or names either after the first of four lead-ins."""
    function, letter = _choice(as_texts(label), None)
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
    return float(match is not None and float(match.group()) == _number(label))


def math_calc(prediction: str, label: Any) -> float:
    """Length of the correct leading run of numbers, signs lost, over the number of values."""
    values = _values(label)
    correct = 0
    for number, value in zip(re.findall(r"[0-9]+", prediction), values, strict=False):
        if (number.lstrip("0") or "0") != str(value):  # as text: int() refuses very many digits
            break
        correct += 1
    return correct / len(values)


def longdialogue(prediction: str, label: Any) -> float:
    """Only the first name counts, as written, among the upper-cased words."""
    return float(str(_first(label)) in _blank(prediction, "\n:\"'.,?!{}").upper().split())


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


def _best(measure: Callable[[str, str], float], prediction: str, label: Any) -> float:
    return metrics.best(measure, prediction, as_texts(label))


# subset -> (metric's name, formula)
SCORES: dict[str, tuple[str, Scorer]] = {
    "passkey": ("accuracy", first_digits),
    "number_string": ("accuracy", first_digits),
    "kv_retrieval": ("accuracy", kv_retrieval),
    "math_find": ("accuracy", math_find),
    "math_calc": ("leading_run", math_calc),
    "code_run": ("accuracy", code_run),
    "code_debug": ("accuracy", code_debug),
    "longbook_choice_eng": ("accuracy", longbook_choice),
    "longbook_qa_eng": ("qa_f1", partial(_best, metrics.word_f1)),
    "longbook_qa_chn": ("character_f1", partial(_best, metrics.character_f1_zh)),
    "longbook_sum_eng": ("rouge_lsum", partial(_best, metrics.rouge_lsum)),
    "longdialogue_qa_eng": ("accuracy", longdialogue),
}


def label_of(subset: str, answer: Any, options: list[str] | None) -> Any:
    """The label, from an answer that a copy of the data may hold as a value or as a list. Raises ValueError if impossible."""
    if subset == "code_run":
        return _integer(answer)
    if subset == "math_find":
        return _number(answer)
    if subset == "math_calc":
        return _values(answer)
    if subset in ("passkey", "number_string", "kv_retrieval"):
        return str(_first(answer))
    if subset in ("code_debug", "longbook_choice_eng"):
        return _choice(as_texts(answer), options)
    return as_texts(answer)


def _integer(answer: Any) -> int:
    try:
        return int(_first(answer))
    except (ValueError, TypeError):
        raise ValueError(f"the answer must be an integer, got {shown(answer)}") from None


def _number(answer: Any) -> int | float:
    value = _first(answer)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value.strip()):
        return float(value) if "." in value else int(value)
    if not isinstance(value, numbers.Real):
        raise ValueError(f"the answer must be a number, got {shown(answer)}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _values(answer: Any) -> list[int]:
    """The integers of a list, of its JSON text, or of a list that holds one of them."""
    values = answer
    try:
        while isinstance(values, str) or (len(values) == 1 and isinstance(values[0], (str, list))):
            values = json.loads(values) if isinstance(values, str) else values[0]
        integers = [int(value) for value in values]
    except (ValueError, TypeError):
        integers = []
    if not integers:
        raise ValueError(f"the answer must be a list of integers, got {shown(answer)}")
    return integers


def _choice(answer: list[str], options: list[str] | None) -> list[str]:
    """[option text, letter], from both or one of them."""
    if len(answer) == 2 and answer[1] in list(LETTERS):
        return answer
    if len(answer) != 1:
        raise ValueError(f"the answer must be an option's text and letter, or one of them, got {shown(answer)}")
    given = answer[0]
    if not options or len(options) > len(LETTERS):
        raise ValueError(f"the answer must be an option's text and letter, got {shown(given)} and no options A to D")
    if given in options:
        return [given, LETTERS[options.index(given)]]
    if given in list(LETTERS[: len(options)]):
        return [options[LETTERS.index(given)], given]
    raise ValueError(f"the answer {shown(given)} is none of the options")
