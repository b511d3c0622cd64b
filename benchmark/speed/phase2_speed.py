"""How much faster Phase 2 answers 9 configurations than the obvious ways, and how well two workers share a machine.

    python benchmark/speed/phase2_speed.py --json

On the embedded model, one sample a context length, micro metrics off:
- ours: one prefill, all configurations in lockstep;
- prefill each time: a prefill for every configuration, one after the other, model loaded once;
- process each time: for every configuration a new process that loads the model, prefills with the LM head over the
  whole context, and answers through the transformers plug-in. `--processes N` measures only the first N and scales to all.
Workers: two processes with one thread each against one, held against what two independent processes that only read
memory reach here. Everything runs with `--threads` threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MODEL = "embedded/SmolLM2-135M-Instruct"
#: context length -> least ratio to a prefill for each configuration, and to a process for each
GOALS: dict[int, tuple[float, float | None]] = {1024: (4.0, None), 4096: (5.0, 8.0)}


def configurations() -> list[Any]:
    """Dense (None) and eight sparse configurations at 5 to 25% of the keys."""
    from sparse_attention_hub import (
        AdaptiveSamplingMaskerConfig,
        LocalMaskerConfig,
        OracleTopKConfig,
        RandomSamplingMaskerConfig,
        ResearchAttentionConfig,
        SinkMaskerConfig,
    )

    def ends(share: float) -> list[Any]:
        return [SinkMaskerConfig(sink_size=share / 2), LocalMaskerConfig(window_size=share / 2)]

    adaptive = AdaptiveSamplingMaskerConfig(base_rate_sampling=0.02, epsilon=0.2, delta=0.2, init_offset=0, local_offset=0)
    entries = [
        ends(0.1),
        ends(0.25),
        [*ends(0.02), OracleTopKConfig(heavy_size=0.05)],
        [*ends(0.02), OracleTopKConfig(heavy_size=0.1)],
        [*ends(0.02), OracleTopKConfig(heavy_size=0.23)],
        [*ends(0.02), RandomSamplingMaskerConfig(sampling_rate=0.08)],
        [*ends(0.02), RandomSamplingMaskerConfig(sampling_rate=0.23)],
        [*ends(0.02), OracleTopKConfig(heavy_size=0.05), adaptive],
    ]
    return [None, *(ResearchAttentionConfig(entry) for entry in entries)]


def attentions() -> list[Any]:
    from sparse_attention_hub import ResearchAttention

    return [None if config is None else ResearchAttention(config) for config in configurations()]


def make_prompt(tokenizer: Any, length: int, max_new_tokens: int) -> Any:
    from benchmark.tasks import get_task
    from benchmark.tasks.base import SampleRequest, build_prompt

    task = get_task(f"ruler/{length}/niah_single_1")
    (sample,) = task.samples(SampleRequest(tokenizer, max_samples=1, max_context_length=length))
    return build_prompt(
        sample,
        tokenizer,
        max_context_length=length + 256,
        max_new_tokens=max_new_tokens,
        use_chat_template=task.use_chat_template,
    )


def measure_prefills(length: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of ours and of a prefill for each configuration; the best of `repeats`."""
    from sparse_attention_hub.models import answer, answer_many, load_model, prefill

    lm = load_model(MODEL, device="cpu")
    prompt = make_prompt(lm.tokenizer, length, tokens)
    room = len(prompt.question_ids) + tokens
    several = attentions()
    ours, each = [], []
    answer(lm, prefill(lm, prompt.context_ids[:64], room), prompt.question_ids, several[1], 2)  # warm up
    for _ in range(repeats):
        started = time.perf_counter()
        together = answer_many(lm, prefill(lm, prompt.context_ids, room), prompt.question_ids, several, tokens)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        alone = [
            answer(lm, prefill(lm, prompt.context_ids, room), prompt.question_ids, attention, tokens) for attention in several
        ]
        each.append(time.perf_counter() - started)
        agree = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
    return {
        f"ours_seconds_{length}": min(ours),
        f"prefill_each_seconds_{length}": min(each),
        f"prefill_each_over_ours_{length}": min(each) / min(ours),
        f"same_answers_{length}": float(agree),
        f"answer_tokens_{length}": float(sum(len(a.token_ids) for a in together)),
    }


def one_process(index: int, length: int, tokens: int) -> None:
    """What a process of its own for one configuration does, after it was started."""
    import contextlib

    import torch
    from transformers import DynamicCache

    from sparse_attention_hub.models import load_model, sparse_attention

    lm = load_model(MODEL, device="cpu")
    prompt = make_prompt(lm.tokenizer, length, tokens)
    attention = attentions()[index]
    cache = DynamicCache()
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([prompt.context_ids]), past_key_values=cache, use_cache=True)  # all logits
        inside = contextlib.nullcontext() if attention is None else sparse_attention(lm.model, attention)
        with inside:
            ids = torch.tensor([prompt.question_ids])
            for _ in range(tokens):
                logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
                if int(ids) in lm.eos_token_ids:
                    break


def measure_processes(length: int, tokens: int, count: int | None) -> dict[str, float]:
    total = len(configurations())
    chosen = range(total if count is None else min(total, count))
    started = time.perf_counter()
    for index in chosen:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", str(index), str(length), str(tokens)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seconds = (time.perf_counter() - started) / len(chosen) * total
    return {f"process_each_seconds_{length}": seconds, f"processes_measured_{length}": float(len(chosen))}


def measure_workers(samples: int, tokens: int) -> dict[str, float]:
    """Samples a second of one and of two workers, from the first sample's start to the last one's end."""
    from benchmark.execution.runner import BenchmarkUnit, run_benchmarks
    from benchmark.settings import Settings, SparseConfig

    chosen = [entry for entry in configurations()[:3]]
    named = [SparseConfig(f"c{i}", c, c and tuple(type(e) for e in c.masker_configs)) for i, c in enumerate(chosen)]
    rates = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                models=(MODEL,),
                tasks=("ruler/1024/niah_single_1",),
                device="cpu",
                max_concurrent_benchmarks=workers,
                max_requests=samples,
                max_new_tokens=tokens,
                micro_metrics="off",
                benchmark_results_dir=Path(folder),
            )
            unit = BenchmarkUnit(MODEL, "ruler/1024/niah_single_1", tuple(named))
            outcome = run_benchmarks([unit], settings, in_process=False)
            if outcome.failures:
                raise RuntimeError(f"a sample failed: {outcome.failures[0]}")
            rates.append(_rate(Path(folder), workers))
    probe_one = sum(_probe(1))
    probe_two = sum(_probe(2))
    speedup, limit = rates[1] / rates[0], probe_two / probe_one
    return {
        "one_worker_samples_per_second": rates[0],
        "two_workers_samples_per_second": rates[1],
        "two_workers_speedup": speedup,
        "two_memory_readers_speedup": limit,
        "workers_share_of_limit": speedup / limit,
    }


def _rate(folder: Path, workers: int) -> float:
    """Samples a second while every worker was at work: from the last worker's first sample to the first one's last."""
    from benchmark.storage.results import Journal

    spans = []
    for path in folder.glob("*/.journals/*/worker-*.jsonl"):
        spans.append([(record["time"], record["time"] + record["wall_seconds"]) for record in Journal(path).read()])
    if len(spans) != workers:
        raise RuntimeError(f"{len(spans)} of {workers} workers answered a sample: give more samples")
    # The rate of each worker over its own span, without its start.
    return sum(len(span) / (max(end for _, end in span) - min(start for start, _ in span)) for span in spans)


_READER = """
import sys, time, torch
torch.set_num_threads(1)
weights, x = torch.rand(25_000, 4096), torch.rand(4096)
weights @ x
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
count, end = 0, time.perf_counter() + 3.0
while time.perf_counter() < end:
    weights @ x
    count += 1
print(count)
"""


def _probe(processes: int) -> list[float]:
    """Passes over 400 MB that each of so many processes reads in three seconds, side by side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(processes)
    ]
    for reader in readers:
        assert reader.stdout is not None
        reader.stdout.readline()
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    return [float(reader.communicate()[0]) for reader in readers]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=sorted(GOALS), help="context lengths in tokens")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens at most (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many (default 1)")
    parser.add_argument("--processes", type=int, help="processes measured for a length; default: one a configuration")
    parser.add_argument("--worker-samples", type=int, default=8, help="samples for the workers; 0 leaves them out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.one:
        one_process(*arguments.one)
        return 0
    figures: dict[str, float] = {}
    goals: list[dict[str, Any]] = []
    for length in arguments.lengths:
        figures |= measure_prefills(length, arguments.tokens, arguments.repeats)
        least, least_process = GOALS.get(length, (0.0, None))
        goals.append({"name": f"prefill_each_over_ours_{length}", "at_least": least})
        if least_process is not None and arguments.processes != 0:
            figures |= measure_processes(length, arguments.tokens, arguments.processes)
            ratio = figures[f"process_each_seconds_{length}"] / figures[f"ours_seconds_{length}"]
            figures[f"process_each_over_ours_{length}"] = ratio
            goals.append({"name": f"process_each_over_ours_{length}", "at_least": least_process})
    if arguments.worker_samples:
        figures |= measure_workers(arguments.worker_samples, arguments.tokens)
        goals.append({"name": "workers_share_of_limit", "at_least": 0.8})
    for goal in goals:
        goal["value"] = figures[goal["name"]]
    from benchmark.speed.fault_run import report

    return report({name: round(value, 3) for name, value in figures.items()}, goals, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
