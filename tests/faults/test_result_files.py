"""Files of results: names that fit and differ, texts that come back, a full disk, numbers that are not finite."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.command_line import run_command
from benchmark.execution.jobs import BenchmarkUnit
from benchmark.execution.runner import run_benchmarks
from benchmark.execution.worker import forget_model
from benchmark.progress import printable
from benchmark.settings import Settings
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.records import Failure, parse_record, read_record, to_json, write_record
from benchmark.storage.results import Journal, StorageError, fingerprint, result_key, safe_name, write_text
from benchmark.storage.tables import cell, read_table, table_text
from sparse_attention_hub.errors import NonFiniteError, UserError
from tests.toy import ToyTask

Make = Callable[..., Settings]
SURROGATE = "\ud83d"


@pytest.fixture(autouse=True)
def _no_model_stays() -> Iterator[None]:
    yield
    forget_model()


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "a" * 300,
    "a" * 299 + "b",
    "/models/" + "deep/" * 60 + "model",
    "/models/" + "deep/" * 60 + "model2",
    "模型" * 40,
    "模型" * 40 + "b",
    "🙂" * 90,
    "a\x1b[31mb",
    "a\x1b[32mb",
    "a\nb",
    f"a{SURROGATE}b",
    "a\udcffb",
    ".",
    "..",
]


def test_names_fit_and_two_names_never_share_one(tmp_path: Path) -> None:
    made = [safe_name(name) for name in NAMES]
    assert len(set(made)) == len(NAMES)
    for name in made:
        assert len(name.encode()) <= 100 and name.isprintable() and "/" not in name
        (tmp_path / f".{name}.tmpxxxxxx").touch()
    assert safe_name("meta-llama/Llama-3.1-8B") == "meta-llama_Llama-3.1-8B" and safe_name("a" * 100) == "a" * 100


def test_keys_of_long_names_fit_with_what_is_put_around_them(tmp_path: Path) -> None:
    names = [name for name in NAMES if name.strip(".")]  # "_" and "__" beside each other are no names
    keys = {result_key(model, task, "x" * 90) for model in names for task in names}
    assert len(keys) == len(names) ** 2 and max(len(key.encode()) for key in keys) <= 200
    for key in sorted(keys)[:20]:
        write_text(tmp_path / f"{key}_analysis.csv", "")
        Journal(tmp_path / f"search_{key}-{fingerprint(key)}.jsonl").append({"a": 1})
    assert result_key("m", "t", "n") == "m_t_n"


def test_names_that_would_share_a_folder_are_refused_before_anything_starts(
    toy_unit: BenchmarkUnit, make_settings: Make
) -> None:
    settings = make_settings()
    one, other = (replace(toy_unit.configs[1], name=name) for name in ("a/b", "a_b"))
    with pytest.raises(UserError, match="a_b for toy/count on .* and a/b for toy/count on .* same files"):
        run_benchmarks([replace(toy_unit, configs=(one, other))], settings)
    with pytest.raises(UserError, match="is listed twice"):
        run_benchmarks([toy_unit, toy_unit], settings)
    assert not settings.benchmark_results_dir.exists()


def test_results_under_long_names_are_written_and_found(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    folder = tmp_path / ("d" * 120) / ("e" * 120)
    model = str(save_tiny_model(folder))
    long = replace(toy_unit.configs[1], name="模型" * 50 + "_25pct")
    settings = make_settings(models=(model,), max_requests=1)
    unit = replace(toy_unit, model=model, configs=(toy_unit.configs[0], long))
    summary = run_benchmarks([unit], settings, in_process=True)
    assert summary.failures == [] and [row.samples.ok for row in summary.results] == [1, 1]
    for row in summary.results:
        assert (settings.benchmark_results_dir / row.folder / "raw_results.csv").exists()


# -- texts -------------------------------------------------------------------------------------------------------------


def test_halves_of_surrogate_pairs_are_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, Failure(status="failed", model=SURROGATE, sample_id=f"a{SURROGATE}", problem="\udcff"))
    found = read_record(path, Failure, "")
    assert (found.model, found.sample_id, found.problem) == ("\\ud83d", "a\\ud83d", "\\udcff")
    assert parse_record(json.dumps(to_json(found)), Failure) == found
    write_text(tmp_path / "table.csv", f"a{SURROGATE}\n")
    assert (tmp_path / "table.csv").read_bytes() == b"a\\ud83d\n"
    (tmp_path / "record.json").write_text('{"status": "\\ud83d"}')
    with pytest.raises(UserError, match=r"record.json: .*; mend it$"):
        read_record(path, Failure, "mend it")


def test_a_run_over_names_with_halves_of_pairs_resumes(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(max_requests=2)
    config = replace(toy_unit.configs[1], name=f"local{SURROGATE}_25pct")
    unit = replace(toy_unit, configs=(toy_unit.configs[0], config), provenance={})
    first = run_benchmarks([unit], settings, in_process=True)
    assert first.failures == [] and [row.samples.ok for row in first.results] == [2, 2]
    import benchmark.execution.worker as worker

    monkeypatch.setattr(worker, "answer_sample", None)  # nothing is answered again
    again = run_benchmarks([unit], settings, in_process=True)
    assert [row.samples.ok for row in again.results] == [2, 2]


CELLS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-x", "'twas", "", "plain", "a\nb", '"q"', "'", "-", "1,2"]


def test_no_cell_is_a_formula_and_every_text_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text(path, table_text(CELLS, [CELLS, CELLS[::-1]]))
    rows = read_table(path)
    assert [list(row) for row in rows] == [CELLS] * 2 and [list(row.values()) for row in rows] == [CELLS, CELLS[::-1]]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as a spreadsheet saves it
    assert read_table(path) == rows
    with path.open(newline="", encoding="utf-8-sig") as stream:
        shown = [text for row in csv.reader(stream) for text in row]
    assert not [text for text in shown if text.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [cell(value) for value in (-0.5, -3, None, ["=1"], "twas")] == ["-0.5", "-3", "", '["=1"]', "twas"]


def test_answers_are_written_as_texts(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real, answer = models.answer_many, "=HYPERLINK(1)\x1b[2J"

    def formulas(*given: Any, **options: Any) -> Any:
        return [replace(entry, text=answer) for entry in real(*given, **options)]

    monkeypatch.setattr(models, "answer_many", formulas)
    settings = make_settings(max_requests=1)
    summary = run_benchmarks([toy_unit], settings, in_process=True)
    path = settings.benchmark_results_dir / summary.results[0].folder / "raw_results.csv"
    assert read_table(path)[0]["predicted_answer"] == answer and "\"'=HYPERLINK" in path.read_text()
    assert printable(answer) == "=HYPERLINK(1) [2J" and printable("a\n\tb") == "a\n\tb"


# -- a full disk -------------------------------------------------------------------------------------------------------


class Disk:
    """A disk with room for so many writes; then each fails, after half a line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        real = os.fsync

        def fsync(handle: int) -> None:
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_half_written_results_are_no_earlier_results(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    unit, settings = replace(toy_unit, configs=toy_unit.configs[:1]), make_settings(max_requests=1)
    folder = settings.benchmark_results_dir / safe_name(unit.model) / "dense"
    (folder / "toy_count").mkdir(parents=True)
    (folder / "toy_count" / "raw_results.csv").write_text('"context","le')
    assert run_benchmarks([unit], settings, in_process=True).notes == []
    assert [path.name for path in folder.iterdir()] == ["toy_count"]


def test_a_file_that_cannot_be_written_is_one_line_with_its_path(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    disk.room = 0

    def command() -> int:
        write_text(path, "new")
        return 0

    assert run_command(command) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{path}: No space left on device; make room" in told
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_line_that_was_cut_by_a_full_disk_harms_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"n": 1})
    real = os.fsync

    def full(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size - 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="journal.jsonl"):
        journal.append({"n": 2})
    monkeypatch.setattr(os, "fsync", real)
    journal.append({"n": 3})
    assert [record["n"] for record in journal.read()] == [1, 3]


def test_phase_2_stops_at_a_full_disk_and_resumes(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, disk: Disk, tmp_path: Path
) -> None:
    unit = replace(toy_unit, configs=toy_unit.configs[:2])

    def answers(base: Path) -> list[list[str]]:
        summary = run_benchmarks([unit], make_settings(max_requests=3, benchmark_results_dir=base), in_process=True)
        assert summary.failures == [] and [row.samples.ok for row in summary.results] == [3, 3]
        tables = [read_table(base / row.folder / "raw_results.csv") for row in summary.results]
        return [[row["predicted_answer"] for row in table] for table in tables]

    calm = answers(tmp_path / "calm")
    for room in (0, 8, 15):
        base = tmp_path / f"room {room}"
        disk.room = room
        with pytest.raises(StorageError, match=str(base)):
            answers(base)
        disk.room = 10**9
        assert answers(base) == calm


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_model(tmp_path: Path) -> str:
    """A tiny model with one weight that is not a number."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_model_that_gives_no_numbers_fails_its_samples(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, broken_model: str
) -> None:
    settings = make_settings(models=(broken_model,), max_requests=2)
    summary = run_benchmarks([replace(toy_unit, model=broken_model)], settings, in_process=True)
    for row in summary.results:
        assert row.samples.failed == 2 and row.score is None and row.density is None
    assert len(summary.failures) == 6 and all("finite" in str(failure.problem) for failure in summary.failures)


@pytest.mark.parametrize("call", ["answer_many", "forced_many"])
def test_one_attention_that_gives_no_numbers_fails_alone(
    call: str, toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real = getattr(models, call)
    attentions_at = {"answer_many": 3, "forced_many": 4}[call]

    def overflow(*given: Any, **options: Any) -> Any:
        if any(attention is not None and len(attention.maskers) == 3 for attention in given[attentions_at]):
            raise NonFiniteError("logits are not finite numbers")
        return real(*given, **options)

    monkeypatch.setattr(models, call, overflow)
    summary = run_benchmarks([toy_unit], make_settings(max_requests=2), in_process=True)
    assert [row.samples.ok for row in summary.results] == [2, 2, 0]
    assert {failure.problem for failure in summary.failures} == {"NonFiniteError: logits are not finite numbers"}
    assert {failure.configuration for failure in summary.failures} == {toy_unit.configs[2].name}
