"""The speed script on small sizes: its record, and what it leaves out without a GPU."""

from __future__ import annotations

import json
import re

import torch

from benchmark.speed.kernel_speed import main


def test_record(capsys):
    code = main(["--json", "--rounds", "2", "--cpu-keys", "512", "--gpu-keys", "4096", "--batch", "1"])
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"figures", "goals", "machine"}
    assert code == (0 if all(goal["holds"] for goal in record["goals"]) else 1)
    assert all(value > 0 for value in record["figures"].values())
    assert {"cpu_dense_sdpa_ms", "cpu_own_5%_ms", "cpu_own_5%_speedup", "cpu_shared_25%_speedup"} <= set(record["figures"])
    assert any(name.startswith("gpu") for name in record["figures"]) == torch.cuda.is_available()
    assert ("gpu" in record["machine"]) == torch.cuda.is_available()


def test_table(capsys):
    main(["--rounds", "1", "--cpu-keys", "256", "--gpu-keys"])
    out = capsys.readouterr().out
    assert re.search(r"^(holds|FAILS) cpu_shared_5%_speedup [\d.]+, at least 7$", out, re.MULTILINE)
