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

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from benchmark.tasks import ruler_generators as make
from benchmark.tasks import ruler_sources as texts
from benchmark.tasks.base import (
    ContextTooShortError,
    Sample,
    SampleRequest,
    Task,
    TaskDescription,
    TaskSelection,
    UserError,
    hash64,
    in_tuning_split,
    prompt_length,
    take_split,
)
from benchmark.tasks.data import Source, load_rows
from benchmark.tasks.ruler_generators import Essays, NeedleTask, Parts, Question
from benchmark.tasks.sources import PROMPT_COLUMNS, as_texts, prompt_of

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
# Tasks, the loader and the files of their texts, and their name in a note.
OUTSIDE_TEXTS = (
    (ESSAY_TASKS, texts.load_essays, texts.ESSAYS_FILES, "essays (DIR/ruler/PaulGrahamEssays.json or essays.txt)"),
    (("qa_1",), texts.load_squad, texts.SQUAD_FILES, "SQuAD (DIR/ruler/squad.json)"),
    (("qa_2",), texts.load_hotpotqa, texts.HOTPOTQA_FILES, "HotpotQA (DIR/ruler/hotpotqa.json)"),
)


def string_match(task: str, prediction: str, references: Any) -> dict[str, float]:
    """{"string_match": 0..1}. `task`: one of the 13 names; for qa, one matching reference is enough."""
    cleaned = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [reference.lower() in cleaned for reference in as_texts(references)]
    score = float(any(found)) if task.startswith("qa_") else sum(found) / max(len(found), 1)
    return {"string_match": score}


class _RulerTask(Task):
    metric = "string_match"

    def __init__(self, name: str, kind: str, length: int) -> None:
        self.name = name
        self.kind = kind  # "niah_single_2"
        self.length = length

    def _description(self, source: str) -> TaskDescription:
        metric = "string_match (any)" if self.kind.startswith("qa_") else "string_match (all)"
        return TaskDescription(source, metric, ANSWER_TOKENS[self.kind], NUM_SAMPLES, f"{self.length} tokens")

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        return string_match(self.kind, prediction, references)


class GeneratedTask(_RulerTask):
    """`ruler/<length>/<task>`. Sample i is a function of seed, split, task, length, i and the tokenizer."""

    def __init__(self, name: str, kind: str, length: int, own_essays: bool = False) -> None:
        super().__init__(name, kind, length)
        self.fixed_length = length or None
        self.own_essays = own_essays

    @property
    def description(self) -> TaskDescription:
        source = {"qa_1": "generated with SQuAD 2.0", "qa_2": "generated with HotpotQA"}.get(self.kind, "generated")
        if self.kind in ESSAY_TASKS:
            source = "generated with own essays" if self.own_essays else "generated with Paul Graham's essays"
        return self._description(source)

    def samples(self, request: SampleRequest) -> list[Sample]:
        length = request.length or self.length
        if not length:
            raise UserError(f"task {self.name!r} needs a length: ruler/4096/{self.kind}")
        count = NUM_SAMPLES if request.max_samples is None else request.max_samples
        essays = corpus = None
        questions: list[Question] = []
        if self.kind in ESSAY_TASKS:
            essays = texts.load_own_essays(request.data_dir) if self.own_essays else texts.load_essays(request.data_dir)
        if self.kind in CORPORA:
            corpus = CORPORA[self.kind](request.data_dir)
            questions = [q for q in corpus.questions if in_tuning_split(q.id) == (request.split == "tuning")]
            count = min(count, len(questions))
        made, short = [], 0
        for index in range(count):
            seed = sample_seed(request.seed, request.split, self.kind, length, index)
            if corpus is not None:
                generator = make.question_answering(seed, corpus, questions[index])
            else:
                generator = self._generator(seed, length, essays, request.tokenizer)
            sample, ran_out = self._fill(generator, index, length, request)
            made.append(sample)
            short += ran_out
        if short:
            text = "%s: %d of %d samples do not fill %d tokens: there are no more words or documents for them"
            logger.warning(text, self.name, short, count, length)
        return made

    def _generator(self, seed: int, length: int, essays: Essays | None, tokenizer: Any) -> make.Generator[Parts]:
        if self.kind in NEEDLES:
            return make.niah(seed, NEEDLES[self.kind], essays)
        if self.kind == "vt":
            return make.variable_tracking(seed, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        if self.kind == "cwe":
            return make.common_words(seed, length)
        return make.frequent_words(seed, length - ANSWER_TOKENS[self.kind])

    def _fill(self, generator: make.Generator[Parts], index: int, length: int, request: SampleRequest) -> tuple[Sample, bool]:
        """The sample, and whether its haystack is the largest possible."""

        def build(n: int) -> tuple[Sample, bool]:
            return self._sample(generator.build(n), index, length, request), n == generator.largest

        def measure(made: tuple[Sample, bool]) -> int:
            return prompt_length(made[0], request.tokenizer, self.use_chat_template)

        room = ANSWER_TOKENS[self.kind]
        try:
            return make.fill(build, measure, length - room, generator.smallest, generator.largest, generator.slack)
        except make.TooShort as error:
            raise ContextTooShortError(
                f"{self.name}: a length of {length} tokens is too short: the smallest prompt has {error} tokens "
                f"and the answer needs {room}; take a longer one"
            ) from None

    def _sample(self, parts: Parts, index: int, length: int, request: SampleRequest) -> Sample:
        mark = "" if request.split == "test" else "tuning-"
        at = "" if length == self.length else f"@{length}"
        columns = {
            "context": parts.context,
            "question": parts.question,
            "answer_prefix": parts.answer_prefix,
            "answer": parts.answers,
            "task": self.kind + (OWN if self.own_essays else ""),
            "max_new_tokens": ANSWER_TOKENS[self.kind],
            "context_length": length,
        }
        return self.make_sample(f"{mark}{index}{at}", prompt_of(columns), parts.answers, columns=columns)


def sample_seed(seed: int, split: str, task: str, length: int, index: int) -> int:
    """64 bits for one sample, independent of the number of samples."""
    return hash64(f"{seed}/{split}/{task}/{length}/{index}")


class PublishedTask(_RulerTask):
    """One of the 13 tasks in a fixed data set."""

    def __init__(self, name: str, kind: str, length: int) -> None:
        super().__init__(name, kind, length)
        benchmark = name.split("/")[0]
        if benchmark == "ruler_hf":
            self.source = Source(benchmark, str(length), "simonjegou/ruler", PUBLISHED_COLUMNS, config=str(length))
        else:
            hub_id = f"xAlg-AI/att-hub-ruler-{benchmark.removeprefix('ruler')}"
            self.source = Source(benchmark, kind, hub_id, PUBLISHED_COLUMNS, config=kind, split=kind)

    @property
    def description(self) -> TaskDescription:
        return self._description(self.source.hub_id)

    def samples(self, request: SampleRequest) -> list[Sample]:
        rows = (row for row in load_rows(self.source, request.data_dir) if row["task"] == self.kind)
        chosen = take_split(enumerate(rows), request, lambda numbered: f"{self.name}:{numbered[0]}")
        if not chosen and request.max_samples != 0:
            raise UserError(f"{self.name}: no row with task {self.kind!r} in the {request.split} split of its data")
        return [self._sample(row, number) for number, row in chosen]

    def _sample(self, row: dict[str, Any], number: int) -> Sample:
        columns, references = {**row, "context_length": self.length}, list(row["answer"])
        return self.make_sample(number, prompt_of(row), references, max_new_tokens=row["max_new_tokens"], columns=columns)


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
    missing: dict[str, str] = {}  # task -> what it needs
    for kinds, load, files, needed in OUTSIDE_TEXTS:
        if not texts.available(load, files, data_dir):
            missing |= dict.fromkeys(kinds, needed)
    suffix = ""
    if ESSAY_TASKS[0] in missing and texts.own_essays_file(data_dir) is not None:
        suffix = OWN
        missing = {kind: needed for kind, needed in missing.items() if kind not in ESSAY_TASKS}
    names = [f"{name}/{kind}{suffix if kind in ESSAY_TASKS else ''}" for kind in TASKS if kind not in missing]
    notes = []
    if missing:
        needs = ", ".join(dict.fromkeys(missing.values()))
        notes.append(f"{len(names)} of {len(TASKS)} tasks: needs {needs} in --data-dir DIR, or the hub")
    if suffix:
        notes.append("essay tasks use your own essays (@own): not comparable with published scores")
    return TaskSelection(names, "; ".join(notes) or None)
