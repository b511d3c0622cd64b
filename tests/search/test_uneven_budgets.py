"""Head budgets and budgets on KV bytes in a study, on an evaluator whose figures are a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmark.storage.results import Journal
from benchmark.storage.search_records import Evaluation
from benchmark.workers.errors import BrokenDeviceError
from benchmark.workers.limits import TimeLimitError
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.head_budgets import FittedBudgets
from tests.search.test_study import FormulaEvaluator, make_study, run

TABLE = [[0.5, 1.5], [1.0, 1.0]]


class Uneven(FormulaEvaluator):
    """A table changes the error by a factor, which replay and forced forward see differently."""

    def __init__(self, replayed: float = 0.8, forced: float = 0.8, score: float = 1.0, nll: float = 0.5) -> None:
        super().__init__()
        self.replayed, self.forced, self.score, self.nll = replayed, forced, score, nll
        self.fits: list[tuple[int, str]] = []

    def fit_head_budgets(self, configs: list[ResearchAttentionConfig], by: str, timeout: float) -> list[FittedBudgets | None]:
        self.fits.append((len(configs), by))
        return [FittedBudgets(TABLE, 0.5, -0.2) for _ in configs]

    def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
        found = super().figures(config, rung)
        if rung == 2:
            found = found.model_copy(update={"reference_nll": 0.5 if config.head_budgets is None else self.nll})
        if config.head_budgets is None:
            return found
        assert found.error is not None
        changes: dict[str, Any] = {"error": found.error * (self.replayed if rung < 2 else self.forced)}
        if rung == 3:
            changes |= {"score": self.score, "sample_scores": [self.score] * 8}
        return found.model_copy(update=changes)


def uneven_study(path: Path, evaluator: Uneven, **changes: object) -> Any:
    return make_study(path, evaluator, head_budgets="kv_head", **changes)


def test_a_table_with_a_smaller_confirmed_error_wins(tmp_path: Path) -> None:
    evaluator = Uneven(nll=0.505)
    study = run(uneven_study(tmp_path / "j", evaluator))
    assert evaluator.fits == [(2, "kv_head")], "all levels in one pass"
    even = study.best_even()
    for best in study.best():
        trial = study.trials[best.trial]
        assert best.confirmed and best.meets_budget and trial.table is not None and trial.table.level == best.level
        assert study.config_of(trial).head_budgets == TABLE and trial.params == study.trials[trial.table.base].params
        beaten = study.trials[even[best.level].trial]
        assert beaten.table is None and trial.last.error < beaten.last.error
    tables = [trial for trial in study.trials if trial.table is not None]
    assert len(tables) == 2 and all(trial.reached == 3 for trial in tables)


@pytest.mark.parametrize(
    ("evaluator", "reached"),
    [
        (Uneven(replayed=0.99, forced=0.5), 1),  # not worth a confirmation
        (Uneven(replayed=0.8, forced=1.1), 3),
        (Uneven(score=0.0), 3),  # it answers everything wrong
        (Uneven(nll=0.52), 3),  # the dense answers are less likely
    ],
)
def test_a_table_that_is_not_better_loses(evaluator: Uneven, reached: int, tmp_path: Path) -> None:
    study = run(uneven_study(tmp_path / "j", evaluator))
    plain = run(make_study(tmp_path / "plain", FormulaEvaluator()))
    assert {trial.reached for trial in study.trials if trial.table is not None} == {reached}
    assert [best.model_dump() for best in study.best()] == [best.model_dump() for best in plain.best()]
    assert study.best_even().keys() == {best.level for best in plain.best()}


def test_a_table_with_less_likely_answers_is_no_reason_to_stop_searching(tmp_path: Path) -> None:
    """The even finalists spend more in a forced forward than their budgets: others are confirmed, as without head budgets."""

    def denser(found: Evaluation, config: ResearchAttentionConfig, rung: int) -> Evaluation:
        return found.model_copy(update={"density": found.density * (1.2 if rung > 1 and config.head_budgets is None else 1.0)})

    class Plain(FormulaEvaluator):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return denser(super().figures(config, rung), config, rung)

    class Unlikely(Uneven):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return denser(super().figures(config, rung), config, rung)

    study = run(uneven_study(tmp_path / "j", Unlikely(replayed=0.5, forced=0.5, nll=0.52)))
    plain = run(make_study(tmp_path / "plain", Plain()))
    tables = [trial for trial in study.trials if trial.table is not None]
    assert tables and all(trial.reached == 3 for trial in tables)
    found, expected = ([(best.level, s.trials[best.trial].params, best.confirmed) for best in s.best()] for s in (study, plain))
    assert found == expected and all(study.trials[best.trial].table is None for best in study.best())


def test_a_table_that_spends_too_much_is_shrunk(tmp_path: Path) -> None:
    class Large(Uneven):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            factor = 1.0 if config.head_budgets is None else 1.2 * config.head_budgets[0][0] / TABLE[0][0]
            return found.model_copy(update={"density": factor * found.density})

    study = run(uneven_study(tmp_path / "j", Large()))
    tables = [trial for trial in study.trials if trial.table is not None]
    assert [trial.reached for trial in tables] == [1, 1, 3, 3]
    for best in study.best():
        trial = study.trials[best.trial]
        assert best.meets_budget and trial in tables[2:]
        assert trial.last.density == pytest.approx(0.99 * study.trials[trial.table.base].last.density, rel=1e-3)


def test_all_finalists_are_confirmed_in_one_pass_with_the_best_of_each_level(tmp_path: Path) -> None:
    evaluator, plain = Uneven(), FormulaEvaluator()
    levels = (5, 10, 25, 50)
    study = run(uneven_study(tmp_path / "j", evaluator, budgets=levels))
    off = run(make_study(tmp_path / "plain", plain, levels))
    assert [count for rung, count in evaluator.calls if rung == 2][0] == 8
    assert [count for rung, count in plain.calls if rung == 2][0] == 6
    tables = [trial for trial in study.trials if trial.table is not None]
    assert len(tables) == 4 and {trial.table.base for trial in tables} == {best.trial for best in off.best()}
    assert all(study.trials[trial.table.base].reached == trial.reached == 3 for trial in tables)


def test_each_of_seven_levels_has_an_even_finalist(tmp_path: Path) -> None:
    evaluator = Uneven(replayed=0.5, forced=0.5, nll=5.0)
    study = run(uneven_study(tmp_path / "j", evaluator, budgets=(5, 10, 15, 20, 25, 30, 50)))
    tables = [trial for trial in study.trials if trial.table is not None]
    assert [count for rung, count in evaluator.calls if rung == 2][:2] == [8, 6], "seven even ones, then seven tables"
    assert len(tables) == 7 and all(study.trials[trial.table.base].reached == 3 for trial in tables)
    assert all(best.confirmed and study.trials[best.trial].table is None for best in study.best())


def test_a_table_whose_even_budgets_are_not_confirmed_does_not_win(tmp_path: Path) -> None:
    class EvenFails(Uneven):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            return found.model_copy(update={"error": None}) if rung == 2 and config.head_budgets is None else found

        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
            return [
                found if found and (found.error is not None or rung == 3) else None
                for found in super().evaluate(configs, rung, timeout)
            ]

    study = run(uneven_study(tmp_path / "j", EvenFails()))
    assert any(trial.table is not None and trial.reached == 3 for trial in study.trials)
    assert study.best() and all(study.trials[best.trial].table is None for best in study.best())


def test_a_table_that_wins_two_levels_is_compared_with_even_budgets_at_both(tmp_path: Path) -> None:
    class Saturated(Uneven):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            found = super().figures(config, rung)
            return found.model_copy(update={"density": min(found.density, 0.3)})

    study = run(uneven_study(tmp_path / "j", Saturated(), budgets=(40, 50)))
    assert len({best.trial for best in study.best()}) == 1 and study.trials[study.best()[0].trial].table is not None
    assert study.best_even().keys() == {best.level for best in study.best()}


def test_the_line_of_a_study_shows_the_errors_of_its_best(tmp_path: Path) -> None:
    study = uneven_study(tmp_path / "j", Uneven(replayed=0.5, forced=0.5, nll=0.52))
    *_, last = study.run()
    assert last.best == {best.level: study.trials[best.trial].last.error for best in study.best()}


def test_another_way_of_fitting_fits_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = Uneven(), Uneven(), Uneven()
    run(uneven_study(tmp_path / "j", first))
    run(uneven_study(tmp_path / "j", again))
    monkeypatch.setattr("benchmark.search.study.FIT_VERSION", -1)
    run(uneven_study(tmp_path / "j", other))
    assert (len(first.fits), len(again.fits), len(other.fits)) == (1, 0, 1)


def test_a_fit_that_took_too_long_is_tried_again_with_more_time(tmp_path: Path) -> None:
    class Slow(Uneven):
        def fit_head_budgets(self, *_: Any) -> list[FittedBudgets | None]:
            raise TimeLimitError

    study = run(uneven_study(tmp_path / "j", Slow(), timeout=60.0))
    (failed,) = [trial for trial in study.trials if trial.status == "failed"]
    assert failed.error_message == "fitting head budgets: took longer than --search-timeout 60 s for each level: raise it"
    for timeout, fits in ((60.0, 0), (900.0, 1)):
        evaluator = Uneven()
        run(uneven_study(tmp_path / "j", evaluator, timeout=timeout))
        assert len(evaluator.fits) == fits


def test_a_search_with_tables_resumes_and_ends_the_same(tmp_path: Path) -> None:
    whole = run(uneven_study(tmp_path / "whole", Uneven()))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    fitted = next(number for number, line in enumerate(lines) if b'"fit"' in line)
    for kept in (fitted - 1, fitted + 1, len(lines)):
        (tmp_path / "cut").write_bytes(b"".join(lines[:kept]))
        evaluator = Uneven()
        resumed = run(uneven_study(tmp_path / "cut", evaluator))
        assert len(evaluator.fits) == (kept <= fitted) and (evaluator.calls == []) == (kept == len(lines))
        assert [(t.params, t.table, t.rungs) for t in resumed.trials] == [(t.params, t.table, t.rungs) for t in whole.trials]
        assert resumed.best() == whole.best()
    off = Uneven()
    plain = run(make_study(tmp_path / "whole", off))  # the same journal without head budgets
    assert off.calls == [] and all(trial.table is None for trial in plain.trials)


@pytest.mark.parametrize(("fault", "transient"), [(ValueError("no such size"), False), (MemoryError("no room"), True)])
def test_a_failed_fit_is_a_failed_trial(fault: Exception, transient: bool, tmp_path: Path) -> None:
    class Failing(Uneven):
        def fit_head_budgets(self, *_: Any) -> list[FittedBudgets | None]:
            raise fault

    study = run(uneven_study(tmp_path / "j", Failing()))
    (failed,) = [trial for trial in study.trials if trial.status == "failed"]
    assert failed.error_message == f"fitting head budgets: {type(fault).__name__}: {fault}" and failed.transient == transient
    assert all(best.confirmed for best in study.best())
    again = run(uneven_study(tmp_path / "j", Uneven()))
    assert any(trial.table is not None for trial in again.trials) == transient, "only a transient failure is retried"


def test_a_device_that_breaks_in_a_fit_ends_the_study_once(tmp_path: Path) -> None:
    class Broken(Uneven):
        def fit_head_budgets(self, *_: Any) -> list[FittedBudgets | None]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(BrokenDeviceError):
        run(uneven_study(tmp_path / "j", Broken()))
    study = run(uneven_study(tmp_path / "j", Broken()))
    assert [t.error_message for t in study.trials if t.status == "failed"] == ["fitting head budgets: broke its device"]


def test_nothing_is_fitted_without_a_budget_or_for_what_misses_it(tmp_path: Path) -> None:
    class Dense(Uneven):
        def figures(self, config: ResearchAttentionConfig, rung: int) -> Evaluation:
            return super().figures(config, rung).model_copy(update={"density": 0.3 + config.masker_configs[2].heavy_size})

    evaluator = Dense()
    run(uneven_study(tmp_path / "j", evaluator))
    assert evaluator.fits == []


def test_a_budget_on_kv_bytes_limits_these(tmp_path: Path) -> None:
    """The formula reads half of the bytes to select: 60% of the bytes are a density of 10%."""
    evaluator = FormulaEvaluator()
    study = run(make_study(tmp_path / "j", evaluator, (60,), budget_on="kv", num_samples=40))
    (best,) = study.best()
    last = study.trials[best.trial].last
    assert best.meets_budget and best.confirmed and last.kv_fraction is not None and last.kv_fraction <= 0.6
    assert last.density <= 0.1 + 1e-9, "the density would have been within 60%"
    (out_of_reach,) = run(make_study(tmp_path / "k", FormulaEvaluator(), (10,), budget_on="kv")).best()
    assert not out_of_reach.meets_budget and all(record["status"] == "completed" for record in evaluations(tmp_path / "k"))


def evaluations(path: Path) -> list[dict[str, Any]]:
    return [record for line in Journal(path).read() for record in line.get("evaluations", [])]
