"""The study: ladder, budgets, journal, recovery; on an evaluator whose figures are a formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.raytune.optimizer_factory import CombinationSpace, nearest, parameter_name
from benchmark.raytune.study import Evaluation, Level, Study, TrialTimeout, objective_value
from benchmark.results import Journal
from sparse_attention_hub import (
    Choice,
    LocalMaskerConfig,
    OracleTopKConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    Uniform,
)


class FormulaEvaluator:
    """Density is what the sizes add up to, error falls with it; `worst` scores 0, the rest 1."""

    key = "formula"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation]:
        self.calls.append((rung, len(configs)))
        return [self.figures(config, rung) for config in configs]

    def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
        sink, local, heavy = config.masker_configs
        density = min(1.0, sink.sink_size + local.window_size + heavy.heavy_size)
        error = 0.3 * (0.02 / heavy.heavy_size) ** 0.5 + local.window_size
        score = 1.0 if rung == 3 else None
        return Evaluation(error, density, 0.01, 0.5 + density, score, [score] * 8 if score else None)


def template(heavy: float) -> ResearchAttentionConfig:
    return ResearchAttentionConfig([SinkMaskerConfig(0.01), LocalMaskerConfig(0.01), OracleTopKConfig(heavy)])


def levels(*budgets: int) -> list[Level]:
    return [Level(f"sink_local_oracle_top_k_{b}pct", b / 100, template(b / 100 - 0.02)) for b in budgets]


def make_study(path: Path, evaluator: FormulaEvaluator, budgets: tuple[int, ...] = (5, 10), **changes: object) -> Study:
    found = levels(*budgets)
    options = {"num_samples": 16, "timeout": 60.0, "seed": 0, **changes}
    return Study(CombinationSpace(found[0].template, "task"), found, evaluator, Journal(path), **options)  # type: ignore[arg-type]


def run(study: Study) -> Study:
    for _ in study.run():
        pass
    return study


def test_templates_are_tried_first_and_every_level_finds_its_best(tmp_path: Path) -> None:
    study = run(make_study(tmp_path / "j", FormulaEvaluator()))
    heavy = [trial.params["oracletopk_heavy_size"] for trial in study.trials[:2]]
    assert heavy == pytest.approx([0.03, 0.08])
    for best in study.best():
        trial = study.trials[best.trial]
        assert best.meets_budget and best.confirmed
        assert trial.last.density <= best.budget
        assert trial.reached == 3
        others = [t.last.error for t in study.trials if 3 in t.rungs and t.last.density <= best.budget]
        assert trial.last.error == min(others)


def test_the_ladder_narrows(tmp_path: Path) -> None:
    evaluator = FormulaEvaluator()
    study = run(make_study(tmp_path / "j", evaluator, num_samples=50))
    counts = study.progress("")["rungs"]
    assert counts[0] <= 100 and counts[1] <= max(6, counts[0] / 10 + 1) and counts[2] == counts[3] <= 6
    assert all(size <= 8 for _, size in evaluator.calls)
    assert {trial.pruned_at for trial in study.trials} <= {None, 0, 1}


def test_a_study_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = run(make_study(tmp_path / "whole", FormulaEvaluator()))
    steps = make_study(tmp_path / "cut", FormulaEvaluator()).run()
    next(steps), next(steps)
    steps.close()
    journalled = len(Journal(tmp_path / "cut").read())
    with (tmp_path / "cut").open("ab") as stream:
        stream.write(b'{"key": "torn')  # the kill hit the middle of a line
    again = FormulaEvaluator()
    resumed = run(make_study(tmp_path / "cut", again))
    assert sum(size for _, size in again.calls) == resumed.evaluated
    assert resumed.evaluated + journalled == whole.evaluated
    assert [(t.params, t.rungs) for t in resumed.trials] == [(t.params, t.rungs) for t in whole.trials]
    assert resumed.best() == whole.best()
    silent = FormulaEvaluator()
    assert run(make_study(tmp_path / "cut", silent)).best() == whole.best() and silent.calls == []


def test_a_failing_configuration_fails_alone_and_is_never_a_result(tmp_path: Path) -> None:
    class Failing(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if config.masker_configs[2].heavy_size < 0.05:
                raise RuntimeError("no such kernel")
            return super().figures(config, rung)

    study = run(make_study(tmp_path / "j", Failing()))
    failed = [trial for trial in study.trials if trial.status == "failed"]
    assert failed and all("no such kernel" in (trial.error_message or "") for trial in failed)
    assert all(not trial.rungs for trial in failed)
    assert all(study.trials[best.trial].status == "completed" for best in study.best())


def test_not_a_number_is_a_failure(tmp_path: Path) -> None:
    class Broken(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return Evaluation(float("nan"), 0.1, 0.0)

    study = run(make_study(tmp_path / "j", Broken()))
    assert {trial.status for trial in study.trials} == {"failed"} and study.best() == []


def test_a_slow_trial_is_recorded_as_timed_out(tmp_path: Path) -> None:
    class Slow(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if config.masker_configs[2].heavy_size > 0.2:
                raise TrialTimeout("took longer than 1 s (--search-timeout)")
            return super().figures(config, rung)

    study = run(make_study(tmp_path / "j", Slow(), (5, 50)))
    assert {"timeout", "completed"} == {trial.status for trial in study.trials}


def test_a_budget_that_nothing_meets_reports_the_closest_and_says_so(tmp_path: Path) -> None:
    class Dense(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return Evaluation(0.1, 0.3 + config.masker_configs[2].heavy_size, 0.0)

    study = run(make_study(tmp_path / "j", Dense(), (5,)))
    (best,) = study.best()
    assert not best.meets_budget
    confirmed = [trial.last.density for trial in study.trials if 3 in trial.rungs]
    assert study.trials[best.trial].last.density == min(confirmed)


def test_a_higher_rung_that_measures_a_little_more_density_leaves_someone_within_the_budget(tmp_path: Path) -> None:
    class Creeping(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            return Evaluation(found.error, found.density * 1.003, 0.0, None, found.score, found.sample_scores)

    class Grid(Creeping):
        """Densities in steps of a hundredth: the template lies exactly on the budget."""

        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            return Evaluation(
                found.error, found.density / (1.003 if rung < 2 else 1.0), 0.0, None, found.score, found.sample_scores
            )

    study = run(make_study(tmp_path / "j", Grid(), (5, 10, 25, 50), num_samples=16))
    assert all(best.meets_budget for best in study.best())


def test_significantly_worse_scores_lose_against_a_larger_error(tmp_path: Path) -> None:
    class Tempting(FormulaEvaluator):
        """The smallest error answers everything wrong."""

        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            if rung == 3 and config.masker_configs[1].window_size < 0.009:
                return Evaluation(found.error, found.density, 0.0, None, 0.0, [0.0] * 8)
            return found

    study = run(make_study(tmp_path / "j", Tempting(), (10,)))
    (best,) = study.best()
    scored = [trial for trial in study.trials if 3 in trial.rungs and trial.last.density <= 0.1]
    if any(trial.rungs[3].score == 1.0 for trial in scored):
        assert study.trials[best.trial].rungs[3].score == 1.0


def test_without_a_budget_the_objective_decides(tmp_path: Path) -> None:
    found = [Level("sink_local_oracle_top_k", None, template(0.05))]
    study = Study(
        CombinationSpace(found[0].template, "task"), found, FormulaEvaluator(), Journal(tmp_path / "j"),
        num_samples=24, timeout=60, seed=1, objective="sparsity_10",
    )  # fmt: skip
    run(study)
    (best,) = study.best()
    confirmed = [t for t in study.trials if 3 in t.rungs]
    assert study.trials[best.trial] is min(confirmed, key=lambda t: objective_value("sparsity_10", t.last))


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (Choice([1, 2, 4]), 3.4, 4),
        (Choice(["a", "b"]), "b", "b"),
        (Choice(["a", "b"]), "c", "a"),
        (Uniform(0.1, 0.9), 2.0, 0.9),
        (Uniform(0.1, 0.9), 128, pytest.approx(0.3)),
    ],
)
def test_templates_are_held_to_the_space(domain: object, value: object, expected: object) -> None:
    assert nearest(domain, value) == expected


def test_parameter_names() -> None:
    assert parameter_name(OracleTopKConfig, "heavy_size") == "oracletopk_heavy_size"
    assert parameter_name(SinkMaskerConfig, "sink_size") == "sinkmasker_sink_size"
