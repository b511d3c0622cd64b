"""The formula of `python -m benchmark.cost` against measured decode steps of the CPU kernels.

    python benchmark/speed/cost_model.py [--rounds 15] [--json]

One thread, shapes of Llama-3.1-8B (32 query heads, 8 kv heads, 128 channels, float32), keys chosen at random, a list per kv head.
First the machine is measured, without attention over many keys: a call, from a step over one key; the arithmetic of a key, from
steps over keys that lie in the core's cache; the bandwidth, from a loop that does nothing but sum the same rows of keys and values,
less what that loop takes in the cache. Then steps at 2 to 50% of 4k to 32k keys are predicted from their bytes and measured. Other
memory is read before each step, as the other layers of a model do. predicted_over_measured must be within 25% everywhere. Exit
code 1 if it is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.cost import Machine
from benchmark.speed.common import Figures, Step, new_parser, report, run_command, take_turns

LENGTHS = (4096, 8192, 16384, 32768)
DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5)
#: Keys of steps whose keys and values lie in a core's cache.
FEW, MORE = 32, 160
#: Bytes that are read between two steps.
OTHER_MEMORY = 2**26
WITHIN = 0.25


class Work(NamedTuple):
    """A step, a loop that reads the same rows of keys and values, and the bytes of these rows and of the step's lists."""

    step: Step
    read: Step
    bytes: int


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="steps measured of each kind (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="context lengths in keys")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    figures = measure(options.lengths, options.rounds)
    names = [name for name in figures if name.endswith("predicted_over_measured")]
    bounds = {name: 1 - WITHIN for name in names}, {name: 1 + WITHIN for name in names}
    return report(figures, options.json, at_least=bounds[0], at_most=bounds[1], precision=".4g", threads=1)


def measure(lengths: Sequence[int], rounds: int) -> Figures:
    """What a call and a byte's arithmetic cost, then for each step its bandwidth, milliseconds, and prediction over measurement."""
    alone = {kind: _work(1, [1.0])[kind].step for kind in ("dense", "100%")}
    call = _cold(alone, 5 * rounds)
    arithmetic = {kind: _in_cache(kind, "step", rounds) for kind in alone}
    reading = {kind: _in_cache(kind, "read", rounds) for kind in alone}
    figures: Figures = {"call_us": 1e6 * call["100%"], "dense_call_us": 1e6 * call["dense"]}
    figures |= {"gb_per_s_in_cache": 1e-9 / arithmetic["100%"], "dense_gb_per_s_in_cache": 1e-9 / arithmetic["dense"]}
    for keys in lengths:
        # A bandwidth is measured in turns with the steps, so that a slow moment of the machine slows both.
        work = _work(keys, DENSITIES)
        seconds = _cold({(name, part): getattr(each, part) for name, each in work.items() for part in ("read", "step")}, rounds)
        for name, each in work.items():
            kind, measured = name if name == "dense" else "100%", seconds[name, "step"]
            waiting = max(0.0, seconds[name, "read"] / each.bytes - reading[kind])
            rate = 1 / (arithmetic[kind] + waiting)
            machine = Machine(memory=rate, link=rate, capacity=0.0, launch=call[kind])
            figures[f"{keys}_{name}_gb_per_s"] = rate / 1e9
            figures[f"{keys}_{name}_ms"] = 1e3 * measured
            figures[f"{keys}_{name}_predicted_over_measured"] = machine.seconds(each.bytes, 1) / measured
    return figures


def _cold(steps: dict[Any, Step], rounds: int) -> dict[Any, float]:
    """Seconds of each step, the median of its turns, after other memory was read."""
    import torch

    other = torch.ones(OTHER_MEMORY // 4)
    spaced = {name: part for kind, step in steps.items() for name, part in ((("before", kind), other.sum), (kind, step))}
    seen = take_turns(spaced, rounds)
    return {name: median(times[name] for times in seen) for name in steps}


def _in_cache(kind: str, part: str, rounds: int) -> float:
    """Seconds per byte of a step, or of its reading, over keys and values in a core's cache: the difference of two sizes, each
    the shortest of many turns."""
    few, more = (_work(keys, [1.0])[kind] for keys in (FEW, MORE))
    seen = take_turns({"few": getattr(few, part), "more": getattr(more, part)}, 20 * rounds)
    difference = min(times["more"] for times in seen) - min(times["few"] for times in seen)
    return difference / (more.bytes - few.bytes)


def _work(keys: int, shares: Sequence[float]) -> dict[str, Work]:
    """Name -> work: dense, and sparse at each share of the keys."""
    import torch

    from benchmark.speed.decode_step import DIM, KV_HEADS, dense_fused, list_step, random_lists, sum_rows, tensors

    queries, cache = tensors(1, keys, torch.float32, "cpu")
    row = 2 * DIM * 4
    every = torch.arange(keys).expand(KV_HEADS, keys)
    found = {"dense": Work(lambda: dense_fused(queries, *cache), lambda: sum_rows(cache, every), every.numel() * row)}
    for share in shares:
        step, entries = list_step(queries, cache, "shared", share, "cpu")
        chosen = random_lists(1, KV_HEADS, keys, share)[0, :, 0].sort().values  # as the mask holds them
        found[f"{share:.0%}"] = Work(step, partial(sum_rows, cache, chosen), entries * (row + 4))
    return found


if __name__ == "__main__":
    raise SystemExit(run_command(main))
