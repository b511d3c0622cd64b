"""How the samples of the 13 RULER tasks are made (RULER: NVIDIA, arXiv 2404.06654; Apache-2.0).

A generator takes a seed and gives `build(n) -> Parts` for a haystack of n lines, words or documents. `fill` finds the n
whose prompt fills a token budget. Deliberate differences from the original:
- every sample has its own seed, so it does not depend on the number of samples;
- no answer is ambiguous: keys, values and names are unique in a sample, and the counts that fwe asks for all differ;
- the haystack grows by single lines, words or documents, so that fewer tokens stay unused;
- a length that is too short for the smallest haystack is an error.
"""

import functools
import importlib.resources
import math
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, chain, cycle, islice, pairwise
from typing import Generic, Literal, TypeVar

from benchmark.tasks.base import ContextTooShortError, Sample, SampleRequest, Task, hash64, prompt_length
from sparse_attention_hub.errors import UserError

Item = TypeVar("Item")
ItemType = Literal["numbers", "words", "uuids"]
Haystack = Literal["noise", "needle", "essay"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SHORT = 4096  # tokens: below this length cwe repeats its words less often


@dataclass(frozen=True)
class Parts:
    """One generated sample: three texts that join to the prompt, and the answers."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Generator(Generic[Item]):
    """`build(n)` for n in smallest..largest."""

    build: Callable[[int], Item]
    smallest: int
    largest: int = 2**40
    slack: int = 32  # tokens that may stay unused where a line, word or document has fewer


class TooShort(Exception):
    """The smallest haystack exceeds the budget. The argument is its size in tokens."""


def sample_seed(seed: int, split: str, task: str, length: int, index: int) -> int:
    """64 bits for one sample, independent of the number of samples."""
    return hash64(f"{seed}/{split}/{task}/{length}/{index}")


def fill_prompt(task: Task, generator: Generator[Sample], length: int, request: SampleRequest) -> tuple[Sample, bool]:
    """The largest sample of at most `length` tokens, prompt and answer together, and whether no larger one can be built.

    Raises ContextTooShortError if the smallest one has more, or UserError if the length is the task's own.
    """

    def measure(sample: Sample) -> int:
        return prompt_length(sample, request.tokenizer, task.use_chat_template) + sample.max_new_tokens

    try:
        n, sample = fill(generator, measure, length)
    except TooShort as error:
        raised = UserError if length == task.fixed_length else ContextTooShortError
        raise raised(
            f"{task.name}: a length of {length} tokens is too short: the smallest prompt and its answer have {error}"
        ) from None
    return sample, n == generator.largest


def fill(generator: Generator[Item], measure: Callable[[Item], int], budget: int) -> tuple[int, Item]:
    """The largest n found for which the item's measure is at most `budget`, and the item.

    Measuring encodes the whole text, so it is done rarely: sizes grow almost linearly with n, and the search follows the
    secant within a bracket. It stops when one more unit (line, word, document) would not fit, or when fewer tokens are
    unused than about one unit has, or than `slack` (at most 1/128 of the budget).
    """
    low = smallest = generator.smallest
    best = generator.build(low)
    low_size = first_size = measure(best)
    if low_size > budget:
        raise TooShort(low_size)
    high: int | None = None
    n = min(generator.largest, smallest * 2 + 8)
    for attempt in range(64):
        if n <= low:
            break
        item = generator.build(n)
        size = measure(item)
        slope = max((size - first_size) / (n - smallest), 1e-3)
        if size <= budget:
            low, low_size, best = n, size, item
        else:
            high = n
        filled = budget - low_size < max(slope, min(generator.slack, budget // 128))
        if filled or low == generator.largest or (high is not None and high - low <= 1):
            break
        n = low + max(1, math.floor((budget - low_size) / slope))
        if high is not None:
            n = (low + high) // 2 if attempt >= 6 else min(n, high - 1)
        n = min(n, generator.largest, 64 * (low + 1))  # a bad first slope must not lead to gigabytes of text
    return low, best


@functools.cache
def _word_file(name: str) -> tuple[str, ...]:
    text = (importlib.resources.files("wonderwords") / "assets" / name).read_text(encoding="utf-8")
    # "wet" is listed twice, once with a trailing blank.
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
        return f"{rng.choice(_word_file('adjectivelist.txt'))}-{rng.choice(_word_file('nounlist.txt'))}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_new(draw: Callable[[], str], seen: set[str]) -> str:
    """The first drawn item that is not in `seen`; it is added to them."""
    while (item := draw()) in seen:
        pass
    seen.add(item)
    return item


def _insert(lines: list[str], positions: list[int], items: list[str]) -> list[str]:
    """The lines with `items[i]` before `lines[positions[i]]`; positions ascending."""
    result = list(lines)
    for position, item in reversed(list(zip(positions, items, strict=True))):
        result.insert(position, item)
    return result


@dataclass(frozen=True)
class NeedleTask:
    haystack: Haystack
    key_type: ItemType = "words"
    value_type: ItemType = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class Essays:
    """A long text in words and sentences. The sentences are those of an untrained punkt: a trained one needs data files."""

    def __init__(self, text: str) -> None:
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        self.words = text.split()
        if not self.words:
            raise UserError("the essays are empty: give a text with words in it")
        sentences = PunktSentenceTokenizer().tokenize(" ".join(self.words))
        self._starts = list(accumulate((len(sentence.split()) for sentence in sentences[:-1]), initial=0))

    def sentences(self, count: int) -> list[str]:
        """The sentences of the first `count` words; the essays repeat when they end."""
        total = len(self.words)
        rounds = math.ceil(count / total)
        words = self.words * rounds
        starts = [total * round_ + start for round_ in range(rounds) for start in self._starts]
        ends = [start for start in starts if start < count] + [count]
        return [" ".join(words[start:end]) for start, end in pairwise(ends)]


def niah(seed: int, task: NeedleTask, essays: Essays | None = None) -> Generator[Parts]:
    rng = random.Random(seed)
    hay_seed, place_seed = rng.getrandbits(64), rng.getrandbits(64)
    seen: set[str] = set()
    keys = [draw_new(lambda: draw_item(rng, task.key_type), seen) for _ in range(max(task.keys, task.queries))]
    values = [[draw_new(lambda: draw_item(rng, task.value_type), seen) for _ in range(task.values)] for _ in keys]
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

    # A distractor shares no key or value with a needle or another distractor; the first n are the same for every n.
    hay_rng = random.Random(hay_seed)
    distractors: list[str] = []

    def lines(n: int) -> list[str]:
        if task.haystack == "noise":
            return [NOISE] * n
        while len(distractors) < n:
            key = draw_new(lambda: draw_item(hay_rng, task.key_type), seen)
            distractors.append(_needle(task, key, draw_new(lambda: draw_item(hay_rng, task.value_type), seen)))
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


def _chain(rng: random.Random, letters: int, value: str) -> Generator[Parts]:
    """One chain of 5 variables among n noise lines."""
    seen: set[str] = set()
    names = [draw_new(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), seen) for _ in range(5)]
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
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


def variable_tracking(seed: int, count_tokens: Callable[[str], int]) -> Generator[Parts]:
    """One chain of 4 hops, after a worked example of at most 500 tokens, which is part of the prompt."""
    rng = random.Random(seed)
    seen: set[str] = set()
    example_value, value = (draw_new(lambda: str(rng.randint(10000, 99998)), seen) for _ in range(2))
    chain = _chain(rng, 3, example_value)
    try:
        _, shown = fill(chain, lambda parts: count_tokens(parts.prompt), 500)
    except TooShort as error:
        raise UserError(f"vt: the worked example needs {error} tokens with this tokenizer, more than its 500") from None
    example = shown.prompt + " " + " ".join(shown.answers) + "\n"
    main = _chain(rng, 5, value)

    def build(n: int) -> Parts:
        parts = main.build(n)
        return replace(parts, context=example + "\n" + parts.context)

    return Generator(build, main.smallest)


def common_words(seed: int, length: int) -> Generator[Parts]:
    """Ten words that appear more often than the n - 10 others, after a worked example with other words."""
    rng = random.Random(seed)
    words = list(english_words())
    rng.shuffle(words)
    short = length < SHORT
    common, uncommon = (6, 1) if short else (30, 3)
    example_size, example_common, example_uncommon = (20, 3, 1) if short else (40, 10, 3)
    order_seed = rng.getrandbits(64)
    shown = _word_list(words[-example_size:], example_common, example_uncommon, order_seed)
    example = f"{shown.prompt} {_numbered(shown.answers)}\n"

    def build(n: int) -> Parts:
        parts = _word_list(words[:n], common, uncommon, order_seed)
        return replace(parts, context=example + parts.context)

    return Generator(build, smallest=11, largest=len(words) - example_size)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _word_list(words: list[str], common: int, uncommon: int, order_seed: int) -> Parts:
    entries = words[:10] * common + words[10:] * uncommon
    random.Random(order_seed).shuffle(entries)
    return Parts(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(entries)}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        words[:10],
    )


def frequent_words(seed: int, budget: int) -> Generator[Parts]:
    """n coded words with counts falling as the square of their rank; rank 1 is noise, ranks 2 to 4 are the answers."""
    rng = random.Random(seed)
    seen: set[str] = set()
    vocabulary = [
        draw_new(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), seen) for _ in range(max(budget // 50, 5))
    ]
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

    # From 74 words on, the counts of ranks 2 to 5 differ. The order of the words, and with it the number of tokens, varies
    # with n: a search for the last token would not converge.
    return Generator(build, smallest=74, slack=2**40)


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


def question_answering(seed: int, corpus: Corpus, question: Question) -> Generator[Parts]:
    """The gold documents of one question among distractors, which repeat when the corpus ends."""
    rng = random.Random(seed)
    order_seed = rng.getrandbits(64)
    near = [i for i in question.near if i not in question.gold]
    rng.shuffle(near)
    known = {*question.gold, *near}
    others = [i for i in range(len(corpus.documents)) if i not in known]
    rng.shuffle(others)

    def build(n: int) -> Parts:
        distractors = islice(chain(near, cycle(others + near)), n - len(question.gold))
        chosen = [*question.gold, *distractors]
        random.Random(order_seed).shuffle(chosen)
        documents = "\n\n".join(f"Document {i}:\n{corpus.documents[d]}" for i, d in enumerate(chosen, start=1))
        return Parts(
            f"{QA_INSTRUCTION}\n\nThe following are given documents.\n\n{documents}\n\n",
            f"{QA_INSTRUCTION}\n\nQuestion: {question.text}",
            " Answer:",
            question.answers,
        )

    spare = len(corpus.documents) > len(question.gold)
    return Generator(build, len(question.gold), 2**40 if spare else len(question.gold))
