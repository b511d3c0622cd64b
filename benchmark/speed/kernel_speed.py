"""One attention step over lists of keys against a dense step.

    python benchmark/speed/kernel_speed.py [--json]

Shapes are those of Llama-3.1-8B (32 query heads, 8 kv heads, 128 channels); the keys are chosen at random. "own": a list per
query head; "shared": a list per kv head.
- On the CPU (16k keys, float32, one thread): the compiled loops against grouped matrix products, for which there are goals, and
  against torch's fused attention, which varies more between machines. A ratio is the median over rounds.
- On a GPU, if there is one (4k to 128k keys, bfloat16): GPU time of the Triton kernels, without launches, against torch's
  attention, and against the time to read the chosen keys and values at the bandwidth that a large copy reaches in the same run.
Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.speed.common import Figures, Step, new_parser, report, take_turns
from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import attend

HEADS, KV_HEADS, DIM = 32, 8, 128
GPU_KEYS = [4096, 16384, 32768, 65536, 131072]
#: (lists, density) -> least ratio of grouped matrix products to ours on the CPU
CPU_GOALS = {("shared", 0.02): 14.0, ("shared", 0.05): 7.0, ("shared", 0.1): 4.2, ("shared", 0.25): 2.4, ("own", 0.05): 3.0}


def measure_cpu(keys: int, rounds: int) -> Figures:
    """Milliseconds per step, decoding one token of one request in one layer, and ratios of the dense steps to ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    queries, cache = tensors(1, keys, torch.float32, "cpu")
    steps: dict[str, Step] = {
        "dense_products": lambda: dense_products(queries, *cache),
        "dense_sdpa": lambda: _dense(queries, *cache),
    }
    for lists, density in CPU_GOALS:
        mask = _masks(1, keys, density, "cpu")[lists]
        steps[f"{lists}_{density:.0%}"] = lambda mask=mask: attend(queries, *cache, mask, DIM**-0.5, "cpu")
    seen = take_turns(steps, rounds)
    torch.set_num_threads(threads)
    figures = {f"cpu_{name}_ms": 1e3 * seconds for name, seconds in _medians(seen).items()}
    for lists, density in CPU_GOALS:
        name = f"{lists}_{density:.0%}"
        figures[f"cpu_{name}_speedup"] = median(times["dense_products"] / times[name] for times in seen)
        figures[f"cpu_{name}_over_sdpa"] = median(times["dense_sdpa"] / times[name] for times in seen)
    return figures


def measure_gpu(lengths: list[int], batch: int, density: float, rounds: int) -> Figures:
    """For every length: microseconds per step, ratios of dense to ours, and the share of the copy bandwidth that is reached."""
    bandwidth = _copy_bandwidth(rounds)
    figures = {"gpu_copy_gb_per_s": bandwidth / 1e9}
    for keys in lengths:
        queries, cache = tensors(batch, keys, torch.bfloat16, "cuda")
        masks = _masks(batch, keys, density, "cuda")
        steps: dict[str, Step] = {"dense": lambda: _dense(queries, *cache)}  # noqa: B023 (used before the next length)
        for name, mask in masks.items():
            steps[name] = lambda mask=mask: attend(queries, *cache, mask, DIM**-0.5, "triton")  # noqa: B023
        times = _medians(take_turns({name: _as_graph(step) for name, step in steps.items()}, rounds, _gpu_seconds))
        figures |= {f"gpu_{keys}_{name}_us": 1e6 * seconds for name, seconds in times.items()}
        for name, mask in masks.items():
            entries = batch * (HEADS if name == "own" else KV_HEADS) * mask.lists().indices.shape[-1]
            read = entries * (4 + 2 * 2 * DIM)  # bytes: the key's index, the key and the value
            figures[f"gpu_{keys}_{name}_speedup"] = times["dense"] / times[name]
            figures[f"gpu_{keys}_{name}_bandwidth_share"] = read / bandwidth / times[name]
    return figures


def tensors(batch: int, keys: int, dtype: torch.dtype, device: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Random queries (batch, HEADS, 1, DIM), keys and values (batch, KV_HEADS, keys, DIM)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return normal(batch, HEADS, 1, DIM), (normal(batch, KV_HEADS, keys, DIM), normal(batch, KV_HEADS, keys, DIM))


def _masks(batch: int, keys: int, density: float, device: str) -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, heads in (("own", HEADS), ("shared", KV_HEADS)):
        order = torch.rand((batch, heads, 1, keys), generator=generator)
        lists = order.topk(max(1, int(density * keys)), dim=-1, sorted=False).indices.to(device)
        masks[name] = Mask.from_indices(lists, (batch, HEADS, 1, keys), kv_heads=KV_HEADS)
    return masks


def _dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The query heads of a group as rows of one head: torch then reads every key once, without repeating keys."""
    return F.scaled_dot_product_attention(queries.view(queries.shape[0], KV_HEADS, -1, DIM), keys, values)


def dense_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Grouped matrix products: one per kv head for the scores, one for the values."""
    grouped = (queries * DIM**-0.5).view(1, KV_HEADS, -1, DIM)
    return (grouped @ keys.transpose(-1, -2)).softmax(-1) @ values


def _medians(seen: list[Figures]) -> Figures:
    """The median over rounds of each step's seconds."""
    return {name: median(times[name] for times in seen) for name in seen[0]}


def _gpu_seconds(step: Step) -> float:
    """GPU seconds with a cold L2 cache, as in a model, where other layers run in between."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _as_graph(step: Step) -> Step:
    """The step as a CUDA graph: replaying it takes the time of its kernels, without that of launching them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written, of a copy of 1 GB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _medians(take_turns({"copy": lambda: target.copy_(source)}, rounds, _gpu_seconds))["copy"]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--density", type=float, default=0.05, help="share of the keys that each head attends to, on a GPU")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured of each kind (default: %(default)s)")
    parser.add_argument("--cpu-keys", type=int, default=16384, help="context length on the CPU (default: %(default)s)")
    parser.add_argument("--gpu-keys", type=int, nargs="*", default=GPU_KEYS, help="context lengths on a GPU")
    parser.add_argument("--batch", type=int, default=8, help="requests per step on a GPU (default: %(default)s)")
    options = parser.parse_args(arguments)
    figures = measure_cpu(options.cpu_keys, options.rounds)
    machine: dict[str, object] = {"cpu": _cpu_name(), "cpu_threads": 1, "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        figures |= measure_gpu(options.gpu_keys, options.batch, options.density, options.rounds)
    else:
        print("no GPU: its figures are not measured", file=sys.stderr)
    at_least = {f"cpu_{lists}_{density:.0%}_speedup": least for (lists, density), least in CPU_GOALS.items()}
    at_least |= {f"gpu_{keys}_shared_bandwidth_share": 0.8 for keys in options.gpu_keys if keys >= 32768}
    return report(figures, options.json, at_least=at_least, at_most={}, machine=machine)


if __name__ == "__main__":
    sys.exit(main())
