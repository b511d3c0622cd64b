"""What Phase 2 has to answer: the samples of a (model, task), the answers in its journals, and batches of the rest.

A journal folder belongs to one (model, task) and one set of settings; its lines name sample and configuration by their hashes.
So a sample is answered again only if the tokens sent, its configuration or a setting changed, a configuration added later runs alone,
and equal configurations under two names run once. A line holds all answers of one sample, so that a restart never splits a
lockstep group.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from benchmark.execution.messages import Request, failure
from benchmark.execution.prompts import make_prompt, sample_request
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.benchmark_records import Answer, AnswerStatus, FoundBy, JournalSettings, SampleLine
from benchmark.storage.fingerprints import config_key, lacks_a_file, same_parameters, weights_stamp
from benchmark.storage.records import parse_record, shared_fields, to_json, write_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import Journal, fingerprint, safe_name
from benchmark.tasks import get_task
from benchmark.tasks.base import Sample, Task, UserError, answer_seed
from sparse_attention_hub.models.prompts import opens_thinking

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig

#: Increased when the meaning of a journalled answer changes, so that older ones are not reused.
RECORD_VERSION = 4
#: Samples per batch: small enough that all workers finish together.
MAX_BATCH = 4


@dataclass(frozen=True)
class BenchmarkUnit:
    """One (model, leaf task) and what is run on it.

    configs: dense first, then the configurations tuned for this (model, task). provenance: configuration name -> where
    Phase 1 found it.
    """

    model: str
    task: str
    configs: tuple[SparseConfig, ...]
    provenance: dict[str, FoundBy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A journalled answer. Its micro metrics stay in the journal, in the line at `position` under `key`."""

    answer: Answer
    position: tuple[Path, int]
    key: str
    has_micro: bool
    time: float


class AnswerStore:
    """The journalled answers of a unit, by all workers that ever wrote into the folder.

    `poll` reads what was appended since the last call. Micro metrics stay on disk until they are needed. fallback: keys of
    configurations that cannot be rerun; their latest answer with equal parameters is reused.
    """

    def __init__(self, folder: Path, fallback: Iterable[str] = ()) -> None:
        self.folder, self._fallback = folder, frozenset(fallback)
        self.lines: dict[str, SampleLine] = {}  # sample hash -> its line, without answers
        self._answers: dict[str, dict[str, Recorded]] = {}  # sample hash -> key -> answer
        self._offsets: dict[Path, int] = {}

    def poll(self) -> None:
        """Read all whole lines that are new."""
        for path in sorted(self.folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            if path.stat().st_size <= offset:
                continue
            with path.open("rb") as stream:
                stream.seek(offset)
                content = stream.read()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines(keepends=True):
                self._add(line, path, offset)
                offset += len(line)
            self._offsets[path] = offset

    def find(self, digest: str, key: str) -> Recorded | None:
        """The answer to the sample with this hash under a configuration."""
        known = self._answers.get(digest, {})
        if key not in known and key in self._fallback:
            alike = [found for other, found in known.items() if same_parameters(other, key) and found.answer.ok]
            return max(alike, key=lambda found: found.time, default=None)
        return known.get(key)

    def is_answered(self, digest: str, key: str) -> bool:
        found = self.find(digest, key)
        return found is not None and found.answer.ok

    def dependencies_changed(self, key: str) -> bool:
        """Whether answers with these parameters exist, but only of other versions, masker code or files."""
        keys = {other for known in self._answers.values() for other in known}
        return key not in keys and any(same_parameters(other, key) for other in keys)

    def micro(self, digest: str, key: str) -> list[list[JsonValue]]:
        """The micro metrics of an answer, read from its journal."""
        found = self.find(digest, key)
        if found is None or not found.has_micro:
            return []
        path, offset = found.position
        with path.open("rb") as stream:
            stream.seek(offset)
            return parse_record(stream.readline(), SampleLine).answers[found.key].micro

    def failures(self) -> set[tuple[Path, int]]:
        """Positions of all failures that no answer replaced."""
        return {found.position for known in self._answers.values() for found in known.values() if not found.answer.ok}

    def _add(self, text: bytes, path: Path, offset: int) -> None:
        try:
            line = parse_record(text, SampleLine)
        except ValueError:
            return  # left incomplete by a kill, or not a sample
        known = self._answers.setdefault(line.sample_hash, {})
        for key, answer in line.answers.items():
            has_micro, answer.micro = bool(answer.micro), []
            # An answer is kept; a failure is replaced by the result of a later try.
            if key not in known or not known[key].answer.ok:
                known[key] = Recorded(answer, (path, offset), key, has_micro, line.time or 0.0)
        line.answers = {}
        if line.prefill_seconds is not None or line.sample_hash not in self.lines:
            self.lines[line.sample_hash] = line


@dataclass
class UnitRun:
    """A unit being run. `prepare` makes its samples."""

    unit: BenchmarkUnit
    settings: Settings
    device_kind: str  # "cuda" or "cpu"
    task: Task = field(init=False)
    keys: dict[str, str] = field(init=False)  # configuration name -> key
    shared: JournalSettings = field(init=False)
    samples: list[Sample] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    opens_thinking: bool = False  # prompts end inside the model's thinking
    todo: int = field(init=False)  # how many samples are to be answered, an estimate before they are made
    error: str | None = None  # why it cannot run at all
    deadline: float | None = None
    prepared: bool = False
    finished: bool = False
    forced: ForcedRun | None = None  # rerun what was answered before it began
    old_failures: set[tuple[Path, int]] = field(default_factory=set)  # positions of earlier runs' failures, which are retried

    def __post_init__(self) -> None:
        self.task = get_task(self.unit.task)
        self.keys = {config.name: config_key(config.config) for config in self.unit.configs}
        self.shared = journal_settings(self.unit, self.settings, self.device_kind)
        folder = self.settings.benchmark_results_dir / safe_name(self.unit.model) / ".journals"
        self.folder = folder / f"{safe_name(self.unit.task)}-{fingerprint(to_json(self.shared))}"
        counts = [n for n in (self.settings.max_requests, self.task.description.num_samples) if n is not None]
        self.todo = 0 if self.settings.rescore else min(counts, default=1)
        frozen = [c.name for c in self.unit.configs if self.settings.rescore or lacks_a_file(c.config)]
        self.store = AnswerStore(self.folder, [self.keys[name] for name in frozen])

    @property
    def name(self) -> str:
        return f"{self.unit.model} {self.unit.task}"

    @property
    def configs(self) -> dict[str, ResearchAttentionConfig | None]:
        """Key -> configuration, each once, dense first."""
        return {self.keys[config.name]: config.config for config in self.unit.configs}

    def prepare(self, tokenizer: Any) -> list[str]:
        """Make the samples and read the journals. Returns notes for the user. Raises UserError if data are missing, samples of
        the task's length do not fit, or --rescore finds nothing to score."""
        request = sample_request(tokenizer, self.task, self.unit.model, self.settings)
        samples = self.task.samples(request)
        if not samples:
            raise UserError(f"{self.unit.task}: there are no samples to benchmark")
        if len({sample.sample_id for sample in samples}) != len(samples):
            raise ValueError(f"{self.unit.task}: sample ids are not unique")
        self.samples = samples
        self.opens_thinking = self.task.use_chat_template and opens_thinking(tokenizer)
        self.limits = [max(1, min(sample.max_new_tokens, self.settings.max_new_tokens)) for sample in samples]
        longest, templated = request.max_context_length, self.task.use_chat_template
        self.hashes = [
            make_prompt(sample, tokenizer, self.settings, longest=longest, limit=limit, use_chat_template=templated)[1]
            for sample, limit in zip(samples, self.limits, strict=True)
        ]
        notes = self._open_journal()
        self.store.poll()
        if not self.settings.rescore:
            changed = [c.name for c in self.unit.configs if self.store.dependencies_changed(self.keys[c.name])]
            if changed:
                names = ", ".join(changed)
                notes.append(
                    f"{self.name}: versions, code or files of maskers changed, so these configurations run again: {names}"
                )
        self.old_failures = self.store.failures()
        if self.settings.rescore and not any(self.store.find(digest, key) for digest in self.hashes for key in self.configs):
            others = "; ".join(f"recorded with another {changed}" for _, changed in self._other_settings())
            raise UserError(
                f"--rescore: there are no recorded answers of {self.name} to these samples under these settings"
                f"{f' ({others})' if others else ''}: give the flags they were recorded with, or leave --rescore out"
            )
        self.prepared = True
        return notes

    def _open_journal(self) -> list[str]:
        notes = []
        path = self.folder / "settings.json"
        if self.forced is not None and self.folder.exists() and not self.forced.is_own(path):
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.replaced-{datetime.now():%Y%m%d_%H%M%S_%f}"))
        if not path.exists() and not self.settings.rescore:
            for other, changed in self._other_settings():
                notes.append(
                    f"{self.name}: settings changed ({changed}), so all samples run again; earlier answers stay in {other}"
                )
            write_record(path, self.shared)
        return notes

    def _other_settings(self) -> Iterator[tuple[Path, str]]:
        """Journal folders of this (model, task) under other settings, and what differs."""
        task = glob.escape(self.folder.name.rpartition("-")[0])
        for path in sorted(self.folder.parent.glob(f"{task}-*/settings.json")):
            if path.parent != self.folder and ".replaced-" not in path.parent.name:
                yield path.parent, _changes(path, self.shared)

    def missing(self) -> list[Request]:
        """The samples that have no answer under some configuration, in order; none with --rescore. Failures of earlier runs are
        retried."""
        if self.settings.rescore:
            return []
        todo = []
        for sample, limit, digest in zip(self.samples, self.limits, self.hashes, strict=True):
            keys = tuple(key for key in self.configs if not self.store.is_answered(digest, key))
            if keys:
                bare = replace(sample, columns={}, label=None, all_classes=None)  # a worker does not need these
                todo.append(Request(bare, digest, answer_seed(self.settings.seed, sample.sample_id), limit, keys))
        return todo

    def remaining(self, requests: Iterable[Request]) -> tuple[Request, ...]:
        """Those of `requests` with a configuration under which this run has neither an answer nor a failure."""
        return tuple(r for r in requests if not all(self._is_settled(r.sample_hash, key) for key in r.configs))

    def _is_settled(self, digest: str, key: str) -> bool:
        found = self.store.find(digest, key)
        return found is not None and (found.answer.ok or found.position not in self.old_failures)

    def record_failure(self, requests: Iterable[Request], message: str, status: AnswerStatus) -> None:
        """Journal that these samples were not answered, and why."""
        journal = Journal(self.folder / "parent.jsonl")
        for request in requests:
            digest = request.sample_hash
            line = SampleLine(
                kind="sample",
                sample_id=request.sample.sample_id,
                sample_hash=digest,
                limit=request.limit,
                answers={k: failure(message, status) for k in request.configs if not self.store.is_answered(digest, k)},
            )
            journal.append(to_json(line))
        self.store.poll()

    def release(self) -> None:
        """Free the memory of samples and answers once all files are written."""
        self.samples = [replace(sample, context="", columns={}) for sample in self.samples]
        self.store = AnswerStore(self.folder)


def journal_settings(unit: BenchmarkUnit, settings: Settings, device_kind: str) -> JournalSettings:
    """Everything except sample and configuration that determines an answer and its measurements."""
    own = {
        "record_version": RECORD_VERSION,
        "model": unit.model,
        "weights": weights_stamp(unit.model),
        "task": unit.task,
        "device": device_kind,
        "dtype": "float32" if settings.dtype == "auto" and device_kind == "cpu" else settings.dtype,
    }
    values = shared_fields(JournalSettings, settings) | own
    if settings.thinking == "auto":  # the template's default, as in journals that do not have the setting
        del values["thinking"]
    return JournalSettings(**values)


def _changes(path: Path, now: JournalSettings) -> str:
    try:
        before = to_json(parse_record(path.read_bytes(), JournalSettings))
    except (OSError, ValueError):
        return "the earlier ones cannot be read"
    defaults: dict[str, JsonValue] = {"thinking": "auto"}  # settings that are left out at their default
    before, after = defaults | before, defaults | to_json(now)
    changed = {name: (before[name], value) for name, value in after.items() if before[name] != value}
    return ", ".join(name if name == "weights" else f"{name}: {old} -> {new}" for name, (old, new) in changed.items())


def make_batches(requests: list[Request], workers: int) -> list[tuple[Request, ...]]:
    """Batches of consecutive samples; samples on one context stay together if that leaves every worker busy."""
    size = max(1, min(MAX_BATCH, -(-len(requests) // (3 * workers))))
    together = max(size, -(-len(requests) // (2 * workers)))  # the limit for samples that share a context
    batches: list[list[Request]] = []
    for request in requests:
        last = batches[-1] if batches else None
        if last is not None and len(last) < (together if last[-1].sample.context == request.sample.context else size):
            last.append(request)
        else:
            batches.append([request])
    return [tuple(batch) for batch in batches]
