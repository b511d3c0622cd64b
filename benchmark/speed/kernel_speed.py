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

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.speed.common import new_parser, report, run_command

GPU_KEYS = [4096, 16384, 32768, 65536, 131072]
#: (lists, density) -> least ratio of grouped matrix products to ours on the CPU
CPU_GOALS = {("shared", 0.02): 14.0, ("shared", 0.05): 7.0, ("shared", 0.1): 4.2, ("shared", 0.25): 2.4, ("own", 0.05): 3.0}


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--density", type=float, default=0.05, help="share of the keys that each head attends to, on a GPU")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured of each kind on the CPU (default: %(default)s)")
    parser.add_argument("--cpu-keys", type=int, default=16384, help="context length on the CPU (default: %(default)s)")
    parser.add_argument("--gpu-keys", type=int, nargs="*", default=GPU_KEYS, help="context lengths on a GPU")
    parser.add_argument("--batch", type=int, default=8, help="requests per step on a GPU (default: %(default)s)")
    options = parser.parse_args(arguments)
    import torch

    from benchmark.speed.decode_step import measure_cpu, measure_gpu

    figures = measure_cpu(options.cpu_keys, options.rounds, CPU_GOALS)
    machine: dict[str, Any] = {"cpu_threads": 1, "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        figures |= measure_gpu(options.gpu_keys, options.batch, options.density)
    else:
        print("no GPU: its figures are not measured", file=sys.stderr)
    at_least = {f"cpu_{lists}_{density:.0%}_speedup": least for (lists, density), least in CPU_GOALS.items()}
    at_least |= {f"gpu_{keys}_shared_bandwidth_share": 0.8 for keys in options.gpu_keys if keys >= 32768}
    return report(figures, options.json, at_least=at_least, **machine)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
