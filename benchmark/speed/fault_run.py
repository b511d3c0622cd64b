"""Kill Phase 2 again and again, and see whether anything was lost.

    python benchmark/speed/fault_run.py --kills 100 --json

A run over a tiny random model is started as a process group of its own and killed with SIGKILL at random moments: one
of its workers, the parent, or the whole group. Whenever it ended it is started again, until it ends by itself. Its
files are then compared with those of an undisturbed run, and its journals with each other: no answer may be there
twice.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

TARGETS = ("worker", "parent", "group")
#: What may differ between two runs: times, and the commit if someone commits meanwhile.
_MAY_DIFFER = {"seconds", "timestamp", "commit"}
_TOLERANCE = 1e-5


def run_once(model: str, results: Path, samples: int, workers: int) -> int:
    """One Phase 2 run over the toy task; the exit code. workers 0 = in this process."""
    import benchmark.execution.jobs
    from benchmark.execution.runner import BenchmarkUnit, run_benchmarks
    from benchmark.settings import Settings
    from benchmark.speed.toy import ToyTask, toy_configs

    task = ToyTask(total=samples, context=400, answer=24)
    settings = Settings(
        models=(model,),
        tasks=(task.name,),
        device="cpu",
        max_new_tokens=24,
        max_context_length=1024,
        max_concurrent_benchmarks=max(1, workers),
        benchmark_results_dir=results,
    )
    find, benchmark.execution.jobs.get_task = benchmark.execution.jobs.get_task, lambda name: task
    try:
        unit = BenchmarkUnit(model, task.name, tuple(toy_configs()))
        outcome = run_benchmarks([unit], settings, in_process=workers == 0)
    finally:
        benchmark.execution.jobs.get_task = find
    return 130 if outcome.interrupted else int(bool(outcome.failures))


def fault_run(
    folder: Path,
    *,
    kills: int,
    samples: int,
    seed: int = 0,
    pause: tuple[float, float] = (0.2, 8.0),
    workers: int = 2,
    calm_workers: int = 2,
) -> dict[str, float]:
    """Kill a run `kills` times and compare it with an undisturbed one. pause: seconds between two kills, from and to;
    calm_workers: of the undisturbed run, 0 = in this process.

    Kills of the parent and of the group come only after something was journalled since the last start, so that the run
    gets on; the moments are random all the same.
    """
    from benchmark.speed.toy import save_tiny_model

    model = str(save_tiny_model(folder / "tiny-llama"))
    calm, wild = folder / "calm", folder / "wild"
    started = time.monotonic()
    code = run_once(model, calm, samples, 0) if calm_workers == 0 else _start(model, calm, samples, calm_workers).wait()
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}")
    calm_seconds = time.monotonic() - started
    chosen = random.Random(seed)
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    starts, process = 1, _start(model, wild, samples, workers)
    while sum(counts.values()) < kills:
        before = _journalled(wild)
        target = TARGETS[sum(counts.values()) % len(TARGETS)]
        wait_until = time.monotonic() + chosen.uniform(*pause)
        while process.poll() is None and (time.monotonic() < wait_until or _journalled(wild) == before):
            time.sleep(0.02)
            seen |= _group(process.pid)
        if process.poll() is not None:
            break  # it was done before it was killed often enough
        seen |= _group(process.pid)
        if _kill(process, target, chosen):
            counts[target] += 1
            print(f"{sum(counts.values())} of {kills} kills, {_journalled(wild)} journalled", file=sys.stderr, flush=True)
        if target != "worker":
            process.wait()
            time.sleep(0.2)  # orphaned workers end with their parent
            starts, process = starts + 1, _start(model, wild, samples, workers)
    while process.poll() is None:
        time.sleep(0.1)
        seen |= _group(process.pid)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    time.sleep(1.5)
    records = _records(wild)
    answered = Counter(
        (record["sample_id"], key)
        for record in records
        for key, answer in record["answers"].items()
        if answer["status"] == "ok"
    )
    unlike = differences(calm, wild)
    for line in unlike[:10]:
        print(line, file=sys.stderr)
    failures = sum(answer["status"] != "ok" for record in records for answer in record["answers"].values())
    return {
        "kills": sum(counts.values()),
        **{f"kills_{target}": counts[target] for target in TARGETS},
        "starts": starts,
        "samples": samples,
        "answered_twice": sum(count > 1 for count in answered.values()),
        "failures": failures,
        "files_equal": int(not unlike),
        "processes_left": sum(_is_alive(pid) for pid in seen),
        "undisturbed_seconds": round(calm_seconds, 1),
        "seconds": round(time.monotonic() - started - calm_seconds, 1),
    }


def _start(model: str, results: Path, samples: int, workers: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", model, str(results), str(samples), str(workers)]
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _kill(process: subprocess.Popen[bytes], target: str, chosen: random.Random) -> bool:
    try:
        if target == "parent":
            os.kill(process.pid, signal.SIGKILL)
        elif target == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            workers = sorted(pid for pid in _group(process.pid) if pid != process.pid and _is_worker(pid))
            if not workers:
                return False
            os.kill(chosen.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _group(leader: int) -> set[int]:
    """Live processes of a process group."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[2]) == leader and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on: state, parent, group, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] != "Z"


def _journals(results: Path) -> list[Path]:
    return sorted(results.glob("*/.journals/*/*.jsonl"))


def _journalled(results: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in _journals(results))


def _records(results: Path) -> list[dict[str, Any]]:
    from benchmark.storage.results import Journal

    return [record for path in _journals(results) for record in Journal(path).read()]


def differences(one: Path, other: Path) -> list[str]:
    """Where two results trees differ: in their files, answers or scores. Texts must be equal, floats to 1e-5, times apart."""
    first, second = _result_files(one), _result_files(other)
    lone = [f"{name} is there once" for name in sorted(set(first) ^ set(second))]
    return lone + [line for name in first if name in second for line in _differences(first[name], second[name], name)]


def _result_files(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix == ".csv":
            with path.open(newline="") as stream:
                found[str(name)] = list(csv.DictReader(stream))
        elif path.suffix == ".jsonl":
            found[str(name)] = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            found[str(name)] = json.loads(path.read_text())
    return found


def _differences(one: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one.keys() - _MAY_DIFFER:
            yield from _differences(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(a, b, f"{where}[{number}]")
    elif one != other and not _close(one, other):
        yield f"{where}: {str(one)[:60]!r} and {str(other)[:60]!r}"


def _close(one: Any, other: Any) -> bool:
    try:
        return not isinstance(one, bool) and abs(float(one) - float(other)) <= _TOLERANCE * max(1.0, abs(float(one)))
    except (TypeError, ValueError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill Phase 2 again and again, and see whether anything was lost.")
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--samples", type=int, help="samples of the run (default: 12 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--run", nargs=4, metavar=("MODEL", "RESULTS", "SAMPLES", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        model, results, samples, workers = arguments.run
        return run_once(model, Path(results), int(samples), int(workers))
    samples = arguments.samples or 12 * arguments.kills  # fewer, and the run may end before the last kill
    with tempfile.TemporaryDirectory() as folder:
        figures = fault_run(Path(folder), kills=arguments.kills, samples=samples, seed=arguments.seed)
    goals = [
        {"name": "kills", "value": figures["kills"], "at_least": arguments.kills},
        {"name": "files_equal", "value": figures["files_equal"], "at_least": 1},
        {"name": "answered_twice", "value": figures["answered_twice"], "at_most": 0},
        {"name": "failures", "value": figures["failures"], "at_most": 0},
        {"name": "processes_left", "value": figures["processes_left"], "at_most": 0},
    ]
    return report(figures, goals, arguments.json)


def report(figures: dict[str, float], goals: list[dict[str, Any]], as_json: bool) -> int:
    """Print figures and goals; 1 if a goal does not hold."""
    import platform

    for goal in goals:
        goal["holds"] = goal["value"] >= goal["at_least"] if "at_least" in goal else goal["value"] <= goal["at_most"]
    if as_json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
        print(json.dumps({"figures": figures, "goals": goals, "machine": machine}))
    else:
        for name, value in figures.items():
            print(f"{name:<48} {value:>12g}")
        for goal in goals:
            bound = f"at least {goal['at_least']:g}" if "at_least" in goal else f"at most {goal['at_most']:g}"
            print(f"{'holds' if goal['holds'] else 'FAILS':<6} {goal['name']} {goal['value']:g}, {bound}")
    return int(not all(goal["holds"] for goal in goals))


if __name__ == "__main__":
    raise SystemExit(main())
