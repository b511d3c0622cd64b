"""What a configuration costs Phase 1, against trying each one in a process of its own.

    python benchmark/speed/search_speed.py [--trials 100 480] [--json]

CPU seconds (user and system of whole process trees), one thread on both sides, the same tuning samples:
- The baseline, per trial: a new process loads the model, prefills each request's context with the LM head over all of it, then
  answers the question under sparse attention and computes density and error at every attention call. As a check, its time per
  request must be 1.4 to 1.8 times our prefill of that request, timed right after it.
- Ours: what each of 8 further configurations adds to a pass of 8, in full replay and on the cheapest rung. `in_a_batch`: an eighth
  of a pass of 8, including what the pass shares.
- Whole searches of `--trials` trials, each in a new process that loads, records, replays and confirms. The first is repeated on
  its traces.
Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed import search_setup as setup
from benchmark.speed.common import Figures, answer_plainly, in_process, prefill_plainly, report, run_command
from sparse_attention_hub import models

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.storage.search_records import Evaluation

FAMILIES = ("oracle_top_k", "adaptive_sampling")
#: Least ratios of the baseline to ours.
GOALS = {
    "oracle_top_k_full_replay_ratio": 140.0,
    "oracle_top_k_cheapest_rung_ratio": 1800.0,
    "adaptive_sampling_full_replay_ratio": 60.0,
    "adaptive_sampling_cheapest_rung_ratio": 850.0,
    "search_100_ratio": 60.0,
    "search_480_ratio": 200.0,
}
OUR_PREFILL = "our_prefill"
#: Rung of the replay: its name, and how many passes are measured. The marginal cost of a single cheap pass is lost in the noise.
REPLAYS = {0: ("cheapest_rung", 5), 1: ("full_replay", 3)}
STAGES = ("replay of some rows and layers", "full replay", "confirmation", "confirmation")


class Meter:
    """CPU seconds of the stages of this process; their peaks of memory in bytes once `watch_memory` was called."""

    def __init__(self) -> None:
        self.seconds: Figures = {}
        self.peaks: Figures = {}
        self._last = 0.0  # the start of the process
        self._before: int | None = None  # memory that is not counted

    def done(self, stage: str) -> float:
        """Count the seconds since the last call, which it returns, and the peak of memory as those of `stage`."""
        now = time.process_time()
        spent, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        if self._before is not None:
            self.peaks[stage] = max(self.peaks.get(stage, 0), _take_peak() - self._before)
        return spent

    def watch_memory(self) -> None:
        """What the process has now is not counted."""
        _take_peak()
        self._before = _take_peak()


def _take_peak() -> int:
    """Peak memory in bytes since the last call; where the system forbids resetting it, since the start of the process."""
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(kilobytes)


def baseline_trial(options: argparse.Namespace, family: str) -> Figures:
    """CPU seconds of the parts of a configuration tried the plain way, and its mean error."""
    from benchmark.search.evaluator import ErrorMeter
    from benchmark.search.samples import tuning_samples
    from sparse_attention_hub.models.model_files import complete

    meter, lm = _start(options)
    config = complete(setup.random_configs(family, 1, options.seed)[0], lm)
    samples = tuning_samples(lm.tokenizer, options.task, setup.search_settings(options))
    meter.done("samples")
    errors = ErrorMeter()

    class Measured(hub.ResearchAttention):
        def attend_inputs(self, inputs: hub.AttentionInputs, state: hub.AttentionState | None = None) -> hub.AttentionResult:
            result = super().attend_inputs(inputs, state)
            errors(result=result, queries=inputs.queries)
            return result

    for entry in samples:
        prompt = entry.prompt
        cache = prefill_plainly(lm, prompt.context_ids)
        meter.done("prefill")
        answer_plainly(lm, cache, prompt.question_ids, Measured(config), entry.max_new_tokens, entry.seed)
        del cache
        meter.done("ask")
        models.prefill(lm, prompt.context_ids, len(prompt.question_ids) + entry.max_new_tokens)
        meter.done(OUR_PREFILL)  # not part of the trial; timed here, since the machine's speed varies
    assert errors.error is not None
    return meter.seconds | {"error": errors.error}


def marginal_costs(options: argparse.Namespace) -> Figures:
    """CPU seconds per configuration by replay, and what all trials share: recording a request."""
    meter, lm = _start(options)
    evaluator = _evaluator(options, lm)
    meter.done("samples")
    list(evaluator.record())
    figures = {
        "context_tokens": len(evaluator.samples[0].prompt.context_ids),
        "rows": fmean(trace.rows for trace in evaluator.traces),
        "capture_a_request_s": meter.done("capture") / len(evaluator.traces),
    }
    for family in options.families:
        configs = setup.random_configs(family, 2 * setup.BATCH, options.seed)
        evaluator.evaluate(configs[:1], 0, 1e9)  # calibrates, and loads code on first use
        meter.done("warm up")
        for rung, (name, repeats) in REPLAYS.items():
            batch = both = 0.0
            for _ in range(repeats):
                found = setup.figures_of(evaluator, configs[: setup.BATCH], rung)
                batch += meter.done("replay") / repeats
                evaluator.evaluate(configs, rung, 1e9)
                both += meter.done("replay") / repeats
            figures[f"{family}_{name}_s"] = (both - batch) / setup.BATCH
            figures[f"{family}_{name}_in_a_batch_s"] = batch / setup.BATCH
            figures[f"{family}_replayed_error"] = found[0][0]
    return figures


def whole_search(options: argparse.Namespace, family: str, trials: int) -> Figures:
    """CPU seconds and memory of a whole study, from the start of the process to the confirmed best of every level."""
    # Code is not memory of a search: it is loaded before `watch_memory`.
    from ray.tune.search import optuna  # noqa: F401

    import benchmark.search.study  # noqa: F401

    meter, lm = _start(options)
    evaluator = _evaluator(options, lm)
    # Nor are compiled kernels, or the weights (the LM head's too), which are read from the file on first use.
    load_kernels()
    context_ids = evaluator.samples[0].prompt.context_ids
    models.answer(lm, models.prefill(lm, context_ids[:64], 2), context_ids[1:2], None, 1)
    meter.done("samples")
    meter.watch_memory()
    list(evaluator.record())
    meter.done("capture")
    evaluate = evaluator.evaluate

    def metered(configs: list[hub.ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        meter.done("sampler and journal")
        try:
            return evaluate(configs, rung, timeout)
        finally:
            meter.done(STAGES[rung])

    with mock.patch.object(evaluator, "evaluate", metered), tempfile.TemporaryDirectory() as folder:
        samples = math.ceil(trials / len(setup.LEVELS))
        study = setup.new_study(family, evaluator, Path(folder), num_samples=samples, seed=options.seed)
        list(study.run())
        study.best()
    meter.done("sampler and journal")
    trace = evaluator.traces[0].nbytes
    figures = {"trials": len(study.trials), "trace_mb": trace / 1e6, "memory_over_trace": max(meter.peaks.values()) / trace}
    figures |= {f"{stage.replace(' ', '_')}_s": seconds for stage, seconds in meter.seconds.items()}
    return figures | {f"memory_{stage.replace(' ', '_')}_mb": peak / 1e6 for stage, peak in meter.peaks.items()}


def load_kernels() -> None:
    """Use each compiled kernel that a trial, a replay or a search uses. The first process that does so compiles them."""
    import torch

    from sparse_attention_hub.maskers.call_cache import CallCache

    for family, budget, rows, shared in itertools.product(FAMILIES, (0.05, 0.5), (1, 8), (False, True)):
        queries, keys = torch.zeros(1, 4, rows, 8), torch.zeros(1, 2, 64, 8)
        inputs = hub.AttentionInputs(queries, keys, keys, cache=CallCache(keeps_order=shared))
        if shared:
            inputs.exponentials()
        result = hub.ResearchAttention(setup.template(family, budget)).attend_inputs(inputs)
        assert result.density > 0 and result.kv_fraction > 0


def _start(options: argparse.Namespace) -> tuple[Meter, models.LanguageModel]:
    import torch

    torch.set_num_threads(1)
    meter = Meter()
    meter.done("start")
    lm = models.load_model(options.model, device="cpu")
    meter.done("load")
    return meter, lm


def _evaluator(options: argparse.Namespace, lm: models.LanguageModel) -> TraceEvaluator:
    from benchmark.search.evaluator import TraceEvaluator

    return TraceEvaluator(lm, options.task, setup.search_settings(options), options.folder / "traces")


def measure(options: argparse.Namespace) -> Figures:
    in_process(load_kernels)  # once per machine, and not part of either side
    figures: Figures = in_process(marginal_costs, options)[0]
    for family in options.families:
        parts, seconds = in_process(baseline_trial, options, family)
        # Of the same configuration as the replayed error: the two differ by what compounds through the layers.
        figures[f"{family}_baseline_error"] = parts.pop("error")
        our_prefill = figures[f"{family}_our_prefill_s"] = parts.pop(OUR_PREFILL)
        baseline = figures[f"{family}_baseline_trial_s"] = seconds - our_prefill
        figures |= {f"{family}_baseline_{name}_s": seconds for name, seconds in parts.items()}
        figures[f"{family}_baseline_request_over_prefill"] = (parts["prefill"] + parts["ask"]) / our_prefill
        for name, _ in REPLAYS.values():
            for cost in (name, f"{name}_in_a_batch"):
                figures[f"{family}_{cost}_ratio"] = baseline / figures[f"{family}_{cost}_s"]
    family = options.families[0]
    for number, trials in enumerate(options.trials):
        shutil.rmtree(options.folder / "traces", ignore_errors=True)
        for name in (f"search_{trials}", f"search_{trials}_again")[: 2 if number == 0 else 1]:
            found, seconds = in_process(whole_search, options, family, trials)
            found |= {"s": seconds, "ratio": found["trials"] * figures[f"{family}_baseline_trial_s"] / seconds}
            figures |= {f"{name}_{figure}": value for figure, value in found.items()}
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = setup.search_parser(__doc__, task="niah_single_1", requests=5)
    parser.add_argument("--length", type=int, default=4096, help="context length in tokens (default: %(default)s)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="masker families; the first is searched")
    parser.add_argument("--trials", type=int, nargs="*", default=[100], help="trials of each whole search (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of configurations and searches (default: %(default)s)")
    options = parser.parse_args(argv)
    options.task = options.task or f"ruler/{options.length}/niah_single_1"
    one_thread = mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with one_thread, tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        figures = measure(options)
    checks = [f"{family}_baseline_request_over_prefill" for family in options.families if options.length == 4096]
    at_most = {f"search_{trials}_memory_over_trace": 1.5 for trials in options.trials} | dict.fromkeys(checks, 1.8)
    return report(figures, options.json, at_least=GOALS | dict.fromkeys(checks, 1.4), at_most=at_most, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
