"""The script for a machine with a GPU runs to its end on the pretended one, at small sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from pretend import PretendedGPU
from torch import Tensor

from benchmark.speed import decode_step, gpu_acceptance, gpu_sections


def wall_seconds(step: Callable[[], object]) -> float:
    """In place of CUDA graphs."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def tensors(batch: int, keys: int, dtype: torch.dtype, device: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """In place of a generator on the device."""
    shapes = ((decode_step.HEADS, 1), (decode_step.KV_HEADS, keys), (decode_step.KV_HEADS, keys))
    made = [torch.randn(batch, heads, length, decode_step.DIM, dtype=dtype, device=device) for heads, length in shapes]
    return made[0], (made[1], made[2])


def run(arguments: list[str], patch: pytest.MonkeyPatch) -> int:
    gpu, make_model = PretendedGPU(), gpu_sections.make_model
    patch.setattr(gpu_sections, "make_model", lambda sizes: gpu.move(make_model(sizes)))
    patch.setattr(decode_step, "_gpu_seconds", wall_seconds)
    patch.setattr(decode_step, "tensors", tensors)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    with gpu:
        return gpu_acceptance.main(["--small", *arguments])


@pytest.mark.timeout(280)  # 40 s on a quiet machine
def test_it_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    code = run(["--out", str(out), "--json"], monkeypatch)
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    assert list(record["sections"]) == list(gpu_acceptance.LIMITS)
    assert {name: section["error"] for name, section in record["sections"].items() if section["error"]} == {}
    bounded = {*gpu_acceptance.AT_MOST, *gpu_acceptance.AT_LEAST} - {
        f"gpu_{keys}_shared_bandwidth_share" for keys in (32768, 65536)
    }
    assert bounded <= set(record["figures"])
    for name in ("kernels_worst_error_over_tolerance", "pipelines_that_differ", "faults_misjudged"):
        assert record["figures"][name] <= gpu_acceptance.AT_MOST[name]
    assert record["machine"]["gpu"] == "pretended GPU" and record["details"]["waits_of_a_step"]
    shown = json.loads(printed.out)
    assert set(shown) == {"figures", "goals", "machine"} and code == int(not all(goal["holds"] for goal in shown["goals"]))
    assert "faults_misjudged 0 at most 0 holds\n-- faults " in printed.err


def test_a_section_that_fails_is_recorded_and_the_next_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr(gpu_sections.Sections, "kernels", lambda self: 1 / 0)
    monkeypatch.setattr(gpu_sections.Sections, "waits", lambda self: time.sleep(5))
    monkeypatch.setitem(gpu_acceptance.LIMITS, "waits", 0.2)
    assert run(["--out", str(out), "--only", "kernels", "waits", "dense"], monkeypatch) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["kernels"]["error"] == "ZeroDivisionError: division by zero"
    assert sections["waits"]["error"] == "took longer than 0.2 s" and sections["dense"]["error"] is None


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main(["--out", str(tmp_path / "x.json")])
    assert ended.value.code == 2 and "there is no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
