"""The benchmarks: their samples, prompts and scores.

    from benchmark.tasks import get_task, available_tasks, expand_task, score_prediction
    score_prediction("ruler/4096/vt", "ABCDE FGHIJ", ["ABCDE", "QWERT"])      # {"string_match": 0.5}

A benchmark's module is imported when one of its names is used; base.py says what such a module defines.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmark.tasks.base import Task, TaskSelection, UserError

__all__ = ["available_tasks", "expand_task", "get_task", "score_prediction"]

# benchmark name -> its module in this package
MODULES: dict[str, str] = {
    "ruler": "ruler",
    "ruler_hf": "ruler",
    "ruler16k": "ruler",
    "ruler32k": "ruler",
    "infinite_bench": "infinite_bench",
    "infinite_bench_hf": "infinite_bench",
    "loogle": "loogle",
    "zero_scrolls": "zero_scrolls",
    "longbench": "longbench",
    "longbenchv2": "longbenchv2",
    "aime2024": "aime",
    "aime2025": "aime",
}


def _module(benchmark: str) -> ModuleType:
    return importlib.import_module(f"benchmark.tasks.{MODULES[benchmark]}")


@functools.cache
def _listed(benchmark: str) -> dict[str, Task]:
    prefix = benchmark + "/"
    return {name: task for name, task in _module(benchmark).make_tasks().items() if name.startswith(prefix)}


def available_tasks() -> list[str]:
    """Every listed leaf task. More names work: any RULER length, as in "ruler/5000/vt"."""
    return [name for benchmark in MODULES for name in _listed(benchmark)]


def _check_benchmark(name: str) -> str:
    benchmark, _, subset = name.partition("/")
    if benchmark not in MODULES:
        near = difflib.get_close_matches(benchmark, MODULES, n=3, cutoff=0.5)
        raise UserError(
            f"unknown task {name!r}: no benchmark {benchmark!r}, "
            + (f"near names: {', '.join(near)}" if near else f"there are {', '.join(MODULES)}")
        )
    if not subset:
        examples = list(_listed(benchmark))
        shown = ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        raise UserError(f"task {name!r} needs a subset: {shown}")
    return benchmark


def get_task(name: str) -> Task:
    """The leaf task of this name. UserError, with names to use instead, for an unknown name or a group."""
    benchmark = _check_benchmark(name)
    listed = _listed(benchmark)
    find_task = getattr(_module(benchmark), "find_task", lambda name: None)
    task: Task | None = listed.get(name) or find_task(name)
    if task is not None:
        return task
    members = [member for member in listed if member.startswith(name + "/")]
    if members:
        raise UserError(
            f"{name!r} is a group of {len(members)} tasks: name one of them, such as {members[0]}, or expand_task it"
        )
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.4) or list(listed)[:3]
    raise UserError(f"unknown task {name!r}: near names are {', '.join(near)}; `python -m benchmark.tasks list` shows all")


def expand_task(name: str, data_dir: Path | None = None) -> TaskSelection:
    """The leaf tasks of a name: itself, or a group's members whose data are available, with a note if some are not."""
    expand = getattr(_module(_check_benchmark(name)), "expand", lambda name, data_dir: None)
    selection: TaskSelection | None = expand(name, data_dir)
    return selection or TaskSelection([get_task(name).name])


def score_prediction(
    task_name: str, prediction: str | None, references: Any, all_classes: list[str] | None = None
) -> dict[str, float]:
    """The original benchmark's scores of one answer, every value in 0..1.

    `task_name`: a task, or a benchmark whose tasks all have the same score ("aime2024", "longbenchv2").
    `prediction`: None counts as an empty answer. `references`: the gold answers, a list of texts or the value in the
    benchmark's own data (an int for infinite_bench/code_run); None is no reference, which scores 0. Raises UserError for
    an unknown name and ValueError for gold answers that the benchmark cannot have.
    """
    tasks = list(_listed(task_name).values()) if task_name in MODULES else []
    alike = len({task.description.metric for task in tasks}) == 1
    task = tasks[0] if alike else get_task(task_name)
    return task.score_answer(prediction or "", [] if references is None else references, all_classes)
