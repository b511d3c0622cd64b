"""The study: rungs, budgets, journal, recovery; on an evaluator whose figures are a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from benchmark.search.space import CombinationSpace, nearest, parameter_name
from benchmark.search.study import Study
from benchmark.search.trial import Level, objective_value
from benchmark.storage.results import Journal
from benchmark.storage.search_records import Evaluation
from benchmark.workers.errors import BrokenDeviceError
from benchmark.workers.limits import TimeLimitError
from sparse_attention_hub import (
    Choice,
    LocalMaskerConfig,
    OracleTopKConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    Uniform,
)
from sparse_attention_hub.errors import UserError


def evaluation(error: float | None, density: float, seconds: float = 0.0, **more: Any) -> Evaluation:
    return Evaluation(error=error, density=density, seconds=seconds, **more)


class FormulaEvaluator:
    """Density is the sum of the sizes; the error falls with the top-k and grows with the window; every score is 1."""

    key = "formula"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        self.calls.append((rung, len(configs)))
        return [self.figures(config, rung) for config in configs]

    def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
        sink, local, heavy = config.masker_configs
        density = min(1.0, sink.sink_size + local.window_size + heavy.heavy_size)
        error = 0.3 * (0.02 / heavy.heavy_size) ** 0.5 + local.window_size
        score = 1.0 if rung == 3 else None
        return evaluation(
            error, density, 0.01, kv_fraction=0.5 + density, score=score, sample_scores=[score] * 8 if score else None
        )


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
    counts = study.progress("").rungs
    assert counts[0] <= 100 and counts[1] <= max(6, counts[0] / 10 + 1) and counts[2] == counts[3] <= 6
    assert all(size <= (32 if rung == 1 else 8) for rung, size in evaluator.calls)
    assert {trial.pruned_at for trial in study.trials} <= {None, 0, 1}


def test_a_trial_that_is_much_better_than_all_others_is_promoted_alone(tmp_path: Path) -> None:
    class Steep(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            error = 0.01 if config == template(0.07) else 1.0
            return evaluation(error, found.density, score=found.score, sample_scores=found.sample_scores)

    study = make_study(tmp_path / "j", Steep(), (10,))
    study.levels = [Level("sink_local_oracle_top_k_10pct", 0.1, template(0.07))]
    assert run(study).progress("").rungs[1:] == (1, 1, 1)


def test_a_stopped_study_resumes_and_ends_the_same(tmp_path: Path) -> None:
    evaluator = FormulaEvaluator()
    whole = run(make_study(tmp_path / "whole", evaluator))
    steps = make_study(tmp_path / "cut", FormulaEvaluator()).run()
    next(steps), next(steps)
    steps.close()
    journalled = sum(len(line["evaluations"]) for line in Journal(tmp_path / "cut").read())
    with (tmp_path / "cut").open("ab") as stream:
        stream.write(b'{"key": "torn')  # the kill hit the middle of a line
    again = FormulaEvaluator()
    resumed = run(make_study(tmp_path / "cut", again))
    assert sum(size for _, size in again.calls) + journalled == sum(size for _, size in evaluator.calls)
    assert resumed.known_trials == journalled and resumed.known_seconds == pytest.approx(0.01 * journalled)
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


@pytest.mark.parametrize("fault", [MemoryError("no room"), RuntimeError("CUDA out of memory. Tried"), OSError("disk gone")])
def test_a_transient_failure_is_retried_on_the_next_start(tmp_path: Path, fault: Exception) -> None:
    class Short(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if rung == 2:
                raise fault
            return super().figures(config, rung)

    study = run(make_study(tmp_path / "j", Short()))
    failed = [trial for trial in study.trials if trial.status == "failed"]
    assert failed and all(trial.transient for trial in failed)
    healthy = FormulaEvaluator()
    again = run(make_study(tmp_path / "j", healthy))
    assert {rung for rung, _ in healthy.calls} == {2, 3} and all(best.confirmed for best in again.best())


def test_a_failure_that_repeats_counts_against_the_configuration(tmp_path: Path) -> None:
    class Large(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if rung == 2:
                raise MemoryError("no room")
            return super().figures(config, rung)

    first, second = (run(make_study(tmp_path / "j", Large())) for _ in range(2))
    assert any(trial.transient for trial in first.trials) and not any(trial.transient for trial in second.trials)
    silent = FormulaEvaluator()
    third = run(make_study(tmp_path / "j", silent))
    assert silent.calls == [] and third.best() == second.best()


def test_a_broken_device_ends_the_study_and_fails_no_trial(tmp_path: Path) -> None:
    class Broken(FormulaEvaluator):
        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(BrokenDeviceError):
        run(make_study(tmp_path / "j", Broken()))
    assert all("evaluations" not in line for line in Journal(tmp_path / "j").read())
    study = run(make_study(tmp_path / "j", FormulaEvaluator()))  # a sound device
    assert {trial.status for trial in study.trials} == {"completed"}


def test_a_configuration_that_breaks_devices_is_found_and_fails_alone(tmp_path: Path) -> None:
    class Breaking(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if config.masker_configs[2].heavy_size == pytest.approx(0.03):
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().figures(config, rung)

    for _ in range(2):  # in the batch, then alone; Ray starts a fresh worker each time
        with pytest.raises(BrokenDeviceError):
            run(make_study(tmp_path / "j", Breaking()))
    study = run(make_study(tmp_path / "j", Breaking()))
    (failed,) = [trial for trial in study.trials if trial.status == "failed"]
    assert failed.number == 0 and "broke its device" in (failed.error_message or "") and study.best()


def test_not_a_number_is_a_failure(tmp_path: Path) -> None:
    class Broken(FormulaEvaluator):
        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
            return [None] * len(configs)

    study = run(make_study(tmp_path / "j", Broken()))
    assert {trial.status for trial in study.trials} == {"failed"} and study.best() == []
    assert "not a number on rung 0" in (study.trials[0].error_message or "")


def test_a_slow_trial_is_recorded_as_timed_out(tmp_path: Path) -> None:
    class Slow(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            if config.masker_configs[2].heavy_size > 0.2:
                raise TimeLimitError("took longer than 1 s (--search-timeout)")
            return super().figures(config, rung)

    study = run(make_study(tmp_path / "j", Slow(), (5, 50)))
    assert {"timeout", "completed"} == {trial.status for trial in study.trials}


def test_the_limit_bounds_a_trial_over_all_its_rungs(tmp_path: Path) -> None:
    class Timed(FormulaEvaluator):
        limits: list[tuple[int, int, float]] = []

        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
            self.limits.append((rung, len(configs), timeout))
            found = super().evaluate(configs, rung, timeout)
            return [entry and entry.model_copy(update={"seconds": 4.0}) for entry in found]

    study = run(make_study(tmp_path / "j", Timed(), (10,), timeout=10.0))
    assert {limit for rung, _, limit in Timed.limits if rung == 0} == {10.0}
    assert {limit for rung, _, limit in Timed.limits if rung == 2} == {2.0}
    late = [trial for trial in study.trials if trial.status == "timeout"]
    assert late and all(
        trial.reached == 1 and "longer than 10 s over its rungs" in (trial.error_message or "") for trial in late
    )
    assert not any(rung == 3 for rung, _, _ in Timed.limits)
    # With a higher limit they are tried again; what was measured is not.
    Timed.limits = []
    again = run(make_study(tmp_path / "j", Timed(), (10,), timeout=100.0))
    assert {rung for rung, _, _ in Timed.limits} == {2, 3} and again.best()[0].confirmed


def test_a_journal_that_cannot_be_written_stops_the_study_at_once(tmp_path: Path) -> None:
    class Full(Journal):
        left = 1

        def append(self, record: dict[str, Any]) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError("no space left on device")
            super().append(record)

    evaluator = FormulaEvaluator()
    study = make_study(tmp_path / "j", evaluator)
    study.journal = Full(tmp_path / "j")
    with pytest.raises(OSError, match="no space"):
        run(study)
    assert evaluator.calls == [(0, 8), (0, 8)], "what was written is not evaluated again"
    assert len(Journal(tmp_path / "j").read()) == 1, "a line holds what was evaluated together"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rung": "1"}, "field evaluations.0.rung: .*got '1'"),
        ({"limit": None, "transient": 3}, "field evaluations.0.transient"),
        (
            {"evaluation": {"error": float("nan"), "density": 0.1, "seconds": 0.1}},
            "field evaluations.0.evaluation.error: .*nan",
        ),
        ({"evaluation": {"error": 0.1}}, "field evaluations.0.evaluation.density: Field required"),
    ],
)
def test_a_damaged_journal_line_is_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    run(make_study(tmp_path / "j", FormulaEvaluator()))
    first, *others = (tmp_path / "j").read_text().splitlines(keepends=True)
    line = json.loads(others[0])
    line["evaluations"][0] |= change
    (tmp_path / "j").write_text("".join([first, json.dumps(line) + "\n", *others[1:]]))
    with pytest.raises(UserError, match=f"j, line 2: {problem}.*; remove the file") as raised:
        run(make_study(tmp_path / "j", FormulaEvaluator()))
    assert "\n" not in str(raised.value)


def test_another_objective_or_number_of_trials_reads_the_same_journal(tmp_path: Path) -> None:
    run(make_study(tmp_path / "j", FormulaEvaluator(), num_samples=40))
    silent = FormulaEvaluator()
    other = run(make_study(tmp_path / "j", silent, num_samples=40, objective="sparsity_5"))
    assert silent.calls == [] and other.best()
    more = FormulaEvaluator()
    longer = run(make_study(tmp_path / "j", more, num_samples=50))
    assert sum(size for rung, size in more.calls if rung == 0) <= len(longer.trials) - 80


def test_a_budget_that_nothing_meets_reports_the_closest_and_says_so(tmp_path: Path) -> None:
    class Dense(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return evaluation(0.1, 0.3 + config.masker_configs[2].heavy_size)

    study = run(make_study(tmp_path / "j", Dense(), (5,)))
    (best,) = study.best()
    assert not best.meets_budget
    confirmed = [trial.last.density for trial in study.trials if 3 in trial.rungs]
    assert study.trials[best.trial].last.density == min(confirmed)


def test_a_higher_rung_that_measures_a_little_more_density_leaves_someone_within_the_budget(tmp_path: Path) -> None:
    class Creeping(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            return evaluation(found.error, found.density * 1.003, score=found.score, sample_scores=found.sample_scores)

    class Grid(Creeping):
        """Densities in steps of a hundredth: the template lies exactly on the budget."""

        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            density = found.density / (1.003 if rung < 2 else 1.0)
            return evaluation(found.error, density, score=found.score, sample_scores=found.sample_scores)

    study = run(make_study(tmp_path / "j", Grid(), (5, 10, 25, 50), num_samples=16))
    assert all(best.meets_budget for best in study.best())


class Drifting(FormulaEvaluator):
    """From the forced forward on, density is higher by a factor; error falls slowly, so that sparser finalists are no match."""

    drift = 1.03

    def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
        sink, local, heavy = config.masker_configs
        density = sink.sink_size + local.window_size + heavy.heavy_size
        scored: dict[str, Any] = {"score": 1.0, "sample_scores": [1.0]} if rung == 3 else {}
        error = 1.0 - heavy.heavy_size - 0.1 * local.window_size
        return evaluation(error, min(1.0, density * (self.drift if rung >= 2 else 1.0)), 0.1, **scored)


@pytest.mark.parametrize("drift", [1.0, 1.01, 1.03, 1.1])
def test_a_level_that_loses_its_finalists_confirms_others(tmp_path: Path, drift: float) -> None:
    evaluator = Drifting()
    evaluator.drift = drift
    study = run(make_study(tmp_path / "j", evaluator, (5, 10, 25, 50), num_samples=50))
    for best in study.best():
        assert best.meets_budget and best.confirmed and best.budget is not None
        fits = [t.rungs[0].error for t in study.trials if 0 in t.rungs and t.rungs[0].density * drift <= best.budget]
        assert study.trials[best.trial].last.error <= 1.1 * min(fits)
    confirmed = study.progress("").rungs[3]
    assert confirmed == 6 if drift == 1.0 else confirmed <= 6 + 3 * 4


def test_what_fits_only_as_replayed_is_better_than_nothing(tmp_path: Path) -> None:
    class Unconfirmable(Drifting):
        """Sparse configurations fail on the forced forward."""

        drift = 1.0

        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            if rung == 2 and found.density <= 0.11:
                raise RuntimeError("no forced forward")
            return found

    study = run(make_study(tmp_path / "j", Unconfirmable(), (10, 25), num_samples=60))
    sparse, denser = study.best()
    assert sparse.meets_budget and not sparse.confirmed
    alive = [t for t in study.trials if t.status == "completed" and t.last.density <= 0.1]
    assert study.trials[sparse.trial].last.error == min(t.last.error for t in alive)
    assert denser.meets_budget and denser.confirmed


def test_significantly_worse_scores_lose_against_a_larger_error(tmp_path: Path) -> None:
    class Tempting(FormulaEvaluator):
        """The smallest error answers everything wrong."""

        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            if rung == 3 and config.masker_configs[1].window_size < 0.009:
                return evaluation(found.error, found.density, score=0.0, sample_scores=[0.0] * 8)
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
    assert study.trials[best.trial] is min(
        confirmed, key=lambda t: objective_value("sparsity_10", t.last.error, t.last.density)
    )


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (Choice([1, 2, 4]), 3.4, 4),
        (Choice(["a", "b"]), "b", "b"),
        (Choice(["a", "b"]), "c", "a"),
        (Uniform(0.1, 0.9), 2.0, 0.9),
        (Uniform(0.1, 0.9), 128, pytest.approx(0.3)),
        (tune.choice([16, 32]), 24, 16),
        (tune.choice(["a", "b"]), "c", "a"),
        (tune.randint(1, 5), 7, 4),
        (tune.qrandint(16, 128, 16), 128, 128),
        (tune.uniform(0.1, 0.9), 2.0, 0.9),
    ],
)
def test_templates_are_clipped_to_the_space(domain: object, value: object, expected: object) -> None:
    assert nearest(domain, value) == expected


def test_parameter_names() -> None:
    assert parameter_name(OracleTopKConfig, "heavy_size") == "oracletopk_heavy_size"
    assert parameter_name(SinkMaskerConfig, "sink_size") == "sinkmasker_sink_size"
