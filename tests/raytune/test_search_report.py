"""Progress of Phase 1."""

from __future__ import annotations

import sys

import pytest

from benchmark.raytune.phases import SearchReport
from benchmark.search.spec import StudySpec
from benchmark.search.trial import Level, Progress
from benchmark.settings import Settings
from sparse_attention_hub import OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig

LEVEL = Level("top_k_10pct", 0.1, ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(0.1)]))


def progress(trials: int, known: int = 0) -> Progress:
    best = {"top_k_5pct": None, "top_k_10pct": 0.123}
    return Progress("search", trials, known, rungs=(trials, 6, 3, 3), best=best)


def report(*models: str, trials: int = 100) -> tuple[SearchReport, list[StudySpec]]:
    studies = [StudySpec(model, "t", "top_k", (LEVEL,)) for model in models]
    return SearchReport(studies, Settings(models=models, tasks=("t",), num_samples=trials)), studies


def test_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    shown, (first, second) = report("one", "two")
    shown.finished(first, progress(100))
    shown.bar._due = 0.0
    shown.progress(second, progress(50))
    lines = capsys.readouterr().err.splitlines()
    assert "1 of 2 studies one t top_k: 100 trials" in lines[0]
    assert "150/200 trials" in lines[-1] and "1 of 2 studies two t top_k; 50 trials" in lines[-1]
    assert "rungs 50/6/3/3; best error 5pct none, 10pct 0.123" in lines[-1]


def test_reused_trials_do_not_count_for_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    shown, (first, second) = report("one", "two")
    shown.reused(first, "run_x")
    shown.bar._bar.start_t -= 60
    for trials, known in ((40, 40), (50, 40)):
        shown.bar._due = 0.0
        shown.progress(second, progress(trials, known))
    lines = capsys.readouterr().err.splitlines()
    assert "copied from run_x" in lines[0]
    assert "140/200 trials [" in lines[-2], "nothing was evaluated yet"
    assert "150/200 trials" in lines[-1] and "05:0" in lines[-1], "ten trials per minute, fifty to go"


def test_the_size_of_traces_is_always_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown, (study,) = report("one")
    shown.progress(study, Progress("loading"))
    shown.progress(study, Progress("5 traces, at most 80 MB", announce=True))
    assert "80 MB" in capsys.readouterr().err


def test_a_failed_study_needs_no_more_trials(capsys: pytest.CaptureFixture[str]) -> None:
    shown, (study,) = report("one")
    shown.failed(study, "its worker died")
    printed = capsys.readouterr().err
    assert "1 of 1 studies t top_k: FAILED, its worker died" in printed and "100/100 trials" in printed


def test_a_terminal_shows_rungs_and_the_best_of_every_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    shown, (study,) = report("one")
    shown.progress(study, progress(50))
    shown.bar.close()
    printed = capsys.readouterr().err
    assert "rungs 50/6/3/3; best error 5pct none, 10pct 0.123" in printed and "0 of 1 studies t top_k" in printed
