"""What a study is to the rest of Phase 1: its name, its levels, its files; and how configurations become studies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.results import Journal, environment, fingerprint, result_key, write_json
from benchmark.settings import Settings, SparseConfig

from .optimizer_factory import CombinationSpace
from .study import Level, Study

#: Raised when the meaning of what a search writes changes, so that older results are not reused.
FORMAT = 1


@dataclass(frozen=True)
class StudySpec:
    """All levels of one masker combination that share a study, on one (model, task)."""

    model: str
    task: str
    name: str  # the family, with a number where levels of it need studies of their own
    levels: tuple[Level, ...]

    def space(self) -> CombinationSpace:
        return CombinationSpace(self.levels[0].template, self.task)

    def identity(self, settings: Settings) -> str:
        """A hash of everything that determines what this study finds."""
        space = self.space()
        return fingerprint(
            {
                "format": FORMAT,
                "version": environment()["sparse-attention-hub"],
                "model": self.model,
                "task": self.task,
                "levels": [(level.name, level.budget, level.template.to_dict()) for level in self.levels],
                "space": {name: repr(domain) for name, domain in space.domains.items()},
                "settings": [
                    settings.seed,
                    settings.sparse_from,
                    settings.dtype,
                    settings.device,
                    settings.num_samples,
                    settings.search_timeout,
                    settings.search_max_new_tokens,
                    settings.search_max_context_length,
                    settings.search_max_requests,
                    settings.objective,
                    settings.trace_budget_gb,
                    str(settings.data_dir) if settings.data_dir else None,
                ],
            }
        )


def plan_studies(models: list[str], tasks: list[str], configs: list[SparseConfig]) -> tuple[list[StudySpec], list[str]]:
    """(the studies of a run, those of one (model, task) together; notes on what is left out). Levels of a family share a
    study if their fixed fields agree; a combination that needs weights which a model does not have is left out."""
    from sparse_attention_hub.models.model_files import fit_template

    studies: list[StudySpec] = []
    notes: list[str] = []
    for model in models:
        fitted = [(config, fit_template(config.config, model)) for config in configs if config.config is not None]
        left_out = sorted({config.family for config, template in fitted if template is None})
        if left_out:
            notes.append(
                f"{model}: no HashAttention weights, left out {', '.join(left_out)}; name a hat_weight_file to have them"
            )
        for task in tasks:
            groups: dict[tuple[str, str], list[Level]] = {}
            for config, template in fitted:
                if template is None:
                    continue
                fixed = fingerprint(CombinationSpace(template, task).fixed_fields())
                groups.setdefault((config.family, fixed), []).append(Level(config.name, config.budget, template))
            numbers: dict[str, int] = {}
            for (family, _), levels in groups.items():
                numbers[family] = numbers.get(family, 0) + 1
                name = family if numbers[family] == 1 else f"{family}_{numbers[family]}"
                studies.append(StudySpec(model, task, name, tuple(levels)))
    return studies, notes


def study_id(study: StudySpec) -> str:
    return result_key(study.model, study.task, study.name)


def journal_path(folder: Path, study: StudySpec, identity: str) -> Path:
    return folder / f"{study_id(study)}-{identity}.jsonl"


def outcome_path(folder: Path, study: StudySpec, identity: str) -> Path:
    return folder / f"{study_id(study)}-{identity}.json"


def run_study(spec: StudySpec, settings: Settings, identity: str, journals: Path, evaluator: Any) -> Study:
    """The Study of a spec, journalling into `journals`."""
    return Study(
        spec.space(),
        list(spec.levels),
        evaluator,
        Journal(journal_path(journals, spec, identity)),
        num_samples=settings.num_samples,
        timeout=settings.search_timeout,
        seed=settings.seed,
        objective=settings.objective,
    )


def write_outcome(path: Path, spec: StudySpec, study: Study | None, evaluator: Any, seconds: float, error: str | None) -> None:
    """What a worker leaves for the driver."""
    record: dict[str, Any] = {"study": study_id(spec), "error": error, "seconds": seconds, "trials": [], "best": []}
    if study is not None and error is None:
        record["trials"] = [
            {
                "number": trial.number,
                "params": trial.params,
                "status": trial.status,
                "error_message": trial.error_message,
                "pruned_at": trial.pruned_at,
                "rungs": {str(rung): asdict(evaluation) for rung, evaluation in trial.rungs.items()},
            }
            for trial in study.trials
        ]
        record["best"] = [asdict(best) for best in study.best()]
        record["samples"] = [entry.sample.sample_id for entry in evaluator.samples]
        record["truncated_samples"] = sum(entry.prompt.truncated_tokens > 0 for entry in evaluator.samples)
        record["traces"] = [trace.key for trace in evaluator.traces]
        record["layers"] = evaluator.layers
        record["trace_bytes"] = sum(trace.nbytes for trace in evaluator.traces)
        record["evaluated"] = study.evaluated
        record["model_dtype"] = str(evaluator.lm.dtype)
        record["device"] = str(evaluator.lm.device)
    write_json(path, record)
