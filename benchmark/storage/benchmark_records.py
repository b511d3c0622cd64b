"""The records of Phase 2: journals, result files and the summary. docs/file_formats.md explains the fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from benchmark.storage.records import (
    AttentionRecord,
    BudgetOn,
    Count,
    EvenBudgets,
    Failure,
    Interval,
    Measured,
    Params,
    Record,
    Text,
    Versions,
)

AnswerStatus = Literal["ok", "failed", "timeout"]


def _call(call: list[JsonValue]) -> list[JsonValue]:
    def is_number(value: JsonValue, low: float, high: float) -> bool:
        return isinstance(value, int | float) and low <= value <= high

    *figures, moment = call[2:] or [None]
    known = all(value is None or is_number(value, -1e300, 1e300) for value in figures)
    if len(call) != 6 or not known or not all(is_number(value, 0, 2e11) for value in (*call[:2], moment)):
        raise ValueError("a call must be [layer, step, density, error, kv_fraction, unix time]")
    return call


#: A call of `MetricRecorder.calls`.
MicroCall = Annotated[list[JsonValue], AfterValidator(_call)]


class Answer(Record):
    """An answer under one configuration, or its failure. micro: calls of `MetricRecorder`."""

    status: AnswerStatus
    predicted_answer: Text | None = None
    tokens: int | None = None
    stopped: str | None = None
    seconds: float | None = None
    density: float | None = None
    error: float | None = None
    kv_fraction: float | None = None
    model_kv_fraction: float | None = None
    micro: list[MicroCall] = Field(default_factory=list)
    reference_nll: float | None = None
    reference_error: Text | None = None
    error_message: Text | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class SampleLine(Record):
    """A line of a Phase 2 journal: one sample and its answers by configuration key. limit: new tokens at most; capped_limit:
    the task asks for more. time: in seconds since 1970."""

    kind: Literal["sample"]
    sample_id: Text
    sample_hash: str
    limit: int
    answers: dict[str, Answer]
    capped_limit: bool = False
    time: float | None = None
    device: str | None = None
    dtype: str | None = None
    dense_backend: str | None = None
    truncated_tokens: int = 0
    context_tokens: int | None = None
    question_tokens: int | None = None
    prefill_seconds: float | None = None
    wall_seconds: float | None = None
    layers: int | None = None
    sparse_layers: int | None = None


class JournalSettings(Record):
    """settings.json of a journal folder: everything that determines an answer, except sample and configuration."""

    record_version: int
    model: Text
    weights: list[list[JsonValue]] | None
    task: Text
    seed: int
    sparse_from: str
    device: str
    dtype: str
    dense_backend: str
    attention_backend: str
    max_context_length: int
    micro_metrics: str
    thinking: str = "auto"


class WorkerStatus(Record):
    """The sample that a worker is answering; None while it loads the model."""

    sample: Text | None


class Score(Record):
    """A metric over the samples that have it."""

    mean: Measured | None
    interval: Interval | None
    n: Count


class Difference(Record):
    """A configuration against dense attention on the samples that both answered; see stats.compare_paired."""

    difference: Measured
    interval: Interval | None
    n: Count
    better: Count
    worse: Count
    p_value: float | None


class SampleCounts(Record):
    """How many samples of a result were answered, failed, and so on."""

    total: Count
    ok: Count
    failed: Count
    timed_out: Count
    unscored: Count
    missing: Count
    capped: Count
    truncated: Count
    without_reference_nll: Count
    never_left_thinking: Count = 0


class Scores(Record):
    """The scores of one configuration on one task. Means leave failed samples out."""

    model: Text
    task: Text
    configuration: Text
    metric: str
    score: Measured | None
    interval: Interval | None
    scores: dict[str, Score]
    reference_nll: Measured | None
    perplexity: float | None
    density: Measured | None
    error: Measured | None
    kv_fraction: Measured | None
    model_kv_fraction: Measured | None = None
    layers: Count | None = None
    sparse_layers: Count | None = None
    budget: Measured | None
    budget_on: BudgetOn = "density"
    over_budget: bool | None
    samples: SampleCounts
    seconds: Measured | None
    difference_to_dense: Difference | None = None
    reference_nll_difference_to_dense: Difference | None = None
    aggregate: Params | None = None
    aggregate_problem: Text | None = None


class Metrics(Scores):
    """metrics.json: the scores, and the samples that failed."""

    failures: list[Failure]


class FoundBy(Record):
    """Where Phase 1 found a configuration."""

    config_run: Text
    config_file: Text
    budget: float | None
    budget_on: BudgetOn = "density"
    meets_budget: bool
    error: float
    density: float
    score: float | None
    even_budgets: EvenBudgets | None = None
    hyperparams: Params
    identity: str
    sparse_from: str


#: None for dense attention, where older files have {}.
Found = Annotated[FoundBy | None, BeforeValidator(lambda value: value or None)]


class ResultIdentity(Record):
    """The hashes in a config.json that tell results of other settings or other data."""

    hash: str
    samples: list[str] = Field(default_factory=list)


class ResultConfig(ResultIdentity):
    """config.json: what a result was made of. hash: of everything that determines an answer; samples_hash: of the samples;
    samples: a hash of each sample's content; settings: of the journal."""

    model: Text
    task: Text
    configuration: Text
    sparse_config: AttentionRecord | None
    masker_classes: list[str] | None
    budget: float | None
    samples_hash: str
    samples: list[str]
    settings: Params
    sparse_from: str
    seed: int
    dtype: str | None
    device: str | None
    dense_backend: str | None
    attention_backend: str
    max_new_tokens: int
    max_context_length: int
    max_requests: int | None
    micro_metrics: str
    thinking: str = "auto"
    config_run: Text | None
    provenance: Found
    versions: Versions


class ResultRow(Scores):
    """A result in the summary. folder: of its files, below the results folder."""

    folder: Text
    meets_budget: bool | None
    provenance: Found


class PhaseCounts(Record):
    """How many (model, task, configuration) triples of a run were completed, failed, and so on."""

    total: int
    completed: int
    partial: int
    failed: int
    skipped: int


class RunRecord(Record):
    """What a Phase 2 run was asked to do."""

    models: list[Text]
    tasks: list[Text]
    num_sparse_configs: int
    objective_function: str
    seed: int
    sparse_from: str
    max_new_tokens: int
    max_context_length: int
    max_requests: int | None
    benchmark_timeout: float
    micro_metrics: str
    thinking: str = "auto"
    budget_on: BudgetOn = "density"


class Summary(Record):
    """benchmark_summary.json: every score of a run, and what failed in either phase."""

    timestamp: str
    config_run_used: Text | None
    objective_function: str
    interrupted: bool
    phase2_results: PhaseCounts
    results: list[ResultRow]
    failures: list[Failure]
    notes: list[Text]
    configuration: RunRecord
    versions: Versions
