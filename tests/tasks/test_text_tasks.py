"""What holds for every benchmark that comes as data: rows in, samples and scores out; clear errors."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from benchmark_data import DATA, both_splits, read_rows, samples, write_rows

from benchmark.tasks import available_tasks, data, get_task
from benchmark.tasks.base import SampleRequest, UserError

TASKS = [
    name
    for name in available_tasks()
    if name.split("/")[0] in ("longbench", "longbenchv2", "loogle", "zero_scrolls", "aime2024", "aime2025")
]
WITH_FIXTURE = [name for name in TASKS if (DATA / f"{name}.jsonl").is_file() or name == "zero_scrolls/default"]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "hub_reachable", lambda: False)


def test_the_names_that_users_type_are_there() -> None:
    for name in (
        "loogle/longdep_qa",
        "loogle/shortdep_qa",
        "loogle/shortdep_cloze",
        "loogle/longdep_summarization",
        "zero_scrolls/default",
        "longbenchv2/0shot",
        "longbenchv2/cot",
        "aime2024/aime2024",
        "aime2025/aime2025",
        "longbench/passage_retrieval_en",
    ):
        assert name in WITH_FIXTURE
    assert sum(name.startswith("longbench/") and not name.endswith("_e") for name in TASKS) == 21
    assert sum(name.startswith("longbench/") and name.endswith("_e") for name in TASKS) == 13
    assert sum(name.startswith("zero_scrolls/") for name in TASKS) == 11


@pytest.mark.parametrize("name", WITH_FIXTURE)
def test_fixture_rows_become_samples_that_can_be_scored(name: str) -> None:
    task = get_task(name)
    test, tuning = samples(name), samples(name, split="tuning")
    assert test and tuning
    assert not {sample.context for sample in test} & {sample.context for sample in tuning}
    assert samples(name, max_samples=1) == test[:1]
    for sample in test:
        assert sample.references and sample.max_new_tokens > 0 and sample.columns
        score = task.score(sample.references[0], sample)
        assert task.metric in score and all(0 <= value <= 1 for value in score.values())
    assert len({sample.sample_id for sample in test + tuning}) == len(test + tuning)
    json.dumps(task.aggregate([task.score("x", sample) for sample in test], test), allow_nan=False)
    assert task.description.metric == task.metric


@pytest.mark.parametrize("name", TASKS)
def test_missing_data_stop_the_task_with_one_line(name: str, no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        samples(name, tmp_path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(name)
    assert get_task(name).description.source.split(" ")[0] in message and str(tmp_path) in message
    assert "run once where the hub can be reached" in message


def test_every_hub_data_set_that_was_tried_is_named(no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(data.DataMissingError) as caught:
        samples("longbench/qasper", tmp_path)
    assert "hub data set THUDM/LongBench or Xnhyacinth/LongBench or xAlg-AI/att-hub-longbench: the hub" in str(caught.value)


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    rows = read_rows("longbench/qasper")
    rows[1]["answers"] = 3
    with pytest.raises(UserError, match=r"qasper\.jsonl row 2: column 'answers' must be list of texts, got 3"):
        samples("longbench/qasper", write_rows(tmp_path, "longbench/qasper", rows))
    rows = [{name: value for name, value in row.items() if name != "difficulty"} for row in read_rows("longbenchv2/0shot")]
    with pytest.raises(UserError, match="row 1: column 'difficulty' is missing"):
        samples("longbenchv2/0shot", write_rows(tmp_path, "longbenchv2/0shot", rows))
    rows = [{**row, "all_classes": []} for row in read_rows("longbench/trec")]
    with pytest.raises(UserError, match=r"trec\.jsonl row 1: column 'all_classes' is empty"):
        samples("longbench/trec", write_rows(tmp_path, "longbench/trec", rows))


def zipped(folder: Path, member: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / "archive.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, "\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("name", "repository", "archive", "member"),
    [
        ("longbench/qasper", "THUDM/LongBench", "data.zip", "data/qasper.jsonl"),
        ("zero_scrolls/qasper", "tau/zero_scrolls", "qasper.zip", "qasper/validation.jsonl"),
    ],
)
def test_rows_are_read_from_the_archive_of_a_hub_repository(
    name: str, repository: str, archive: str, member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    file = zipped(tmp_path, member, read_rows(name))

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    got = get_task(name).samples(SampleRequest(tokenizer=None))
    assert [sample.context for sample in got] == [sample.context for sample in samples(name)]
    assert set(asked) == {(repository, archive)}


def test_an_archive_without_the_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> None:
    file = zipped(tmp_path, "other.jsonl", [])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(file))
    with pytest.raises(UserError, match=r"qasper\.zip holds no validation\.jsonl"):
        get_task("zero_scrolls/qasper").samples(SampleRequest(tokenizer=None))


@pytest.mark.parametrize(
    "name",
    [
        "longbench/gov_report",
        "longbench/trec",
        "longbenchv2/cot",
        "loogle/shortdep_qa",
        "loogle/shortdep_cloze",
        "zero_scrolls/musique",
    ],
)
def test_copies_with_the_prompt_in_their_columns_give_the_same_questions(name: str, tmp_path: Path) -> None:
    want = both_splits(name)
    rows = []
    for sample in want:
        row = {name: value for name, value in sample.columns.items() if name not in ("input", "output")}
        row |= {
            "context": sample.context,
            "question": sample.question,
            "answer_prefix": sample.answer_prefix,
            "max_new_tokens": 999,
        }
        if name == "longbenchv2/cot":  # the copy has the instruction in the prefix
            row["question"] = sample.question.partition("Format your")[0]
        if name.startswith(("loogle", "zero_scrolls")):
            row["answer"] = sample.references[0]
        rows.append(row)
    got = both_splits(name, write_rows(tmp_path, name, rows))
    parts = [(s.context, s.question, s.answer_prefix, s.references, s.max_new_tokens) for s in got]
    assert parts == [(s.context, s.question, s.answer_prefix, s.references, s.max_new_tokens) for s in want]


@pytest.mark.parametrize("name", ["longbench/trec", "loogle/shortdep_qa", "loogle/shortdep_cloze", "zero_scrolls/quality"])
def test_csv_and_parquet_give_the_same_samples(name: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows, want = read_rows(name), both_splits(name)
    for suffix in ("csv", "parquet"):
        file = tmp_path / suffix / f"{name}.{suffix}"
        file.parent.mkdir(parents=True)
        if suffix == "csv":
            with file.open("w", encoding="utf-8", newline="") as lines:
                writer = csv.DictWriter(lines, list(rows[0]))
                writer.writeheader()
                for row in rows:
                    writer.writerow({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()})
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        got = both_splits(name, tmp_path / suffix)
        assert [(s.context, s.question, s.references) for s in got] == [(s.context, s.question, s.references) for s in want]
