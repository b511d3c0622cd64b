"""The program stopped by signals, next to another one in its folder, on a full disk, without a home folder, under a strict umask."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.speed.fault_run import processes
from benchmark.storage.benchmark_records import Summary
from benchmark.storage.records import read_record

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


def start(folder: Path, model: str, *more: str, umask: int = -1, **changes: str | None) -> subprocess.Popen[str]:
    """The program in a folder. changes: of the environment; None = unset."""
    command = [sys.executable, str(PROGRAM), "--models", model, "--tasks", "infinite_bench/passkey", *SIZES, *more]
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


def test_the_second_program_in_a_folder_ends_in_one_line(tiny_model: str, tmp_path: Path) -> None:
    first = start(tmp_path, tiny_model, "--configs", "dense")
    while not (tmp_path / "benchmark_results/.lock").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    code, errors = end(start(tmp_path, tiny_model, "--configs", "dense"))
    assert code == 2 and errors.count("\n") == 1 and "another run writes to benchmark_results" in errors
    first.send_signal(signal.SIGCONT)
    assert end(first)[0] == 0 and answers(tmp_path) == 4


@pytest.mark.timeout(240)
def test_signals_end_a_run_in_order_or_at_once(tiny_model: str, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group: the workers finish their samples, the files are written, exit code 130. Twice: now."""

    def answered() -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("benchmark_results/*/.journals/*/*.jsonl"))

    def start_and_wait() -> subprocess.Popen[str]:
        before = answered()
        process = start(tmp_path, tiny_model, "--configs", "dense", "--max-requests", "100")
        while answered() == before:
            assert process.poll() is None
            time.sleep(0.02)
        return process

    process = start_and_wait()
    os.killpg(process.pid, signal.SIGINT)
    assert end(process)[0] == 130
    summary = read_record(tmp_path / "benchmark_results/benchmark_summary.json", Summary, "")
    samples = summary.results[0].samples
    assert summary.interrupted and not summary.failures and samples.ok == answered() and samples.missing > 0

    process = start_and_wait()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    deadline = time.monotonic() + 10
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(tmp_path)

    assert end(start(tmp_path, tiny_model, "--configs", "dense", "--max-requests", "100"))[0] == 0
    assert answers(tmp_path) == answered() == 100, "nothing is lost or answered again"


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


@pytest.mark.parametrize(
    ("small_disk", "configs"),
    [
        ("benchmark_results", ["dense"]),
        pytest.param("optimal_configs", ["sink_local_10pct"], marks=pytest.mark.slow),
        pytest.param(
            "ray_results",
            ["sink_local_10pct"],
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["small_disk"],
)
def test_a_full_disk(tiny_model: str, tmp_path: Path, small_disk: Path, configs: list[str]) -> None:
    """The run ends with a line that names the cause; with space, the same command completes it."""
    code, errors = end(start(tmp_path, tiny_model, "--configs", "dense", *configs))
    assert code != 0 and "No space left on device" in errors and "Traceback" not in errors, errors
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    code, errors = end(start(tmp_path, tiny_model, "--configs", "dense", *configs))
    assert code == 0 and answers(tmp_path) == 4, errors


def test_without_a_home_folder_and_with_a_strict_umask(tiny_model: str, tmp_path: Path) -> None:
    """Results that others may not read stay unreadable for them."""
    process = start(tmp_path, tiny_model, "--configs", "dense", umask=0o077, **HOMELESS, PYTHONDONTWRITEBYTECODE="1")
    code, errors = end(process)
    assert code == 0 and answers(tmp_path) == 4, errors
    assert (tmp_path / "benchmark_results").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_both_phases_with_a_home_folder_that_cannot_be_written(tiny_model: str, tmp_path: Path) -> None:
    homeless = HOMELESS | {"HOME": "/proc/nobody"}  # where nobody can write, root included
    code, errors = end(start(tmp_path, tiny_model, "--configs", "dense", "sink_local_25pct", **homeless))
    assert code == 0 and answers(tmp_path) == 4, errors
