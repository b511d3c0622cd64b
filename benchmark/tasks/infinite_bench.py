"""InfiniteBench (OpenBMB, arXiv 2402.13718): 12 subsets.

`infinite_bench/<subset>`: passkey, number_string, kv_retrieval, math_find, math_calc and code_run are generated, at the
published size or to fill the context length asked for, whichever is smaller; the others take real data.
`infinite_bench_hf/<subset>` takes the published data for all 12. Each looks for data in its own folder of
`--data-dir DIR`, `DIR/infinite_bench/<subset>.jsonl` or `DIR/infinite_bench_hf/<subset>.jsonl`, then on the hub
(xinrongzhang2022/InfiniteBench: id, context, input, answer, options; or MaxJeblick/InfiniteBench, prepared: context,
question, answer_prefix, answer).

Prompts are the authors' for plain completion (their yarn-mistral column), which end in the start of the answer; like
theirs, they go to the model without a chat template. code_run asks with the data's own sentence and starts the answer
with the ending that it names. With a chat template, SmolLM2-135M-Instruct repeats the question on one passkey in four
at 1k tokens; without, it finds all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks import ruler_generators as make
from benchmark.tasks.base import (
    ContextTooShortError,
    Sample,
    SampleRequest,
    Task,
    TaskDescription,
    UserError,
    prompt_length,
    take_split,
)
from benchmark.tasks.infinite_bench_generators import GENERATORS, Row
from benchmark.tasks.infinite_bench_scores import SCORES, label_of
from benchmark.tasks.ruler import sample_seed
from benchmark.tasks.sources import Form, Place, read_samples

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
PREPARED_HUB = "MaxJeblick/InfiniteBench"


def prompt_parts(subset: str, context: str, question: str, options: list[str] | None) -> tuple[str, str, str]:
    """(context, question, answer prefix) of one row, which join to the authors' prompt. `question`: column `input`."""
    if subset == "passkey":
        head = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information."
        )
        return f"{head}\n\n{context}", f"\n\n{question}", "\n\nThe pass key is"
    if subset == "number_string":
        head = (
            "There is an important info hidden inside a lot of irrelevant text. Find it. "
            "I will quiz you about the important information there."
        )
        return f"{head}\n\n{context}", f"\n\n{question}", "\n\nThe sequence of digits is"
    if subset == "kv_retrieval":
        head = "Extract the value corresponding to the specified key in the JSON object below."
        question, prefix = _before(question, "The value associated with")
        return f"{head}\n\n{context}", f"\n\n{question}", prefix
    if subset == "math_find":
        found = re.search(r"The .+ of", question)
        target = found.group()[:-3].lower() if found else "the number"
        question, prefix = _before(question, found.group() if found else "")
        return f"What is {target} in the following list?\n\n{context}", f"\n\n{question}", prefix
    if subset == "math_calc":
        head = (
            "Let us calculate the intermediate values of an expression.\n\n"
            "Expression: 1 + 3 + 4\nValues: [1, 4, 8]\n\nExpression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\n"
        )
        return f"{head}Expression: {context}", "\n", "Values:"
    if subset == "code_run":
        called = re.search(r"func_\d+", question)
        head = f"There is a function called {called.group() if called else 'func'} in the following Python code."
        return f"{head}\n\n{context}", f"\n\n{question}", "\n\nThe return value is:"
    if subset == "code_debug":
        head = (
            "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it crash."
        )
        return f"{head}\n\n{context}", f"\n\nOptions:{_options(options)}", "\n\nThe correct option is:"
    if subset == "longbook_choice_eng":
        head = "Read the book and answer the question."
        asked = f"\n\nQuestion: {question}{_options(options)}"
        return f"{head}\n\n{context}", asked, "\n\nThe letter of the correct answer is"
    if subset == "longbook_qa_eng":
        head = "Read the book and answer the question. Be very concise in your answer."
        return f"{head}\n\n{context}", f"\n\nQuestion: {question}", "\nAnswer:"
    if subset == "longbook_qa_chn":
        return f"阅读以下书籍然后回答问题。\n\n{context}", f"\n\n问题：{question}", "\n答案："
    if subset == "longbook_sum_eng":
        return f"Summarize the book below.\n\n{context}", "\n\n", "Summary:"
    head = (
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
        "and you should try to guess who that character is."
    )
    return f"{head}\n\n{context}", "\n\n", "The name that has been replaced with $$MASK$$ is likely"


def _before(text: str, start: str) -> tuple[str, str]:
    """Text up to the last `start`, and from there on: the input's own beginning of the answer."""
    position = text.rfind(start) if start else -1
    return (text, "") if position < 0 else (text[:position], text[position:])


def _options(options: list[str] | None) -> str:
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options or [], strict=False))


class _InfiniteBenchTask(Task):
    use_chat_template = False

    def __init__(self, benchmark: str, subset: str) -> None:
        self.name = f"{benchmark}/{subset}"
        self.benchmark = benchmark
        self.subset = subset
        self.metric, self._score = SCORES[subset]
        self.max_new_tokens, self.num_samples, self.length = SIZES[subset]

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """ValueError for a gold answer that cannot be one, such as a text where a number is needed."""
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
            return self._sample(f"{self.name}:{mark}{index}@{length}", generator.build(n), request.tokenizer)

        def measure(made: Sample) -> int:
            return prompt_length(made, request.tokenizer, self.use_chat_template) + made.max_new_tokens

        try:
            return make.fill(sample, measure, length, generator.smallest, generator.published)
        except make.TooShort as error:
            raise ContextTooShortError(
                f"{self.name}: a context length of {length} tokens is too short: the smallest prompt and its answer "
                f"need {error}; raise the context length"
            ) from None

    def _sample(self, sample_id: str, row: Row, tokenizer: Any) -> Sample:
        context, question, prefix = prompt_parts(self.subset, row.context, row.input, None)
        text = f"{row.answer:g}" if isinstance(row.answer, float) else str(row.answer)
        tokens = self.max_new_tokens
        if self.subset == "math_calc":  # a smaller expression has a shorter answer; the prompt leaves room for it
            tokens = min(tokens, len(tokenizer.encode(" " + text, add_special_tokens=False)) + 8)
        columns = {"context": context, "question": question, "answer_prefix": prefix, "answer": text}
        return Sample(
            sample_id=sample_id,
            task=self.name,
            context=context,
            question=question,
            answer_prefix=prefix,
            references=[text],
            max_new_tokens=tokens,
            columns={**columns, "task": self.subset, "max_new_tokens": tokens},
            label=row.answer,
        )


class PublishedTask(_InfiniteBenchTask):
    """A subset of published rows, in the authors' columns or in the prepared ones."""

    @property
    def description(self) -> TaskDescription:
        return self._description(HUB, self.length)

    def samples(self, request: SampleRequest) -> list[Sample]:
        places = [Place(HUB, None, self.subset), Place(PREPARED_HUB, self.subset, "test")]
        original = {"context": "text", "input": "text", "answer": "anything", "options": "?list of texts"}
        prepared = {"context": "text", "question": "text", "answer_prefix": "text", "answer": "anything"}
        forms = [Form(original, self._from_original), Form(prepared, self._from_prepared)]
        rows = read_samples(self.benchmark, self.subset, places, forms, request.data_dir)
        # By context, since several questions are asked on one book.
        chosen = take_split(rows, request, lambda sample: f"{self.subset}:{sample.context}")
        if not chosen and request.max_samples != 0:
            raise UserError(f"{self.name}: its data hold no rows of the {request.split} split")
        return chosen

    def _from_original(self, row: dict[str, Any], number: int) -> Iterator[Sample]:
        options = row.get("options") or None
        parts = prompt_parts(self.subset, row["context"], row["input"], options)
        yield self._sample(row, number, parts, options)

    def _from_prepared(self, row: dict[str, Any], number: int) -> Iterator[Sample]:
        # The prepared rows list the options in the question, one a line.
        options = re.findall(r"^[A-D]\. (.*)$", row["question"], re.MULTILINE) or None
        yield self._sample(row, number, (row["context"], row["question"], row["answer_prefix"]), options)

    def _sample(self, row: dict[str, Any], number: int, parts: tuple[str, str, str], options: list[str] | None) -> Sample:
        try:
            label = label_of(self.subset, row["answer"], options)
        except ValueError as error:
            raise ValueError(f"column 'answer': {error}") from error
        if self.subset == "math_calc":
            references = [str(label)]
        else:
            references = [str(item) for item in label] if isinstance(label, list) else [str(label)]
        return Sample(
            sample_id=f"{self.name}:{number}",
            task=self.name,
            context=parts[0],
            question=parts[1],
            answer_prefix=parts[2],
            references=references,
            max_new_tokens=self.max_new_tokens,
            columns=dict(row),
            label=label,
        )


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = []
    for subset in SIZES:
        made = GeneratedTask if subset in GENERATORS else PublishedTask
        tasks.append(made("infinite_bench", subset))
        tasks.append(PublishedTask("infinite_bench_hf", subset))
    return {task.name: task for task in tasks}
