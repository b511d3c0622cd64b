"""The script that holds the cost formula against measured steps, on small sizes: its record and its goals."""

from __future__ import annotations

import json

from benchmark.speed.cost_model import DENSITIES, main


def test_record(capsys):
    code = main(["--json", "--rounds", "1", "--lengths", "512", "1024"])
    record = json.loads(capsys.readouterr().out)
    assert all(value > 0 for value in record["figures"].values())
    expected = {"call_us", "gb_per_s_in_cache", "512_2%_gb_per_s", "512_dense_ms", "1024_50%_predicted_over_measured"}
    assert expected <= set(record["figures"])
    assert len(record["goals"]) == 2 * 2 * (len(DENSITIES) + 1), "at least and at most, of each step at each length"
    assert code == (0 if all(goal["holds"] for goal in record["goals"]) else 1)
