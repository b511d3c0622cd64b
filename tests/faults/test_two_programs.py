"""The program stopped by signals, next to another one in its folder, on a full disk, without a home folder, under a strict umask,
run by a user whom the system does not know."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmark.raytune.run_full_benchmark import main
from benchmark.speed.fault_run import processes
from benchmark.storage.benchmark_records import Summary
from benchmark.storage.records import read_record

pytestmark = pytest.mark.long
PROGRAM = Path(__file__).parents[2] / "benchmark" / "raytune" / "run_full_benchmark.py"
SIZES = [
    "--search-max-requests",
    "1",
    "--search-max-context-length",
    "400",
    "--search-max-new-tokens",
    "2",
    "--num-samples",
    "4",
]
SIZES += ["--max-requests", "4", "--max-context-length", "400", "--max-new-tokens", "4"]
#: No folder of the user's: None = unset.
HOMELESS = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "SPARSE_ATTENTION_HUB_CACHE", "NUMBA_CACHE_DIR", "HF_HOME"))
#: The id of a user without an entry in /etc/passwd, as containers often have.
STRANGER = 54321
EMBEDDED = "embedded/SmolLM2-135M-Instruct"


def start(
    folder: Path, model: str, *more: str, umask: int = -1, before: Sequence[str] = (), **changes: str | None
) -> subprocess.Popen[str]:
    """The program in a folder. before: of the command; changes: of the environment; None = unset."""
    command = [*before, sys.executable, str(PROGRAM), "--models", model, "--tasks", "infinite_bench/passkey", *SIZES, *more]
    environment = {
        name: value for name, value in {**os.environ, "OMP_NUM_THREADS": "1", **changes}.items() if value is not None
    }
    folder.mkdir(exist_ok=True)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, umask=umask, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it printed to stderr)."""
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def answers(folder: Path) -> int:
    (table,) = folder.glob("benchmark_results/*/dense/*/raw_results.csv")
    with table.open(newline="") as rows:
        return sum(row["status"] == "ok" for row in csv.DictReader(rows))


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, model: str, *more: str) -> int:
    """The exit code of the same command in this process, without workers: where a process is not the point."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("benchmark.execution.runner.has_pebble", lambda: False)
        return main(["--models", model, "--tasks", "infinite_bench/passkey", *SIZES, *more])


MANY = ("--configs", "dense", "--max-requests", "60")


def answered(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("benchmark_results/*/.journals/*/*.jsonl"))


def start_and_wait(folder: Path, model: str) -> subprocess.Popen[str]:
    """The program after its first answer: without a home folder, and others may not read what it writes."""
    process = start(folder, model, *MANY, umask=0o077, **HOMELESS, PYTHONDONTWRITEBYTECODE="1")
    while not answered(folder):
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.timeout(240)
def test_a_second_program_and_a_signal(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second program in the folder ends in one line. Ctrl-C reaches the whole group: the workers finish their samples, the files
    are written, exit code 130. What others may not read stays so."""
    process = start_and_wait(tmp_path, tiny_model)
    os.killpg(process.pid, signal.SIGSTOP)
    capsys.readouterr()
    assert run_here(monkeypatch, tmp_path, tiny_model, *MANY) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "another run writes to benchmark_results" in errors
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    assert end(process)[0] == 130
    summary = read_record(tmp_path / "benchmark_results/benchmark_summary.json", Summary, "")
    samples = summary.results[0].samples
    assert summary.interrupted and not summary.failures and samples.ok == answered(tmp_path) and samples.missing > 0
    assert (tmp_path / "benchmark_results").stat().st_mode & 0o077 == 0
    assert run_here(monkeypatch, tmp_path, tiny_model, *MANY) == 0
    assert answers(tmp_path) == answered(tmp_path) == 60, "nothing is lost or answered again"


@pytest.mark.slow
def test_two_signals_end_the_program_now(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_and_wait(tmp_path, tiny_model)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    deadline = time.monotonic() + 10
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(tmp_path)
    assert run_here(monkeypatch, tmp_path, tiny_model, *MANY) == 0
    assert answers(tmp_path) == answered(tmp_path) == 60, "nothing is lost or answered again"


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A results folder on a disk of a few kilobytes."""
    folder = tmp_path / request.param
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", ["benchmark_results"], indirect=True)
def test_a_full_disk(
    tiny_model: str, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with a line that names the cause; with space, the same command completes it."""
    assert run_here(monkeypatch, tmp_path, tiny_model, "--configs", "dense") != 0
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "Traceback" not in errors, errors
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert run_here(monkeypatch, tmp_path, tiny_model, "--configs", "dense") == 0
    assert answers(tmp_path) == 4


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["benchmark_results", "optimal_configs", "ray_results"], indirect=True)
def test_a_full_disk_of_both_phases(tiny_model: str, tmp_path: Path, small_disk: Path) -> None:
    configs = ("--configs", "dense", "sink_local_10pct")
    code, errors = end(start(tmp_path, tiny_model, *configs))
    assert code != 0 and "No space left on device" in errors and "Traceback" not in errors, errors
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    code, errors = end(start(tmp_path, tiny_model, *configs))
    assert code == 0 and answers(tmp_path) == 4, errors


@pytest.mark.slow
def test_both_phases_with_a_home_folder_that_cannot_be_written(tiny_model: str, tmp_path: Path) -> None:
    homeless = HOMELESS | {"HOME": "/proc/nobody"}  # where nobody can write, root included
    code, errors = end(start(tmp_path, tiny_model, "--configs", "dense", "sink_local_25pct", **homeless))
    assert code == 0 and answers(tmp_path) == 4, errors


def stranger() -> list[str] | None:
    """What makes a command another user's; None where that cannot be done."""
    may_read = "-all,+dac_read_search"  # the interpreter may lie in root's own folder
    user = ["--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups"]
    before = ["setpriv", *user, "--inh-caps", may_read, "--ambient-caps", may_read]
    if shutil.which("setpriv") is None or subprocess.run([*before, "true"], capture_output=True).returncode:
        return None
    return before


@pytest.fixture
def as_stranger(tmp_path: Path) -> list[str]:
    """What to put before a command so that the stranger runs it, who may read every file and writes into tmp_path."""
    before = stranger()
    if before is None:
        pytest.skip("a program cannot be run as another user here: that takes root and setpriv")
    os.chown(tmp_path, STRANGER, STRANGER)
    return before


HOMES = [pytest.param(None, id="no HOME"), pytest.param("/", id="a read-only HOME", marks=pytest.mark.slow)]


@pytest.mark.parametrize("home", HOMES)
def test_a_user_whom_the_system_does_not_know(
    home: str | None, tiny_model: str, tmp_path: Path, as_stranger: list[str]
) -> None:
    deep = tmp_path / ("x" * 90)  # the path of a socket has at most 107 bytes
    deep.mkdir()
    os.chown(deep, STRANGER, STRANGER)
    nobody = HOMELESS | {"HOME": home, "USER": None, "LOGNAME": None, "TMPDIR": str(deep)}
    phases = (
        ("--phase", "1", "--num-samples", "1") if home is None else ()
    )  # without a place to keep compiled loops, each process takes seconds
    code, errors = end(
        start(tmp_path, tiny_model, *phases, "--configs", "dense", "sink_local_25pct", before=as_stranger, **nobody)
    )
    assert code == 0 and (phases or answers(tmp_path) == 4), errors
    assert len(list(tmp_path.glob("optimal_configs/run_*/*_sink_local_25pct.json"))) == 1
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {"optimal_configs", "benchmark_results", "ray_results", deep.name}, "no folder called ~"


STARTS = """
import ray
from benchmark.workers.ray_start import start_ray
assert start_ray("local", 1)
print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
ray.shutdown()
"""


def test_ray_starts_without_a_home_and_with_a_long_temporary_folder(tmp_path: Path) -> None:
    if stranger() is not None:
        pytest.skip("test_a_user_whom_the_system_does_not_know, which runs here, starts Ray so, too")
    long = tmp_path / ("x" * 90)
    long.mkdir(mode=0o777)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name not in ("HOME", "USER")}
    environment = kept | {
        "TMPDIR": str(long),
        "HOME": "/proc/nobody",
        "PYTHONPATH": str(PROGRAM.parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", STARTS], env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert "answer 42" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("home", HOMES)
def test_where_the_embedded_model_cannot_be_kept_a_line_names_the_variable(
    home: str | None, tmp_path: Path, as_stranger: list[str]
) -> None:
    nobody = HOMELESS | {"HOME": home, "USER": None, "LOGNAME": None}
    code, errors = end(start(tmp_path, EMBEDDED, "--debug", before=as_stranger, **nobody))
    assert code == 2 and errors.count("\n") == 1, errors
    assert "set SPARSE_ATTENTION_HUB_CACHE to a writable folder" in errors
    assert list(tmp_path.iterdir()) == []
