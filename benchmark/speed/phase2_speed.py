"""How much faster Phase 2 answers 9 configurations than the obvious ways, and how well two workers share a machine.

    python benchmark/speed/phase2_speed.py [--lengths 1024 4096] [--processes 2] [--json]

One sample per context length:
- ours: one prefill, all configurations decoded as one batch;
- prefill each time: a prefill for every configuration, one after the other, the model loaded once;
- process each time: for every configuration a new process that loads the model, prefills with the LM head over the whole
  context, and answers through the transformers plug-in. `--processes N` measures the first N and scales to all.
Workers: the rate of two processes with one thread each over that of one, as a share of what two independent processes that only
read memory reach. Everything else runs with `--threads` threads. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.settings import Settings, SparseConfig
from benchmark.speed.common import MODEL, Figures, answer_plainly, in_process, new_parser, prefill_plainly, report, run_command
from sparse_attention_hub import models

if TYPE_CHECKING:
    from benchmark.tasks.base import Prompt

#: Figure -> its least value.
GOALS = {
    "prefill_each_over_ours_1024": 4.3,
    "prefill_each_over_ours_4096": 6.0,
    "process_each_over_ours_4096": 8.0,
    "workers_share_of_limit": 0.8,
}
PROCESS_LENGTH = 4096
WORKER_TASK = "ruler/1024/niah_single_1"


def configurations() -> list[hub.ResearchAttentionConfig | None]:
    """Dense (None) and eight sparse configurations at 5 to 25% of the keys."""

    def ends(share: float) -> list[hub.MaskerConfig]:
        return [hub.SinkMaskerConfig(sink_size=share / 2), hub.LocalMaskerConfig(window_size=share / 2)]

    adaptive = hub.AdaptiveSamplingMaskerConfig(base_rate_sampling=0.02, epsilon=0.2, delta=0.2, init_offset=0, local_offset=0)
    entries = [ends(0.1), ends(0.25)]
    entries += [[*ends(0.02), hub.OracleTopKConfig(heavy_size=size)] for size in (0.05, 0.1, 0.23)]
    entries += [[*ends(0.02), hub.RandomSamplingMaskerConfig(sampling_rate=rate)] for rate in (0.08, 0.23)]
    entries += [[*ends(0.02), hub.OracleTopKConfig(heavy_size=0.05), adaptive]]
    return [None, *(hub.ResearchAttentionConfig(entry) for entry in entries)]


def attention_of(config: hub.ResearchAttentionConfig | None) -> hub.ResearchAttention | None:
    return None if config is None else hub.ResearchAttention(config)


def make_prompt(tokenizer: Any, length: int, tokens: int) -> Prompt:
    from benchmark.tasks import get_task
    from benchmark.tasks.base import SampleRequest, build_prompt

    task = get_task(f"ruler/{length}/niah_single_1")
    (sample,) = task.samples(SampleRequest(tokenizer, max_samples=1, max_context_length=length))
    limit = length + 256
    return build_prompt(
        sample, tokenizer, max_context_length=limit, max_new_tokens=tokens, use_chat_template=task.use_chat_template
    )


def measure_prefills(length: int, tokens: int, repeats: int) -> Figures:
    """Seconds of ours and of a prefill per configuration, the best of `repeats`."""
    lm = models.load_model(MODEL, device="cpu")
    prompt = make_prompt(lm.tokenizer, length, tokens)
    question, room = prompt.question_ids, len(prompt.question_ids) + tokens
    several = [attention_of(config) for config in configurations()]
    models.answer_many(lm, models.prefill(lm, prompt.context_ids[:64], room), question, several, 2)  # compile what is not yet
    models.answer(lm, models.prefill(lm, prompt.context_ids[:64], room), question, several[1], 2)
    ours, each = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        together = models.answer_many(lm, models.prefill(lm, prompt.context_ids, room), question, several, tokens)
        middle = time.perf_counter()
        alone = [models.answer(lm, models.prefill(lm, prompt.context_ids, room), question, one, tokens) for one in several]
        ours.append(middle - started)
        each.append(time.perf_counter() - middle)
    return {
        f"ours_seconds_{length}": min(ours),
        f"prefill_each_seconds_{length}": min(each),
        f"prefill_each_over_ours_{length}": min(each) / min(ours),
        f"same_answers_{length}": float(sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))),
        f"answer_tokens_{length}": float(sum(len(a.token_ids) for a in together)),
    }


def one_process(index: int, length: int, tokens: int) -> None:
    """What a new process does for one configuration."""
    lm = models.load_model(MODEL, device="cpu")
    prompt = make_prompt(lm.tokenizer, length, tokens)
    cache = prefill_plainly(lm, prompt.context_ids)
    answer_plainly(lm, cache, prompt.question_ids, attention_of(configurations()[index]), tokens)


def measure_processes(length: int, tokens: int, count: int | None) -> Figures:
    total = len(configurations())
    chosen = range(total)[:count]
    started = time.perf_counter()
    for index in chosen:
        in_process(one_process, index, length, tokens)
    seconds = (time.perf_counter() - started) / len(chosen) * total
    return {f"process_each_seconds_{length}": seconds, f"processes_measured_{length}": float(len(chosen))}


def measure_workers(samples: int, tokens: int) -> Figures:
    """Samples per second of one and of two workers while they answer."""
    from benchmark.execution.runner import BenchmarkUnit, run_benchmarks

    chosen = configurations()[:3]
    named = [SparseConfig(f"c{i}", c, tuple(type(e) for e in c.masker_configs) if c else None) for i, c in enumerate(chosen)]
    unit = BenchmarkUnit(MODEL, WORKER_TASK, tuple(named))
    settings = Settings(
        (MODEL,), (WORKER_TASK,), device="cpu", max_requests=samples, max_new_tokens=tokens, micro_metrics="off"
    )
    rates = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            place: dict[str, Any] = {"max_concurrent_benchmarks": workers, "benchmark_results_dir": Path(folder)}
            outcome = run_benchmarks([unit], replace(settings, **place), in_process=False)
            if outcome.failures:
                raise RuntimeError(f"a sample failed: {outcome.failures[0]}")
            rates.append(_rate(Path(folder), workers))
    speedup, limit = rates[1] / rates[0], _passes(2) / _passes(1)
    return {
        "one_worker_samples_per_second": rates[0],
        "two_workers_samples_per_second": rates[1],
        "two_workers_speedup": speedup,
        "two_memory_readers_speedup": limit,
        "workers_share_of_limit": speedup / limit,
    }


def _rate(folder: Path, workers: int) -> float:
    """Samples per second, summed over workers: each from the start of its first sample to the end of its last."""
    from benchmark.storage.results import Journal

    rates: list[float] = []
    for path in folder.glob("*/.journals/*/worker-*.jsonl"):
        lines = Journal(path).read()
        started = min(line["time"] for line in lines)
        rates.append(len(lines) / (max(line["time"] + line["wall_seconds"] for line in lines) - started))
    if len(rates) != workers:
        raise RuntimeError(f"{len(rates)} of {workers} workers answered a sample: raise --worker-samples")
    return sum(rates)


def _passes(processes: int) -> int:
    """Passes over 400 MB that this many processes, each with its own, make in three seconds side by side."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        return sum(pool.map(_read_memory, [manager.Barrier(processes)] * processes))


def _read_memory(barrier: threading.Barrier) -> int:
    import torch

    torch.set_num_threads(1)
    weights, x = torch.rand(25_000, 4096), torch.rand(4096)
    weights @ x
    barrier.wait()
    passes, end = 0, time.perf_counter() + 3.0
    while time.perf_counter() < end:
        weights @ x
        passes += 1
    return passes


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, PROCESS_LENGTH], help="context lengths in tokens")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="times measured, of which the best counts (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, help="processes measured per length (default: one per configuration)")
    parser.add_argument("--worker-samples", type=int, default=8, help="samples for the workers; 0 = do not measure them")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by torch, here and in the processes that this one starts
    figures: Figures = {}
    for length in options.lengths:
        figures |= measure_prefills(length, options.tokens, options.repeats)
        if length == PROCESS_LENGTH and options.processes != 0:
            figures |= measure_processes(length, options.tokens, options.processes)
            ratio = figures[f"process_each_seconds_{length}"] / figures[f"ours_seconds_{length}"]
            figures[f"process_each_over_ours_{length}"] = ratio
    if options.worker_samples:
        figures |= measure_workers(options.worker_samples, options.tokens)
    return report(figures, options.json, at_least=GOALS, precision=".3f")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
