"""The formula of `python -m benchmark.cost` against measured decode steps of the CPU kernels.

    python benchmark/speed/cost_model.py [--rounds 9] [--json]

One thread, shapes of Llama-3.1-8B (32 query heads, 8 kv heads, 128 channels, float32), keys chosen at random, a list per kv head.
First the machine is measured as the formula sees it: the cost of a call, from a step over one key; the rates at which the dense
and the sparse kernel read, each from one step at 8k keys. Then steps at 2 to 50% of 4k to 32k keys are predicted from their bytes
and measured. predicted_over_measured must be within 25% everywhere. Exit code 1 if it is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.cost import Machine
from benchmark.speed.common import Figures, Step, new_parser, report, run_command, take_turns

LENGTHS = (4096, 8192, 16384, 32768)
DENSITIES = (0.02, 0.05, 0.1, 0.25, 0.5)
#: Where the rates are measured.
REFERENCE, SHARE = 8192, 0.1
WITHIN = 0.25


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="steps measured of each kind (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="context lengths in keys")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    figures = measure(options.lengths, options.rounds)
    names = [name for name in figures if name.endswith("predicted_over_measured")]
    bounds = {name: 1 - WITHIN for name in names}, {name: 1 + WITHIN for name in names}
    return report(figures, options.json, at_least=bounds[0], at_most=bounds[1], precision=".4g", threads=1)


def measure(lengths: Sequence[int], rounds: int) -> Figures:
    """Rates of the machine, then each step's measured milliseconds and prediction over measurement."""
    one = {"call": _steps(REFERENCE, [1 / REFERENCE])["0%"][0]}
    call = median(times["call"] for times in take_turns(one, 5 * rounds))
    kinds = _steps(REFERENCE, [SHARE])
    seconds = _seconds(kinds, rounds)
    figures: Figures = {"call_us": 1e6 * call}
    machines = {}
    for name, (_, read) in kinds.items():
        rate = read / (seconds[name] - call)
        machines[name == "dense"] = Machine(memory=rate, link=rate, capacity=0.0, launch=call)
        figures[f"{'dense' if name == 'dense' else 'sparse'}_gb_per_s"] = rate / 1e9
    for keys in lengths:
        steps = _steps(keys, DENSITIES)
        for name, measured in _seconds(steps, rounds).items():
            predicted = machines[name == "dense"].seconds(steps[name][1], 1)
            figures[f"{keys}_{name}_ms"] = 1e3 * measured
            figures[f"{keys}_{name}_predicted_over_measured"] = predicted / measured
    return figures


def _seconds(steps: dict[str, tuple[Step, float]], rounds: int) -> Figures:
    """The median time of each step."""
    seen = take_turns({name: step for name, (step, _) in steps.items()}, rounds)
    return {name: median(times[name] for times in seen) for name in steps}


def _steps(keys: int, shares: Sequence[float]) -> dict[str, tuple[Step, float]]:
    """Name -> (the step, the bytes of keys, values and lists that it reads): dense, and sparse at each share of the keys."""
    import torch

    from benchmark.speed.decode_step import DIM, KV_HEADS, dense_products, list_step, tensors

    queries, cache = tensors(1, keys, torch.float32, "cpu")
    row = 2 * DIM * 4
    steps: dict[str, tuple[Step, float]] = {"dense": (lambda: dense_products(queries, *cache), KV_HEADS * keys * row)}
    for share in shares:
        step, entries = list_step(queries, cache, "shared", share, "cpu")
        steps[f"{share:.0%}"] = step, entries * (row + 4)
    return steps


if __name__ == "__main__":
    raise SystemExit(run_command(main))
