"""One typed record for each file that is written and read again.

    best = read_record(path, BestConfig, "search again")     # UserError with file, field and value for a damaged file
    write_record(path, best)

Numbers must be finite, and a text is no number. Fields that a file has beyond its record are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, field_validator

from benchmark.storage.results import write_json
from sparse_attention_hub.errors import UserError

RecordT = TypeVar("RecordT", bound="Record")


def _finite(value: JsonValue) -> JsonValue:
    if isinstance(value, int | float) and not -1e30 < value < 1e30:
        raise ValueError("numbers must be finite and between -1e30 and 1e30")
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(entry)
    return value


Plain = Annotated[JsonValue, AfterValidator(_finite)]
#: {parameter of a search: its value}
Params = dict[str, Plain]
#: A figure of any sign. The bounds leave room for what tables and plots make of it.
Measured = Annotated[float, Field(ge=-1e15, le=1e15)]
Interval = tuple[Measured, Measured]
Versions = dict[str, str | None]
_QUOTED = 200


class Record(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


# -- what both phases name ---------------------------------------------------------------------------------------------


class MaskerRecord(Record):
    """A masker's configuration, as the library's `config_to_dict` writes it."""

    type: str
    params: Params


class AttentionRecord(Record):
    """A ResearchAttentionConfig, as its `to_dict` writes it."""

    type: str = "ResearchAttentionConfig"
    masker_configs: list[MaskerRecord]


class Failure(Record):
    """Something that was not answered. sample_id, configuration: None where all of them were lost."""

    phase: int | None = None
    model: str | None = None
    task: str | None = None
    configuration: str | None = None
    sample_id: str | None = None
    status: str
    problem: str | None = None


# -- Phase 1 -----------------------------------------------------------------------------------------------------------

#: The rung of the forced forward: the last that measures error and density on inputs that all configurations share.
FORCED = 2
#: An error, a density or a duration. The upper bound leaves room for what tables and plots make of it.
Figure = Annotated[float, Field(ge=0, le=1e15)]
Count = Annotated[int, Field(ge=0)]
#: Share of keys that a level may attend to; None for a level without a budget.
Budget = Annotated[float, Field(gt=0, le=1e3)] | None


class _Whole(Record):
    """A record that is written with all its fields, set or not."""

    def model_post_init(self, context: Any) -> None:
        self.model_fields_set.update(type(self).model_fields)


class Evaluation(_Whole):
    """Figures of one configuration on one rung, means over the tuning samples. None = not measured on this rung."""

    error: Figure | None
    density: Figure
    seconds: Figure
    kv_fraction: float | None = None
    score: float | None = None
    sample_scores: list[float] | None = None
    reference_nll: float | None = None
    reproduced: float | None = None
    layer_errors: list[Figure] | None = None
    layer_densities: list[Figure] | None = None


class Trial(_Whole):
    """One configuration of a search. passing: a transient failure, retried on the next run. rungs: figures of each rung.
    finished: when the highest rung was evaluated, in seconds since 1970."""

    number: int
    params: Params
    status: Literal["completed", "failed", "timeout"] = "completed"
    error_message: str | None = None
    passing: bool = False
    pruned_at: int | None = None
    finished: float | None = None
    rungs: dict[int, Evaluation] = Field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time of all its rungs."""
        return sum(figures.seconds for figures in self.rungs.values())

    @property
    def reached(self) -> int | None:
        """The highest rung evaluated."""
        return max(self.rungs, default=None)

    def at_most(self, rung: int) -> Evaluation:
        """The figures of the highest rung up to `rung`."""
        return self.rungs[max(r for r in self.rungs if r <= rung)]

    @property
    def last(self) -> Evaluation:
        """The figures of the highest rung up to the forced forward."""
        return self.at_most(FORCED)


class Best(Record):
    """The best trial of one level. meets_budget False: no configuration met the budget, this is the closest. confirmed False:
    its figures are a replay's, since no confirmed trial met the budget."""

    level: str
    budget: float | None
    trial: int
    meets_budget: bool
    confirmed: bool


class EvaluationRecord(Record):
    """One evaluation in a study's journal. limit: the timeout that it ran out of. time: in seconds since 1970."""

    key: str
    params: Params
    rung: int
    status: Literal["completed", "failed", "timeout"]
    error_message: str | None
    evaluation: Evaluation | None
    limit: float | None
    passing: bool
    time: float


class StudyLine(Record):
    """A line of a study's journal: evaluations of one batch, or the keys of the batch that was running when a device broke."""

    evaluations: list[EvaluationRecord] = Field(default_factory=list)
    broke: list[str] = Field(default_factory=list)


class StudyOutcome(Record):
    """Result of a study, written by its worker for the driver. error: why the study failed as a whole. seconds: of this start
    and of evaluations reused from earlier ones. evaluated: number of evaluations of this start."""

    study: str
    error: str | None
    seconds: Figure
    trials: list[Trial] = Field(default_factory=list)
    best: list[Best] = Field(default_factory=list)
    samples: list[str] = Field(default_factory=list)
    truncated_samples: int = 0
    traces: list[str] = Field(default_factory=list)
    layers: list[int] = Field(default_factory=list)
    trace_bytes: int = 0
    evaluated: int = 0
    model_dtype: str = ""
    device: str = ""
    dense_backend: str = ""


class Confirmation(Record):
    """How sure the figures of a best configuration are, and from which rung each comes."""

    confirmed: bool
    error_from: str
    density_from: str
    score_from: str | None
    samples: int
    sample_scores: list[float] | None
    answers_reproduced: float | None
    dense_answer_nll: float | None
    replay_error: float | None


class SearchProvenance(Record):
    """Everything that determined the result of a search. identity: a hash of it."""

    identity: str
    seed: int
    sparse_from: str
    objective: str
    dtype: str
    device: str
    attention_backend: str
    dense_backend: str
    weights: list[list[Plain]] | None
    max_context_length: int
    max_new_tokens: int
    num_samples: int
    samples: list[str]
    truncated_samples: int
    traces: list[str]
    layers: list[int]
    versions: Versions


class BestConfig(Record):
    """{model}_{task}_{masker}.json: the best settings of a level. docs/file_formats.md explains the fields."""

    model: str
    task: str
    masker_name: str
    sparse_config: AttentionRecord
    masker_classes: list[str]
    hyperparams: Params
    budget: Budget
    meets_budget: bool
    error: Figure
    density: Figure
    kv_fraction: float | None
    score: float | None
    objective: float
    search_time: Figure
    num_trials: Count
    failed_trials: Count
    passing_failures: Count
    best_trial_id: str
    confirmation: Confirmation
    provenance: SearchProvenance


class TrialRow(Record):
    """A trial in {..}_trials.json. config: its parameters. rung: the highest evaluated. error, density, kv_fraction: of the
    highest rung up to the forced forward; score: of generation; figures: of every rung."""

    trial_id: str
    config: Params
    hyperparams: Params | None
    status: Literal["completed", "failed", "timeout"]
    error_message: str | None
    rung: int | None
    pruned_at: int | None
    error: float | None
    density: float | None
    kv_fraction: float | None
    score: float | None
    figures: dict[int, Evaluation]
    seconds: Figure

    @property
    def params(self) -> Params:
        return self.config

    @property
    def rungs(self) -> dict[int, Evaluation]:
        return self.figures

    @property
    def reached(self) -> int | None:
        """The highest rung evaluated."""
        return max(self.figures, default=None)

    @property
    def confirmed(self) -> bool:
        """Whether a forced forward was evaluated."""
        return FORCED in self.figures

    def figure(self, name: str, rung: int) -> float | None:
        """A figure of one rung; None if it was not measured there."""
        value: float | None = getattr(self.figures[rung], name) if rung in self.figures else None
        return value

    def last(self, name: str) -> float | None:
        """A figure of the highest rung up to the forced forward."""
        rungs = [rung for rung in self.figures if rung <= FORCED]
        return self.figure(name, max(rungs)) if rungs else None


class TrialsFile(Record):
    """{model}_{task}_{masker}_trials.json: every trial of a level's study. rungs: their names."""

    model: str
    task: str
    masker_name: str
    budget: Budget
    objective_function: str
    best_trial_id: str
    rungs: list[str]
    analysis_dataframe_path: str
    trials: list[TrialRow]

    @field_validator("trials")
    @classmethod
    def _same_parameters(cls, trials: list[TrialRow]) -> list[TrialRow]:
        for trial in trials:
            if trial.config.keys() != trials[0].config.keys():
                raise ValueError(f"the parameters of {trial.trial_id} are not those of {trials[0].trial_id}")
        return trials


# -- Phase 2 -----------------------------------------------------------------------------------------------------------


class Answer(Record):
    """An answer under one configuration, or the failure in its place. micro: calls of `MetricRecorder`."""

    status: str
    predicted_answer: str | None = None
    tokens: int | None = None
    stopped: str | None = None
    seconds: float | None = None
    density: float | None = None
    error: float | None = None
    kv_fraction: float | None = None
    micro: list[list[JsonValue]] = Field(default_factory=list)
    reference_nll: float | None = None
    reference_error: str | None = None
    error_message: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class SampleLine(Record):
    """A line of a Phase 2 journal: one sample, answered under configurations by their keys. limit: new tokens at most;
    capped_limit: the task asks for more. time: in seconds since 1970."""

    kind: Literal["sample"]
    sample_id: str
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


class JournalSettings(Record):
    """settings.json of a journal folder: all that determines an answer, apart from the sample and the configuration."""

    record_version: int
    model: str
    weights: list[list[JsonValue]] | None
    task: str
    seed: int
    sparse_from: str
    device: str
    dtype: str
    dense_backend: str
    attention_backend: str
    max_context_length: int
    micro_metrics: str


class WorkerStatus(Record):
    """What a worker is doing. sample: None while it loads the model."""

    pid: int
    state: Literal["loading", "answering"]
    model: str
    task: str
    sample: str | None


class Score(Record):
    """A metric over the samples that have it."""

    mean: Measured | None
    interval: Interval | None
    n: Count


class Difference(Record):
    """A configuration against dense attention on the samples that both answered; see stats.Comparison."""

    difference: Measured
    interval: Interval | None
    n: Count
    better: Count
    worse: Count
    p_value: float | None


class SampleCounts(Record):
    """Samples of a result by what became of them."""

    total: Count
    ok: Count
    failed: Count
    timed_out: Count
    unscored: Count
    missing: Count
    capped: Count
    truncated: Count
    without_reference_nll: Count


class Scores(Record):
    """The scores of one configuration on one task. Means leave failed samples out."""

    model: str
    task: str
    configuration: str
    metric: str
    score: Measured | None
    interval: Interval | None
    scores: dict[str, Score]
    reference_nll: Measured | None
    perplexity: float | None
    density: Measured | None
    error: Measured | None
    kv_fraction: Measured | None
    budget: Measured | None
    over_budget: bool | None
    samples: SampleCounts
    seconds: Measured | None
    difference_to_dense: Difference | None = None
    reference_nll_difference_to_dense: Difference | None = None
    aggregate: Params | None = None
    aggregate_problem: str | None = None


class Metrics(Scores):
    """metrics.json: the scores, and the samples that failed."""

    failures: list[Failure]


class FoundBy(Record):
    """Where Phase 1 found a configuration."""

    config_run: str
    config_file: str
    budget: float | None
    meets_budget: bool
    error: float
    density: float
    score: float | None
    hyperparams: Params
    identity: str
    sparse_from: str


#: None for dense attention, where older files have {}.
Found = Annotated[FoundBy | None, BeforeValidator(lambda value: value or None)]


class ResultIdentity(Record):
    """The hashes of a config.json by which results of other settings or other data are recognised."""

    hash: str
    samples: list[str] = Field(default_factory=list)


class ResultConfig(ResultIdentity):
    """config.json: what one result was made of. hash: of all that determines an answer; samples_hash: of which samples were
    asked; samples: of what each was made of; settings: of the journal."""

    model: str
    task: str
    configuration: str
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
    config_run: str | None
    provenance: Found
    versions: Versions


class ResultRow(Scores):
    """A result in the summary. folder: of its files, below the results folder."""

    folder: str
    meets_budget: bool | None
    provenance: Found


class PhaseCounts(Record):
    """(model, task, configuration) triples of a run by what became of them."""

    total: int
    completed: int
    partial: int
    failed: int
    skipped: int


class RunRecord(Record):
    """What a Phase 2 run was asked to do."""

    models: list[str]
    tasks: list[str]
    num_sparse_configs: int
    objective_function: str
    seed: int
    sparse_from: str
    max_new_tokens: int
    max_context_length: int
    max_requests: int | None
    benchmark_timeout: float
    micro_metrics: str


class Summary(Record):
    """benchmark_summary.json: every score of a run, and what failed in either phase."""

    timestamp: str
    config_run_used: str | None
    objective_function: str
    interrupted: bool
    phase2_results: PhaseCounts
    results: list[ResultRow]
    failures: list[Failure]
    notes: list[str]
    configuration: RunRecord
    versions: Versions


# -- reading and writing -----------------------------------------------------------------------------------------------


def read_record(path: Path, kind: type[RecordT], advice: str) -> RecordT:
    """The record in a JSON file. UserError, one line that ends with `advice`, for a file that does not hold one."""
    try:
        return parse_record(path.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from None


def parse_record(content: bytes | str, kind: type[RecordT]) -> RecordT:
    """The record in JSON text. ValueError with the first wrong field and what was got."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def read_lines(path: Path, kind: type[RecordT], advice: str) -> Iterator[RecordT]:
    """The records in a file of JSON lines; an absent file has none. Lines that a kill left incomplete are skipped; UserError
    for one that holds something else."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise UserError(f"{path}, line {number}: {_first_problem(error)}; {advice}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    got = "" if first["type"] in ("missing", "json_invalid") else f", got {repr(first['input'])[:_QUOTED]}"
    where = f"field {field}: " if field else ""
    return f"{where}{first['msg'].removeprefix('Value error, ')[:_QUOTED]}{got}"


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain JSON values, fields that were not set left out."""
    return record.model_dump(mode="json", exclude_unset=True)


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    write_json(path, to_json(record))
