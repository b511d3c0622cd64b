"""RULER (NVIDIA, arXiv 2404.06654): 13 synthetic tasks at any length. How samples are made: ruler_generators.py.

Names: `ruler/<length>/<task>` generates with the model's own tokenizer; `ruler/<length>` is the group of 13, of which
six need no data; ruler_sources.py says where the others' essays, SQuAD and HotpotQA come from.
`ruler_hf/<length>[/<task>]` (simonjegou/ruler), `ruler16k/<task>` and `ruler32k/<task>` (xAlg-AI/att-hub-ruler-16k and
-32k) take published samples, made for Llama 3.1's tokenizer.

Prompts use the chat template of a tokenizer that has one, with the answer prefix at the start of the assistant's turn,
as published comparisons of sparse attention do. A sample's length counts every token that the model sees: template,
BOS, question, answer prefix and the answer's room.

Score, 0..1: control characters become newlines, then `string_match` is the share of references that occur in the
prediction, whatever their case (qa: 1 if any occurs); 0 without references.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from benchmark.tasks import ruler_generators as make
from benchmark.tasks.base import (
    ContextTooShortError,
    Sample,
    SampleRequest,
    Task,
    TaskDescription,
    TaskSelection,
    UserError,
    in_tuning_split,
    prompt_length,
    take_split,
)
from benchmark.tasks.data import Source, load_rows
from benchmark.tasks.ruler_generators import Essays, NeedleTask, Parts, Question
from benchmark.tasks.ruler_sources import (
    available,
    load_essays,
    load_hotpotqa,
    load_own_essays,
    load_squad,
    own_essays_file,
)
from benchmark.tasks.sources import as_texts

logger = logging.getLogger(__name__)

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768)
NUM_SAMPLES = 500
CONTROL = re.compile(r"[\x00-\x1f]")

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
CORPORA = {"qa_1": load_squad, "qa_2": load_hotpotqa}
ESSAY_TASKS = tuple(name for name, task in NEEDLES.items() if task.haystack == "essay")
OWN = "@own"

PUBLISHED_COLUMNS = {
    "context": "text",
    "question": "text",
    "answer_prefix": "text",
    "answer": "list of texts",
    "task": "text",
    "max_new_tokens": "integer",
}


def string_match(task: str, prediction: str, references: Any) -> dict[str, float]:
    """{"string_match": 0..1}. `task`: one of the 13 names; for qa any reference will do."""
    cleaned = CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [reference.lower() in cleaned for reference in as_texts(references)]
    score = float(any(found)) if task.startswith("qa_") else sum(found) / max(len(found), 1)
    return {"string_match": score}


class _RulerTask(Task):
    metric = "string_match"
    use_chat_template = True

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind  # "niah_single_2"

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        return string_match(self.kind, prediction, references)


# ---- generated samples -----------------------------------------------------------------------------------


class GeneratedTask(_RulerTask):
    """`ruler/<length>/<task>`. Sample i is a function of seed, split, task, length, i and the tokenizer."""

    def __init__(self, name: str, kind: str, length: int, own_essays: bool = False) -> None:
        super().__init__(name, kind)
        self.length = length
        self.fixed_length = length or None
        self.own_essays = own_essays

    @property
    def description(self) -> TaskDescription:
        source = {"qa_1": "generated with SQuAD 2.0", "qa_2": "generated with HotpotQA"}.get(self.kind, "generated")
        if self.kind in ESSAY_TASKS:
            source = "generated with own essays" if self.own_essays else "generated with Paul Graham's essays"
        metric = "string_match (any)" if self.kind.startswith("qa_") else "string_match (all)"
        return TaskDescription(source, metric, ANSWER_TOKENS[self.kind], NUM_SAMPLES, f"{self.length} tokens")

    def samples(self, request: SampleRequest) -> list[Sample]:
        length = request.length or self.length
        count = NUM_SAMPLES if request.max_samples is None else request.max_samples
        essays = corpus = None
        questions: list[Question] = []
        if self.kind in ESSAY_TASKS:
            essays = load_own_essays(request.data_dir) if self.own_essays else load_essays(request.data_dir)
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
            logger.warning(
                "%s: %d of %d samples do not fill %d tokens: there are no more words or documents for them",
                self.name, short, count, length,
            )  # fmt: skip
        return made

    def _generator(self, seed: int, length: int, essays: Essays | None, tokenizer: Any) -> make.Generator:
        if self.kind in NEEDLES:
            return make.niah(seed, NEEDLES[self.kind], essays)
        if self.kind == "vt":
            return make.variable_tracking(seed, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        if self.kind == "cwe":
            return make.common_words(seed, length)
        return make.frequent_words(seed, length - ANSWER_TOKENS[self.kind])

    def _fill(self, generator: make.Generator, index: int, length: int, request: SampleRequest) -> tuple[Sample, bool]:
        """The sample, and whether its haystack is the largest there is."""
        largest: list[Sample] = []

        def sample(n: int) -> Sample:
            made = self._sample(generator.build(n), index, length, request)
            if n == generator.largest:
                largest.append(made)
            return made

        def measure(made: Sample) -> int:
            return prompt_length(made, request.tokenizer, self.use_chat_template)

        room = ANSWER_TOKENS[self.kind]
        try:
            best = make.fill(sample, measure, length - room, generator.smallest, generator.largest, generator.slack)
        except make.TooShort as error:
            raise ContextTooShortError(
                f"{self.name}: a length of {length} tokens is too short: the smallest prompt has {error} tokens "
                f"and the answer needs {room}; take a longer one"
            ) from None
        return best, any(made is best for made in largest)

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
        return Sample(
            sample_id=f"{self.name}:{mark}{index}{at}",
            task=self.name,
            context=parts.context,
            question=parts.question,
            answer_prefix=parts.answer_prefix,
            references=parts.answers,
            max_new_tokens=ANSWER_TOKENS[self.kind],
            columns=columns,
        )


def sample_seed(seed: int, split: str, task: str, length: int, index: int) -> int:
    """64 bits for one sample, independent of how many samples are made."""
    text = f"{seed}/{split}/{task}/{length}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---- published samples -----------------------------------------------------------------------------------


class PublishedTask(_RulerTask):
    """One of the 13 tasks in a fixed data set."""

    def __init__(self, name: str, kind: str, source: Source, length: int) -> None:
        super().__init__(name, kind)
        self.source = source
        self.length = length

    @property
    def description(self) -> TaskDescription:
        metric = "string_match (any)" if self.kind.startswith("qa_") else "string_match (all)"
        tokens = ANSWER_TOKENS[self.kind]
        return TaskDescription(self.source.hub_id, metric, tokens, NUM_SAMPLES, f"{self.length} tokens")

    def samples(self, request: SampleRequest) -> list[Sample]:
        rows = (row for row in load_rows(self.source, request.data_dir) if row["task"] == self.kind)
        numbered = ((f"{self.name}:{index}", row) for index, row in enumerate(rows))
        chosen = take_split(numbered, request, lambda pair: pair[0])
        if not chosen and request.max_samples != 0:
            raise UserError(f"{self.name}: no row with task {self.kind!r} in the {request.split} split of its data")
        return [
            Sample(
                sample_id=sample_id,
                task=self.name,
                context=row["context"],
                question=row["question"],
                answer_prefix=row["answer_prefix"],
                references=list(row["answer"]),
                max_new_tokens=row["max_new_tokens"],
                columns={**row, "context_length": self.length},
            )
            for sample_id, row in chosen
        ]


def _published_source(benchmark: str, length: int, kind: str) -> Source:
    if benchmark == "ruler_hf":
        return Source(benchmark, str(length), "simonjegou/ruler", PUBLISHED_COLUMNS, config=str(length))
    hub_id = f"xAlg-AI/att-hub-ruler-{benchmark.removeprefix('ruler')}"
    return Source(benchmark, kind, hub_id, PUBLISHED_COLUMNS, config=kind, split=kind)


# ---- names -----------------------------------------------------------------------------------------------


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = [GeneratedTask(f"ruler/{length}/{kind}", kind, length) for length in LENGTHS for kind in TASKS]
    for length in PUBLISHED_LENGTHS:
        for kind in TASKS:
            name = f"ruler_hf/{length}/{kind}"
            tasks.append(PublishedTask(name, kind, _published_source("ruler_hf", length, kind), length))
    for benchmark, length in (("ruler16k", 16384), ("ruler32k", 32768)):
        for kind in TASKS:
            tasks.append(PublishedTask(f"{benchmark}/{kind}", kind, _published_source(benchmark, length, kind), length))
    return {task.name: task for task in tasks}


def find_task(name: str) -> Task | None:
    """`ruler/<any length>/<task>`, also with @own essays; and `ruler/<task>`, which only scores, having no length."""
    parts = name.split("/")
    if parts[0] != "ruler" or len(parts) not in (2, 3):
        return None
    kind = parts[-1].removesuffix(OWN)
    own = parts[-1].endswith(OWN)
    if kind not in TASKS or (own and kind not in ESSAY_TASKS):
        return None
    if len(parts) == 2:
        return _Unsized(name, kind)
    length = _length(parts[1])
    return GeneratedTask(name, kind, length, own) if length else None


class _Unsized(GeneratedTask):
    """`ruler/vt`: takes its length from the request."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name, kind, 0)

    def samples(self, request: SampleRequest) -> list[Sample]:
        if not request.length:
            raise UserError(f"task {self.name!r} needs a length: ruler/4096/{self.kind}")
        return super().samples(request)


def _length(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9]\d{0,8}", text) else None


def expand(name: str, data_dir: Path | None) -> TaskSelection | None:
    """The tasks of `ruler/<length>` that can be had here, and of `ruler_hf/<length>` all 13."""
    parts = name.split("/")
    if len(parts) != 2 or (length := _length(parts[1])) is None:
        return None
    if parts[0] == "ruler_hf" and length in PUBLISHED_LENGTHS:
        return TaskSelection([f"{name}/{kind}" for kind in TASKS])
    if parts[0] != "ruler":
        return None
    missing: dict[str, str] = {}  # task -> what it needs
    suffix = ""
    if not available(load_essays, data_dir):
        if own_essays_file(data_dir) is not None:
            suffix = OWN
        else:
            missing |= dict.fromkeys(ESSAY_TASKS, "essays (DIR/ruler/PaulGrahamEssays.json or essays.txt)")
    if not available(load_squad, data_dir):
        missing["qa_1"] = "SQuAD (DIR/ruler/squad.json)"
    if not available(load_hotpotqa, data_dir):
        missing["qa_2"] = "HotpotQA (DIR/ruler/hotpotqa.json)"
    names = [f"{name}/{kind}{suffix if kind in ESSAY_TASKS else ''}" for kind in TASKS if kind not in missing]
    notes = []
    if missing:
        needs = ", ".join(dict.fromkeys(missing.values()))
        notes.append(f"{len(names)} of {len(TASKS)} tasks: needs {needs} in --data-dir DIR, or the hub")
    if suffix:
        notes.append("essay tasks use your own essays (@own): not comparable with published scores")
    return TaskSelection(names, "; ".join(notes) or None)
