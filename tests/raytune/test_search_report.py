"""What a person sees of Phase 1 while it runs."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from benchmark.raytune.phases import SearchReport
from benchmark.search.spec import StudySpec
from benchmark.search.trial import Level
from benchmark.settings import Settings
from sparse_attention_hub import OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig

LEVEL = Level("top_k_10pct", 0.1, ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(0.1)]))


def progress(trials: int, known: int = 0) -> dict[str, Any]:
    counts = {"stage": "search", "trials": trials, "known": known, "failed": 0}
    return {**counts, "rungs": [trials, 6, 3, 3], "best": {"top_k_5pct": None, "top_k_10pct": 0.123}}


def report(*models: str, trials: int = 100) -> tuple[SearchReport, list[StudySpec]]:
    studies = [StudySpec(model, "t", "top_k", (LEVEL,)) for model in models]
    return SearchReport(studies, Settings(models=models, tasks=("t",), num_samples=trials)), studies


def test_models_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    told, (first, second) = report("one", "two")
    told("finished", first, progress(100))
    told._last_line = -10.0
    told("progress", second, progress(50))
    lines = capsys.readouterr().err.splitlines()
    assert "one t top_k" in lines[0] and "two t top_k" in lines[1]
    assert "[1/2 studies]" in lines[1] and "150 of 200 trials" in lines[1]
    assert "50 trials, rungs 50/6/3/3; best error 5pct none, 10pct 0.123" in lines[1]


def test_what_was_done_before_says_nothing_of_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    told, (first, second) = report("one", "two")
    told("reused", first, {"from": "run_x"})
    told._started = time.monotonic() - 60
    for trials, known in ((40, 40), (50, 40)):
        told._last_line = -10.0
        told("progress", second, progress(trials, known))
    lines = capsys.readouterr().err.splitlines()
    assert "min left" not in lines[1], "nothing was evaluated yet"
    assert "150 of 200 trials, about 5 min left" in lines[2], "ten trials a minute, fifty to go"


def test_the_size_of_traces_is_always_told(capsys: pytest.CaptureFixture[str]) -> None:
    told, (study,) = report("one")
    told("progress", study, {"stage": "loading"})
    told("progress", study, {"stage": "5 traces, 80 MB at most", "tell": True})
    assert "80 MB" in capsys.readouterr().err


def test_a_terminal_shows_rungs_and_the_best_of_every_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    told, (study,) = report("one")
    told("progress", study, progress(50))
    told.close()
    shown = capsys.readouterr().err
    assert "rungs 50/6/3/3; best error 5pct none, 10pct 0.123" in shown and "[0/1 studies] t top_k" in shown
