"""What the speed scripts share: arguments, measuring in turns or in a new process, goals, and the report."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from timeit import timeit
from typing import TYPE_CHECKING, Any

import sparse_attention_hub as hub
from benchmark.command_line import Parser
from benchmark.command_line import run_command as run_command  # for the scripts

if TYPE_CHECKING:
    from transformers import DynamicCache

    from sparse_attention_hub.models import LanguageModel

MODEL = "embedded/SmolLM2-135M-Instruct"
Figures = dict[str, float]
Step = Callable[[], object]


def new_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser with --json whose --help shows the docstring of the script."""
    parser = Parser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def take_turns(steps: dict[Any, Step], rounds: int) -> list[dict[Any, float]]:
    """Seconds of each step in each round. Steps take turns, so that a slow moment of the machine slows all of them."""
    for step in steps.values():
        step()  # warm up
    return [{name: timeit(step, number=1) for name, step in steps.items()} for _ in range(rounds)]


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


def prefill_plainly(lm: LanguageModel, context_ids: list[int]) -> DynamicCache:
    """The KV cache of one dense pass over the context, with the LM head over all of it."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([context_ids]), past_key_values=cache, use_cache=True)
    return cache


def answer_plainly(
    lm: LanguageModel,
    cache: DynamicCache,
    question_ids: list[int],
    attention: hub.ResearchAttention | None,
    tokens: int,
    seed: int = 0,
) -> None:
    """Ask a question and generate an answer, token by token through the transformers plug-in; attention None = dense."""
    import torch

    from sparse_attention_hub.models import sparse_attention

    ids = torch.tensor([question_ids])
    with torch.inference_mode(), nullcontext() if attention is None else sparse_attention(lm.model, attention, seed=seed):
        for _ in range(tokens):
            ids = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if int(ids) in lm.eos_token_ids:
                break


def report(
    figures: Figures,
    as_json: bool,
    *,
    at_least: Figures | None = None,
    at_most: Figures | None = None,
    precision: str = "",
    **machine: object,
) -> int:
    """Print figures and goals; 1 if a goal does not hold, else 0.

    at_least, at_most: name of a figure -> its bound; an absent figure has no goal. precision: format of the printed figures,
    such as ".4g"; goals are checked on exact ones. machine: what to print beside processor, cores and Python version.
    """
    goals: list[dict[str, Any]] = [
        {"name": name, "value": figures[name], kind: bound, "holds": (figures[name] - bound) * sign >= 0}
        for kind, bounds, sign in (("at_least", at_least, 1), ("at_most", at_most, -1))
        for name, bound in (bounds or {}).items()
        if name in figures
    ]
    if precision:
        figures = {name: float(format(value, precision)) for name, value in figures.items()}
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), **machine}
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


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
