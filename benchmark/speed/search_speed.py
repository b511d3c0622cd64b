"""What a configuration costs Phase 1, against trying each one in a process of its own.

    python benchmark/speed/search_speed.py [--trials 100 480] [--baseline-trials 1] [--json]

CPU seconds (user and system of whole process trees) with one thread on both sides, embedded model, one retrieval task.
- The baseline, per trial: a new process loads the model, prefills each request's context with the LM head over all of it, then
  answers the question under sparse attention and computes density and error at every attention call.
- Ours: the same configurations by replay of recorded traces, full and on the cheapest rung. The marginal cost is what each of
  8 further configurations adds to a pass of 8. `in_a_batch`: an eighth of a pass of 8, including the scores and their sorting
  that the pass shares.
- Whole searches, each in a new process that loads, records, replays and confirms. `--trials` gives their numbers of trials;
  the first search is repeated on the traces that it left.
Both sides use the same tuning samples. As a check of the baseline, its time per request must be 1.4 to 1.8 times our prefill of
that request, timed right after it in the same process. Exit code 1 if a goal does not hold.
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
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.search.evaluator import ErrorMeter, TraceEvaluator, tuning_samples
from benchmark.speed.common import Figures, in_process, report
from benchmark.speed.search_setup import BATCH, LEVELS, new_study, random_configs, search_parser, search_settings, template
from sparse_attention_hub import ResearchAttention
from sparse_attention_hub.maskers.call_cache import CallCache
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.models import LanguageModel, answer, load_model, prefill, sparse_attention
from sparse_attention_hub.models.model_files import complete

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
#: Passes of the cheapest rung and of full replay: the marginal cost of a single cheap pass is lost in the noise.
REPEATS = (5, 1)
STAGES = ("replay of some rows and layers", "full replay", "confirmation", "confirmation")


class Parts:
    """CPU seconds of this process by part."""

    def __init__(self) -> None:
        self.seconds: Figures = {}
        self._last = 0.0  # the start of the process

    def done(self, name: str) -> float:
        """Count the time since the last call as `name`."""
        now = time.process_time()
        spent, self._last = now - self._last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return spent


class Memory:
    """Peak memory of each stage in bytes, without what the process had when this was made."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._reset()
        self._start = _status("VmRSS")

    def done(self, stage: str) -> None:
        self.peaks[stage] = max(self.peaks.get(stage, 0), _status("VmHWM") - self._start)
        self._reset()

    @staticmethod
    def _reset() -> None:
        """Reset the high-water mark. Where the system forbids it, a stage also shows the peaks of earlier ones."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def baseline_trial(options: argparse.Namespace, family: str, number: int) -> dict[str, Any]:
    """CPU seconds of one configuration tried the plain way, and its mean error."""
    parts, lm = _start(options)
    config = complete(random_configs(family, BATCH, options.seed)[number], lm)
    samples = tuning_samples(lm.tokenizer, options.task, search_settings(options))
    parts.done("samples")
    meter = ErrorMeter()

    class Measured(ResearchAttention):
        def __call__(self, queries: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(queries, *args, **kwargs)
            meter(result=result, queries=queries)
            return result

    for entry in samples:
        cache = DynamicCache()
        with torch.inference_mode():
            lm.model(input_ids=torch.tensor([entry.prompt.context_ids]), past_key_values=cache, use_cache=True)
            parts.done("prefill")
            ids = torch.tensor([entry.prompt.question_ids])
            with sparse_attention(lm.model, Measured(config), seed=entry.seed):
                for _ in range(entry.max_new_tokens):
                    logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                    ids = logits[:, -1:].argmax(-1)
                    if int(ids) in lm.eos_token_ids:
                        break
        del cache, logits
        parts.done("ask")
        prefill(lm, entry.prompt.context_ids, len(entry.prompt.question_ids) + entry.max_new_tokens)
        parts.done(OUR_PREFILL)  # not part of the trial; timed here, since the machine's speed varies
    return {"parts": parts.seconds, "error": meter.error}


def marginal_costs(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds per configuration by replay, and what all trials share: recording a request."""
    parts, lm = _start(options)
    evaluator = TraceEvaluator(lm, options.task, search_settings(options), options.folder / "traces")
    parts.done("samples")
    found: dict[str, Any] = {"context": len(evaluator.samples[0].prompt.context_ids)}
    list(evaluator.record())
    found["capture"] = parts.done("capture") / len(evaluator.traces)
    found["rows"] = fmean(trace.rows for trace in evaluator.traces)
    for family in options.families:
        configs = random_configs(family, 2 * BATCH, options.seed)
        evaluator.evaluate(configs[:1], 0, 1e9)  # calibrates, and loads code on first use
        parts.done("warm up")
        found[family] = {}
        for rung, repeats in enumerate(REPEATS):
            batch = both = 0.0
            for _ in range(repeats):
                evaluations = evaluator.evaluate(configs[:BATCH], rung, 1e9)
                batch += parts.done("replay") / repeats
                evaluator.evaluate(configs, rung, 1e9)
                both += parts.done("replay") / repeats
            found[family][f"rung_{rung}"] = {"batch": batch / BATCH, "further": (both - batch) / BATCH}
            found[family]["error"] = evaluations[0].error
    return found


def whole_search(options: argparse.Namespace, family: str, trials: int) -> dict[str, Any]:
    """CPU seconds of a whole study, from the start of the process to the confirmed best of every level."""
    from ray.tune.search import optuna  # noqa: F401  (its code is not memory of a search: loaded before `Memory` starts)

    parts, lm = _start(options)
    evaluator = TraceEvaluator(lm, options.task, search_settings(options), options.folder / "traces")
    # Nor are compiled kernels, or the weights (the LM head's too), which are read from the file on first use.
    load_kernels()
    context_ids = evaluator.samples[0].prompt.context_ids
    answer(lm, prefill(lm, context_ids[:64], 2), context_ids[1:2], None, 1)
    parts.done("samples")
    memory = Memory()
    list(evaluator.record())
    parts.done("capture")
    memory.done("capture")

    def evaluate(configs: list[Any], rung: int, timeout: float) -> Any:
        parts.done("sampler and journal")
        try:
            return evaluator.evaluate(configs, rung, timeout)
        finally:
            parts.done(STAGES[rung])
            memory.done(STAGES[rung])

    timed = SimpleNamespace(key=evaluator.key, evaluate=evaluate)
    journal = options.folder / f"{family}_{trials}_{time.time_ns()}.jsonl"
    study = new_study(family, timed, journal, num_samples=math.ceil(trials / len(LEVELS)), seed=options.seed)
    list(study.run())
    study.best()
    parts.done("sampler and journal")
    trace_bytes = evaluator.traces[0].nbytes
    return {"parts": parts.seconds, "trials": len(study.trials), "trace_bytes": trace_bytes, "memory": memory.peaks}


def load_kernels() -> None:
    """Use each compiled kernel that a trial, a replay or a search uses. The first process that does so compiles them."""
    for family, budget, rows, shared in itertools.product(FAMILIES, (0.05, 0.5), (1, 8), (False, True)):
        tensors = [torch.zeros(1, heads, length, 8) for heads, length in ((4, rows), (2, 64), (2, 64))]
        inputs = AttentionInputs(*tensors, cache=CallCache(keeps_order=shared))
        if shared:
            inputs.exponentials()
        result = ResearchAttention(template(family, budget)).attend_inputs(inputs)
        assert result.density > 0 and result.kv_fraction > 0


def _start(options: argparse.Namespace) -> tuple[Parts, LanguageModel]:
    torch.set_num_threads(1)
    parts = Parts()
    parts.done("start")
    lm = load_model(options.model, device="cpu")
    parts.done("load")
    return parts, lm


def measure(options: argparse.Namespace) -> Figures:
    in_process(load_kernels)  # once per machine, and not part of either side
    ours, _ = in_process(marginal_costs, options)
    figures: Figures = {"context_tokens": ours["context"], "rows": ours["rows"], "capture_a_request_s": ours["capture"]}
    baselines: Figures = {}  # CPU seconds of a trial, by family
    for family in options.families:
        trials = [in_process(baseline_trial, options, family, number) for number in range(options.baseline_trials)]
        parts = {name: fmean(found["parts"][name] for found, _ in trials) for name in trials[0][0]["parts"]}
        our_prefill = parts.pop(OUR_PREFILL)
        baselines[family] = fmean(seconds for _, seconds in trials) - our_prefill
        figures |= {f"{family}_our_prefill_s": our_prefill, f"{family}_baseline_trial_s": baselines[family]}
        figures |= {f"{family}_baseline_{name}_s": seconds for name, seconds in parts.items()}
        figures[f"{family}_baseline_request_over_prefill"] = (parts["prefill"] + parts["ask"]) / our_prefill
        for rung, name in ((1, "full_replay"), (0, "cheapest_rung")):
            cost = ours[family][f"rung_{rung}"]
            figures[f"{family}_{name}_s"] = cost["further"]
            figures[f"{family}_{name}_in_a_batch_s"] = cost["batch"]
            figures[f"{family}_{name}_in_a_batch_ratio"] = baselines[family] / cost["batch"]
            figures[f"{family}_{name}_ratio"] = baselines[family] / cost["further"]
        # Errors of the same configuration on both sides: they differ by what compounds through the layers.
        figures[f"{family}_baseline_error"] = trials[0][0]["error"]
        figures[f"{family}_replayed_error"] = ours[family]["error"]
    family = options.families[0]
    for number, trials in enumerate(options.trials):
        shutil.rmtree(options.folder / "traces", ignore_errors=True)
        figures |= _search(options, family, trials, f"search_{trials}", baselines[family])
        if number == 0:
            figures |= _search(options, family, trials, f"search_{trials}_again", baselines[family])
    return figures


def _search(options: argparse.Namespace, family: str, trials: int, name: str, baseline: float) -> Figures:
    found, seconds = in_process(whole_search, options, family, trials)
    figures = {f"{name}_trials": float(found["trials"]), f"{name}_s": seconds}
    figures |= {f"{name}_{part.replace(' ', '_')}_s": spent for part, spent in found["parts"].items()}
    figures[f"{name}_ratio"] = found["trials"] * baseline / seconds
    figures[f"{name}_memory_over_trace"] = max(found["memory"].values()) / found["trace_bytes"]
    figures |= {f"{name}_memory_{stage.replace(' ', '_')}_mb": peak / 1e6 for stage, peak in found["memory"].items()}
    figures[f"{name}_trace_mb"] = found["trace_bytes"] / 1e6
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = search_parser(__doc__, task="niah_single_1", requests=5)
    parser.add_argument("--length", type=int, default=4096, help="context length in tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--baseline-trials", type=int, default=1, help="baseline trials per family (default: %(default)s)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="masker families; the first is searched")
    parser.add_argument("--trials", type=int, nargs="*", default=[100], help="trials of each whole search (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of configurations and searches (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.baseline_trials < 1 or options.baseline_trials > BATCH:
        parser.error(f"--baseline-trials must be 1 to {BATCH}, got {options.baseline_trials}")
    options.task = options.task or f"ruler/{options.length}/niah_single_1"
    one_thread = mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with one_thread, tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        figures = measure(options)
    checks = [f"{family}_baseline_request_over_prefill" for family in options.families if options.length == 4096]
    at_most = {f"search_{trials}_memory_over_trace": 1.5 for trials in options.trials} | dict.fromkeys(checks, 1.8)
    return report(figures, options.json, at_least=GOALS | dict.fromkeys(checks, 1.4), at_most=at_most, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(main())
