"""How fast one attention step over a few keys is beside a dense one: `python benchmark/speed/kernel_speed.py [--json]`.

Shapes are those of Llama-3.1-8B (32 query heads, 8 kv heads, 128 dimensions), with random keys chosen. "own" lists
differ between the heads of a group, "shared" lists do not. Sides take turns; a ratio is the median of those of its rounds.
On the CPU: the compiled loops beside grouped matrix products (the goals) and torch's fused attention, which machines differ in, at
16k keys, float32, one thread. On a GPU, if there is one:
the Triton kernels beside torch's attention at 4k to 128k keys, bfloat16, in GPU time without launches, and beside the time
that reading the chosen keys and values takes at the bandwidth that a large copy reaches in the same run.
Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import attend

HEADS, KV_HEADS, DIM = 32, 8, 128
#: (lists, share of the keys) -> how many times faster than grouped matrix products a step on the CPU must be
CPU_GOALS = {("shared", 0.02): 14.0, ("shared", 0.05): 7.0, ("shared", 0.1): 4.2, ("shared", 0.25): 2.4, ("own", 0.05): 3.0}
Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--density", type=float, default=0.05, help="share of the keys that each head attends to, on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-keys", type=int, default=16384)
    parser.add_argument("--gpu-keys", type=int, nargs="*", default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--batch", type=int, default=8, help="requests a step on the GPU")
    options = parser.parse_args(arguments)

    figures, goals = measure_cpu(options.cpu_keys, options.rounds)
    machine: dict[str, object] = {"cpu": _cpu_name(), "cpu_threads": 1, "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        on_gpu = measure_gpu(options.gpu_keys, options.batch, options.density, options.rounds)
        figures, goals = figures | on_gpu[0], goals + on_gpu[1]
    if options.json:
        print(json.dumps({"figures": figures, "goals": goals, "machine": machine}))
    else:
        _print_table(figures, goals, machine)
    return 0 if all(goal["holds"] for goal in goals) else 1


def measure_cpu(keys: int, rounds: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Milliseconds a step, decoding one token of one request in one layer, and how many times faster than dense."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        queries, cache = _tensors(1, keys, torch.float32, "cpu")
        steps: dict[str, Step] = {
            "dense_products": lambda: _dense_products(queries, *cache),
            "dense_sdpa": lambda: _dense(queries, *cache),
        }
        for name, density in CPU_GOALS:
            mask = _masks(1, keys, density, "cpu")[name]
            steps[f"{name}_{density:.0%}"] = lambda mask=mask: attend(queries, *cache, mask, DIM**-0.5, "cpu")
        for step in steps.values():
            step()
        seen = [{name: _cpu_seconds(step) for name, step in steps.items()} for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    figures = {f"cpu_{name}_ms": 1e3 * statistics.median(times[name] for times in seen) for name in steps}
    goals = []
    for (lists, density), at_least in CPU_GOALS.items():
        name = f"{lists}_{density:.0%}"
        for form, figure in (("dense_products", "speedup"), ("dense_sdpa", "over_sdpa")):
            figures[f"cpu_{name}_{figure}"] = statistics.median(times[form] / times[name] for times in seen)
        goals.append(_goal(figures, f"cpu_{name}_speedup", at_least))
    return figures, goals


def measure_gpu(
    lengths: list[int], batch: int, density: float, rounds: int
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Microseconds a step for every length, and the share of the bandwidth that reading the chosen rows reaches."""
    bandwidth = _copy_bandwidth(rounds)
    figures: dict[str, float] = {"gpu_copy_gb_per_s": bandwidth / 1e9}
    goals = []
    for keys in lengths:
        queries, cache = _tensors(batch, keys, torch.bfloat16, "cuda")
        masks = _masks(batch, keys, density, "cuda")
        steps: dict[str, Step] = {"dense": lambda: _dense(queries, *cache)}  # noqa: B023 (used before the next length)
        for name, mask in masks.items():
            steps[name] = lambda mask=mask: attend(queries, *cache, mask, DIM**-0.5, "triton")  # noqa: B023
        launched = {name: _as_graph(step) for name, step in steps.items()}
        times = _take_turns(launched, _gpu_seconds, rounds)
        for name, seconds in times.items():
            figures[f"gpu_{keys}_{name}_us"] = 1e6 * seconds
        for name, mask in masks.items():
            # A key's index in the list (4 bytes), the key and the value.
            lists = batch * (HEADS if name == "own" else KV_HEADS)
            chosen = lists * mask.lists().indices.shape[-1] * (4 + 2 * 2 * DIM)
            figures[f"gpu_{keys}_{name}_speedup"] = times["dense"] / times[name]
            figures[f"gpu_{keys}_{name}_bandwidth_share"] = chosen / bandwidth / times[name]
        if keys >= 32768:
            goals.append(_goal(figures, f"gpu_{keys}_shared_bandwidth_share", 0.8))
    return figures, goals


def _tensors(batch: int, keys: int, dtype: torch.dtype, device: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return normal(batch, HEADS, 1, DIM), (normal(batch, KV_HEADS, keys, DIM), normal(batch, KV_HEADS, keys, DIM))


def _masks(batch: int, keys: int, density: float, device: str) -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, held in (("own", HEADS), ("shared", KV_HEADS)):
        order = torch.rand((batch, held, 1, keys), generator=generator)
        lists = order.topk(max(1, int(density * keys)), dim=-1, sorted=False).indices.to(device)
        masks[name] = Mask.from_indices(lists, (batch, HEADS, 1, keys), kv_heads=KV_HEADS)
    return masks


def _dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The heads of a group as rows of one head: torch then reads every key once, without repeating keys."""
    return F.scaled_dot_product_attention(queries.view(queries.shape[0], KV_HEADS, -1, DIM), keys, values)


def _dense_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One matrix product a kv head for the scores, one for the values."""
    grouped = (queries * DIM**-0.5).view(1, KV_HEADS, -1, DIM)
    return (grouped @ keys.transpose(-1, -2)).softmax(-1) @ values


def _take_turns(steps: dict[str, Step], measure: Callable[[Step], float], rounds: int) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that a slow moment of the machine hits all alike."""
    for step in steps.values():
        step()
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seen[name].append(measure(step))
    return {name: statistics.median(seconds) for name, seconds in seen.items()}


def _cpu_seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _gpu_seconds(step: Step) -> float:
    """GPU seconds with a cold L2 cache, as in a model, where other layers ran in between."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _as_graph(step: Step) -> Step:
    """The step's GPU work, recorded once and replayed: what remains is the kernels, not the time to launch them."""
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
    """Bytes a second, read and written, of a copy of 1 GB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _take_turns({"copy": lambda: target.copy_(source)}, _gpu_seconds, rounds)["copy"]


def _goal(figures: dict[str, float], name: str, at_least: float) -> dict[str, object]:
    return {"name": name, "value": figures[name], "at_least": at_least, "holds": figures[name] >= at_least}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _print_table(figures: dict[str, float], goals: list[dict[str, object]], machine: dict[str, object]) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if "gpu" not in machine:
        print("no GPU: its figures are not measured")
    for name, value in figures.items():
        print(f"{name:<40} {value:>12.3f}")
    for goal in goals:
        verdict = "holds" if goal["holds"] else "DOES NOT HOLD"
        print(f"goal: {goal['name']} at least {goal['at_least']}: {goal['value']:.3f} {verdict}")


if __name__ == "__main__":
    sys.exit(main())
