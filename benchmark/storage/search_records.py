"""The records of Phase 1: best configurations, trials, and what studies journal. docs/file_formats.md explains the fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from benchmark.storage.records import (
    SPENT,
    AttentionRecord,
    BudgetOn,
    Count,
    EvenBudgets,
    Figure,
    Params,
    Plain,
    Record,
    Text,
    Versions,
)

#: The rung of the forced forward: the last that measures error and density on inputs that all configurations share.
FORCED = 2
#: Share of keys, or of the dense KV bytes, that a level may use; None for a level without a budget.
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
    head_densities: list[list[Figure]] | None = None  # of a configuration with head budgets, as its table has rows and columns

    def spent(self, budget_on: BudgetOn) -> float:
        """What a budget limits."""
        value: float | None = getattr(self, SPENT[budget_on])
        assert value is not None, "this rung did not measure what budgets are on"
        return value


class FittedTable(_Whole):
    """Head budgets that were fitted. by: one factor per "layer", "kv_head" or "head". strength: 0 = even .. 1 = as fitted.
    held_out: change of the replayed error against even budgets at the same density, on rows that the table was not fitted on.
    factors: a row per layer of the model."""

    by: str
    strength: float
    held_out: float
    factors: list[list[float]]


class HeadBudgetTable(FittedTable):
    """The head budgets of a trial. level: what they were fitted for. base: the trial with even budgets that they scale."""

    level: Text
    base: int


class Trial(_Whole):
    """One configuration of a search. transient: its failure is retried on the next run. rungs: figures of each rung.
    finished: when the highest rung was evaluated, in seconds since 1970. table: its head budgets, None = even ones."""

    number: int
    params: Params
    table: HeadBudgetTable | None = None
    status: Literal["completed", "failed", "timeout"] = "completed"
    error_message: Text | None = None
    transient: bool = False
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

    level: Text
    budget: float | None
    trial: int
    meets_budget: bool
    confirmed: bool


class EvaluationRecord(Record):
    """One evaluation in a study's journal. limit: the timeout that it exceeded. time: in seconds since 1970."""

    key: str
    params: Params
    rung: Annotated[int, Field(ge=0, le=3)]
    status: Literal["completed", "failed", "timeout"]
    error_message: Text | None
    evaluation: Evaluation | None
    limit: float | None
    transient: bool = Field(validation_alias=AliasChoices("transient", "passing"))  # the second in older files
    time: float

    @model_validator(mode="after")
    def _figures_of_what_is_completed(self) -> Self:
        if (self.evaluation is None) == (self.status == "completed"):
            raise ValueError("a completed evaluation has figures, another one has none")
        if self.evaluation is not None and self.evaluation.error is None and self.rung <= FORCED:
            raise ValueError("an evaluation by replay or forced forward has an error")
        return self


class FitRecord(Record):
    """A fit of head budgets in a study's journal: a table, or None, for each trial that it was tried for; or why it failed.
    limit: the timeout that it exceeded."""

    key: str
    tables: list[FittedTable | None]
    error_message: Text | None
    limit: float | None = None
    transient: bool
    seconds: Figure


class StudyLine(Record):
    """A line of a study's journal: evaluations of one batch, a fit of head budgets, or the keys of what was running when
    a device broke."""

    evaluations: list[EvaluationRecord] = Field(default_factory=list)
    fit: FitRecord | None = None
    broke: list[str] = Field(default_factory=list)


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
    thinking: str = "auto"
    head_budgets: str = "off"
    versions: Versions


class BestConfig(Record):
    """{model}_{task}_{masker}.json: the best settings of a level. docs/file_formats.md explains the fields."""

    model: Text
    task: Text
    masker_name: Text
    sparse_config: AttentionRecord
    masker_classes: list[str]
    hyperparams: Params
    budget: Budget
    budget_on: BudgetOn = "density"
    meets_budget: bool
    error: Figure
    density: Figure
    kv_fraction: float | None
    score: float | None
    even_budgets: EvenBudgets | None = None
    objective: float
    search_time: Figure
    num_trials: Count
    failed_trials: Count
    transient_failures: Count = Field(validation_alias=AliasChoices("transient_failures", "passing_failures"))
    best_trial_id: str
    confirmation: Confirmation
    provenance: SearchProvenance


class TrialRow(Record):
    """A trial in {..}_trials.json. table: its head budgets. rung: the highest evaluated. error, density, kv_fraction: of the
    highest rung up to the forced forward; score: of generation; rungs: figures of every rung."""

    trial_id: str
    params: Params = Field(alias="config")
    hyperparams: Params | None
    table: HeadBudgetTable | None = None
    status: Literal["completed", "failed", "timeout"]
    error_message: Text | None
    rung: int | None
    pruned_at: int | None
    error: float | None
    density: float | None
    kv_fraction: float | None
    score: float | None
    rungs: dict[int, Evaluation] = Field(alias="figures")
    seconds: Figure

    def figure(self, name: str, rung: int) -> float | None:
        """A figure of one rung; None if it was not measured there."""
        value: float | None = getattr(self.rungs[rung], name) if rung in self.rungs else None
        return value


class TrialsFile(Record):
    """{model}_{task}_{masker}_trials.json: every trial of a level's study. rungs: their names."""

    model: Text
    task: Text
    masker_name: Text
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
            if trial.params.keys() != trials[0].params.keys():
                raise ValueError(f"the parameters of {trial.trial_id} are not those of {trials[0].trial_id}")
        return trials
