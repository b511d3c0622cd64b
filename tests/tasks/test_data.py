"""Rows from a folder in three formats, the schema's messages, and a hub that is not there."""

from __future__ import annotations

import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from benchmark.tasks import data
from benchmark.tasks.data import Source, load_rows
from sparse_attention_hub.errors import UserError

SOURCE = Source(
    "bench",
    "sub",
    "someone/bench",
    {"context": "text", "answer": "list of texts", "length": "integer", "extra": "?text"},
    config="sub",
)
ROWS = [
    {"context": 'one, "two"\nthree', "answer": ["a", "b"], "length": 7},
    {"context": "四", "answer": [], "length": 0},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bench").mkdir()
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: False)


def write_jsonl(folder, rows):
    (folder / "bench" / "sub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_jsonl(folder):
    write_jsonl(folder, ROWS)
    assert list(load_rows(SOURCE, folder)) == ROWS


def test_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "bench" / "sub.parquet")
    assert list(load_rows(SOURCE, folder)) == ROWS


def test_csv_holds_lists_and_numbers_as_json(folder):
    import csv

    with (folder / "bench" / "sub.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["context", "answer", "length", "extra"])
        for row in ROWS:
            writer.writerow([row["context"], json.dumps(row["answer"]), row["length"], ""])
    assert list(load_rows(SOURCE, folder)) == [{**row, "extra": ""} for row in ROWS]


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("kind", ["?text", "?list of texts", "?integer"])
def test_an_optional_column_may_be_null_or_empty(folder, kind, value):
    write_jsonl(folder, [{"extra": value}])
    assert list(load_rows(Source("bench", "sub", "someone/bench", {"extra": kind}), folder)) == [{"extra": value}]


def test_a_cell_is_never_evaluated(folder):
    (folder / "bench" / "sub.csv").write_text("context,answer,length\nx,\"__import__('os').getcwd()\",3\n", "utf-8")
    with pytest.raises(UserError, match="row 1: column 'answer' must be list of texts"):
        list(load_rows(SOURCE, folder))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"context": "x", "answer": ["a"]},
            r"sub.jsonl row 2: column 'length' is missing \(there are \['context', 'answer'\]\)",
        ),
        ({"context": 3, "answer": ["a"], "length": 1}, "row 2: column 'context' must be text, got 3"),
        ({"context": "x", "answer": ["a", 1], "length": 1}, "row 2: column 'answer' must be list of texts, got"),
        ({"context": "x", "answer": None, "length": 1}, "row 2: column 'answer' is empty"),
        ({"context": "x", "answer": ["a"], "length": True}, "row 2: column 'length' must be integer, got True"),
        ({"context": "x", "answer": ["a"], "length": 1, "extra": 5}, "row 2: column 'extra' must be text, got 5"),
        (["a", "list"], "row 2: a row must be an object of columns, got list"),
    ],
)
def test_a_malformed_row_is_named(folder, bad, message):
    write_jsonl(folder, [ROWS[0], bad])
    with pytest.raises(UserError, match=message) as caught:
        list(load_rows(SOURCE, folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sub.jsonl", b'{"context": "x"\n', "sub.jsonl row 1: not JSON"),
        ("sub.jsonl", b"\xff\xfe\n", "sub.jsonl row 1: not UTF-8"),
        ("sub.parquet", b"nonsense", "sub.parquet row 1: cannot be read \\(ArrowInvalid"),
    ],
)
def test_a_broken_file_is_one_line(folder, name, content, message):
    (folder / "bench" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(load_rows(Source("bench", "sub", "someone/bench", {}), folder))


@pytest.mark.parametrize("given", [True, False])
def test_missing_data_are_one_line(folder, offline, given):
    with pytest.raises(UserError) as caught:
        load_rows(SOURCE, folder if given else None)
    message = str(caught.value)
    assert message.startswith("bench/sub: no data found. Tried ") and "\n" not in message
    assert "someone/bench (sub): the hub cannot be reached from here" in message
    assert ("sub.jsonl (.parquet, .csv): not there" in message) == given
    assert ("give --data-dir DIR and put it there as DIR/bench/sub.jsonl" in message) == (not given)
    assert ("--data-dir DIR" in message) == (not given) and "run once where the hub can be reached" in message


def test_a_hub_that_does_not_answer_costs_seconds(monkeypatch, tmp_path):
    """No network: the one-line error comes after one short probe, not after a client's minutes of retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data.hub_reachable.cache_clear()
    start = time.monotonic()
    try:
        with pytest.raises(UserError, match="the hub cannot be reached"):
            load_rows(SOURCE, None)
        with pytest.raises(UserError, match="the hub cannot be reached"):
            load_rows(SOURCE, None)
    finally:
        data.hub_reachable.cache_clear()
    assert time.monotonic() - start < data.PROBE_SECONDS + 3


def test_a_data_set_in_the_cache_is_read_without_the_hub(monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: True)

    def load(hub_id, config, split):
        assert (hub_id, config, split) == ("someone/bench", "sub", "test")
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_list(ROWS)

    before = constants.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(load_rows(SOURCE, None)) == ROWS
    assert before == constants.HF_HUB_OFFLINE


def test_a_refusing_hub_is_one_line(monkeypatch):
    import datasets

    def load(*_, **__):
        raise RuntimeError("gated\nmore lines")

    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="RuntimeError: gated. Either") as caught:
        load_rows(SOURCE, None)
    assert "\n" not in str(caught.value)
