"""One decode step of each masker against dense attention, on tensors shaped like Llama-3.1-8B.

    python benchmark/speed/masker_speed.py [--keys 16384] [--repeats 15] [--json]

Selection and attention at 5% density, on random tensors (32 query heads, 8 kv heads, 128 channels, float32), one thread, the
state prepared on the context. Every method alternates with the dense step (grouped-query matrix products) and is compared
with it by the median of the ratios. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HEADS, KV_HEADS, DIM = 32, 8, 128
DENSITY = 0.05
#: Method -> its time over dense at most.
GOALS = {"random_sampling": 0.35, "quest": 0.3, "double_sparsity": 0.5, "pq_cache": 0.5}


@dataclass
class Measured:
    """seconds: median of a step. ratio: to the dense step beside it, median. density; kv_fraction: bytes read / dense bytes."""

    seconds: float
    ratio: float
    density: float
    kv_fraction: float


def pipelines(folder: Path, keys: int) -> dict[str, list[Any]]:
    """Method -> masker configs of about 5% density."""
    import torch

    import sparse_attention_hub as hub

    generator = torch.Generator().manual_seed(1)
    channels = [torch.randperm(DIM, generator=generator).tolist() for _ in range(HEADS)]
    file = folder / "channels.json"
    file.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": channels}))
    planes = torch.randn(KV_HEADS, DIM, 32, generator=generator)
    zeros = torch.zeros(KV_HEADS, 32)
    per_query = {"query_matrix": [planes.repeat_interleave(4, 0)], "query_bias": [zeros.repeat_interleave(4, 0)]}
    hash_weights = {0: per_query | {"key_matrix": [planes], "key_bias": [zeros]}}
    ends = [hub.SinkMaskerConfig(128), hub.LocalMaskerConfig(128)]
    rest = DENSITY - 256 / keys
    return {
        "sink_local": [hub.SinkMaskerConfig(DENSITY / 2), hub.LocalMaskerConfig(DENSITY / 2)],
        "random_sampling": [*ends, hub.RandomSamplingMaskerConfig(rest)],
        "quest": [*ends, hub.QuestTopKMaskerConfig(rest, 16)],
        "double_sparsity": [*ends, hub.DoubleSparsityTopKMaskerConfig(rest, str(file), 16, 4)],
        "hash_attention": [*ends, hub.HashAttentionTopKMaskerConfig(rest, 32, 1, 0, "relu", hat_weights=hash_weights)],
        "pq_cache": [*ends, hub.PQCacheConfig(rest, 2, 6, 10, 128, "euclidean")],
        "magic_pig": [*ends, hub.MagicPigConfig(lsh_l=36, lsh_k=10)],
        "oracle_top_k": [*ends, hub.OracleTopKConfig(rest)],
        "oracle_top_p": [*ends, hub.OracleTopPMaskerConfig(0.2)],
        "oracle_top_k_adaptive_sampling": [
            *ends,
            hub.OracleTopKConfig(rest / 2),
            hub.AdaptiveSamplingMaskerConfig(rest / 4, 0.25, 0.25, 0, 0),
        ],
    }


def dense_step(queries: Any, keys: Any, values: Any) -> Any:
    """The best dense decode step there is here: one matrix product a kv head for the scores, one for the values."""
    grouped = (queries * DIM**-0.5).view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
    weights = (grouped @ keys.transpose(-1, -2)).softmax(-1)
    return (weights @ values).view(1, HEADS, 1, DIM)


def measure(step: Callable[[], Any], dense: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(median seconds of a step, median of its ratio to the dense step before it)."""
    step(), dense()
    times, ratios = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        dense()
        middle = time.perf_counter()
        step()
        end = time.perf_counter()
        times.append(end - middle)
        ratios.append((end - middle) / (middle - start))
    return median(times), median(ratios)


def run(keys: int, repeats: int, only: list[str] | None) -> tuple[float, dict[str, Measured]]:
    """(dense seconds, method -> what was measured)."""
    import torch

    from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, 1, DIM, generator=generator)
    k = torch.randn(1, KV_HEADS, keys, DIM, generator=generator)
    v = torch.randn(1, KV_HEADS, keys, DIM, generator=generator)
    found = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        seconds, _ = measure(lambda: dense_step(q, k, v), lambda: dense_step(q, k, v), repeats)
        for name, configs in pipelines(Path(folder), keys).items():
            if only and name not in only:
                continue
            attention = ResearchAttention(ResearchAttentionConfig(configs))
            state = attention.new_state()
            attention.prepare(k[:, :, :-1], 0, state)

            def step(attention: Any = attention, state: Any = state) -> Any:
                state.rewind(keys - 1)
                return attention(q, k, v, state=state, seeds=0)

            times = measure(step, lambda: dense_step(q, k, v), repeats)
            result = step()
            found[name] = Measured(*times, result.density, result.kv_fraction)
    return seconds, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=16384, help="context length in keys (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="steps a method (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="measure these methods only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.keys < 8192:
        parser.error(f"--keys must be >= 8192, so that sink and window leave some of the 5% to choose, got {arguments.keys}")
    import torch

    torch.set_num_threads(1)
    dense, found = run(arguments.keys, arguments.repeats, arguments.only)
    goals = [
        {"name": f"{name}_ratio_to_dense", "value": found[name].ratio, "at_most": most, "holds": found[name].ratio <= most}
        for name, most in GOALS.items()
        if name in found
    ]
    if arguments.json:
        figures = {"dense_ms": 1000 * dense}
        for name, row in found.items():
            figures |= {f"{name}_ms": 1000 * row.seconds, f"{name}_ratio_to_dense": row.ratio}
            figures |= {f"{name}_density": row.density, f"{name}_kv_fraction": row.kv_fraction}
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "keys": arguments.keys,
        }
        print(json.dumps({"figures": figures, "goals": goals, "machine": machine}, indent=2))
    else:
        megabytes = 2 * KV_HEADS * arguments.keys * DIM * 4 / 1e6
        print(f"{'method':32} {'ms':>8} {'of dense':>9} {'density':>8} {'MB read':>8} {'bytes bound':>12}")
        print(f"{'dense':32} {1000 * dense:8.2f} {1:9.2f} {1:8.3f} {megabytes:8.1f} {1:11.1f}x")
        for name, row in found.items():
            read = row.kv_fraction * megabytes
            bound = f"{1 / row.kv_fraction:11.1f}x"
            print(f"{name:32} {1000 * row.seconds:8.2f} {row.ratio:9.2f} {row.density:8.3f} {read:8.1f} {bound}")
        for goal in goals:
            print(f"{'holds' if goal['holds'] else 'FAILS'}: {goal['name']} {goal['value']:.2f}, at most {goal['at_most']}")
    return 0 if all(goal["holds"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
