"""How the samples of the 13 RULER tasks are made (RULER: NVIDIA, arXiv 2404.06654; Apache-2.0).

A generator takes a seed and gives `build(n) -> Parts` for a haystack of size n: lines, words, documents. `fill` finds
the n whose prompt fills a token budget. Differences to the original, all of them on purpose:
- every sample has its own seed, so it does not depend on how many samples are asked for;
- draws that would make the answer ambiguous are redrawn: keys, values and names are unique in a sample, and the counts
  that fwe asks for are strictly decreasing;
- the haystack grows by single lines, words or documents, so that a prompt is filled closer than the original's steps;
- a length that is too short for the smallest haystack is an error.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import random
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from sparse_attention_hub.errors import UserError

Item = TypeVar("Item")
ItemType = Literal["numbers", "words", "uuids"]
Haystack = Literal["noise", "needle", "essay"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SHORT = 4096  # below this length cwe repeats its words less often


@dataclass(frozen=True)
class Parts:
    """One generated sample: three texts that join to the prompt, and the answers."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Generator:
    """`build(n)` for n in smallest..largest; answers do not depend on n."""

    build: Callable[[int], Parts]
    smallest: int
    largest: int = 2**40
    slack: int = 32  # tokens that may stay unused where a unit has fewer


class TooShort(Exception):
    """The smallest haystack is over the budget; the argument is its size in tokens."""


def fill(
    build: Callable[[int], Item],
    measure: Callable[[Item], int],
    budget: int,
    smallest: int,
    largest: int,
    slack: int = 32,
) -> Item:
    """The item with the largest n found whose measure is at most `budget`.

    Every measure encodes the whole text, so few are made: sizes grow almost linearly with n, and the search follows the
    secant, keeping a bracket. It stops when one more unit would not fit, or when what is left is less than about one
    unit, or than `slack` tokens (never more than 1/128 of the budget) where a unit is a single word.
    """
    low, best = smallest, build(smallest)
    low_size = first_size = measure(best)
    if low_size > budget:
        raise TooShort(low_size)
    high: int | None = None
    n = min(largest, smallest * 2 + 8)
    for attempt in range(64):
        if n <= low:
            break
        item = build(n)
        size = measure(item)
        slope = max((size - first_size) / (n - smallest), 1e-3)
        if size <= budget:
            low, low_size, best = n, size, item
        else:
            high = n
        if low == largest or (high is not None and high - low <= 1):
            break
        if budget - low_size < max(slope, min(slack, budget // 128)):
            break
        n = low + max(1, math.floor((budget - low_size) / slope))
        if high is not None:
            n = (low + high) // 2 if attempt >= 6 else min(n, high - 1)
        n = min(n, largest, 64 * (low + 1))  # a bad first slope must not build a text of gigabytes
    return best


# ---- words, keys and values --------------------------------------------------------------------------------


@functools.cache
def _word_file(name: str) -> tuple[str, ...]:
    text = (importlib.resources.files("wonderwords") / "assets" / name).read_text(encoding="utf-8")
    # "wet" is there with and without a trailing blank: each word counts once.
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


@functools.cache
def english_words() -> tuple[str, ...]:
    """The 8,166 distinct nouns, adjectives and verbs of wonderwords 3.0.1, sorted."""
    words = sorted({*_word_file("nounlist.txt"), *_word_file("adjectivelist.txt"), *_word_file("verblist.txt")})
    if len(words) != 8166:
        raise UserError(f"RULER needs the word lists of wonderwords 3.0.1 (8166 words), got {len(words)}: install that version")
    return tuple(words)


def draw_item(rng: random.Random, kind: ItemType) -> str:
    """A key or value: a 7-digit number, an adjective-noun pair or a version-4 UUID."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        # Drawing both words is drawing from the set of all pairs: they are all different.
        return f"{rng.choice(_word_file('adjectivelist.txt'))}-{rng.choice(_word_file('nounlist.txt'))}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _unique(draw: Callable[[], str], seen: set[str]) -> str:
    while True:
        item = draw()
        if item not in seen:
            seen.add(item)
            return item


def _insert(lines: list[str], positions: list[int], items: list[str]) -> list[str]:
    """`items[i]` before `lines[positions[i]]`; positions ascending."""
    result: list[str] = []
    last = 0
    for position, item in zip(positions, items, strict=True):
        result += lines[last:position]
        result.append(item)
        last = position
    return result + lines[last:]


# ---- needles in a haystack ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeedleTask:
    haystack: Haystack
    key_type: ItemType = "words"
    value_type: ItemType = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class Essays:
    """A long text cut in words and sentences, the latter by punkt's rules alone: its trained form needs data files."""

    def __init__(self, text: str) -> None:
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        self.words = text.split()
        if not self.words:
            raise UserError("the essays are empty: give a text with words in it")
        self._starts: list[int] = []
        start = 0
        for sentence in PunktSentenceTokenizer().tokenize(" ".join(self.words)):
            self._starts.append(start)
            start += len(sentence.split())

    def sentences(self, count: int) -> list[str]:
        """The sentences of the first `count` words; the essays repeat when they end."""
        total = len(self.words)
        words = (self.words * -(-count // total))[:count]
        starts = [round_ * total + start for round_ in range(-(-count // total)) for start in self._starts]
        starts = [start for start in starts if start < count]
        return [" ".join(words[a:b]) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def niah(seed: int, task: NeedleTask, essays: Essays | None = None) -> Generator:
    rng = random.Random(seed)
    hay_seed, place_seed = rng.getrandbits(64), rng.getrandbits(64)
    seen: set[str] = set()
    keys = [_unique(lambda: draw_item(rng, task.key_type), seen) for _ in range(max(task.keys, task.queries))]
    values = [[_unique(lambda: draw_item(rng, task.value_type), seen) for _ in range(task.values)] for _ in keys]
    needles = [_needle(task, key, value) for key, own in zip(keys, values, strict=True) for value in own]
    rng.shuffle(needles)
    asked = rng.sample(range(len(keys)), task.queries)
    query = keys[asked[0]] if len(asked) == 1 else ", ".join(keys[i] for i in asked[:-1]) + f", and {keys[asked[-1]]}"
    answers = [value for i in asked for value in values[i]]

    singular = task.queries * task.values == 1
    kind = task.value_type.removesuffix("s") if singular else task.value_type
    some, are, are_all = ("A", "is", "is") if singular else ("Some", "are", "are all")
    head = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    question = f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
    prefix = f" The special magic {kind} for {query} mentioned in the provided text {are}"

    # A distractor shares neither key nor value with a needle or another distractor; the first n are the same for all n.
    hay_rng = random.Random(hay_seed)
    distractors: list[str] = []

    def lines(n: int) -> list[str]:
        if task.haystack == "noise":
            return [NOISE] * n
        while len(distractors) < n:
            key = _unique(lambda: draw_item(hay_rng, task.key_type), seen)
            distractors.append(_needle(task, key, _unique(lambda: draw_item(hay_rng, task.value_type), seen)))
        return distractors[:n]

    def build(n: int) -> Parts:
        place = random.Random(place_seed)
        if task.haystack == "essay":
            assert essays is not None
            sentences = essays.sentences(n)
            depths = sorted(place.sample([round(i * 100 / 39) for i in range(40)], len(needles)))
            text = " ".join(_insert(sentences, [len(sentences) * depth // 100 for depth in depths], needles))
        else:
            text = "\n".join(_insert(lines(n), sorted(place.sample(range(n), len(needles))), needles))
        return Parts(head + text + "\n", question, prefix, answers)

    return Generator(build, smallest=len(needles))


def _needle(task: NeedleTask, key: str, value: str) -> str:
    return f"One of the special magic {task.value_type} for {key} is: {value}."


# ---- variable tracking -------------------------------------------------------------------------------------


def _chain(rng: random.Random, letters: int, value: str) -> Generator:
    """One chain of 5 variables among n noise lines."""
    seen: set[str] = set()
    names = [_unique(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), seen) for _ in range(5)]
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {name} = VAR {source} " for source, name in zip(names, names[1:], strict=False)]
    place_seed = rng.getrandbits(64)

    def build(n: int) -> Parts:
        positions = sorted(random.Random(place_seed).sample(range(n), len(links)))
        return Parts(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(_insert([NOISE] * n, positions, links))
            + "\n",
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are: ",
            names,
        )

    return Generator(build, smallest=len(links))


def variable_tracking(seed: int, count_tokens: Callable[[str], int]) -> Generator:
    """One chain of 4 hops, after a worked example of at most 500 tokens, which counts in the budget."""
    rng = random.Random(seed)
    seen: set[str] = set()
    example_value, value = (_unique(lambda: str(rng.randint(10000, 99998)), seen) for _ in range(2))
    chain = _chain(rng, 3, example_value)
    try:
        shown = fill(
            chain.build,
            lambda parts: count_tokens(parts.context + parts.question + parts.answer_prefix),
            500,
            chain.smallest,
            chain.largest,
        )
    except TooShort as error:
        raise UserError(f"vt: the worked example needs {error} tokens with this tokenizer, more than its 500") from None
    example = shown.context + shown.question + shown.answer_prefix + " " + " ".join(shown.answers) + "\n"
    main = _chain(rng, 5, value)

    def build(n: int) -> Parts:
        parts = main.build(n)
        return Parts(example + "\n" + parts.context, parts.question, parts.answer_prefix, parts.answers)

    return Generator(build, main.smallest)


# ---- common and frequent words -----------------------------------------------------------------------------


def common_words(seed: int, length: int) -> Generator:
    """Ten words that appear more often than the n - 10 others, after a worked example with words of its own."""
    rng = random.Random(seed)
    words = list(english_words())
    rng.shuffle(words)
    short = length < SHORT
    common, uncommon = (6, 1) if short else (30, 3)
    example_size, example_common, example_uncommon = (20, 3, 1) if short else (40, 10, 3)
    order_seed = rng.getrandbits(64)
    shown = _word_list(words[-example_size:], example_common, example_uncommon, order_seed)
    example = shown.context + shown.question + shown.answer_prefix + _numbered(" ", shown.answers) + "\n"

    def build(n: int) -> Parts:
        parts = _word_list(words[:n], common, uncommon, order_seed)
        return Parts(example + parts.context, parts.question, parts.answer_prefix, parts.answers)

    return Generator(build, smallest=11, largest=len(words) - example_size)


def _numbered(lead: str, words: list[str]) -> str:
    return lead + " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _word_list(words: list[str], common: int, uncommon: int, order_seed: int) -> Parts:
    entries = words[:10] * common + words[10:] * uncommon
    random.Random(order_seed).shuffle(entries)
    return Parts(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered('', entries)}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        words[:10],
    )


def frequent_words(seed: int, budget: int) -> Generator:
    """n coded words with counts falling as the square of their rank; rank 1 is noise, ranks 2 to 4 are the answers."""
    rng = random.Random(seed)
    seen: set[str] = set()
    vocabulary = [_unique(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), seen) for _ in range(max(budget // 50, 5))]
    vocabulary[0] = "..."
    order_seed = rng.getrandbits(64)
    zeta = math.pi**2 / 6

    def build(n: int) -> Parts:
        words: list[str] = []
        for rank, word in enumerate(vocabulary, start=1):
            words += [word] * math.floor(n / rank**2 / zeta)
        random.Random(order_seed).shuffle(words)
        return Parts(
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(words)}\n",
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:",
            vocabulary[1:4],
        )

    # From 74 words on the counts of ranks 2 to 5 differ by at least one, so the three answers are clear.
    # Each n has its own order, hence not quite its own size: a search for the last token would not converge.
    return Generator(build, smallest=74, slack=2**40)


# ---- question answering ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """`gold` and `near` (preferred distractors) are indices of documents."""

    id: str
    text: str
    answers: list[str]
    gold: list[int]
    near: list[int]


@dataclass(frozen=True)
class Corpus:
    documents: list[str]
    questions: list[Question]


QA_INSTRUCTION = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def question_answering(seed: int, corpus: Corpus, question: Question) -> Generator:
    """The gold documents of one question among distractors; the distractors repeat when the corpus ends."""
    rng = random.Random(seed)
    order_seed = rng.getrandbits(64)
    gold = set(question.gold)
    near = [i for i in question.near if i not in gold]
    rng.shuffle(near)
    distractors: list[int] = []
    source = _distractors(rng, near, len(corpus.documents), gold)

    def build(n: int) -> Parts:
        while len(distractors) < n - len(question.gold):
            distractors.append(next(source))
        chosen = [*question.gold, *distractors[: n - len(question.gold)]]
        random.Random(order_seed).shuffle(chosen)
        documents = "\n\n".join(f"Document {i}:\n{corpus.documents[d]}" for i, d in enumerate(chosen, start=1))
        return Parts(
            f"{QA_INSTRUCTION}\n\nThe following are given documents.\n\n{documents}\n\n",
            f"{QA_INSTRUCTION}\n\nQuestion: {question.text}",
            " Answer:",
            question.answers,
        )

    spare = len(corpus.documents) > len(gold)
    return Generator(build, len(question.gold), 2**40 if spare else len(question.gold))


def _distractors(rng: random.Random, near: list[int], total: int, gold: set[int]) -> Iterator[int]:
    yield from near
    known = gold | set(near)
    first = [i for i in range(total) if i not in known]
    rng.shuffle(first)
    yield from first
    while True:  # the corpus again
        yield from near
        yield from first
