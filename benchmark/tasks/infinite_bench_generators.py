"""How InfiniteBench's six synthetic subsets are made (OpenBMB, arXiv 2402.13718; MIT), at most at their published size.

Each function takes a seed and a sample's index; its `build(n)` gives the data's own columns, and its `largest` is the
published size. The published sets go through depths, keys or targets in order. Here the order is scattered, so that the
first few samples cover them.
"""

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmark.tasks.ruler_generators import NOISE, Generator, draw_item, draw_new

TARGETS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")
CODE_DEPTHS = (2, 4, 6, 8, 10)


@dataclass(frozen=True)
class Generated:
    """The columns of one generated row; `answer` is the label."""

    context: str
    input: str
    answer: Any


def _scattered(index: int, count: int, stride: int) -> int:
    """A permutation of 0..count-1 that starts in the middle and jumps by about 0.62 of the whole."""
    return (index * stride + count // 2) % count


def _hidden_line(seed: int, index: int, line: str, key: str, question: str) -> Generator[Generated]:
    depth = _scattered(index, 590, 363) // 10  # 59 depths, ten samples each

    def build(n: int) -> Generated:
        lines = [NOISE + "\n"] * n
        lines.insert(n * depth // 58, line.format(key=key))
        return Generated("".join(lines), question, key)

    return Generator(build, smallest=1, largest=5220)


def passkey(seed: int, index: int) -> Generator[Generated]:
    key = "".join(random.Random(seed).choices("0123456789", k=5))
    line = "The pass key is {key}. Remember it. {key} is the pass key.\n"
    return _hidden_line(seed, index, line, key, "What is the pass key?")


def number_string(seed: int, index: int) -> Generator[Generated]:
    rng = random.Random(seed)
    digits = rng.choices("0123456789", k=5)
    for _ in range(5):  # duplicate a digit in place: ten digits with runs
        position = rng.randrange(len(digits))
        digits.insert(position, digits[position])
    line = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
    return _hidden_line(seed, index, line, "".join(digits), "What is the sequence of digits?")


def kv_retrieval(seed: int, index: int) -> Generator[Generated]:
    rng = random.Random(seed)
    slot = _scattered(index, 500, 309)
    seen: set[str] = set()
    pairs: list[tuple[str, str]] = []

    def draw() -> str:
        return draw_new(lambda: draw_item(rng, "uuids"), seen)

    def build(n: int) -> Generated:
        while len(pairs) < n:
            pairs.append((draw(), draw()))
        key, value = pairs[slot * n // 500]
        shown = ", ".join(f'"{k}": "{v}"' for k, v in pairs[:n])
        question = f'\nKey: "{key}"\nThe value associated with the specified key is: '
        return Generated(f"JSON data:\n{{{shown}}}", question, value)

    return Generator(build, smallest=1, largest=2500)


def math_find(seed: int, index: int) -> Generator[Generated]:
    rng = random.Random(seed)
    target = TARGETS[index % len(TARGETS)]
    low = rng.randint(0, 19) if "smallest" in target or (target == "median" and rng.random() < 0.5) else 0
    high = rng.randint(79, 99) if "largest" in target or (target == "median" and low == 0) else 99
    list_seed = rng.getrandbits(64)

    def build(n: int) -> Generated:
        draw = random.Random(list_seed)
        # The published lists are even, so a median is the mean of two values.
        numbers = [draw.randint(low, high) for _ in range(n - n % 2)]
        question = f"You should answer with only one number, no other words. The {target} number of the list is: "
        return Generated(str(numbers), question, _find(numbers, target))

    return Generator(build, smallest=32, largest=60000)


def _find(numbers: list[int], target: str) -> int | float:
    if target == "median":
        return statistics.median(numbers)
    distinct = sorted(set(numbers), reverse="largest" in target)
    return distinct[("second" in target) + 2 * ("third" in target)]


def math_calc(seed: int, index: int) -> Generator[Generated]:
    def build(n: int) -> Generated:
        draw = random.Random(seed)
        value = draw.randint(0, 99)
        values, terms = [value], [str(value)]
        for _ in range(n - 1):
            plus = draw.random() < 0.5
            operand = draw.randint(0, 99 - value if plus else value)
            value += operand if plus else -operand
            terms.append(f"{'+' if plus else '-'} {operand}")
            values.append(value)
        return Generated(" ".join(terms), "", values)

    return Generator(build, smallest=2, largest=30000)


def code_run(seed: int, index: int) -> Generator[Generated]:
    depth = CODE_DEPTHS[index % len(CODE_DEPTHS)]

    def build(n: int) -> Generated:
        draw = random.Random(seed)
        ids = draw.sample(range(1, 2 * n + 1), n)
        layers = [ids[n * i // depth : n * (i + 1) // depth] for i in range(depth)]
        addend = {i: draw.randint(-12, 17) for i in ids}
        callee = {i: draw.choice(below) for layer, below in itertools.pairwise(layers) for i in layer}
        functions = []
        for i in sorted(ids):
            inner = f"func_{callee[i]}(x)" if i in callee else "x"
            plus = "" if addend[i] == 0 else f" {'+' if addend[i] > 0 else '-'} {abs(addend[i])}"
            functions.append(f"def func_{i}(x):\n    return {inner}{plus}\n")
        start, x = draw.choice(layers[0]), draw.randint(-10, 10)
        result, at = x + addend[start], start
        while at in callee:
            at = callee[at]
            result += addend[at]
        question = (
            f"Please give me the exact number of the return value of func_{start}({x}). "
            "Your response should end with the sentence 'The return value is:'."
        )
        return Generated("\n".join(functions), question, result)

    return Generator(build, smallest=depth, largest=550)


GENERATORS: dict[str, Callable[[int, int], Generator[Generated]]] = {
    make.__name__: make for make in (passkey, number_string, kv_retrieval, math_find, math_calc, code_run)
}
