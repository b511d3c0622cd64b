"""What Phase 2 has to do: the samples of a (model, task), what of them is journalled already, and blocks of the rest.

A journal folder belongs to one (model, task) and one set of everything that determines an answer apart from the
sample and the configuration; its records name both by their hashes. So a sample is answered again only if its text,
its configuration or a setting changed, a configuration added later runs alone, and the same settings under another
name are not run twice. A record holds all answers of one lockstep batch, so that a restart never splits a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.execution.messages import Request, failure
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.fingerprints import config_key, lacks_a_file, same_parameters, weights_stamp
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import Journal, fingerprint, safe_name, write_json
from benchmark.tasks import get_task
from benchmark.tasks.base import Sample, SampleRequest, Task, UserError, answer_seed
from benchmark.tasks.limits import fitted

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig

#: Raised when the meaning of a journalled answer changes, so that older ones are not reused.
RECORD_VERSION = 2
#: Samples a block: small enough that all workers finish together.
MAX_BLOCK = 4


@dataclass(frozen=True)
class BenchmarkUnit:
    """One (model, leaf task) and what is run on it.

    configs: dense first, then the configurations tuned for this (model, task). provenance: configuration name -> where
    Phase 1 found it ({"config_run", "error", "density", "meets_budget", ...}).
    """

    model: str
    task: str
    configs: tuple[SparseConfig, ...]
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)


def sample_hash(sample: Sample, limit: int) -> str:
    """Everything of a sample that determines an answer and its reference_nll."""
    parts = [sample.context, sample.question, sample.answer_prefix, sample.references[:1], limit]
    return fingerprint([sample.sample_id, *parts])


class AnswerStore:
    """The journalled answers of a unit: records of every worker that ever wrote into the folder.

    `poll` reads what was appended since the last call. Micro metrics stay on disk until they are asked for. loose: keys that
    cannot be answered anew; what was answered with their parameters last counts for them.
    """

    def __init__(self, folder: Path, loose: Iterable[str] = ()) -> None:
        self.folder, self._loose = folder, frozenset(loose)
        self.details: dict[tuple[str, str], dict[str, Any]] = {}  # (sample id, sample hash) -> the record without answers
        self._answers: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self._offsets: dict[Path, int] = {}

    def poll(self) -> None:
        """Read all whole records that are new."""
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._offsets.get(path, 0)
            if path.stat().st_size <= start:
                continue
            with path.open("rb") as stream:
                stream.seek(start)
                content = stream.read()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines(keepends=True):
                self._take(line, path, start)
                start += len(line)
            self._offsets[path] = start

    def answer(self, sample_id: str, digest: str, key: str) -> dict[str, Any] | None:
        known = self._answers.get((sample_id, digest), {})
        if key not in known and key in self._loose:
            alike = [answer for other, answer in known.items() if same_parameters(other, key) and answer["status"] == "ok"]
            return alike[-1] if alike else None
        return known.get(key)

    def behind_changed(self, key: str) -> bool:
        """Whether there are answers with these parameters, but only of other code or files behind them."""
        keys = {other for known in self._answers.values() for other in known}
        return key not in keys and any(same_parameters(other, key) for other in keys)

    def micro(self, sample_id: str, digest: str, key: str) -> list[list[Any]]:
        """The micro metrics of an answer, read from its journal."""
        answer = self.answer(sample_id, digest, key)
        if answer is None or not answer.get("has_micro"):
            return []
        path, start = answer["at"]
        with open(path, "rb") as stream:
            stream.seek(start)
            record = json.loads(stream.readline())
        return list(record["answers"][answer["key"]].get("micro", []))

    def failures(self) -> set[tuple[str, int]]:
        """Where the records of all failures that nothing replaced stand."""
        return {answer["at"] for known in self._answers.values() for answer in known.values() if answer["status"] != "ok"}

    def _take(self, line: bytes, path: Path, start: int) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return  # torn by a kill, written past later
        if not isinstance(record, dict) or record.get("kind") != "sample" or not isinstance(record.get("answers"), dict):
            return
        place = (record["sample_id"], record["sample_hash"])
        known = self._answers.setdefault(place, {})
        for key, answer in record.pop("answers").items():
            answer["has_micro"] = bool(answer.pop("micro", None))
            answer["at"], answer["key"] = (str(path), start), key
            old = known.get(key)
            # An answer is kept; a failure is replaced by whatever a later try gave.
            if old is None or old["status"] != "ok":
                known[key] = answer
        if "prefill_seconds" in record or place not in self.details:
            self.details[place] = record


@dataclass
class UnitRun:
    """A unit in work. `prepare` makes its samples; until then only their number is guessed."""

    unit: BenchmarkUnit
    settings: Settings
    place: str  # "cuda" or "cpu": what kind of device answers
    task: Task = field(init=False)
    keys: dict[str, str] = field(init=False)  # configuration name -> key
    shared: dict[str, Any] = field(init=False)
    samples: list[Sample] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    error: str | None = None  # why it could not run at all
    deadline: float | None = None
    prepared: bool = False
    finished: bool = False
    forced: ForcedRun | None = None  # answer again what was answered before it began
    old_failures: set[tuple[str, int]] = field(default_factory=set)  # where failures of earlier runs stand: to be tried again

    def __post_init__(self) -> None:
        self.task = get_task(self.unit.task)
        self.keys = {config.name: config_key(config.config) for config in self.unit.configs}
        self.shared = shared_settings(self.unit, self.settings, self.place)
        folder = self.settings.benchmark_results_dir / safe_name(self.unit.model) / ".journals"
        self.folder = folder / f"{safe_name(self.unit.task)}-{fingerprint(self.shared)}"
        rescore = self.settings.rescore
        loose = [self.keys[c.name] for c in self.unit.configs if c.config is not None and (rescore or lacks_a_file(c.config))]
        self.store = AnswerStore(self.folder, loose)

    @property
    def name(self) -> str:
        return f"{self.unit.model} {self.unit.task}"

    @property
    def configs(self) -> dict[str, ResearchAttentionConfig | None]:
        """Key -> configuration, each once, dense first."""
        return {self.keys[config.name]: config.config for config in self.unit.configs}

    def expected(self) -> int:
        """How many samples there are, or how many there may be before they are made."""
        if self.prepared:
            return len(self.samples)
        counts = [n for n in (self.settings.max_requests, self.task.description.num_samples) if n is not None]
        return min(counts) if counts else 1

    def prepare(self, tokenizer: Any) -> list[str]:
        """Make the samples and read the journals. Returns what is worth telling. Raises UserError if data are missing,
        samples of the task's length do not fit, or there is nothing that --rescore could score."""
        request = SampleRequest(
            tokenizer=tokenizer,
            split="test",
            seed=self.settings.seed,
            max_samples=self.settings.max_requests,
            max_context_length=self.settings.max_context_length,
            data_dir=self.settings.data_dir,
            trust_remote_code=self.settings.trust_remote_code,
        )
        samples = self.task.samples(fitted(request, self.task, self.unit.model))
        if not samples:
            raise UserError(f"{self.unit.task}: there are no samples to benchmark")
        ids = [sample.sample_id for sample in samples]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{self.unit.task}: sample ids are not unique")
        self.samples = samples
        self.limits = [max(1, min(sample.max_new_tokens, self.settings.max_new_tokens)) for sample in samples]
        self.hashes = [sample_hash(sample, limit) for sample, limit in zip(samples, self.limits, strict=True)]
        notes = self._open_journal()
        self.store.poll()
        if not self.settings.rescore:
            changed = [config.name for config in self.unit.configs if self.store.behind_changed(self.keys[config.name])]
            if changed:
                notes.append(f"{self.name}: maskers' code or files changed, so these start anew: {', '.join(changed)}")
        self.old_failures = self.store.failures()
        if self.settings.rescore and not self._has_answers():
            told = "; ".join(f"recorded with another {changed}" for _, changed in self._other_settings())
            raise UserError(
                f"--rescore: there are no recorded answers of {self.name} to these samples under these settings"
                f"{f' ({told})' if told else ''}: give the flags they were recorded with, or leave --rescore out"
            )
        self.prepared = True
        return notes

    def _open_journal(self) -> list[str]:
        notes = []
        told = self.folder / "settings.json"
        if self.forced is not None and self.folder.exists() and not self.forced.is_own(told):
            aside = self.folder.with_name(f"{self.folder.name}.replaced-{datetime.now():%Y%m%d_%H%M%S_%f}")
            self.folder.rename(aside)
        if not told.exists() and not self.settings.rescore:
            for other, changed in self._other_settings():
                notes.append(f"{self.name}: settings changed ({changed}), so it starts anew; earlier answers stay in {other}")
            write_json(told, self.shared)
        return notes

    def _other_settings(self) -> Iterator[tuple[Path, str]]:
        """Journal folders of this (model, task) under other settings, and what differs."""
        for told in sorted(self.folder.parent.glob(f"{self.folder.name.rpartition('-')[0]}-*/settings.json")):
            if told.parent != self.folder and ".replaced-" not in told.parent.name:
                yield told.parent, ", ".join(_changes(told, self.shared))

    def _has_answers(self) -> bool:
        """Whether any sample has a record, of an answer or of a failure, under any configuration."""
        asked = zip(self.samples, self.hashes, strict=True)
        return any(self.store.answer(s.sample_id, digest, key) for s, digest in asked for key in self.configs)

    def missing(self) -> list[Request]:
        """What is still to be answered, in the samples' order; a failure of an earlier run is tried again."""
        todo = []
        for sample, limit, digest in zip(self.samples, self.limits, self.hashes, strict=True):
            keys = tuple(key for key in self.configs if not self._answered(sample, digest, key))
            if keys:
                bare = replace(sample, columns={}, label=None, all_classes=None)  # what a worker does not need
                todo.append(Request(bare, digest, answer_seed(self.settings.seed, sample.sample_id), limit, keys))
        return todo

    def remaining(self, requests: Iterable[Request]) -> tuple[Request, ...]:
        """Those of `requests` that this run has neither an answer nor a failure of, under some configuration."""
        return tuple(request for request in requests if not all(self._is_settled(request, key) for key in request.configs))

    def _is_settled(self, request: Request, key: str) -> bool:
        answer = self.store.answer(request.sample.sample_id, request.sample_hash, key)
        return answer is not None and (answer["status"] == "ok" or answer["at"] not in self.old_failures)

    def record_failure(self, requests: Iterable[Request], message: str, status: str) -> None:
        """Journal that these samples were not answered, and why."""
        journal = Journal(self.folder / "parent.jsonl")
        for request in requests:
            known = {key: self.store.answer(request.sample.sample_id, request.sample_hash, key) for key in request.configs}
            open_keys = [key for key, answer in known.items() if answer is None or answer["status"] != "ok"]
            journal.append(
                {
                    "kind": "sample",
                    "sample_id": request.sample.sample_id,
                    "sample_hash": request.sample_hash,
                    "limit": request.limit,
                    "answers": {key: failure(message, status) for key in open_keys},
                }
            )
        self.store.poll()

    def release(self) -> None:
        """Let samples and answers go: all is written."""
        self.samples = [replace(sample, context="", columns={}) for sample in self.samples]
        self.store = AnswerStore(self.folder)

    def _answered(self, sample: Sample, digest: str, key: str) -> bool:
        answer = self.store.answer(sample.sample_id, digest, key)
        return answer is not None and answer["status"] == "ok"


def shared_settings(unit: BenchmarkUnit, settings: Settings, place: str) -> dict[str, Any]:
    """Everything but sample and configuration that determines an answer and what is measured beside it."""
    dtype = "float32" if settings.dtype == "auto" and place == "cpu" else settings.dtype
    return {
        "record_version": RECORD_VERSION,
        "model": unit.model,
        "weights": weights_stamp(unit.model),
        "task": unit.task,
        "seed": settings.seed,
        "sparse_from": settings.sparse_from,
        "device": place,
        "dtype": dtype,
        "dense_backend": settings.dense_backend,
        "attention_backend": settings.attention_backend,
        "max_context_length": settings.max_context_length,
        "micro_metrics": settings.micro_metrics,
    }


def _changes(other: Path, shared: dict[str, Any]) -> Iterator[str]:
    try:
        before = json.loads(other.read_text())
    except (OSError, ValueError):
        yield "the earlier ones cannot be read"
        return
    for name, value in shared.items():
        if before.get(name) != value:
            yield name if name == "weights" else f"{name}: {before.get(name)} -> {value}"


def make_blocks(requests: list[Request], workers: int) -> list[tuple[Request, ...]]:
    """Blocks of consecutive samples; samples on one context stay together where that leaves every worker busy."""
    size = max(1, min(MAX_BLOCK, -(-len(requests) // (3 * workers))))
    together = max(size, -(-len(requests) // (2 * workers)))  # the most that may follow from a shared context
    blocks: list[list[Request]] = []
    for request in requests:
        last = blocks[-1] if blocks else None
        if last is not None and len(last) < (together if last[-1].sample.context == request.sample.context else size):
            last.append(request)
        else:
            blocks.append([request])
    return [tuple(block) for block in blocks]
