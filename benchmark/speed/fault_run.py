"""Kill the program repeatedly and check that nothing is lost.

    python benchmark/speed/fault_run.py [--kills 100] [--phase 1|2|both] [--seed 0] [--json]

The program searches and benchmarks a tiny random model. At random moments SIGKILL, SIGTERM and SIGINT are sent, in turn, to one of
its workers, to the program alone and to its process group. The same command is run again until it ends by itself; then another
run is begun, until there were enough kills. The files of every run must be those of an undisturbed one, apart from times, and
nothing that is journalled may be evaluated again. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.speed.common import Figures, new_parser, report, run_command
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.results import Journal

PROGRAM = Path(__file__).resolve().parents[1] / "raytune" / "run_full_benchmark.py"
ARGUMENTS = (
    "--tasks ruler/1024/niah_single_1 --configs dense sink_local_10pct sink_local_25pct sink_local_random_sampling_25pct "
    "--search-max-requests 2 --search-max-context-length 1024 --search-max-new-tokens 8 --max-new-tokens 8"
)
TARGETS = ("worker", "parent", "group")
KINDS = list(itertools.product((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), TARGETS))
#: What must not happen.
WRONG = ("differ", "evaluated_twice", "failed", "stuck")
#: Exit codes of a program that was killed or interrupted. Ray aborts on a SIGTERM while it starts.
KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGABRT, 130)
#: Seconds after which a program that does not end counts as stuck.
PATIENCE = 300.0
#: What may differ between two runs: times, and the commit if someone commits meanwhile.
MAY_DIFFER = re.compile(r'"(seconds|search_time|time_\w+|timestamp|date|commit)": ("[^"]*"|[^,}\]\n]*)')
RUN_NAME = re.compile(r"run_\d{8}_\d{6}")


class FaultRun:
    """Runs of the program in subfolders of `folder`; `run` returns what became of them. phase: "1", "2" or "both"."""

    def __init__(self, folder: Path, *, phase: str = "both", samples: int = 40, seed: int = 0) -> None:
        self.folder, self.phase, self.samples, self.chosen = folder, phase, samples, random.Random(seed)
        self.model = str(save_tiny_model(folder / "tiny-llama"))
        self.undisturbed = folder / "undisturbed"
        self.counts: Counter[str] = Counter()

    def run(self, kills: int) -> Figures:
        for phase in ("1", "2") if self.phase == "2" else (self.phase,):
            started = time.monotonic()
            if self.start(self.undisturbed, phase).wait() != 0:
                raise RuntimeError(f"the undisturbed run failed:\n{(self.undisturbed / 'log').read_text()}")
            seconds = time.monotonic() - started
        while self.counts["kills"] < kills:
            self.counts["runs"] += 1
            run = self.folder / f"killed_{self.counts['runs']}"
            if self.phase == "2":
                shutil.copytree(self.undisturbed / "optimal_configs", run / "optimal_configs")
            self.killed_run(run, kills, seconds / 2)
            self.compare(run)
        time.sleep(5.0)  # the last processes end
        counted = ("kills", *TARGETS, "SIGKILL", "SIGTERM", "SIGINT", "phase_1", "phase_2", "runs", "starts", "ignored")
        figures = {name: self.counts[name] for name in (*counted, *WRONG)}
        return figures | {"processes_left": len(processes(self.folder)), "undisturbed_seconds": round(seconds, 1)}

    def start(self, run: Path, phase: str) -> subprocess.Popen[bytes]:
        """The program in a folder and a process group of its own; it writes into the file `log`."""
        run.mkdir(exist_ok=True)
        sizes = ["--num-samples", str(self.samples), "--max-requests", str(self.samples)]
        command = [sys.executable, str(PROGRAM), "--models", self.model, *shlex.split(ARGUMENTS), *sizes]
        command += [] if phase == "both" else ["--phase", phase]
        with (run / "log").open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background programs ignore
            return subprocess.Popen(
                command, cwd=run, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed
            )

    def killed_run(self, run: Path, kills: int, seconds: float) -> None:
        """Start the program until it ends by itself, or has failed three times. Signals follow each other within `seconds`."""
        code, failed = KILLED[0], 0
        while code != 0 and failed < 3:
            process, stopped = self.start(run, self.phase), False
            self.counts["starts"] += 1
            while not stopped and self.counts["kills"] < kills and not _ends(process, self.chosen.uniform(0.0, seconds)):
                stopped = self.kill(process, run)
            if not _ends(process, PATIENCE):
                self.counts["stuck"] += 1
                for pid in processes(run):
                    os.kill(pid, signal.SIGKILL)
            code = process.wait()
            self.counts["ignored"] += stopped and code == 0  # the signal came after the last sample, or was lost
            print(f"{self.counts['kills']} of {kills} kills, exit code {code}", file=sys.stderr, flush=True)
            if code not in (0, *KILLED):
                failed += 1
                print((run / "log").read_text()[-3000:], file=sys.stderr, flush=True)
        self.counts["failed"] += failed

    def kill(self, process: subprocess.Popen[bytes], run: Path) -> bool:
        """Send the next signal, unless there is no worker to get it; whether the program itself got it."""
        number, target = KINDS[self.counts["kills"] % len(KINDS)]
        pids = {"parent": [process.pid], "group": [process.pid], "worker": [pid for pid in processes(run) if _is_worker(pid)]}
        if not pids[target]:
            return False
        with contextlib.suppress(ProcessLookupError):
            send = os.killpg if target == "group" else os.kill
            send(self.chosen.choice(pids[target]), number)
            phase = 2 if (run / "benchmark_results").exists() else 1
            self.counts.update(["kills", target, number.name, f"phase_{phase}"])
            print(f"{number.name} to {target} in phase {phase}", file=sys.stderr, flush=True)
        return target != "worker"

    def compare(self, run: Path) -> None:
        """Count what was evaluated twice, and whether the files differ from an undisturbed run's."""
        self.counts["evaluated_twice"] += sum(count > 1 for count in Counter(_journalled(run)).values())
        differences = list(difflib.unified_diff(contents(self.undisturbed), contents(run), "undisturbed", run.name, n=0))
        self.counts["differ"] += bool(differences)
        for line in differences[:20]:
            print(line, file=sys.stderr)


def processes(folder: Path) -> list[int]:
    """All processes that work in a folder: a run's, its workers' and Ray's."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if Path(os.readlink(f"/proc/{name}/cwd")).is_relative_to(folder):
                found.append(int(name))
    return found


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"spawn_main" in command or (command.startswith(b"ray::") and b"Trainable" in command)
    return False


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _journalled(run: Path) -> Iterator[tuple[str, str]]:
    """What the journals of both phases name as evaluated without a failure."""
    for path in run.glob("ray_results/journals/*.jsonl"):
        for line in Journal(path).read():
            done = (entry for entry in line.get("evaluations", []) if entry["status"] == "completed")
            yield from ((path.name, f"{entry['key']} {entry['rung']}") for entry in done)
    for path in run.glob("benchmark_results/*/.journals/*/*.jsonl"):
        for line in Journal(path).read():
            yield from ((line["sample_id"], name) for name, answer in line["answers"].items() if answer["status"] == "ok")


def contents(run: Path) -> list[str]:
    """The lines of all result files of the newest search and of the benchmark, without what may differ."""
    lines = []
    newest = sorted((run / "optimal_configs").glob("run_*"))[-1:]
    files = [path for folder in [*newest, run / "benchmark_results"] for path in folder.rglob("*")]
    for path in sorted(files):
        if path.suffix in (".csv", ".json", ".jsonl") and "/." not in str(path):
            text = path.read_text()
            if path.suffix == ".csv":
                text = "\n".join(json.dumps(row) for row in csv.DictReader(io.StringIO(text)))
            name, text = (RUN_NAME.sub("run", part) for part in (str(path.relative_to(run)), MAY_DIFFER.sub("", text)))
            lines += [f"{name} {line}" for line in text.splitlines()]
    return lines


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: %(default)s)")
    parser.add_argument("--phase", choices=("1", "2", "both"), default="both", help="what is run (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=40, help="trials per level, and samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the workers killed (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = FaultRun(Path(folder), phase=options.phase, samples=options.samples, seed=options.seed).run(options.kills)
    return report(
        figures, options.json, at_least={"kills": options.kills}, at_most=dict.fromkeys((*WRONG, "processes_left"), 0)
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
