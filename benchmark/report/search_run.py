"""Reads a Phase 1 run: studies with their trials, levels with their best. Imports neither torch, Ray nor Optuna."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.settings import SparseConfig
from benchmark.storage.records import FORCED, BestConfig, TrialRow, TrialsFile, read_record
from sparse_attention_hub.errors import UserError

__all__ = ["FORCED", "Level", "Run", "Study", "Trial", "choose_run", "read_run"]

Trial = TrialRow
_RUN = re.compile(r"^run_\d{8}_\d{6}$")
_ADVICE = "search again"


@dataclass
class Level:
    """The best of one budget. trial: None if the trials file does not contain it."""

    best: BestConfig
    trial: Trial | None

    @property
    def name(self) -> str:
        return self.best.masker_name

    @property
    def budget(self) -> float | None:
        return self.best.budget

    @property
    def label(self) -> str:
        return "-" if self.budget is None else f"{100 * self.budget:g}%"


@dataclass
class Study:
    """All trials of one (model, task, masker combination), with the levels that share them."""

    model: str
    task: str
    combination: str
    trials: list[Trial]
    levels: list[Level] = field(default_factory=list)

    @property
    def search_seconds(self) -> float:
        return max((level.best.search_time for level in self.levels), default=0.0)


@dataclass
class Run:
    """A run. rung_names: the name of each rung. left_out: problems of damaged files. pairs: its (model, task), in order."""

    folder: Path
    studies: list[Study]
    rung_names: list[str]
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((study.model, study.task) for study in self.studies))

    @property
    def combinations(self) -> list[str]:
        return sorted({study.combination for study in self.studies}, key=lambda name: (name.count("_"), name))

    @property
    def budgets(self) -> list[float | None]:
        """Budgets of the levels, smallest first; None (levels without one) last."""
        found = {level.budget for study in self.studies for level in study.levels}
        return sorted(found, key=lambda budget: (budget is None, budget or 0.0))

    def of(self, model: str, task: str) -> list[Study]:
        return [study for study in self.studies if (study.model, study.task) == (model, task)]


def choose_run(folder: Path, name: str | None) -> Path:
    """The folder of a run, given by name or path; without a name, the newest run with trials. UserError if there is none."""
    if name is not None:
        for candidate in (folder / name, Path(name)):
            if candidate.is_dir():
                return candidate
        known = [run.name for run in _runs(folder)]
        listed = f"there are {', '.join(known[:5])}" if known else "there is none yet: run --phase 1 first"
        raise UserError(f"no run {name!r} in {folder}; {listed}")
    if not folder.is_dir():
        raise UserError(f"--optimal-configs-dir {folder}: no such folder; run --phase 1 first, or name the folder of a search")
    for run in _runs(folder):
        if any(run.glob("*_trials.json")):
            return run
    raise UserError(f"no run with finished trials in {folder}: run --phase 1 first, or give --optimal-configs-dir")


def read_run(folder: Path) -> Run:
    """Read every level of a run; one with a damaged file is left out. UserError if none is left."""
    studies: dict[tuple[str, str, str], Study] = {}
    rung_names: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.glob("*_trials.json")):
        try:
            found = read_record(path, TrialsFile, _ADVICE)
            best = read_record(path.with_name(f"{path.name.removesuffix('_trials.json')}.json"), BestConfig, _ADVICE)
        except UserError as error:
            left_out.append(str(error))
            continue
        rung_names = max(rung_names, found.rungs, key=len)
        # Levels that share a study have the same trial ids, which begin with the study's identity.
        study_part = found.trials[0].trial_id.rpartition("_")[0] if found.trials else best.masker_name
        key = (best.model, best.task, study_part)
        if key not in studies:
            studies[key] = Study(best.model, best.task, SparseConfig(best.masker_name, None, None).family, found.trials)
        trial = next((trial for trial in found.trials if trial.trial_id == found.best_trial_id), None)
        studies[key].levels.append(Level(best, trial))
    if not studies:
        raise UserError(left_out[0] if left_out else f"{folder}: contains no finished search (no *_trials.json)")
    for study in studies.values():
        study.levels.sort(key=lambda level: (level.budget is None, level.budget or 0.0, level.name))
        twins = [
            s for s in studies.values() if (s.model, s.task, s.combination) == (study.model, study.task, study.combination)
        ]
        if len(twins) > 1:  # levels of a combination that could not share a study
            for twin in twins:
                twin.combination += f" ({', '.join(level.label for level in twin.levels)})"
    return Run(folder, list(studies.values()), rung_names, left_out)


def _runs(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("run_*") if path.is_dir() and _RUN.match(path.name)), reverse=True)
