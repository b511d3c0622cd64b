"""InfiniteBench's scores (OpenBMB, arXiv 2402.13718), formula for formula as its authors compute them.

A label is the text, number or list of the data; `label_of` makes it from the several ways in which copies of the data
write an answer. One formula is wider than the original, which stops with an error there: math_find takes "88.0" for 88.
"""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Callable
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.data import shown
from benchmark.tasks.sources import as_texts

LETTERS = "ABCD"
NUMBER = re.compile(r"\d+\.\d+|\d+")  # of any script, as float() reads them
Scorer = Callable[[str, Any], float]


def _first(label: Any) -> Any:
    return label[0] if isinstance(label, list) and label else label


def _blank(text: str, characters: tuple[str, ...] | str) -> str:
    for character in characters:
        text = text.replace(character, " ")
    return text


def _collapse(text: str) -> str:
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
    words = _blank(prediction.strip(), "\n.`'\":").split()
    try:
        answer = int(words[-1]) if words else None
    except ValueError:
        answer = None
    return float(answer == _integer(label))


def code_debug(prediction: str, label: Any) -> float:
    """Label [function, letter]: starts with "X." or "X:", or names either after the first of four lead-ins."""
    function, letter = _choice(as_texts(label), None)
    prediction = prediction.strip()
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _collapse(_blank(prediction, ("\n", "`", "'", '"', "-", "*", "Option", "option")))
    for lead in ("answer is:", "is:", "answer:", "correct option is:"):
        position = text.find(lead)
        if position >= 0:
            return float(text[position + len(lead) + 1 :].startswith((letter, function)))
    return 0.0


def math_find(prediction: str, label: Any) -> float:
    """The first number, without its sign, equals the label."""
    match = NUMBER.search(prediction)
    return float(match is not None and float(match.group()) == _number(label))


def math_calc(prediction: str, label: Any) -> float:
    """Length of the correct leading run of numbers, signs lost, over the number of values."""
    values = _values(label)
    correct = 0
    for number, value in zip(re.findall(r"[0-9]+", prediction), values, strict=False):
        if (number.lstrip("0") or "0") != str(value):  # as text: a model may write more digits than int() takes
            break
        correct += 1
    return correct / len(values)


def longdialogue(prediction: str, label: Any) -> float:
    """Only the first name counts, as written, among the upper-cased words."""
    words = _blank(prediction.strip(), "\n:\"'.,?!{}").split()
    return float(str(_first(label)) in [word.upper() for word in words])


def longbook_choice(prediction: str, label: Any) -> float:
    """Label [option text, letter]: the first letter, the whole text, after a lead-in, or the first A-D word."""
    text, label = prediction.strip(), as_texts(label)
    if not text:
        return 0.0
    if text[0] in LETTERS:
        return float(text[0] in label)
    if text in label:
        return 1.0
    text = _collapse(_blank(text, "\n\"'.,?!{}"))
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        position = text.find(lead)
        if position >= 0:
            rest = text[position + len(lead) + 1 :]
            return float(any(rest.startswith(item) for item in label))
    for word in text.split():
        if word in LETTERS:  # as a substring: "BC" counts as a word too
            return float(word in label)
    return 0.0


def longbook_qa(prediction: str, label: Any) -> float:
    return max((metrics.word_f1(prediction, text) for text in as_texts(label)), default=0.0)


def longbook_qa_chn(prediction: str, label: Any) -> float:
    return max((metrics.character_f1_zh(prediction, text) for text in as_texts(label)), default=0.0)


def longbook_sum(prediction: str, label: Any) -> float:
    return max((metrics.rouge_lsum(prediction, text) for text in as_texts(label)), default=0.0)


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
    "longbook_qa_eng": ("qa_f1", longbook_qa),
    "longbook_qa_chn": ("character_f1", longbook_qa_chn),
    "longbook_sum_eng": ("rouge_lsum", longbook_sum),
    "longdialogue_qa_eng": ("accuracy", longdialogue),
}


def label_of(subset: str, answer: Any, options: list[str] | None) -> Any:
    """The label as the formulas want it, from an answer that a copy of the data may hold as a text or a list of texts.

    Raises ValueError, saying what is wrong, when that cannot be.
    """
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
    """A list, its JSON text, or a list holding either."""
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
    """[option text, letter] from either of them."""
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
