"""What a study is to the rest of Phase 1: its name, its levels, its files; and how configurations become studies."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.search.space import CombinationSpace
from benchmark.search.study import Study
from benchmark.search.trial import Level
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.fingerprints import behind_config, weights_stamp
from benchmark.storage.results import Journal, environment, fingerprint, result_key, write_json
from sparse_attention_hub.errors import UserError

#: Raised when the meaning of what a search writes changes, so that older results are not reused.
FORMAT = 4


@dataclass(frozen=True)
class StudySpec:
    """All levels of one masker combination that share a study, on one (model, task)."""

    model: str
    task: str
    name: str  # the family, with a number where levels of it need studies of their own
    levels: tuple[Level, ...]

    def space(self) -> CombinationSpace:
        return CombinationSpace(self.levels[0].template, self.task)

    def journal_identity(self, settings: Settings, samples: str) -> str:
        """A hash of everything but its parameters that determines an evaluation, the maskers' code too; samples: evaluation.samples_key.

        Searches that differ in levels, numbers of trials or the objective ask the same of a configuration: they share a
        journal.
        """
        return fingerprint(
            {
                "format": FORMAT,
                "version": environment()["sparse-attention-hub"],
                "model": self.model,
                "weights": weights_stamp(self.model),
                "task": self.task,
                "samples": samples,
                "fixed": self.space().fixed_fields(),
                "behind": behind_config(self.levels[0].template),
                "sparse_from": settings.sparse_from,
                "place": resolved_place(settings),
                "backends": [settings.attention_backend, settings.dense_backend],
            }
        )

    def identity(self, settings: Settings, samples: str) -> str:
        """A hash of everything that determines what this study finds."""
        return fingerprint(
            {
                "journal": self.journal_identity(settings, samples),
                "levels": [(level.name, level.budget, level.template.to_dict()) for level in self.levels],
                "space": {name: repr(domain) for name, domain in self.space().domains.items()},
                "settings": [
                    settings.seed,
                    settings.num_samples,
                    settings.search_timeout,
                    settings.objective,
                    settings.trace_budget_gb,
                ],
            }
        )


def resolved_place(settings: Settings) -> list[str]:
    """Kind of device and dtype that evaluations run with; as they were asked for where the machines of a cluster decide."""
    if settings.ray_address not in (None, "local"):
        return ["cluster", settings.device, settings.dtype]
    from sparse_attention_hub.models.load import likely_dtype, pick_device

    device = pick_device(settings.device)
    return [device.type, str(likely_dtype(settings.dtype, device))]


def plan_studies(models: list[str], tasks: list[str], configs: list[SparseConfig]) -> tuple[list[StudySpec], list[str]]:
    """(the studies of a run, those of one (model, task) together; notes on what is left out). Levels of a family share a
    study if their fixed fields agree; a combination that needs weights which a model does not have is left out.

    UserError if two studies or two levels would write the same files.
    """
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
            families = [family for family, _ in groups]
            for (family, _), levels in groups.items():
                # A family in several studies has no file of its own name: each takes its first level's.
                name = family if families.count(family) == 1 else levels[0].name
                studies.append(StudySpec(model, task, name, tuple(levels)))
    _check_names([study_id(study) for study in studies])
    _check_names([result_key(study.model, study.task, level.name) for study in studies for level in study.levels])
    return studies, notes


def _check_names(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"two searches of this run would write the same files, {name}*: rename a configuration, or give each model or "
                "task a run of its own"
            )


def study_id(study: StudySpec) -> str:
    return result_key(study.model, study.task, study.name)


def journal_path(folder: Path, study: StudySpec, identity: str) -> Path:
    """In Ray's results folder, by the study's journal identity."""
    return folder / "journals" / f"{study_id(study)}-{identity}.jsonl"


def outcome_path(folder: Path, study: StudySpec, identity: str) -> Path:
    """Beside the journals, by the study's own identity."""
    return folder / "journals" / f"{study_id(study)}-{identity}.json"


def run_study(spec: StudySpec, settings: Settings, evaluator: Any, journal: Path) -> Study:
    """The Study of a spec, journalling into `journal`."""
    return Study(
        spec.space(),
        list(spec.levels),
        evaluator,
        Journal(journal),
        num_samples=settings.num_samples,
        timeout=settings.search_timeout,
        seed=settings.seed,
        objective=settings.objective,
    )


def write_outcome(path: Path, spec: StudySpec, study: Study | None, evaluator: Any, seconds: float, error: str | None) -> None:
    """What a worker leaves for the driver. seconds: of this start; what earlier ones evaluated is added."""
    record: dict[str, Any] = {"study": study_id(spec), "error": error, "seconds": seconds, "trials": [], "best": []}
    if study is not None and error is None:
        record["seconds"] += study.known_seconds
        record["trials"] = [
            {
                "number": trial.number,
                "params": trial.params,
                "status": trial.status,
                "error_message": trial.error_message,
                "passing": trial.passing,
                "pruned_at": trial.pruned_at,
                "finished": trial.finished,
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
        record["dense_backend"] = evaluator.lm.dense_backend
    write_json(path, record)
