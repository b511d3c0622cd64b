"""What every benchmark shares: a sample, the prompt made of it, the task that makes and scores samples.

How a benchmark module plugs in (`benchmark/tasks/<module>.py`, listed in `benchmark.tasks.MODULES`): it defines

    def make_tasks() -> dict[str, Task]       # every leaf task by its full name
    def find_task(name: str) -> Task | None   # optional: names outside that list ("ruler/5000/vt")
    def expand(name: str, data_dir: Path | None) -> TaskSelection | None
                                              # optional: groups ("ruler/4096"); None = not a group of mine

Both `make_tasks` and `find_task` must be cheap: no data is touched before `Task.samples`. This module imports neither
torch nor transformers.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sparse_attention_hub.errors import UserError

__all__ = [
    "ContextTooShortError",
    "Prompt",
    "Sample",
    "SampleRequest",
    "Task",
    "TaskDescription",
    "TaskSelection",
    "Tokenizer",
    "UserError",
    "answer_seed",
    "build_prompt",
    "in_tuning_split",
    "prompt_length",
    "take_split",
]

T = TypeVar("T")


class ContextTooShortError(UserError):
    """The context length, asked for or the model's, holds no prompt of this task: the data are not at fault."""


TUNING_SHARE = 0.2


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    bos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = True, add_generation_prompt: bool = False
    ) -> Any: ...


@dataclass(frozen=True)
class Sample:
    """One question. `context + question + answer_prefix` is the benchmark's own wording, white space included."""

    sample_id: str  # stable, unique in the task: "ruler/1024/vt:17"
    task: str  # the leaf task that scores it: "ruler/1024/vt"
    context: str  # prefilled once, shared by all questions on it
    question: str  # asked after the context
    answer_prefix: str  # starts the answer (the assistant's turn)
    references: list[str]  # gold answers as text ([] if unknown); the first one is used for reference_nll
    max_new_tokens: int  # the benchmark's own answer length
    columns: dict[str, Any] = field(default_factory=dict)  # the data columns, written to raw_results.csv
    all_classes: list[str] | None = None
    label: Any = None  # the gold answer as the metric wants it, where that is not `references` (an int, a JSON text)


@dataclass(frozen=True)
class Prompt:
    """Token ids, exactly what the model sees: `context_ids + question_ids`, answer prefix included."""

    context_ids: list[int]
    question_ids: list[int]
    truncated_tokens: int  # tokens cut from the middle of the context, 0 = none


@dataclass(frozen=True)
class SampleRequest:
    """Which samples are wanted. Tuning samples are never test samples."""

    tokenizer: Any  # a Tokenizer
    split: Literal["test", "tuning"] = "test"
    seed: int = 0
    max_samples: int | None = None  # None = all
    max_context_length: int = 64000  # tokens; generated tasks without a length of their own fill min(published, this)
    data_dir: Path | None = None
    trust_remote_code: bool = False
    length: int | None = None  # overrides the length of a generated task


@dataclass(frozen=True)
class TaskDescription:
    """One row of `python -m benchmark.tasks list`."""

    source: str  # "generated", or the data set's id
    metric: str
    max_new_tokens: int
    num_samples: int | None  # of the whole published set; None = as many as the data hold
    length: str = ""  # "4096 tokens", "about 122k tokens"


@dataclass(frozen=True)
class TaskSelection:
    """Leaf tasks behind a name, and a note where they are not all of the group's ("6 of 13 tasks: ...")."""

    names: list[str]
    note: str | None = None


class Task(ABC):
    """One leaf task. `metric` names the column of `score` that stands for the task; every score is in 0..1."""

    name: str
    metric: str
    use_chat_template: bool = True  # as the original benchmark does, for a tokenizer that has a template
    # Tokens that a generated task fills, prompt and answer together. It is not run where fewer are allowed (limits.py):
    # a cut sample may have lost what it asks for.
    fixed_length: int | None = None

    @property
    @abstractmethod
    def description(self) -> TaskDescription: ...

    @abstractmethod
    def samples(self, request: SampleRequest) -> list[Sample]:
        """The first `request.max_samples` samples. UserError, one line, when data cannot be had or are malformed."""

    @abstractmethod
    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """Metric name -> 0..1. A metric that cannot be computed here is absent, never 0."""

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        references = sample.references if sample.label is None else sample.label
        return self.score_answer(prediction, references, sample.all_classes)

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """What metrics.json holds beyond the mean of each metric (length buckets, Easy/Hard). Default: nothing."""
        return {}


def answer_seed(seed: int, sample_id: str) -> int:
    """The seed of the sampling maskers for one sample, the same for all configurations."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()[:8], "big") >> 1


def in_tuning_split(row_id: str) -> bool:
    """Whether a data set's row is for tuning: a fixed fifth of all rows, by the hash of the row's id alone."""
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8")).digest()[:8], "big") < TUNING_SHARE * 2**64


def take_split(rows: Iterable[T], request: SampleRequest, row_id: Callable[[T], str]) -> list[T]:
    """The rows of the request's split, in order, at most `max_samples`.

    Give rows that share a context the same id, so that no test question is asked on a context seen in tuning.
    """
    wanted = request.split == "tuning"
    taken: list[T] = []
    for row in rows:
        if request.max_samples is not None and len(taken) >= request.max_samples:
            break
        if in_tuning_split(row_id(row)) == wanted:
            taken.append(row)
    return taken


@dataclass(frozen=True)
class _Text:
    """A rendered prompt: `head` (template text before the context), `context`, and `tail` (all the rest)."""

    head: str
    context: str
    tail: str


def _render(sample: Sample, tokenizer: Any, use_chat_template: bool) -> _Text:
    if not (use_chat_template and getattr(tokenizer, "chat_template", None)):
        return _Text("", sample.context, sample.question + sample.answer_prefix)
    # The white space that joins the prefix to the question stays in the user's turn: " Answer:" -> "Answer:".
    prefix = sample.answer_prefix.lstrip()
    joint = sample.answer_prefix[: len(sample.answer_prefix) - len(prefix)]
    digest = hashlib.sha256((sample.context + "\0" + sample.question).encode("utf-8", "replace")).hexdigest()[:24]
    separator = f"{digest}"
    content = sample.context + separator + sample.question + joint
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(separator)
    if not found:
        raise UserError(f"{sample.task}: the chat template of this tokenizer does not show the user's message as it is")
    # Templates may strip the message, so the context is looked for without its leading white space.
    context = sample.context.lstrip()
    if not before.endswith(context):
        return _Text("", before, after + prefix)
    return _Text(before[: len(before) - len(context)], context, after + prefix)


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]


def _with_one_bos(ids: list[int], tokenizer: Any, rest: list[int]) -> list[int]:
    """`ids` with exactly one leading BOS if the text rendered one or the tokenizer would add one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return ids
    first = 0
    while first < len(ids) and ids[first] == bos:
        first += 1
    if first or (_adds_bos(tokenizer) and not (not ids and rest[:1] == [bos])):
        return [bos, *ids[first:]]
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def build_prompt(
    sample: Sample, tokenizer: Any, *, max_context_length: int, max_new_tokens: int, use_chat_template: bool
) -> Prompt:
    """The token ids of one question: context, then question, template suffix and answer prefix.

    `max_context_length` (tokens) bounds context, question and `max_new_tokens` together. A context that is too long
    loses its middle: the first and the last half stay, and so does the template text before it. Raises UserError when
    question and answer alone do not fit.
    """
    text = _render(sample, tokenizer, use_chat_template)
    question_ids = _encode(tokenizer, text.tail)
    context_ids = _with_one_bos(_encode(tokenizer, text.head + text.context), tokenizer, question_ids)
    room = max_context_length - max_new_tokens - len(question_ids)
    truncated = 0
    if len(context_ids) > room:
        head_ids = _with_one_bos(_encode(tokenizer, text.head), tokenizer, [])
        body_ids = _encode(tokenizer, text.context)
        keep = room - len(head_ids)
        if keep < 1:
            raise ContextTooShortError(
                f"{sample.task}: a context length of {max_context_length} is too short for the question "
                f"({len(head_ids) + len(question_ids)} tokens) and its answer ({max_new_tokens} tokens): "
                "raise --max-context-length"
            )
        front = keep // 2
        truncated = len(body_ids) - keep
        if truncated > 0:
            body_ids = body_ids[:front] + body_ids[len(body_ids) - (keep - front) :]
        context_ids, truncated = head_ids + body_ids, max(truncated, 0)
    if not context_ids:  # a prefill needs a token
        context_ids, question_ids = question_ids[:1], question_ids[1:]
    return Prompt(context_ids, question_ids, truncated)


def prompt_length(sample: Sample, tokenizer: Any, use_chat_template: bool) -> int:
    """Tokens of the whole prompt, uncut, template and BOS included: what a generator holds against its length."""
    prompt = build_prompt(sample, tokenizer, max_context_length=2**62, max_new_tokens=0, use_chat_template=use_chat_template)
    return len(prompt.context_ids) + len(prompt.question_ids)
