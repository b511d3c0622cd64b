"""The script that times maskers: its JSON record, and the density of each method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.speed.masker_speed import DENSITY, run

SCRIPT = Path(__file__).parents[2] / "benchmark" / "speed" / "masker_speed.py"


def test_json(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--keys", "8192", "--repeats", "1", "--only", "quest", "magic_pig", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    record = json.loads(done.stdout)
    assert {"dense_ms", "quest_ms", "quest_ratio_to_dense", "quest_kv_fraction", "magic_pig_ms"} <= set(record["figures"])
    (goal,) = record["goals"]
    assert goal["name"] == "quest_ratio_to_dense" and goal["at_most"] == 0.3
    assert done.returncode == (0 if goal["holds"] else 1) and record["machine"]["threads"] == 1


@pytest.mark.parametrize(
    "method",
    [
        *("sink_local", "random_sampling", "quest", "double_sparsity", "hash_attention", "pq_cache"),
        *("landmarks", "sparq", "loki", "clusters", "snap_kv"),
    ],
)
def test_methods_are_measured_at_the_density_they_are_compared_at(method: str) -> None:
    assert run(8192, 1, [method])[f"{method}_density"] == pytest.approx(DENSITY, abs=0.005)
