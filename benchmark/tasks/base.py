"""What all benchmarks share: samples, their prompts, and the tasks that make and score samples.

A benchmark module (`benchmark/tasks/<module>.py`, listed in `benchmark.tasks.MODULES`) defines

    def make_tasks() -> dict[str, Task]       # every leaf task by its full name
    def find_task(name: str) -> Task | None   # optional: names outside that list ("ruler/5000/vt")
    def expand(name: str, data_dir: Path | None) -> TaskSelection | None   # optional: groups ("ruler/4096"); None = no group

`make_tasks` and `find_task` must be cheap: no data is read before `Task.samples`. This module imports neither torch nor
transformers.
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

from sparse_attention_hub.errors import UserError as UserError  # re-exported
from sparse_attention_hub.errors import quoted
from sparse_attention_hub.models.prompts import encode_continuation, render_chat

Row = dict[str, Any]  # a row of a data file: column name -> value
PromptParts = tuple[str, str, str]  # context, question, answer prefix
Scores = dict[str, float]  # metric name -> 0..1

TUNING_SHARE = 0.2
LONG_TEXT = 5_000_000  # characters that are encoded in any case
LONG_TOKEN = 100  # characters: more than tokens have on average in any text


class ContextTooShortError(UserError):
    """The context length, the user's or the model's, is too short for a prompt of this task. The data are fine."""


@dataclass(frozen=True)
class Sample:
    """One question. `context + question + answer_prefix` is the benchmark's own prompt, white space included."""

    sample_id: str  # stable, unique in the task: "ruler/1024/vt:17"
    task: str  # the leaf task that scores the answer: "ruler/1024/vt"
    context: str  # prefilled once for all questions on it
    question: str  # asked after the context
    answer_prefix: str  # starts the answer (the assistant's turn)
    references: list[str]  # gold answers as text ([] if unknown); the first one is used for reference_nll
    max_new_tokens: int  # the benchmark's own answer length
    columns: Row = field(default_factory=dict)  # the data columns, written to raw_results.csv
    all_classes: list[str] | None = None
    label: Any = None  # the gold answer for the metric, where it is not `references` (an int, a JSON text)

    def __post_init__(self) -> None:
        for text in (self.sample_id, self.context, self.question, self.answer_prefix, *self.references):
            if not isinstance(text, str) or not is_writable(text):
                raise UserError(f"sample {quoted(self.sample_id)}: prompt and references must be text, got {quoted(text)}")


@dataclass(frozen=True)
class Prompt:
    """The token ids that the model sees: `context_ids + question_ids`, answer prefix included."""

    context_ids: list[int]
    question_ids: list[int]
    truncated_tokens: int  # tokens cut from the middle of the context, 0 = none


@dataclass(frozen=True)
class SampleRequest:
    """The samples to make. Tuning samples are never test samples."""

    tokenizer: Any  # of transformers, or with its encode, decode, bos_token_id, chat_template and apply_chat_template
    split: Literal["test", "tuning"] = "test"
    seed: int = 0
    max_samples: int | None = None  # None = all
    max_context_length: int = 64000  # tokens; a generated task without a fixed length fills at most this many
    data_dir: Path | None = None
    trust_remote_code: bool = False
    length: int | None = None  # overrides the length of a generated task


@dataclass(frozen=True)
class TaskDescription:
    """One row of `python -m benchmark.tasks list`."""

    source: str  # "generated", or the data set's id
    metric: str
    max_new_tokens: int
    num_samples: int | None  # in the published set; None = as many as the data hold
    length: str = ""  # "4096 tokens", "about 122k tokens"


@dataclass(frozen=True)
class TaskSelection:
    """The leaf tasks of a name, and a note if tasks of the group are missing ("6 of 13 tasks: ...")."""

    names: list[str]
    note: str | None = None


class Task(ABC):
    """One leaf task. `metric`: the entry of `score` that is reported as the task's score. All scores are in 0..1."""

    name: str
    metric: str
    description: TaskDescription
    use_chat_template: bool = True  # as the original benchmark does, for a tokenizer that has a template
    # Tokens of a generated task's samples, prompt and answer together. It does not run where fewer are allowed (limits.py):
    # a truncated sample may lack the text that holds its answer.
    fixed_length: int | None = None

    @abstractmethod
    def samples(self, request: SampleRequest) -> list[Sample]:
        """The first `request.max_samples` samples. Raises UserError when data are missing or malformed."""

    @abstractmethod
    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """Metric name -> 0..1. A metric that cannot be computed here is absent, never 0."""

    def make_sample(self, identity: object, prompt: PromptParts, references: list[str], **fields: Any) -> Sample:
        """A sample of this task. `identity`: the end of its id; `fields`: other fields of Sample."""
        fields.setdefault("max_new_tokens", self.description.max_new_tokens)
        return Sample(f"{self.name}:{identity}", self.name, *prompt, references, **fields)

    def score(self, prediction: str, sample: Sample) -> Scores:
        references = sample.references if sample.label is None else sample.label
        return self.score_answer(prediction, references, sample.all_classes)

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """What metrics.json holds beyond the mean of each metric (length buckets, Easy/Hard). Default: nothing."""
        return {}


def is_writable(text: str) -> bool:
    """Whether the text holds no half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def hash64(text: str) -> int:
    """64 bits of the text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def answer_seed(seed: int, sample_id: str) -> int:
    """The seed of the sampling maskers for one sample, the same for all configurations."""
    return hash64(f"{seed}\0{sample_id}") >> 1


def in_tuning_split(row_id: str) -> bool:
    """Whether a data set's row is for tuning: a fixed fifth of all rows, chosen by the hash of the row's id."""
    return hash64(row_id) < TUNING_SHARE * 2**64


def _render(sample: Sample, tokenizer: Any, use_chat_template: bool) -> tuple[str, str, str]:
    """(template text before the context, context, all the rest)."""
    if not (use_chat_template and getattr(tokenizer, "chat_template", None)):
        return "", sample.context, sample.question + sample.answer_prefix
    # The white space between question and prefix stays in the user's turn: " Answer:" -> "Answer:".
    prefix = sample.answer_prefix.lstrip()
    joint = sample.answer_prefix.removesuffix(prefix)
    separator = hashlib.sha256((sample.context + "\0" + sample.question).encode("utf-8", "replace")).hexdigest()[:24]
    content = sample.context + separator + sample.question + joint
    rendered = render_chat(tokenizer, content)
    before, found, after = rendered.partition(separator)
    if not found:
        raise UserError(f"{sample.task}: the chat template of this tokenizer does not show the user's message as it is")
    # Templates may strip the message: the context may have lost its leading white space.
    context = sample.context.lstrip()
    if not before.endswith(context):
        return "", before, after + prefix
    return before.removesuffix(context), context, after + prefix


def _with_one_bos(ids: list[int], tokenizer: Any, rest: list[int]) -> list[int]:
    """`ids` with exactly one leading BOS if the template rendered one or the tokenizer would add one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return ids
    text_ids = list(dropwhile(lambda token: token == bos, ids))
    rendered = len(text_ids) < len(ids)
    in_rest = not ids and rest[:1] == [bos]
    if rendered or (not in_rest and list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]):
        return [bos, *text_ids]
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(_encoded(tokenizer, text)) if text else []


@functools.lru_cache(maxsize=2)  # questions on one context follow each other, and a context of 75k tokens takes 0.7 s
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def build_prompt(
    sample: Sample, tokenizer: Any, *, max_context_length: int, max_new_tokens: int, use_chat_template: bool
) -> Prompt:
    """The token ids of one question: context, then question, template suffix and answer prefix.

    `max_context_length` (tokens) bounds context, question and `max_new_tokens` together. A context that is too long
    loses its middle: its start and end stay, in equal shares, and so does the template text before it. Encoding tens of
    millions of characters takes minutes, so what is sure to be cut is not encoded, and its tokens are estimated. Raises
    ContextTooShortError when question and answer alone do not fit.
    """
    longest = max(LONG_TEXT, LONG_TOKEN * max_context_length)
    if len(sample.question) > longest:
        raise ContextTooShortError(f"{sample.task}: a question of {len(sample.question)} characters does not fit")
    removed = max(len(sample.context) - longest, 0)
    if removed:
        sample = replace(sample, context=sample.context[: longest // 2] + sample.context[-(longest // 2) :])
    head, context, tail = _render(sample, tokenizer, use_chat_template)
    question_ids = encode_continuation(tokenizer, tail) if head + context else _encode(tokenizer, tail)
    whole_ids = _encode(tokenizer, head + context)
    context_ids = _with_one_bos(whole_ids, tokenizer, question_ids)
    room = max_context_length - max_new_tokens - len(question_ids)
    truncated, estimate = 0, removed * len(context_ids) // longest
    if len(context_ids) > room:
        head_ids = _with_one_bos(_encode(tokenizer, head), tokenizer, [])
        body_ids = encode_continuation(tokenizer, context) if head else whole_ids
        keep = room - len(head_ids)
        if keep < 1:
            raise ContextTooShortError(
                f"{sample.task}: a context length of {max_context_length} is too short for the question "
                f"({len(head_ids) + len(question_ids)} tokens) and its answer ({max_new_tokens} tokens)"
            )
        truncated = max(len(body_ids) - keep, 0)
        front = keep // 2
        context_ids = head_ids + body_ids[:front] + body_ids[front + truncated :]
    if not context_ids:  # a prefill needs a token
        context_ids, question_ids = question_ids[:1], question_ids[1:]
    return Prompt(context_ids, question_ids, truncated + estimate)


def prompt_length(sample: Sample, tokenizer: Any, use_chat_template: bool) -> int:
    """Tokens of the whole prompt without truncation, template and BOS included."""
    prompt = build_prompt(sample, tokenizer, max_context_length=2**62, max_new_tokens=0, use_chat_template=use_chat_template)
    return len(prompt.context_ids) + len(prompt.question_ids)
