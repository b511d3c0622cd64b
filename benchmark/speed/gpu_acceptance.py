"""What only a GPU can say, measured in one run of at most nine minutes.

    python benchmark/speed/gpu_acceptance.py [--out gpu_acceptance.json] [--only kernels replay] [--json]

Ten sections, each with a time limit of its own. What a section found is printed, a line per figure (name, value, bound, whether it
holds), and written to the file as it ends, so that an interrupted run loses one section at most. Nothing is downloaded: the model is
a Llama-3.1-8B of random weights, made on the GPU. Needs torch, transformers and triton.
--small: the sizes of a test. Exit code 1 if a goal does not hold or a section failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed.common import Figures, new_parser, report, run_command
from benchmark.speed.gpu_sections import LLAMA, SMALL, Sections, Sizes
from benchmark.workers.limits import TimeLimitError, time_limit

#: Seconds of the whole run, which an outer limit of 540 s lets end.
TOTAL = 520.0
#: Section -> its own limit in seconds.
LIMITS = {
    "device": 20, "kernels": 60, "pipelines": 60, "waits": 60, "dense": 30,
    "prefill": 60, "lockstep": 120, "replay": 60, "bandwidth": 40, "faults": 60,
}  # fmt: skip
#: Figures that must not be greater, or not less, for what docs/gpu.md says to hold.
AT_MOST: Figures = {
    "launch_us": 10.0,
    "wait_us": 30.0,
    "kernels_worst_error_over_tolerance": 1.0,
    "kernels_long_rows_error": 1e-5,
    "kernels_long_groups_error": 5e-3,
    "pipelines_that_differ": 0.0,
    "step_of_9_rows_waits": 4.0,
    "step_of_9_rows_operations": 900.0,
    "step_of_9_rows_launches": 100.0,
    "step_of_41_rows_operations": 2500.0,
    "graphs_failed": 0.0,
    "lockstep_41_rows_peak_gib": 70.0,
    "lockstep_9_rows_peak_over_estimate": 1.2,
    "lockstep_41_rows_peak_over_estimate": 1.2,
    "dense_own_over_flash": 1.5,
    "replay_seconds": 2.0,
    "faults_misjudged": 0.0,
}
AT_LEAST: Figures = {"prefill_middle_tflop_per_s": 100.0} | {
    f"gpu_{keys}_shared_bandwidth_share": 0.8 for keys in (32768, 65536)
}


def force_out_of_memory() -> None:
    import torch

    torch.empty(2**50, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")


def force_broken_device() -> None:
    """A list that names a key far outside the cache. Without a GPU the error is raised by hand."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    from sparse_attention_hub.kernels.reference import Call
    from sparse_attention_hub.kernels.triton import attend_triton

    keys = torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16, device="cuda")
    far = torch.full((1, 1, 1, 64), 2**30, device="cuda")
    attend_triton(Call(keys[:, :, :1], keys, keys, hub.Mask.from_indices(far, (1, 1, 1, 64)), 0.1))
    torch.cuda.synchronize()


CHILDREN: dict[str, Callable[[], None]] = {"out_of_memory": force_out_of_memory, "broken_device": force_broken_device}


def judge(kind: str) -> int:
    """What a child process does: force the fault, and print what benchmark/workers makes of the error."""
    from benchmark.workers.errors import BrokenDeviceError, check_device, is_out_of_memory

    try:
        CHILDREN[kind]()
    except Exception as error:
        try:
            check_device(error)
            print("out_of_memory" if is_out_of_memory(error) else f"unknown {type(error).__name__}: {error}")
        except BrokenDeviceError:
            print("broken_device")
    return 0


def faults(run: Sections) -> Iterator[tuple[str, float]]:
    """Out of memory and an illegal access, each forced in a process of its own: are they judged as what they are?"""
    misjudged = 0
    for kind in CHILDREN:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        run.details[f"fault_{kind}"] = (done.stdout + done.stderr[-500:]).strip()
        misjudged += done.stdout.split() != [kind]
    yield "faults_misjudged", misjudged


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.json"), help="file to write (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="measure these sections only")
    parser.add_argument("--small", action="store_true", help="the sizes of a test")
    parser.add_argument("--child", choices=CHILDREN, help="used by the section `faults`")
    options = parser.parse_args(arguments)
    if options.child:
        return judge(options.child)
    import torch

    if not torch.cuda.is_available():
        parser.error("there is no GPU: what needs one is not measured")
    record: dict[str, Any] = {"figures": {}, "sections": {}, "details": {}, "machine": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Sections(SMALL if options.small else Sizes(model=LLAMA), Path(folder))
        for name in options.only:
            measure(run, name, min(LIMITS[name], TOTAL - (time.monotonic() - started)), record)
            record |= {"details": run.details, "machine": run.machine}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    bounds = {"at_most": AT_MOST, "at_least": AT_LEAST}
    code = report(record["figures"], options.json, **bounds, precision=".4g", **run.machine)
    return int(code or any(section["error"] for section in record["sections"].values()))


def measure(run: Sections, name: str, limit: float, record: dict[str, Any]) -> None:
    """Run one section. Whatever happens in it is recorded, and the next one follows."""
    error, started = None, time.monotonic()
    try:
        with time_limit(limit, end_process=False):
            for figure, value in faults(run) if name == "faults" else getattr(run, name)():
                record["figures"][figure] = float(value)
                print(line_of(figure, float(value)), file=sys.stderr, flush=True)
    except TimeLimitError as late:
        error = str(late)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    seconds = round(time.monotonic() - started, 2)
    record["sections"][name] = {"seconds": seconds, "limit": limit, "error": error}
    print(f"-- {name} {seconds:g} s {error or ''}", file=sys.stderr, flush=True)


def line_of(figure: str, value: float) -> str:
    """Name, value, bound and whether it holds."""
    if figure in AT_MOST:
        return f"{figure} {value:.4g} at most {AT_MOST[figure]:g} {'holds' if value <= AT_MOST[figure] else 'FAILS'}"
    if figure in AT_LEAST:
        return f"{figure} {value:.4g} at least {AT_LEAST[figure]:g} {'holds' if value >= AT_LEAST[figure] else 'FAILS'}"
    return f"{figure} {value:.4g}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
