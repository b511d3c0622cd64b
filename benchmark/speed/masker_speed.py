"""One decode step of each masker against dense attention, on tensors shaped like Llama-3.1-8B.

    python benchmark/speed/masker_speed.py [--keys 16384] [--repeats 15] [--json]

Selection and attention at 5% density, on random tensors (32 query heads, 8 kv heads, 128 channels, float32), one thread, the
state prepared on the context. Every method takes turns with the dense step (grouped matrix products); ratio_to_dense is the
median of the ratios, kv_fraction the share of the dense bytes that is read. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed.common import Figures, new_parser, report, run_command, take_turns

DENSITY = 0.05
#: Method -> greatest ratio of its time to that of the dense step.
GOALS = {
    **{"random_sampling": 0.35, "quest": 0.3, "double_sparsity": 0.5, "pq_cache": 0.5},
    **{"landmarks": 1.0, "sparq": 1.0, "clusters": 1.0, "snap_kv": 1.0},
}


def pipelines(folder: Path, keys: int) -> dict[str, list[Any]]:
    """Method -> masker configs of about 5% density."""
    import torch

    from benchmark.speed.decode_step import DIM, HEADS, KV_HEADS
    from sparse_attention_hub.maskers.principal_axes import write_axes

    generator = torch.Generator().manual_seed(1)
    channels = [torch.randperm(DIM, generator=generator).tolist() for _ in range(HEADS)]
    file = folder / "channels.json"
    file.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": channels}))
    axes = folder / "axes.safetensors"
    write_axes({0: torch.eye(DIM).unsqueeze(0)}, axes)
    planes = torch.randn(KV_HEADS, DIM, 32, generator=generator)
    zeros = torch.zeros(KV_HEADS, 32)
    per_query = {"query_matrix": [planes.repeat_interleave(4, 0)], "query_bias": [zeros.repeat_interleave(4, 0)]}
    hash_weights = {0: per_query | {"key_matrix": [planes], "key_bias": [zeros]}}
    ends = [hub.SinkMaskerConfig(128), hub.LocalMaskerConfig(128)]
    rest = DENSITY - 256 / keys
    adaptive = hub.AdaptiveSamplingMaskerConfig(rest / 4, 0.25, 0.25, 0, 0)
    return {
        "sink_local": [hub.SinkMaskerConfig(DENSITY / 2), hub.LocalMaskerConfig(DENSITY / 2)],
        "random_sampling": [*ends, hub.RandomSamplingMaskerConfig(rest)],
        "quest": [*ends, hub.QuestTopKMaskerConfig(rest, 16)],
        "double_sparsity": [*ends, hub.DoubleSparsityTopKMaskerConfig(rest, str(file), 16, 4)],
        "hash_attention": [*ends, hub.HashAttentionTopKMaskerConfig(rest, 32, 1, 0, "relu", hat_weights=hash_weights)],
        "pq_cache": [*ends, hub.PQCacheConfig(rest, 2, 6, 10, 128, "euclidean")],
        "landmarks": [*ends, hub.LandmarksConfig(rest, 16)],
        "sparq": [*ends, hub.SparqConfig(rest, 0.125)],
        "loki": [*ends, hub.LokiConfig(rest, str(axes), 0.125)],
        "clusters": [*ends, hub.ClustersConfig(rest, 32)],
        "snap_kv": [*ends, hub.SnapKVConfig(rest)],
        "magic_pig": [*ends, hub.MagicPigConfig(lsh_l=36, lsh_k=10)],
        "socket": [*ends, hub.SocketConfig(rest)],
        "quest_twilight": [*ends, hub.QuestTopKMaskerConfig(4 * rest, 16), hub.TwilightConfig(0.4)],
        "oracle_top_k": [*ends, hub.OracleTopKConfig(rest)],
        "oracle_top_p": [*ends, hub.OracleTopPMaskerConfig(0.2)],
        "oracle_top_k_adaptive_sampling": [*ends, hub.OracleTopKConfig(rest / 2), adaptive],
    }


def run(keys: int, repeats: int, only: list[str] | None = None) -> Figures:
    """Medians of each method's milliseconds and of its ratio to the dense step; its density and share of bytes read."""
    import torch

    from benchmark.speed.decode_step import DIM, HEADS, dense_products, tensors

    queries, cache = tensors(1, keys, torch.float32, "cpu")
    figures: Figures = {}
    dense_seconds = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name, configs in pipelines(Path(folder), keys).items():
            if only and name not in only:
                continue
            attention = hub.ResearchAttention(hub.ResearchAttentionConfig(configs))
            state = attention.new_state()
            if attention.observes:
                last_queries = torch.randn(1, HEADS, 64, DIM)
                context = hub.AttentionInputs(last_queries, cache[0][:, :, :-1], cache[1][:, :, :-1])
                state.observe(0, hub.ContextSummary.of(context, attention.observes))
            attention.prepare(cache[0][:, :, :-1], 0, state)

            def step(attention: hub.ResearchAttention = attention, state: hub.AttentionState = state) -> hub.AttentionResult:
                state.rewind(keys - 1)
                return attention(queries, *cache, state=state, seeds=0)

            seen = take_turns({"dense": lambda: dense_products(queries, *cache), "step": step}, repeats)
            result = step()
            figures[f"{name}_ms"] = 1000 * median(times["step"] for times in seen)
            figures[f"{name}_ratio_to_dense"] = median(times["step"] / times["dense"] for times in seen)
            figures[f"{name}_density"] = result.density
            figures[f"{name}_kv_fraction"] = result.kv_fraction
            dense_seconds += [times["dense"] for times in seen]
    return {"dense_ms": 1000 * median(dense_seconds), **figures}


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--keys", type=int, default=16384, help="context length in keys (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="steps measured of each method (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="measure these methods only")
    options = parser.parse_args()
    if options.keys < 8192:
        parser.error(f"--keys must be >= 8192, so that sink and window leave some of the 5% to choose, got {options.keys}")
    import torch

    torch.set_num_threads(1)
    figures = run(options.keys, options.repeats, options.only)
    at_most = {f"{name}_ratio_to_dense": most for name, most in GOALS.items()}
    return report(figures, options.json, at_most=at_most, threads=1, keys=options.keys)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
