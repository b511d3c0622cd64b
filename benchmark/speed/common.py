"""What the speed scripts share: arguments, measuring in turns or in a new process, goals, and the report."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.settings import Settings, SparseConfig

if TYPE_CHECKING:
    from benchmark.execution.runner import BenchmarkOutcome

MODEL = "embedded/SmolLM2-135M-Instruct"
Figures = dict[str, float]
Step = Callable[[], object]
wall_seconds = partial(timeit.timeit, number=1)


def new_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser with --json whose --help shows the docstring of the script."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def take_turns(steps: dict[str, Step], rounds: int, measure: Callable[[Step], float] = wall_seconds) -> list[Figures]:
    """Seconds of each step in each round. Steps take turns, so that a slow moment of the machine slows all of them."""
    for step in steps.values():
        step()  # warm up
    return [{name: measure(step) for name, step in steps.items()} for _ in range(rounds)]


def in_process(part: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(what `part` returns in a new process, CPU seconds of that process and all that it started, user and system)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(part, *arguments).result()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shown = [argument for argument in arguments if isinstance(argument, str | int)]
    print(part.__name__, *shown, f"{spent:.1f} CPU s", file=sys.stderr, flush=True)
    return found, spent


def run_phase2(
    model: str, task: str, configs: Sequence[SparseConfig], results: Path, *, workers: int, **settings: Any
) -> BenchmarkOutcome:
    """Phase 2 on CPUs, over one model and task. workers: 0 = in this process."""
    from benchmark.execution.runner import BenchmarkUnit, run_benchmarks

    settings |= {"device": "cpu", "max_concurrent_benchmarks": max(1, workers), "benchmark_results_dir": results}
    unit = BenchmarkUnit(model, task, tuple(configs))
    return run_benchmarks([unit], Settings(models=(model,), tasks=(task,), **settings), in_process=workers == 0)


def report(
    figures: Figures, as_json: bool, *, at_least: Figures, at_most: Figures, precision: str = "", machine: Any = None
) -> int:
    """Print figures and goals; 1 if a goal does not hold, else 0.

    at_least, at_most: name of a figure -> its bound; an absent figure has no goal. precision: format of the printed figures,
    such as ".4g"; goals are checked on exact ones. machine: by default cores, processor and Python version.
    """
    machine = machine or {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    goals: list[dict[str, Any]] = []
    for kind, bounds in (("at_least", at_least), ("at_most", at_most)):
        for name, bound in bounds.items():
            if name in figures:
                value = figures[name]
                holds = value >= bound if kind == "at_least" else value <= bound
                goals.append({"name": name, "value": value, kind: bound, "holds": holds})
    if precision:
        figures = {name: float(format(value, precision)) for name, value in figures.items()}
    if as_json:
        print(json.dumps({"figures": figures, "goals": goals, "machine": machine}))
    else:
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        for name, value in figures.items():
            print(f"{name:<48} {value:>12g}")
        for goal in goals:
            allowed = f"at least {goal['at_least']:g}" if "at_least" in goal else f"at most {goal['at_most']:g}"
            print(f"{'holds' if goal['holds'] else 'FAILS'} {goal['name']} {goal['value']:g}, {allowed}")
    return int(not all(goal["holds"] for goal in goals))
