"""InfiniteBench (OpenBMB, arXiv 2402.13718): 12 subsets.

`infinite_bench/<subset>` generates passkey, number_string, kv_retrieval, math_find, math_calc and code_run, of the context
length or the published size, whichever is smaller, and reads the others. `infinite_bench_hf/<subset>` reads all 12.
Data are read from `--data-dir DIR`, `DIR/infinite_bench/<subset>.jsonl` or `DIR/infinite_bench_hf/<subset>.jsonl`, else
from the hub (xinrongzhang2022/InfiniteBench, or the copy MaxJeblick/InfiniteBench, which holds the prompts).

Prompts are the authors' for plain completion (their yarn-mistral column), which end in the start of the answer, and have
no chat template. code_run asks with the data's own sentence and starts the answer with the ending that it names. With a
chat template, SmolLM2-135M-Instruct repeats the question on one passkey in four at 1k tokens; without, it finds all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks import ruler_generators as make
from benchmark.tasks.base import (
    ContextTooShortError,
    PromptParts,
    Sample,
    SampleRequest,
    Task,
    TaskDescription,
    UserError,
    prompt_length,
    take_split,
)
from benchmark.tasks.data import Source
from benchmark.tasks.infinite_bench_generators import GENERATORS, Row
from benchmark.tasks.infinite_bench_scores import SCORES, label_of
from benchmark.tasks.ruler import sample_seed
from benchmark.tasks.sources import PROMPT_COLUMNS, Form, as_texts, prompt_of, read_samples

# subset -> (answer tokens, published samples, published length)
SIZES: dict[str, tuple[int, int, str]] = {
    "passkey": (6, 590, "122k tokens"),
    "number_string": (12, 590, "122k tokens"),
    "kv_retrieval": (50, 500, "90k tokens"),
    "math_find": (3, 350, "88k tokens"),
    "math_calc": (30000, 50, "44k tokens"),
    "code_run": (5, 400, "550 functions"),
    "code_debug": (5, 394, "115k tokens"),
    "longbook_choice_eng": (40, 229, "184k tokens"),
    "longbook_qa_eng": (40, 351, "193k tokens"),
    "longbook_qa_chn": (40, 175, "2069k tokens"),
    "longbook_sum_eng": (1200, 103, "172k tokens"),
    "longdialogue_qa_eng": (40, 200, "104k tokens"),
}
HUB = "xinrongzhang2022/InfiniteBench"

# subset -> (context, question, answer prefix), in the authors' words; {subject} comes from the question
PROMPTS: dict[str, PromptParts] = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information.\n\n{context}",
        "\n\n{question}", "\n\nThe pass key is",
    ),
    "number_string": (
        "There is an important info hidden inside a lot of irrelevant text. Find it. "
        "I will quiz you about the important information there.\n\n{context}",
        "\n\n{question}", "\n\nThe sequence of digits is",
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}", "\n\n{question}", "",
    ),
    "math_find": ("What is {subject} in the following list?\n\n{context}", "\n\n{question}", ""),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}",
        "\n", "Values:",
    ),
    "code_run": (
        "There is a function called {subject} in the following Python code.\n\n{context}",
        "\n\n{question}", "\n\nThe return value is:",
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it crash."
        "\n\n{context}",
        "\n\nOptions:{options}", "\n\nThe correct option is:",
    ),
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n{context}",
        "\n\nQuestion: {question}{options}", "\n\nThe letter of the correct answer is",
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}",
        "\n\nQuestion: {question}", "\nAnswer:",
    ),
    "longbook_qa_chn": ("阅读以下书籍然后回答问题。\n\n{context}", "\n\n问题：{question}", "\n答案："),
    "longbook_sum_eng": ("Summarize the book below.\n\n{context}", "\n\n", "Summary:"),
    "longdialogue_qa_eng": (
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
        "and you should try to guess who that character is.\n\n{context}",
        "\n\n", "The name that has been replaced with $$MASK$$ is likely",
    ),
}  # fmt: skip


def prompt_parts(subset: str, context: str, question: str, options: list[str] | None) -> PromptParts:
    """(context, question, answer prefix) of one row, which join to the authors' prompt. `question`: column `input`."""
    before, asked, prefix = PROMPTS[subset]
    subject = ""
    if subset == "kv_retrieval":
        question, prefix = _split_at_last(question, "The value associated with")
    elif subset == "math_find":
        found = re.search(r"The .+ of", question)
        subject = found.group()[:-3].lower() if found else "the number"
        question, prefix = _split_at_last(question, found.group()) if found else (question, "")
    elif subset == "code_run":
        called = re.search(r"func_\d+", question)
        subject = called.group() if called else "func"
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options or [], strict=False))
    return before.format(context=context, subject=subject), asked.format(question=question, options=listed), prefix


def _split_at_last(text: str, start: str) -> tuple[str, str]:
    """Text up to the last `start`, and the rest: the input's own start of the answer."""
    before, found, after = text.rpartition(start)
    return (before, found + after) if found else (text, "")


class _InfiniteBenchTask(Task):
    use_chat_template = False

    def __init__(self, benchmark: str, subset: str) -> None:
        self.name = f"{benchmark}/{subset}"
        self.benchmark = benchmark
        self.subset = subset
        self.metric, self._score = SCORES[subset]
        self.max_new_tokens, self.num_samples, self.length = SIZES[subset]

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """Raises ValueError for an impossible gold answer, such as a text where a number is needed."""
        return {self.metric: float(self._score(prediction, references)) if references not in ([], ()) else 0.0}

    def _description(self, source: str, length: str) -> TaskDescription:
        return TaskDescription(source, self.metric, self.max_new_tokens, self.num_samples, length)


class GeneratedTask(_InfiniteBenchTask):
    """A synthetic subset. Sample i is a function of seed, split, subset, length, i and the tokenizer."""

    @property
    def description(self) -> TaskDescription:
        return self._description("generated", f"at most {self.length}")

    def samples(self, request: SampleRequest) -> list[Sample]:
        length = request.length or request.max_context_length
        count = self.num_samples if request.max_samples is None else request.max_samples
        return [self._generate(index, length, request) for index in range(count)]

    def _generate(self, index: int, length: int, request: SampleRequest) -> Sample:
        seed = sample_seed(request.seed, request.split, self.subset, length, index)
        generator = GENERATORS[self.subset](seed, index)
        mark = "" if request.split == "test" else "tuning-"

        def sample(n: int) -> Sample:
            return self._sample(f"{mark}{index}@{length}", generator.build(n), request.tokenizer)

        def measure(made: Sample) -> int:
            return prompt_length(made, request.tokenizer, self.use_chat_template) + made.max_new_tokens

        try:
            return make.fill(sample, measure, length, generator.smallest, generator.largest)
        except make.TooShort as error:
            raise ContextTooShortError(
                f"{self.name}: a context length of {length} tokens is too short: the smallest prompt and its answer "
                f"need {error}; raise the context length"
            ) from None

    def _sample(self, identity: str, row: Row, tokenizer: Any) -> Sample:
        prompt = prompt_parts(self.subset, row.context, row.input, None)
        text = f"{row.answer:g}" if isinstance(row.answer, float) else str(row.answer)
        tokens = self.max_new_tokens
        if self.subset == "math_calc":  # a shorter expression has a shorter answer, which leaves room for the prompt
            tokens = min(tokens, len(tokenizer.encode(" " + text, add_special_tokens=False)) + 8)
        columns = {
            **dict(zip(PROMPT_COLUMNS, prompt, strict=True)),
            "answer": text,
            "task": self.subset,
            "max_new_tokens": tokens,
        }
        return self.make_sample(identity, prompt, [text], max_new_tokens=tokens, columns=columns, label=row.answer)


class PublishedTask(_InfiniteBenchTask):
    """A subset of published rows, in the authors' columns or those of the copy."""

    @property
    def description(self) -> TaskDescription:
        return self._description(HUB, self.length)

    def samples(self, request: SampleRequest) -> list[Sample]:
        sources = [
            Source(self.benchmark, self.subset, HUB, split=self.subset),
            Source(self.benchmark, self.subset, "MaxJeblick/InfiniteBench", config=self.subset),
        ]
        original = {"context": "text", "input": "text", "answer": "anything", "options": "?list of texts"}
        forms = [Form(original, self._original), Form({**PROMPT_COLUMNS, "answer": "anything"}, self._copy)]
        # By context: several questions are asked on one book.
        rows = read_samples(sources, forms, request.data_dir)
        chosen = take_split(rows, request, lambda sample: f"{self.subset}:{sample.context}")
        if not chosen and request.max_samples != 0:
            raise UserError(f"{self.name}: its data hold no rows of the {request.split} split")
        return chosen

    def _original(self, row: dict[str, Any], number: int) -> Iterator[Sample]:
        options = row.get("options") or None
        yield self._sample(row, number, prompt_parts(self.subset, row["context"], row["input"], options), options)

    def _copy(self, row: dict[str, Any], number: int) -> Iterator[Sample]:
        # The copy lists the options in the question, one per line.
        options = re.findall(r"^[A-D]\. (.*)$", row["question"], re.MULTILINE) or None
        yield self._sample(row, number, prompt_of(row), options)

    def _sample(self, row: dict[str, Any], number: int, prompt: PromptParts, options: list[str] | None) -> Sample:
        try:
            label = label_of(self.subset, row["answer"], options)
        except ValueError as error:
            raise ValueError(f"column 'answer': {error}") from error
        references = as_texts(str(label) if self.subset == "math_calc" else label)
        return self.make_sample(number, prompt, references, columns=dict(row), label=label)


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = []
    for subset in SIZES:
        made = GeneratedTask if subset in GENERATORS else PublishedTask
        tasks += [made("infinite_bench", subset), PublishedTask("infinite_bench_hf", subset)]
    return {task.name: task for task in tasks}
