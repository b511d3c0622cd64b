"""RULER (NVIDIA, arXiv 2404.06654): 13 synthetic tasks at any length. How samples are made: ruler_generators.py.

Names: `ruler/<length>/<task>` generates with the model's own tokenizer; `ruler/<length>` is the group of 13. Six need no
data; the others need essays, SQuAD or HotpotQA: see ruler_sources.py. `ruler_hf/<length>[/<task>]` (simonjegou/ruler),
`ruler16k/<task>` and `ruler32k/<task>` (xAlg-AI/att-hub-ruler-16k and -32k) read published samples, made for the tokenizer
of Llama 3.1.

Prompts use the tokenizer's chat template if it has one, with the answer prefix at the start of the assistant's turn, as
published comparisons of sparse attention do. A sample's length counts all tokens: template, BOS, question, answer prefix
and answer.

Score: control characters become newlines, then `string_match` is the share of references that occur in the prediction,
ignoring case (qa: 1 if any occurs); 0 without references.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.tasks import ruler_generators as make
from benchmark.tasks import ruler_sources as texts
from benchmark.tasks.base import (
    PromptParts,
    Sample,
    SampleRequest,
    Scores,
    Task,
    TaskDescription,
    TaskSelection,
    UserError,
    in_tuning_split,
)
from benchmark.tasks.data import Row, Source
from benchmark.tasks.ruler_generators import Generator, NeedleTask, Parts, fill_prompt, sample_seed
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, Form
from benchmark.tasks.values import as_texts

logger = logging.getLogger(__name__)

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768)
NUM_SAMPLES = 500

NEEDLES: dict[str, NeedleTask] = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", value_type="uuids"),
    "niah_multikey_1": NeedleTask("essay", keys=4),
    "niah_multikey_2": NeedleTask("needle"),
    "niah_multikey_3": NeedleTask("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": NeedleTask("essay", values=4),
    "niah_multiquery": NeedleTask("essay", queries=4),
}
TASKS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(NEEDLES, 128)
CORPORA = {"qa_1": texts.load_squad, "qa_2": texts.load_hotpotqa}
ESSAY_TASKS = tuple(name for name, task in NEEDLES.items() if task.haystack == "essay")
OWN = "@own"

PUBLISHED_COLUMNS = {**PROMPT_COLUMNS, "answer": "list of texts", "task": "text", "max_new_tokens": "integer"}
OUTSIDE_TEXTS = (
    (texts.ESSAYS, ESSAY_TASKS),
    (texts.SQUAD, ("qa_1",)),
    (texts.HOTPOTQA, ("qa_2",)),
)  # and the tasks that need them


def string_match(task: str, prediction: str, references: Any) -> dict[str, float]:
    """{"string_match": 0..1}. `task`: one of the 13 names; for qa, one matching reference is enough."""
    cleaned = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [reference.lower() in cleaned for reference in as_texts(references)]
    score = float(any(found)) if task.startswith("qa_") else sum(found) / max(len(found), 1)
    return {"string_match": score}


class _RulerTask(Task):
    metric = "string_match"

    def __init__(self, name: str, kind: str, length: int, source: str) -> None:
        self.name = name
        self.kind = kind  # "niah_single_2"
        self.length = length
        metric = "string_match (any)" if kind.startswith("qa_") else "string_match (all)"
        self.description = TaskDescription(source, metric, ANSWER_TOKENS[kind], NUM_SAMPLES, f"{length} tokens")

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        return string_match(self.kind, prediction, references)


class GeneratedTask(_RulerTask):
    """`ruler/<length>/<task>`. Sample i is a function of seed, split, task, length, i and the tokenizer."""

    def __init__(self, name: str, kind: str, length: int, own_essays: bool = False) -> None:
        source = {"qa_1": "generated with SQuAD 2.0", "qa_2": "generated with HotpotQA"}.get(kind, "generated")
        if kind in ESSAY_TASKS:
            source = "generated with own essays" if own_essays else "generated with Paul Graham's essays"
        super().__init__(name, kind, length, source)
        self.fixed_length = length or None
        self.own_essays = own_essays

    def samples(self, request: SampleRequest) -> list[Sample]:
        length = request.length or self.length
        if not length:
            raise UserError(f"task {self.name!r} needs a length: ruler/4096/{self.kind}")
        count = NUM_SAMPLES if request.max_samples is None else request.max_samples
        corpus = CORPORA[self.kind](request.data_dir) if self.kind in CORPORA else None
        if corpus is not None:
            questions = [q for q in corpus.questions if in_tuning_split(q.id) == (request.split == "tuning")]
            count = min(count, len(questions))
        made, short = [], 0
        for index in range(count):
            seed = sample_seed(request.seed, request.split, self.kind, length, index)
            if corpus is not None:
                parts = make.question_answering(seed, corpus, questions[index])
            else:
                parts = self._generator(seed, length, request)
            sample, ran_out = fill_prompt(self, self._as_samples(parts, index, length, request), length, request)
            made.append(sample)
            short += ran_out
        if short:
            text = "%s: %d of %d samples do not fill %d tokens: there are no more words or documents for them"
            logger.warning(text, self.name, short, count, length)
        return made

    def _generator(self, seed: int, length: int, request: SampleRequest) -> Generator[Parts]:
        if self.kind in NEEDLES:
            essays = texts.load_essays(request.data_dir, self.own_essays) if self.kind in ESSAY_TASKS else None
            return make.niah(seed, NEEDLES[self.kind], essays)
        if self.kind == "vt":
            return make.variable_tracking(seed, lambda text: len(request.tokenizer.encode(text, add_special_tokens=False)))
        if self.kind == "cwe":
            return make.common_words(seed, length)
        return make.frequent_words(seed, length - ANSWER_TOKENS[self.kind])

    def _as_samples(self, parts: Generator[Parts], index: int, length: int, request: SampleRequest) -> Generator[Sample]:
        mark = "" if request.split == "test" else "tuning-"
        at = "" if length == self.length else f"@{length}"
        fixed = {
            "task": self.kind + (OWN if self.own_essays else ""),
            "max_new_tokens": ANSWER_TOKENS[self.kind],
            "context_length": length,
        }

        def build(n: int) -> Sample:
            made = parts.build(n)
            prompt = (made.context, made.question, made.answer_prefix)
            columns = dict(zip(PROMPT_COLUMNS, prompt, strict=True)) | {"answer": made.answers} | fixed
            return self.make_sample(f"{mark}{index}{at}", prompt, made.answers, columns=columns)

        # A share of the prompt without the answer.
        slack = min(parts.slack, (length - ANSWER_TOKENS[self.kind]) // 128)
        return Generator(build, parts.smallest, parts.largest, slack)


class PublishedTask(_RulerTask, DataTask):
    """One of the 13 tasks in a fixed data set."""

    def __init__(self, name: str, kind: str, length: int) -> None:
        benchmark = name.split("/")[0]
        if benchmark == "ruler_hf":
            source = Source(benchmark, str(length), "simonjegou/ruler", config=str(length))
        else:
            source = Source(
                benchmark, kind, f"xAlg-AI/att-hub-ruler-{benchmark.removeprefix('ruler')}", config=kind, split=kind
            )
        super().__init__(name, kind, length, source.hub_id)
        self.sources = [source]
        self.forms = [Form(PUBLISHED_COLUMNS, questions=lambda number, row: [(number, row)] if row["task"] == kind else [])]

    def read(self, sources: list[Source], data_dir: Path | None) -> Iterator[Sample]:
        for number, sample in enumerate(super().read(sources, data_dir)):  # numbers count the rows of this task alone
            yield replace(sample, sample_id=f"{self.name}:{number}")

    def split_key(self, sample: Sample) -> str:
        return sample.sample_id

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        columns = {**row, "context_length": self.length}
        return self.make_sample(identity, prompt, row["answer"], max_new_tokens=row["max_new_tokens"], columns=columns)


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = [GeneratedTask(f"ruler/{length}/{kind}", kind, length) for length in LENGTHS for kind in TASKS]
    published = [(f"ruler_hf/{length}", length) for length in PUBLISHED_LENGTHS] + [("ruler16k", 16384), ("ruler32k", 32768)]
    tasks += [PublishedTask(f"{group}/{kind}", kind, length) for group, length in published for kind in TASKS]
    return {task.name: task for task in tasks}


def find_task(name: str) -> Task | None:
    """`ruler/<any length>/<task>` and `ruler/<task>`, which takes its length from the request, also with @own essays."""
    found = re.fullmatch(r"ruler/(?:([1-9]\d{0,8})/)?(\w+)(@own)?", name)
    if found is None or found[2] not in TASKS or (found[3] and found[2] not in ESSAY_TASKS):
        return None
    return GeneratedTask(name, found[2], int(found[1] or 0), own_essays=found[3] is not None)


def expand(name: str, data_dir: Path | None) -> TaskSelection | None:
    """The tasks of `ruler/<length>` whose texts are available, and all 13 of `ruler_hf/<length>`."""
    if name in [f"ruler_hf/{length}" for length in PUBLISHED_LENGTHS]:
        return TaskSelection([f"{name}/{kind}" for kind in TASKS])
    if not re.fullmatch(r"ruler/[1-9]\d{0,8}", name):
        return None
    missing = {kind: text.needs for text, kinds in OUTSIDE_TEXTS if not texts.available(text, data_dir) for kind in kinds}
    own = ESSAY_TASKS[0] in missing and texts.OWN_ESSAYS.file(data_dir) is not None
    if own:
        missing = {kind: needs for kind, needs in missing.items() if kind not in ESSAY_TASKS}
    names = [f"{name}/{kind}{OWN if own and kind in ESSAY_TASKS else ''}" for kind in TASKS if kind not in missing]
    notes = []
    if missing:
        needs = ", ".join(dict.fromkeys(missing.values()))
        notes.append(f"{len(names)} of {len(TASKS)} tasks: needs {needs} in --data-dir DIR, or the hub")
    if own:
        notes.append("essay tasks use your own essays (@own): not comparable with published scores")
    return TaskSelection(names, "; ".join(notes) or None)
