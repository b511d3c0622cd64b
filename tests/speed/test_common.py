"""What the speed scripts share: the report, and parts in new processes."""

from __future__ import annotations

import json
import os

import pytest

from benchmark.speed.common import in_process, report


def test_goals_are_checked_on_exact_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ratio": 1.99996, "errors": 0.0, "seconds": 3.0}
    code = report(figures, True, at_least={"ratio": 2.0, "not_measured": 1.0}, at_most={"errors": 0}, precision=".3g")
    record = json.loads(capsys.readouterr().out)
    assert code == 1 and record["figures"] == {"ratio": 2.0, "errors": 0.0, "seconds": 3.0}
    assert record["goals"] == [
        {"name": "ratio", "value": 1.99996, "at_least": 2.0, "holds": False},
        {"name": "errors", "value": 0.0, "at_most": 0, "holds": True},
    ]
    assert report(figures, False, at_least={}, at_most={"errors": 0}) == 0
    assert "holds errors 0, at most 0" in capsys.readouterr().out


def test_a_part_in_a_new_process() -> None:
    process, seconds = in_process(os.getpid)
    assert process != os.getpid() and seconds > 0
