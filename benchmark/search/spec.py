"""Study specification: levels, identity and files; and the studies of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmark.search.space import CombinationSpace
from benchmark.search.trial import FIT_VERSION, Level, Progress
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.fingerprints import dependency_digests, weights_stamp
from benchmark.storage.results import fingerprint, result_key
from sparse_attention_hub.errors import UserError

#: Increased when the meaning of a search's files changes, so that older results are not reused.
FORMAT = 4


@dataclass(frozen=True)
class StudySpec:
    """The levels of one masker combination that share a study, on one (model, task). name: the combination, or the first
    level's name where the levels of a combination need several studies."""

    model: str
    task: str
    name: str
    levels: tuple[Level, ...]

    def stems(self) -> list[str]:
        """The names of the levels' result files, without their endings."""
        return [result_key(self.model, self.task, level.name) for level in self.levels]

    def space(self) -> CombinationSpace:
        return CombinationSpace(self.levels[0].template, self.task, [level.template for level in self.levels])

    def journal_identity(self, settings: Settings, samples: str) -> str:
        """A hash of everything but its parameters that determines an evaluation, with the versions of engine and maskers.

        samples: `samples.samples_key`. Searches that differ only in levels, number of trials or objective share a journal.
        """
        return fingerprint(
            {
                "format": FORMAT,
                "model": self.model,
                "weights": weights_stamp(self.model),
                "task": self.task,
                "samples": samples,
                "fixed": self.space().fixed_fields(),
                "behind": dependency_digests(self.levels[0].template),
                "sparse_from": settings.sparse_from,
                "place": device_and_dtype(settings),
                "backends": [settings.attention_backend, settings.dense_backend],
                **({} if settings.budget_on == "density" else {"budget_on": settings.budget_on}),
            }
        )

    def identity(self, settings: Settings, samples: str) -> str:
        """A hash of everything that determines the study's result. --objective is part of it where a level has no budget."""
        objective = None if all(level.budget for level in self.levels) else settings.objective
        limits = [settings.num_samples, settings.search_timeout, settings.trace_budget_gb]
        return fingerprint(
            {
                "journal": self.journal_identity(settings, samples),
                "levels": [(level.name, level.budget, level.template.to_dict()) for level in self.levels],
                "space": {name: repr(domain) for name, domain in self.space().domains.items()},
                "settings": [settings.seed, objective, *limits],
                **({} if settings.head_budgets == "off" else {"head_budgets": [settings.head_budgets, FIT_VERSION]}),
            }
        )


def device_and_dtype(settings: Settings) -> list[str]:
    """Device type and dtype of evaluations; on a cluster, where each machine resolves them itself, the flags' values."""
    if settings.ray_address not in (None, "local"):
        return ["cluster", settings.device, settings.dtype]
    from sparse_attention_hub.models.load import likely_dtype, pick_device

    device = pick_device(settings.device)
    return [device.type, str(likely_dtype(settings.dtype, device))]


def plan_studies(models: list[str], tasks: list[str], configs: list[SparseConfig]) -> tuple[list[StudySpec], list[str]]:
    """(the studies of a run, grouped by (model, task); notes on what is left out).

    Levels of a combination share a study if their fixed fields agree. A combination that needs weights which a model does not
    have is left out. UserError if two studies or two levels would write the same files.
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
                # The studies of a family that needs several are named after their first levels.
                name = family if families.count(family) == 1 else levels[0].name
                studies.append(StudySpec(model, task, name, tuple(levels)))
    _check_names([study_id(study) for study in studies])
    _check_names([stem for study in studies for stem in study.stems()])
    return studies, notes


def _check_names(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"two searches of this run would write the same files, {name}*: rename a configuration, or search the models "
                "or tasks in separate runs"
            )


def study_id(study: StudySpec) -> str:
    return result_key(study.model, study.task, study.name)


@dataclass(frozen=True)
class StudyWork:
    """What a worker needs to run a study. It writes the journal and, into the folder `results`, the files of every level."""

    study: StudySpec
    settings: Settings
    identity: str
    journal: Path
    results: Path
    traces: Path


class Report(Protocol):
    """Receives the events of a search."""

    def note(self, text: str) -> None: ...

    def progress(self, study: StudySpec, progress: Progress) -> None: ...

    def reused(self, study: StudySpec, run: str) -> None:
        """The study was copied from an earlier run."""

    def finished(self, study: StudySpec, progress: Progress) -> None: ...

    def failed(self, study: StudySpec, problem: str) -> None: ...
