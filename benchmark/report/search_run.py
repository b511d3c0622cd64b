"""Reads a Phase 1 run: studies with their trials, levels with their best. Imports neither torch, Ray nor Optuna."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.settings import SparseConfig
from benchmark.storage.records import SPENT, read_record
from benchmark.storage.runs import find_run, list_runs
from benchmark.storage.search_records import BestConfig, TrialRow, TrialsFile
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_ADVICE = "search again"


@dataclass
class Study:
    """All trials of one (model, task, masker combination), and the best of each budget level that shares them."""

    model: str
    task: str
    combination: str
    trials: list[TrialRow]
    levels: list[BestConfig] = field(default_factory=list)

    @property
    def search_seconds(self) -> float:
        return max((level.search_time for level in self.levels), default=0.0)

    def figures(self, name: str, rung: int | None = None) -> pd.Series[float]:
        """A figure of every trial, NaN where it was not measured. rung None: the highest up to the forced forward."""
        import pandas as pd

        found = [getattr(trial, name) if rung is None else trial.figure(name, rung) for trial in self.trials]
        return pd.Series(found, dtype=float)

    def spent(self, rung: int | None = None) -> pd.Series[float]:
        """What budgets limit, of every trial; rung as of `figures`."""
        return self.figures(SPENT[self.levels[0].budget_on], rung)

    def best_trial(self, level: BestConfig) -> TrialRow | None:
        return next((trial for trial in self.trials if trial.trial_id == level.best_trial_id), None)


@dataclass
class Run:
    """A run. rung_names: the name of each rung. left_out: problems of damaged files."""

    folder: Path
    studies: list[Study]
    rung_names: list[str]
    left_out: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Its (model, task), in order."""
        return list(dict.fromkeys((study.model, study.task) for study in self.studies))

    @property
    def combinations(self) -> list[str]:
        return sorted({study.combination for study in self.studies}, key=lambda name: (name.count("_"), name))

    @property
    def budgets(self) -> list[float | None]:
        """Budgets of the levels, smallest first; None (levels without one) last."""
        found = {level.budget for study in self.studies for level in study.levels}
        return sorted(found, key=lambda budget: (budget is None, budget or 0.0))

    @property
    def spent(self) -> str:
        """What its budgets are on, for tables and plots: "density" or "KV bytes"."""
        return "KV bytes" if any(level.budget_on == "kv" for study in self.studies for level in study.levels) else "density"

    def of(self, model: str, task: str) -> list[Study]:
        return [study for study in self.studies if (study.model, study.task) == (model, task)]


def budget_label(budget: float | None) -> str:
    return "-" if budget is None else f"{100 * budget:g}%"


def choose_run(folder: Path, name: str | None, flag: str = "--run") -> Path:
    """The folder of a run, given by name or path; without a name, the newest run with trials. UserError if there is none."""
    if name is not None:
        path = Path(name)
        return find_run(path.parent if len(path.parts) > 1 else folder, path.name, flag)
    if not folder.is_dir():
        raise UserError(f"--optimal-configs-dir {folder}: no such folder; run --phase 1 first, or name the folder of a search")
    for run in list_runs(folder):
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
        studies[key].levels.append(best)
    if not studies:
        raise UserError(left_out[0] if left_out else f"{folder}: contains no finished search (no *_trials.json)")
    counts = Counter((study.model, study.task, study.combination) for study in studies.values())
    for study in studies.values():
        study.levels.sort(key=lambda level: (level.budget is None, level.budget or 0.0, level.masker_name))
        if counts[study.model, study.task, study.combination] > 1:  # levels of a combination that could not share a study
            study.combination += f" ({', '.join(budget_label(level.budget) for level in study.levels)})"
    return Run(folder, list(studies.values()), rung_names, left_out)
