"""InfiniteBench (OpenBMB, arXiv 2402.13718): 12 subsets.

`infinite_bench/<subset>` generates passkey, number_string, kv_retrieval, math_find, math_calc and code_run, of the context
length or the published size, whichever is smaller, and reads the others. `infinite_bench_hf/<subset>` reads all 12.
Data are read from `--data-dir DIR`, `DIR/infinite_bench/<subset>.jsonl` or `DIR/infinite_bench_hf/<subset>.jsonl`, else
from the hub (xinrongzhang2022/InfiniteBench, or the copy MaxJeblick/InfiniteBench, which holds the prompts).

Prompts are the authors' for plain completion (their yarn-mistral column), which end in the start of the answer, and have
no chat template. code_run asks with the data's own sentence and starts the answer with the ending that it names. With a
chat template, SmolLM2-135M-Instruct repeats the question on one passkey in four at 1k tokens; without, it finds all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmark.tasks import infinite_bench_scores as score
from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, SampleRequest, Scores, Task, TaskDescription
from benchmark.tasks.data import Row, Source
from benchmark.tasks.infinite_bench_generators import GENERATORS, Generated
from benchmark.tasks.ruler_generators import Generator, fill_prompt, sample_seed
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, Form
from benchmark.tasks.values import as_texts

HUB = "xinrongzhang2022/InfiniteBench"


@dataclass(frozen=True)
class Subset:
    """The prompt in three parts, in the authors' words ({subject} comes from the question), and the published sizes."""

    context: str
    question: str
    answer_prefix: str
    max_new_tokens: int
    num_samples: int
    length: str
    metric: str
    score: Callable[[str, Any], float]
    label: Callable[..., Any]  # the gold answer, of one that may be a value or a list; `choice` needs the options too


SUBSETS: dict[str, Subset] = {
    "passkey": Subset(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information.\n\n{context}",
        "\n\n{question}", "\n\nThe pass key is",
        6, 590, "122k tokens", "accuracy", score.first_digits, score.text,
    ),
    "number_string": Subset(
        "There is an important info hidden inside a lot of irrelevant text. Find it. "
        "I will quiz you about the important information there.\n\n{context}",
        "\n\n{question}", "\n\nThe sequence of digits is",
        12, 590, "122k tokens", "accuracy", score.first_digits, score.text,
    ),
    "kv_retrieval": Subset(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}", "\n\n{question}", "",
        50, 500, "90k tokens", "accuracy", score.kv_retrieval, score.text,
    ),
    "math_find": Subset("What is {subject} in the following list?\n\n{context}", "\n\n{question}", "",
        3, 350, "88k tokens", "accuracy", score.math_find, score.number,
    ),
    "math_calc": Subset(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}",
        "\n", "Values:",
        30000, 50, "44k tokens", "leading_run", score.math_calc, score.integers,
    ),
    "code_run": Subset(
        "There is a function called {subject} in the following Python code.\n\n{context}",
        "\n\n{question}", "\n\nThe return value is:",
        5, 400, "550 functions", "accuracy", score.code_run, score.integer,
    ),
    "code_debug": Subset(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it crash."
        "\n\n{context}",
        "\n\nOptions:{options}", "\n\nThe correct option is:",
        5, 394, "115k tokens", "accuracy", score.code_debug, score.choice,
    ),
    "longbook_choice_eng": Subset(
        "Read the book and answer the question.\n\n{context}",
        "\n\nQuestion: {question}{options}", "\n\nThe letter of the correct answer is",
        40, 229, "184k tokens", "accuracy", score.longbook_choice, score.choice,
    ),
    "longbook_qa_eng": Subset(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}",
        "\n\nQuestion: {question}", "\nAnswer:",
        40, 351, "193k tokens", "qa_f1", partial(score.best_of, metrics.word_f1), as_texts,
    ),
    "longbook_qa_chn": Subset("阅读以下书籍然后回答问题。\n\n{context}", "\n\n问题：{question}", "\n答案：",
        40, 175, "2069k tokens", "character_f1", partial(score.best_of, metrics.character_f1_zh), as_texts,
    ),
    "longbook_sum_eng": Subset("Summarize the book below.\n\n{context}", "\n\n", "Summary:",
        1200, 103, "172k tokens", "rouge_lsum", partial(score.best_of, metrics.rouge_lsum), as_texts,
    ),
    "longdialogue_qa_eng": Subset(
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
        "and you should try to guess who that character is.\n\n{context}",
        "\n\n", "The name that has been replaced with $$MASK$$ is likely",
        40, 200, "104k tokens", "accuracy", score.longdialogue, as_texts,
    ),
}  # fmt: skip


def prompt_parts(subset: str, context: str, question: str, options: list[str] | None) -> PromptParts:
    """(context, question, answer prefix) of one row, which join to the authors' prompt. `question`: column `input`."""
    spec, subject = SUBSETS[subset], ""
    prefix = spec.answer_prefix
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
    return (
        spec.context.format(context=context, subject=subject),
        spec.question.format(question=question, options=listed),
        prefix,
    )


def _split_at_last(text: str, start: str) -> tuple[str, str]:
    """Text up to the last `start`, and the rest: the input's own start of the answer."""
    before, found, after = text.rpartition(start)
    return (before, found + after) if found else (text, "")


class _InfiniteBenchTask(Task):
    use_chat_template = False
    source = HUB

    def __init__(self, benchmark: str, subset: str) -> None:
        self.name = f"{benchmark}/{subset}"
        self.subset = subset
        spec = self.spec = SUBSETS[subset]
        self.metric = spec.metric
        length = spec.length if self.source == HUB else f"at most {spec.length}"
        self.description = TaskDescription(self.source, self.metric, spec.max_new_tokens, spec.num_samples, length)

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """Raises ValueError for an impossible gold answer, such as a text where a number is needed."""
        return {self.metric: float(self.spec.score(prediction, references)) if references not in ([], ()) else 0.0}


class GeneratedTask(_InfiniteBenchTask):
    """A synthetic subset. Sample i is a function of seed, split, subset, length, i and the tokenizer."""

    source = "generated"

    def samples(self, request: SampleRequest) -> list[Sample]:
        length = request.length or request.max_context_length
        count = self.spec.num_samples if request.max_samples is None else request.max_samples
        return [self._generate(index, length, request) for index in range(count)]

    def _generate(self, index: int, length: int, request: SampleRequest) -> Sample:
        rows = GENERATORS[self.subset](sample_seed(request.seed, request.split, self.subset, length, index), index)
        identity = f"{'' if request.split == 'test' else 'tuning-'}{index}@{length}"
        make = Generator(lambda n: self._sample(identity, rows.build(n), request.tokenizer), rows.smallest, rows.largest)
        return fill_prompt(self, make, length, request)[0]

    def _sample(self, identity: str, row: Generated, tokenizer: Any) -> Sample:
        prompt = prompt_parts(self.subset, row.context, row.input, None)
        text = f"{row.answer:g}" if isinstance(row.answer, float) else str(row.answer)
        tokens = self.description.max_new_tokens
        if self.subset == "math_calc":  # a shorter expression has a shorter answer, which leaves room for the prompt
            tokens = min(tokens, len(tokenizer.encode(" " + text, add_special_tokens=False)) + 8)
        columns: Row = dict(zip(PROMPT_COLUMNS, prompt, strict=True))
        columns |= {"answer": text, "task": self.subset, "max_new_tokens": tokens}
        return self.make_sample(identity, prompt, [text], max_new_tokens=tokens, columns=columns, label=row.answer)


class PublishedTask(_InfiniteBenchTask, DataTask):
    """A subset of published rows, in the authors' columns or those of the copy."""

    def __init__(self, benchmark: str, subset: str) -> None:
        super().__init__(benchmark, subset)
        self.sources = [
            Source(benchmark, subset, HUB, split=subset),
            Source(benchmark, subset, "MaxJeblick/InfiniteBench", config=subset),
        ]
        original = {"context": "text", "input": "text", "answer": "anything", "options": "?list of texts"}
        self.forms = [Form(original, self._prompt), Form({**PROMPT_COLUMNS, "answer": "anything"})]

    def _prompt(self, row: Row) -> PromptParts:
        return prompt_parts(self.subset, row["context"], row["input"], row.get("options"))

    def split_key(self, sample: Sample) -> str:
        return f"{self.subset}:{sample.context}"

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        # The copy lists the options in the question, one per line.
        options = row.get("options") or re.findall(r"^[A-D]\. (.*)$", prompt[1], re.MULTILINE)
        try:
            label = self.spec.label(row["answer"], *([options] if self.spec.label is score.choice else []))
        except ValueError as error:
            raise ValueError(f"column 'answer': {error}") from error
        references = [str(label)] if self.subset == "math_calc" else as_texts(label)
        return self.make_sample(identity, prompt, references, columns=row, label=label)


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = []
    for subset in SUBSETS:
        made = GeneratedTask if subset in GENERATORS else PublishedTask
        tasks += [made("infinite_bench", subset), PublishedTask("infinite_bench_hf", subset)]
    return {task.name: task for task in tasks}
