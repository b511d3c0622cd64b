"""A user's masker that misbehaves for some of its parameters: each of these trials is a failure record, the others and the other
studies of the same worker are not affected."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark.raytune.run_full_benchmark
import benchmark.search.evaluator
import benchmark.search.samples
from benchmark.search import limits, trainable
from benchmark.search.spec import StudySpec, StudyWork
from benchmark.search.trainable import StudyTrainable
from benchmark.search.trial import Level
from benchmark.settings import Settings
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
from tests.toy import ToyTask

TIMEOUT = 0.5
Fault = Callable[[AttentionInputs, Mask], Any]


@dataclass
class BadMaskerConfig(MaskerConfig):
    """Every stride-th key. fault: what happens at even strides."""

    stride: int
    fault: str

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"stride": IntUniform(2, 7)}


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
        models=(tiny_model,), tasks=("toy/count",), device="cpu", num_samples=6, search_timeout=TIMEOUT,
        search_max_requests=1, search_max_new_tokens=4, search_max_context_length=512,
    )  # fmt: skip

    def run(fault: str) -> dict[str, Any]:
        config = ResearchAttentionConfig([SinkMaskerConfig(2), BadMaskerConfig(3, fault)])
        spec = StudySpec(tiny_model, "toy/count", "bad", (Level("bad_50pct", 0.5, config),))
        results = tmp_path / fault
        work = StudyWork(spec, settings, fault, tmp_path / f"{fault}.jsonl", results, tmp_path / "traces")
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
    assert time.monotonic() - started < 20 * TIMEOUT
    trials = by_stride(found)
    assert len(trials) >= 4 and {stride % 2 for stride in trials} == {0, 1}
    for stride, trial in trials.items():
        if stride % 2:
            assert trial["status"] == "completed" and figures(trial).items() >= figures(before[stride]).items()
        elif fault != "return nan in the forward" or trial["rung"] > 1:
            assert trial["status"] == ("timeout" if fault in ("spin", "sleep") else "failed")
            assert SAID[fault] in trial["error_message"] and "\n" not in trial["error_message"]
            assert len(trial["error_message"]) < 600 and trial["score"] is None
    best = next(trial for trial in found["trials"] if trial["trial_id"] == found["best_trial_id"])
    assert best["status"] == "completed" and best["config"]["badmasker_stride"] % 2
    # The worker is as good as before.
    assert {stride: figures(trial) for stride, trial in by_stride(search("none")).items()} == {
        stride: figures(trial) for stride, trial in before.items()
    }


STUBBORN = """
from benchmark.search import limits
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


@pytest.mark.timeout(900)
def test_the_program_searches_the_others_to_their_end(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "bad_plugin.py").write_text(PLUGIN)
    command = [sys.executable, benchmark.raytune.run_full_benchmark.__file__, "--plugin", "bad_plugin.py", "--phase", "1"]
    command += ["--models", tiny_model, "--tasks", "infinite_bench/passkey", "--device", "cpu", "--num-samples", "2"]
    command += ["--configs", "sleeper_50pct", "killer_50pct", "sink_local_25pct", "--search-max-requests", "1"]
    command += ["--search-max-context-length", "400", "--search-max-new-tokens", "2", "--search-timeout", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {line.split(":")[0].split("_passkey_")[1]: line for line in done.stdout.splitlines() if line.startswith("FAILED ")}
    assert failed.keys() == {"sleeper", "killer"}
    assert "took longer than 5 s" in failed["sleeper"] and "die" in failed["killer"]
    (run,) = (tmp_path / "optimal_configs").iterdir()
    assert len(list(run.glob("*_sink_local_25pct*"))) == 3 and not list(run.glob("*sleeper*"))
