"""A user's masker that misbehaves for some of its parameters: each of these trials, and in Phase 2 each of its samples, is a
failure record with the reason; other trials, studies and configurations of the same worker are not affected."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune

import benchmark.search.evaluator
import benchmark.search.samples
from benchmark.execution import worker
from benchmark.execution.jobs import BenchmarkUnit
from benchmark.execution.runner import run_benchmarks
from benchmark.raytune import run_full_benchmark
from benchmark.search import trainable
from benchmark.search.spec import StudySpec, StudyWork
from benchmark.search.trainable import StudyTrainable
from benchmark.search.trial import Level
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.tables import read_table
from benchmark.workers import limits
from sparse_attention_hub import (
    AttentionInputs,
    IntUniform,
    Mask,
    Masker,
    MaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    register_masker,
)
from tests.toy import ToyTask, toy_configs

TIMEOUT = 0.8
HANGS = ("spin", "sleep")
Fault = Callable[[AttentionInputs, Mask], Any]


@dataclass
class BadMaskerConfig(MaskerConfig):
    """Every stride-th key. fault: what happens at even strides."""

    stride: int
    fault: str

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"stride": IntUniform(2, 6)}


@register_masker(BadMaskerConfig)
class BadMasker(Masker[BadMaskerConfig]):
    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        every = inputs.key_positions[:, None, None, :] % self.config.stride == 0
        chosen = mask.union(inputs.mask(every & inputs.allowed))
        changed = FAULTS[self.config.fault](inputs, mask) if self.config.stride % 2 == 0 else None
        return changed if isinstance(changed, Mask) else chosen


def fail(inputs: AttentionInputs, mask: Mask) -> None:
    raise RuntimeError("no such kernel\n" + "x" * 10_000)


def return_nan(inputs: AttentionInputs, mask: Mask) -> Mask:
    return Mask.from_dense(torch.full(inputs.shape, float("nan")), kv_heads=inputs.kv_heads)


def return_nan_in_the_forward(inputs: AttentionInputs, mask: Mask) -> Mask | None:
    return return_nan(inputs, mask) if inputs.shape[2] == 1 else None


def spin(inputs: AttentionInputs, mask: Mask) -> None:
    while True:
        pass


def sleep(inputs: AttentionInputs, mask: Mask) -> None:
    time.sleep(1e6)


def change_lists(inputs: AttentionInputs, mask: Mask) -> None:
    mask.lists().indices.add_(1)


def change_flags(inputs: AttentionInputs, mask: Mask) -> None:
    mask.chosen().fill_(True)


def hoard_tensors(inputs: AttentionInputs, mask: Mask) -> None:
    kept = [torch.empty(0)]
    while True:
        kept.append(torch.empty(2**24))


def hoard_bytes(inputs: AttentionInputs, mask: Mask) -> None:
    kept = []
    while True:
        kept.append(bytes(2**26))


FAULTS: dict[str, Fault] = {
    name: globals()[name.replace(" ", "_")]
    for name in (
        "fail", "return nan", "return nan in the forward", "spin", "sleep", "change lists", "change flags", "hoard tensors",
        "hoard bytes",
    )
} | {"none": lambda inputs, mask: None}  # fmt: skip
SAID = {
    "fail": "RuntimeError: no such kernel xxx",
    "return nan": "BadMasker.select gives inclusion probabilities that are not in [0, 1]",
    "return nan in the forward": "BadMasker.select gives inclusion probabilities that are not in [0, 1]",
    "spin": f"took longer than {TIMEOUT:g} s",
    "sleep": f"took longer than {TIMEOUT:g} s",
    "change lists": "BadMasker.select changed the mask it was given",
    "change flags": "BadMasker.select changed the mask it was given",
    "hoard tensors": "RuntimeError: ",
    "hoard bytes": "MemoryError",
}


@pytest.fixture
def search(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Runs the study of a fault in this process, as a worker does; returns the content of its _trials.json."""
    for module in (benchmark.search.evaluator, benchmark.search.samples):
        monkeypatch.setattr(module, "get_task", lambda name: ToyTask())
    monkeypatch.setattr(limits, "free_memory", lambda device, workers: 250_000_000)
    monkeypatch.setattr(trainable, "_evaluators", {})
    settings = Settings(
        models=(tiny_model,), tasks=("toy/count",), device="cpu", num_samples=5,
        search_max_requests=1, search_max_new_tokens=4, search_max_context_length=512,
    )  # fmt: skip

    def run(fault: str) -> dict[str, Any]:
        config = ResearchAttentionConfig([SinkMaskerConfig(2), BadMaskerConfig(3, fault)])
        spec = StudySpec(tiny_model, "toy/count", "bad", (Level("bad_50pct", 0.5, config),))
        results = tmp_path / fault
        limited = replace(settings, search_timeout=TIMEOUT if fault in HANGS else 60.0)
        work = StudyWork(spec, limited, fault, tmp_path / f"{fault}.jsonl", results, tmp_path / "traces")
        worker = StudyTrainable.__new__(StudyTrainable)
        worker.setup({"study": "bad"}, {"bad": work})
        while not (ended := worker.step())["finished"]:
            pass
        assert ended["problem"] is None
        (path,) = results.glob("*_trials.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    return run


def by_stride(found: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {trial["config"]["badmasker_stride"]: trial for trial in found["trials"]}


def figures(trial: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {rung: (entry["error"], entry["density"]) for rung, entry in trial["figures"].items()}


@pytest.mark.parametrize("fault", SAID)
def test_trials_of_a_bad_masker_fail_alone(fault: str, search: Callable[[str], dict[str, Any]]) -> None:
    before = by_stride(search("none"))
    started = time.monotonic()
    found = search(fault)
    assert time.monotonic() - started < 20 * TIMEOUT or fault not in HANGS
    trials = by_stride(found)
    assert len(trials) >= 4 and {stride % 2 for stride in trials} == {0, 1}
    for stride, trial in trials.items():
        if stride % 2:
            assert trial["status"] == "completed" and figures(trial).items() >= figures(before[stride]).items()
        elif fault != "return nan in the forward" or trial["rung"] > 1:
            assert trial["status"] == ("timeout" if fault in HANGS else "failed")
            assert SAID[fault] in trial["error_message"] and "\n" not in trial["error_message"]
            assert len(trial["error_message"]) < 600 and trial["score"] is None
    best = next(trial for trial in found["trials"] if trial["trial_id"] == found["best_trial_id"])
    assert best["status"] == "completed" and best["config"]["badmasker_stride"] % 2
    # The worker is as good as before.
    assert {stride: figures(trial) for stride, trial in by_stride(search("none")).items()} == {
        stride: figures(trial) for stride, trial in before.items()
    }


Answers = dict[str, list[tuple[str, str, str]]]


def answers_beside(model: str, folder: Path, fault: str, timeout: float) -> tuple[Answers, set[str]]:
    """Benchmarks two strides of a masker with a fault, beside three configurations without: (configuration -> status, answer
    and density of its samples; the problems)."""
    bad = [ResearchAttentionConfig([SinkMaskerConfig(2), BadMaskerConfig(stride, fault)]) for stride in (2, 3)]
    configs = (*toy_configs(), *(SparseConfig(f"stride_{n}", config, ()) for n, config in enumerate(bad, 2)))
    settings = Settings(
        models=(model,), tasks=("toy/count",), device="cpu", max_new_tokens=8, max_requests=2, max_context_length=512,
        benchmark_timeout=timeout, benchmark_results_dir=folder / fault,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmark.execution.jobs.get_task", lambda name: ToyTask())
        patch.setattr(limits, "free_memory", lambda device, workers: 250_000_000)
        patch.setattr(worker, "SELECT_SECONDS", 0.0)
        summary = run_benchmarks([BenchmarkUnit(model, "toy/count", configs, {})], settings, in_process=True)
    tables = {row.configuration: read_table(folder / fault / row.folder / "raw_results.csv") for row in summary.results}
    answers = {
        name: [(line["status"], line["predicted_answer"], line["density"]) for line in table] for name, table in tables.items()
    }
    assert all(failure.configuration == "stride_2" for failure in summary.failures)
    return answers, {str(failure.problem) for failure in summary.failures}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    answers, problems = answers_beside(tiny_model, tmp_path_factory.mktemp("undisturbed"), "none", 600.0)
    assert problems == set() and [status for status, _, _ in answers["stride_2"]] == ["ok", "ok"]
    yield answers
    worker.forget_model()


@pytest.mark.parametrize("fault", SAID)
def test_samples_of_a_bad_masker_fail_alone(
    fault: str, undisturbed: Answers, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, misbehave, bound = [], FAULTS[fault], resource.getrlimit(resource.RLIMIT_DATA)

    def count(inputs: AttentionInputs, mask: Mask) -> Any:
        calls.append(fault)
        return misbehave(inputs, mask)

    monkeypatch.setitem(FAULTS, fault, count)
    hangs = fault in HANGS
    found, problems = answers_beside(tiny_model, tmp_path, fault, 20.0 if hangs else 600.0)  # everything is compiled by now
    assert found.pop("stride_2") == [("failed", "", "")] * 2
    assert found == {name: lines for name, lines in undisturbed.items() if name != "stride_2"}
    said = "TimeLimitError: BadMasker.select took longer than 2 s" if hangs else SAID[fault]
    assert problems and all(said in problem and "\n" not in problem and len(problem) <= 500 for problem in problems)
    assert len(calls) == 1 or not hangs, "what hung once is not called again"
    assert resource.getrlimit(resource.RLIMIT_DATA) == bound


STUBBORN = """
from benchmark.workers import limits
limits.GRACE = 0.2
with limits.time_limit(0.1):
    while True:
        try:
            while True:
                pass
        except Exception:
            print("caught", flush=True)
"""


def test_code_that_catches_everything_ends_with_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "caught\n" and "Timeout" in done.stderr


PLUGIN = """
import os, signal, time
from dataclasses import dataclass
from sparse_attention_hub import *

def make(name, fault):
    @dataclass
    class Config(MaskerConfig):
        pass

    class Bad(Masker):
        def select(self, inputs, mask):
            fault()
            return mask

    Config.__name__ = Config.__qualname__ = name
    globals()[name] = Config
    register_masker(Config)(Bad)
    return name.lower() + "_50pct", ResearchAttentionConfig([SinkMaskerConfig(2), Config()]), [SinkMaskerConfig, Config]

ENTRIES = [
    make("Sleeper", lambda: time.sleep(1e6)),  # Python can interrupt it
    make("Killer", lambda: os.kill(os.getpid(), signal.SIGKILL)),  # as the kernel does where memory ends
]

def get_all_sparse_configs():
    return ENTRIES
"""


@pytest.mark.long
@pytest.mark.usefixtures("undisturbed")  # loops are compiled by then, which may take longer than a trial has here
def test_the_program_searches_the_others_to_their_end(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):  # real files, which Ray can pickle
        monkeypatch.setattr(sys, name, (tmp_path / name).open("w"))
    (tmp_path / "bad_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # to which --plugin adds its folder
    retries = tune.FailureConfig
    monkeypatch.setattr(tune, "FailureConfig", lambda max_failures: retries(max_failures=0))  # a start takes seconds
    command = ["--plugin", "bad_plugin.py", "--phase", "1", "--models", tiny_model, "--tasks", "infinite_bench/passkey"]
    command += ["--configs", "sleeper_50pct", "killer_50pct", "sink_local_25pct", "--device", "cpu", "--num-samples", "1"]
    command += ["--search-max-requests", "1", "--search-max-context-length", "400", "--search-max-new-tokens", "2"]
    code = run_full_benchmark.main([*command, "--search-timeout", "20"])
    sys.stdout.flush(), sys.stderr.flush()
    printed = (tmp_path / "stdout").read_text()
    assert code == 1, printed + (tmp_path / "stderr").read_text()
    failed = {line.split(":")[0].split("_passkey_")[1]: line for line in printed.splitlines() if line.startswith("FAILED ")}
    assert failed.keys() == {"sleeper", "killer"}, failed
    assert "took longer than 20 s" in failed["sleeper"] and "die" in failed["killer"]
    (run,) = (tmp_path / "optimal_configs").iterdir()
    assert len(list(run.glob("*_sink_local_25pct*"))) == 3 and not list(run.glob("*sleeper*"))
