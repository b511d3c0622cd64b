"""ZeroSCROLLS: ten tasks, each with its own score; `default` keeps them apart."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_data import DATA, read_rows, samples, write_rows

from benchmark.tasks import data, expand_task, get_task, score_prediction, sources
from benchmark.tasks.base import Row, SampleRequest, UserError
from benchmark.tasks.data import Source, missing_data
from benchmark.tasks.zero_scrolls import SUBSETS, concordance_index, exp_similarity, first_letter


def test_the_parts_make_up_the_input_and_rows_with_one_id_are_one_question() -> None:
    rows = {row["id"]: row for row in read_rows("zero_scrolls/qasper")}
    for sample in samples("zero_scrolls/qasper"):
        row = rows[sample.columns["id"]]
        assert sample.context + sample.question + sample.answer_prefix == row["input"]
        assert sample.question.startswith("\n\nQuestion:\n") and sample.answer_prefix == "\n\nAnswer:\n"
    assert samples("zero_scrolls/qasper")[0].references == ["Ada Lund", "the engineer Ada Lund"]


def test_default_asks_all_ten_and_scores_each_as_itself() -> None:
    task, asked = get_task("zero_scrolls/default"), samples("zero_scrolls/default")
    assert {sample.task for sample in asked[:10]} == {f"zero_scrolls/{subset}" for subset in SUBSETS}
    assert {sample.max_new_tokens for sample in asked} == {length for length, _ in SUBSETS.values()}
    scores = [task.score(sample.references[0], sample) for sample in asked]
    assert all(score["score"] == pytest.approx(1) for score in scores)
    whole = task.aggregate(scores, asked)
    assert whole["average"] == pytest.approx(1) and (whole["tasks_run"], whole["tasks_in_all"]) == (10, 10)
    assert len(samples("zero_scrolls/default", max_samples=3)) == 3
    with pytest.raises(UserError, match="ten tasks"):
        score_prediction("zero_scrolls/default", "a", ["a"])


def test_a_folder_with_some_of_the_tasks_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "zero_scrolls").mkdir()
    for subset in ("qasper", "quality"):
        shutil.copy(DATA / "zero_scrolls" / f"{subset}.jsonl", tmp_path / "zero_scrolls")
    selection = expand_task("zero_scrolls/default", tmp_path)
    assert selection.names == ["zero_scrolls/default"] and selection.note is not None
    assert selection.note.startswith("2 of 10 tasks: no data for gov_report")
    asked = samples("zero_scrolls/default", tmp_path)
    task = get_task("zero_scrolls/default")
    assert task.aggregate([task.score("x", sample) for sample in asked], asked)["tasks_run"] == 2
    assert expand_task("zero_scrolls/default", DATA).note is None


@pytest.mark.parametrize("given", [True, False])
def test_missing_data_are_one_line(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    with pytest.raises(UserError) as caught:
        get_task("zero_scrolls/default").samples(SampleRequest(None, data_dir=tmp_path if given else None))
    tried = f"{tmp_path}/zero_scrolls/<task>.jsonl (.parquet, .csv): not there; " if given else ""
    way = "put it there" if given else "give --data-dir DIR and put it there as DIR/zero_scrolls/<task>.jsonl"
    assert str(caught.value) == (
        f"zero_scrolls/default: no data found. Tried {tried}hub data set tau/zero_scrolls: the hub cannot be reached "
        f"from here. Either {way}, in the hub's columns, or run once where the hub can be reached (it is then cached)"
    )
    assert caplog.messages == []


def test_tasks_without_data_are_left_out_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = samples("zero_scrolls/default")

    load = sources.load_rows

    def load_rows(source: Source, data_dir: Path | None) -> Iterator[Row]:
        if source.subset in ("qasper", "quality"):
            raise missing_data(source, None, "no such file")
        return load(source, data_dir)

    monkeypatch.setattr(sources, "load_rows", load_rows)
    left = samples("zero_scrolls/default")
    assert left == [sample for sample in whole if sample.task not in ("zero_scrolls/qasper", "zero_scrolls/quality")]
    assert caplog.messages == ["zero_scrolls/default leaves out qasper, quality: no such file"]


def test_a_task_without_tuning_samples_leaves_those_of_the_others(tmp_path: Path) -> None:
    rows = read_rows("zero_scrolls/musique")
    alone = [rows[0] | {"input": "row-2" + rows[0]["input"]}]  # one context, a test one
    write_rows(tmp_path, "zero_scrolls/musique", alone)
    with pytest.raises(UserError, match=r"zero_scrolls/musique: no tuning samples: rows are split .*musique\.jsonl"):
        samples("zero_scrolls/default", tmp_path, split="tuning")
    write_rows(tmp_path, "zero_scrolls/quality", read_rows("zero_scrolls/quality"))
    tuning = samples("zero_scrolls/default", tmp_path, split="tuning")
    assert {sample.task for sample in tuning} == {"zero_scrolls/quality"}
    assert {sample.task for sample in samples("zero_scrolls/default", tmp_path)} >= {"zero_scrolls/musique"}


def test_a_malformed_row_stops_the_benchmark(tmp_path: Path) -> None:
    for subset in ("qasper", "quality"):
        write_rows(tmp_path, f"zero_scrolls/{subset}", read_rows(f"zero_scrolls/{subset}"))
    write_rows(tmp_path, "zero_scrolls/qasper", [{**read_rows("zero_scrolls/qasper")[0], "output": 3}])
    with pytest.raises(UserError, match=r"qasper\.jsonl row 1: column 'output' must be"):
        samples("zero_scrolls/default", tmp_path)


def test_one_file_of_several_tasks_names_each_rows_task(tmp_path: Path) -> None:
    rows = [{**row, "task": name} for name in ("quality", "musique") for row in read_rows(f"zero_scrolls/{name}")]
    asked = samples("zero_scrolls/default", write_rows(tmp_path, "zero_scrolls/default", rows))
    assert {sample.task for sample in asked} == {"zero_scrolls/quality", "zero_scrolls/musique"}
    rows[0]["task"] = "default"
    with pytest.raises(UserError, match="row 1: column 'task' must be one of gov_report"):
        samples("zero_scrolls/default", write_rows(tmp_path, "zero_scrolls/default", rows))


def test_own_scores() -> None:
    assert exp_similarity("about 60% of them, or 20%", "70%") == pytest.approx(0.5)
    assert exp_similarity("no idea", "70%") == 0.0
    assert exp_similarity("70%", "0.7") == exp_similarity("70%", "70") == pytest.approx(1.0)
    assert concordance_index("3, 2, 1", "1, 2, 3") == 0.0
    assert concordance_index("The order is 1, 3, 2", "1, 2, 3") == pytest.approx(2 / 3)
    assert concordance_index("1, 2", "1, 2, 3") == concordance_index("1, 2, 2", "1, 2, 3") == 0.0
    assert [first_letter(text) for text in ("(C) x", "Because B.", "DAB", "")] == ["C", "B", None, None]
    assert score_prediction("zero_scrolls/qasper", "Zoe", ["Zoë", "Max"]) == {"f1": 1.0}


def test_summaries_take_the_best_of_each_rouge_and_average_before_the_geometric_mean() -> None:
    score = score_prediction("zero_scrolls/squality", "the cat sat down", ["the cat sat", "a dog"])
    assert score["rouge"] == pytest.approx((score["rouge1"] * score["rouge2"] * score["rougeL"]) ** (1 / 3))
    task, asked = get_task("zero_scrolls/gov_report"), samples("zero_scrolls/gov_report")
    scores = [
        {"rouge": 1.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0},
        {"rouge": 0.0, "rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5},
    ]
    assert task.aggregate(scores, asked)["task_score"] == pytest.approx((0.75 * 0.5 * 0.75) ** (1 / 3))
