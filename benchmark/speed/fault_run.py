"""Kill Phase 2 repeatedly and check that nothing is lost.

    python benchmark/speed/fault_run.py --kills 100 --json

A run over a tiny random model is killed with SIGKILL at random moments: one of its workers, the parent and the whole process
group in turn. It is started again until it ends by itself. Its files are then compared with those of an undisturbed run, and no
answer may be in its journals twice. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
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
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.speed.common import Figures, new_parser, report, run_phase2
from benchmark.speed.toy import ToyTask, save_tiny_model, toy_configs
from benchmark.storage.results import Journal

TARGETS = ("worker", "parent", "group")
#: What may differ between two runs: times, and the commit if someone commits meanwhile.
MAY_DIFFER = {"seconds", "timestamp", "commit"}
TOLERANCE = 1e-5


def run_once(model: str, results: Path, samples: int, workers: int) -> int:
    """One Phase 2 run over the toy task; the exit code. workers: 0 = in this process."""
    task = ToyTask(total=samples, context=400, answer=24)
    sizes = {"max_new_tokens": 24, "max_context_length": 1024}
    with mock.patch("benchmark.execution.jobs.get_task", lambda name: task):
        outcome = run_phase2(model, task.name, toy_configs(), results, workers=workers, **sizes)
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
) -> Figures:
    """Kill a run `kills` times and compare it with an undisturbed one.

    pause: least and greatest number of seconds between two kills. Each kill also waits until another sample is journalled, so
    that the run makes progress. calm_workers: workers of the undisturbed run, 0 = in this process.
    """
    model = str(save_tiny_model(folder / "tiny-llama"))
    calm, wild = folder / "calm", folder / "wild"
    started = time.monotonic()
    code = run_once(model, calm, samples, 0) if calm_workers == 0 else _start(model, calm, samples, calm_workers).wait()
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}")
    calm_seconds = time.monotonic() - started
    chosen = random.Random(seed)
    counts: Counter[str] = Counter()
    process = _start(model, wild, samples, workers)
    leaders = [process.pid]
    while counts.total() < kills:
        before = _journalled(wild)
        target = TARGETS[counts.total() % len(TARGETS)]
        wait_until = time.monotonic() + chosen.uniform(*pause)
        while process.poll() is None and (time.monotonic() < wait_until or _journalled(wild) == before):
            time.sleep(0.02)
        if process.poll() is not None:
            break  # it ended before the last kill
        if _kill(process.pid, target, chosen):
            counts[target] += 1
            print(f"{counts.total()} of {kills} kills, {_journalled(wild)} journalled", file=sys.stderr, flush=True)
        if target != "worker":
            process.wait()
            time.sleep(0.2)  # orphaned workers end with their parent
            process = _start(model, wild, samples, workers)
            leaders.append(process.pid)
    process.wait()
    if process.returncode not in (0, 1):
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    time.sleep(1.5)  # its last processes end
    answers = Counter(
        (record["sample_id"], key, answer["status"])
        for path in _journals(wild)
        for record in Journal(path).read()
        for key, answer in record["answers"].items()
    )
    unlike = differences(calm, wild)
    for line in unlike[:10]:
        print(line, file=sys.stderr)
    return {
        "kills": counts.total(),
        **{f"kills_{target}": counts[target] for target in TARGETS},
        "starts": len(leaders),
        "samples": samples,
        "answered_twice": sum(count > 1 for (*_, status), count in answers.items() if status == "ok"),
        "failures": sum(count for (*_, status), count in answers.items() if status != "ok"),
        "files_equal": int(not unlike),
        "processes_left": sum(len(_group(leader)) for leader in leaders),
        "undisturbed_seconds": round(calm_seconds, 1),
        "seconds": round(time.monotonic() - started - calm_seconds, 1),
    }


def _start(model: str, results: Path, samples: int, workers: int) -> subprocess.Popen[bytes]:
    """A process group of its own for `run_once`; its output goes to a log beside the results."""
    command = [sys.executable, __file__, "--run", model, str(results), str(samples), str(workers)]
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.with_suffix(".log").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _kill(leader: int, target: str, chosen: random.Random) -> bool:
    """Kill one worker, the parent or the group. False if there is none."""
    try:
        if target == "worker":
            workers = sorted(pid for pid in _group(leader) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
            if not workers:
                return False
            os.kill(chosen.choice(workers), signal.SIGKILL)
        elif target == "parent":
            os.kill(leader, signal.SIGKILL)
        else:
            os.killpg(leader, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False
    return True


def _group(leader: int) -> set[int]:
    """Live processes of a process group."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, group, *_ = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if state != "Z" and int(group) == leader:
                found.add(int(name))
    return found


def _journals(results: Path) -> list[Path]:
    return sorted(results.glob("*/.journals/*/*.jsonl"))


def _journalled(results: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in _journals(results))


def differences(one: Path, other: Path) -> list[str]:
    """Where the files of two results folders differ. Texts must be equal, numbers to 1e-5; MAY_DIFFER is left out."""
    first, second = _values(one), _values(other)
    lone = [f"{where} is in one of them only" for where in sorted(first.keys() ^ second.keys())]
    unlike = [where for where in first if where in second and not _close(first[where], second[where])]
    return lone + [f"{where}: {str(first[where])[:60]!r} and {str(second[where])[:60]!r}" for where in unlike]


def _values(base: Path) -> dict[str, Any]:
    """File and path in its content -> number or text, of all result files."""
    found: dict[str, Any] = {}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix == ".csv":
            with path.open(newline="") as stream:
                content: Any = list(csv.DictReader(stream))
        elif path.suffix == ".jsonl":
            content = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            content = json.loads(path.read_text())
        found.update(_flatten(content, str(name)))
    return found


def _flatten(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key in content.keys() - MAY_DIFFER:
            yield from _flatten(content[key], f"{where}: {key}")
    elif isinstance(content, list) and content:
        for number, entry in enumerate(content):
            yield from _flatten(entry, f"{where}[{number}]")
    else:
        yield where, content


def _close(one: Any, other: Any) -> bool:
    try:
        return one == other or math.isclose(float(one), float(other), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except (TypeError, ValueError):
        return False


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="samples of the run (default: 12 per kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the processes killed (default: %(default)s)")
    parser.add_argument("--run", nargs=4, metavar=("MODEL", "RESULTS", "SAMPLES", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        model, results, samples, workers = options.run
        return run_once(model, Path(results), int(samples), int(workers))
    samples = options.samples or 12 * options.kills  # with fewer the run may end before the last kill
    with tempfile.TemporaryDirectory() as folder:
        figures = fault_run(Path(folder), kills=options.kills, samples=samples, seed=options.seed)
    at_most = {"answered_twice": 0, "failures": 0, "processes_left": 0}
    return report(figures, options.json, at_least={"kills": options.kills, "files_equal": 1}, at_most=at_most)


if __name__ == "__main__":
    raise SystemExit(main())
