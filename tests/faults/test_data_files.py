"""Data files with faults: every task gives usable samples, or one line that names the file, the row and the column."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from benchmark.raytune.plan import check_samples
from benchmark.settings import Settings
from benchmark.tasks import data, get_task
from benchmark.tasks.base import Sample, SampleRequest, build_prompt
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask
from sparse_attention_hub.errors import UserError, quoted

DATA = Path(__file__).parents[1] / "data"
#: A task for every way of reading rows.
TASKS = [
    "ruler_hf/4096/vt", "infinite_bench_hf/passkey", "infinite_bench_hf/kv_retrieval", "infinite_bench_hf/math_find",
    "infinite_bench_hf/math_calc", "infinite_bench_hf/code_run", "infinite_bench/code_debug", "infinite_bench/longbook_choice_eng",
    "infinite_bench/longbook_qa_eng", "infinite_bench/longdialogue_qa_eng", "loogle/longdep_qa", "loogle/shortdep_cloze",
    "zero_scrolls/qasper", "zero_scrolls/space_digest", "longbench/trec", "longbench/qasper_e", "longbenchv2/0shot",
    "aime2024/aime2024", "aime2025/aime2025",
]  # fmt: skip
#: Those whose rows in the copies' form are tried too.
COPIES = [
    "infinite_bench/code_debug", "loogle/shortdep_cloze", "zero_scrolls/qasper", "longbench/trec", "longbenchv2/0shot",
    "aime2024/aime2024",
]  # fmt: skip
#: What takes the place of a value, as JSON text.
VALUES = {
    "null": "null", "number": "3", "fraction": "1.5", "true": "true", "text": '"x"', "empty": '""', "list": '["x"]',
    "empty list": "[]", "numbers": "[1, 2]", "list of null": "[null]", "mixed list": '["x", 1]', "list of lists": '[["x"]]',
    "list of dicts": '[{"a": 1}]', "dict": '{"a": "x"}', "empty dict": "{}", "negative": "-1",
    "long number": "1" + "0" * 4000, "longer number": "1" + "0" * 5000, "digits": '"' + "9" * 5000 + '"',
    "NaN": "NaN", "infinity": "-Infinity", "1e999": "1e999", "NaN in a list": "[NaN]", "long number in a list": "[1" + "0" * 4000 + "]",
    "deep": "[" * 90 + "]" * 90, "very deep": "[" * 100_000 + "]" * 100_000, "deep dicts": '{"a": ' * 90 + "1" + "}" * 90,
    "deep text": '"' + "[" * 5000 + '"', "deeper text": '"' + "[" * 60 + "]" * 60 + '"',
    "half a pair": r'"a\ud83d"', "half a pair in a list": r'["\udc00"]', "half a pair in a dict": r'{"\ud83d": "x"}',
    "control characters": r'"a\u001b[31m\r\nb\u0000"', "control characters in a list": r'["\u001b[31m\n"]',
    "list as text": "\"['a', 'b']\"", "list of NumPy": "\"['a' 'b']\"", "dict as text": "\"{'<mask-0>': 'x'}\"",
    "code": "\"__import__('os').abort()\"", "long text": '"' + "x" * 10_000 + '"',
}  # fmt: skip


class Tokenizer:
    """A token a character."""

    chat_template = bos_token_id = None
    name_or_path = ""
    encoded = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += len(text)
        return list(map(ord, text))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: False)


def data_file(task: str, folder: Path, suffix: str = ".jsonl") -> Path:
    name = (
        "/".join(task.split("/")[:2]) if task.startswith(("ruler_hf", "infinite", "loogle", "zero", "long", "aime")) else task
    )
    file = folder / f"{name}{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def rows_of(task: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in data_file(task, DATA).read_text("utf-8").splitlines()]
    return [row for row in rows if not task.startswith("ruler_hf") or row["task"] == task.rpartition("/")[2]]


def rows_of_the_copy(task: str) -> list[dict[str, Any]]:
    """The rows in the form that holds the prompt in columns."""
    rows = []
    for sample in all_samples(task, DATA):
        columns = {name: value for name, value in sample.columns.items() if name not in ("input", "output", "qa_pairs")}
        prompt = dict(zip(PROMPT_COLUMNS, (sample.context, sample.question, sample.answer_prefix), strict=True))
        answer = sample.references[0] if task.startswith(("loogle", "zero")) else columns.get("answer", sample.references)
        rows.append({**columns, **prompt, "answer": answer})
    return rows


def all_samples(name: str, folder: Path) -> list[Sample]:
    """The samples of both splits."""
    task = get_task(name)
    assert isinstance(task, DataTask)
    return list(task.read(task.sources, folder))


def check(name: str, folder: Path, case: str, must_name: str | None = None) -> bool:
    """Whether the file gives samples. What it gives can be asked, scored and written; an error is one short line."""
    try:
        samples = all_samples(name, folder)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 700, f"{case}: {message}"
        assert str(folder) in message and " row " in message, f"{case}: {message}"
        unread = "nested too deeply" in message or "more than 4300 digits" in message  # by the JSON parser
        assert must_name is None or unread or must_name in message, f"{case}: {message}"
        return False
    task = get_task(name)
    for sample in samples[-1:]:
        texts = [sample.sample_id, sample.context, sample.question, sample.answer_prefix, *sample.references]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts), f"{case}: {sample}"
        json.dumps(sample.columns, default=str).encode()
        build_prompt(sample, Tokenizer(), max_context_length=10**5, max_new_tokens=9, use_chat_template=False)
        for answer in ("", "9" * 5000, sample.references[0] if sample.references else "x"):
            scores = task.score(answer, sample)
            assert scores and all(math.isfinite(score) and 0 <= score <= 1 for score in scores.values()), f"{case}: {scores}"
    json.dumps(task.aggregate([task.score("x", sample) for sample in samples], samples), allow_nan=False)
    return True


def mutated(rows: list[dict[str, Any]], columns: Iterator[str] | set[str]) -> Iterator[tuple[str, str, str]]:
    """(case, column, lines): every column of the second row with every fault."""
    before = json.dumps(rows[0]) + "\n"
    for column in sorted(columns):
        yield f"{column} missing", column, before + json.dumps({k: v for k, v in rows[-1].items() if k != column}) + "\n"
        marked = json.dumps(rows[-1] | {column: "@@"})
        for name, value in VALUES.items():
            yield f"{column}: {name}", column, before + marked.replace('"@@"', value) + "\n"


@pytest.mark.parametrize(("name", "copy"), [*((name, False) for name in TASKS), *((name, True) for name in COPIES)])
def test_every_fault_in_every_column(name: str, copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task(name)
    assert isinstance(task, DataTask)
    if name.startswith("loogle"):  # these take seconds, and depend on texts alone
        monkeypatch.setattr(type(task), "_similarity", staticmethod(lambda prediction, reference: {"rouge-l": 0.0}))
    rows = rows_of_the_copy(name) if copy else rows_of(name)
    form = min(task.forms, key=lambda form: len(form.missing(rows[0])))
    kept = refused = 0
    for case, column, lines in mutated(rows, {column for column in form.columns if column in rows[-1]} | {"extra"}):
        data_file(name, tmp_path).write_text(lines, "utf-8")
        if check(name, tmp_path, case, None if " missing" in case else column):
            kept += 1
        else:
            refused += 1
    assert kept and refused


CELLS = {
    "empty": "", "text": "x", "open": "[", "open dict": "{", "deep": "[" * 5000, "digits": "9" * 5000, "NumPy": "['a' 'b']",
    "NUL": "a\0b", "nan": "nan", "fraction": "1.5", "code": "__import__('os').abort()", "nested": "[['a']]", "lone quote": "['a",
    "minus": "-" * 5000 + "1", "set": "{1, 2}", "tuple key": "{(1, 2): 3}", "bytes": "[b'a']", "control": "\x1b[31m",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_fault_in_every_cell_of_a_csv_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task(name)
    if name.startswith("loogle"):
        monkeypatch.setattr(type(task), "_similarity", staticmethod(lambda prediction, reference: {"rouge-l": 0.0}))
    rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows_of(name)]
    for column in rows[0]:
        for case, cell in CELLS.items():
            write_csv(data_file(name, tmp_path, ".csv"), [rows[0], rows[-1] | {column: cell}])
            check(name, tmp_path, f"{column}: {case}")


def write_csv(file: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    with file.open("w", newline="", encoding=encoding) as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


NAME = "longbench/trec"


@pytest.mark.parametrize("column", ["\x1b[31mred\n", "x" * 100_000, "\ud83d"], ids=["ANSI", "long", "half a pair"])
def test_a_strange_column_name_is_quoted(column: str, tmp_path: Path) -> None:
    rows = [{"context": "c", column: "x"}]
    data_file(NAME, tmp_path).write_text(json.dumps(rows[0]) + "\n", "utf-8")
    assert not check(NAME, tmp_path, "a missing column")
    data_file(NAME, tmp_path).write_text("".join(json.dumps({**row, column: "x"}) + "\n" for row in rows_of(NAME)), "utf-8")
    assert check(NAME, tmp_path, "an extra column") == (column != "\ud83d")
    data_file(NAME, tmp_path).write_text(json.dumps({f"c{i}": i for i in range(2000)}) + "\n", "utf-8")
    assert not check(NAME, tmp_path, "2000 columns")


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_left_out(suffix: str, tmp_path: Path) -> None:
    rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows_of(NAME)]
    file = data_file(NAME, tmp_path, suffix)
    if suffix == ".csv":
        write_csv(file, rows, "utf-8-sig")
    else:
        file.write_text(jsonl(rows), "utf-8-sig")
    want = all_samples(NAME, DATA)
    assert [(s.context, s.references) for s in all_samples(NAME, tmp_path)] == [(s.context, s.references) for s in want]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\0}\0", "ä".encode("latin-1") * 9, b"\0" * 999, os.urandom(999), b"[1, 2]\n", b'"x"\n', b"3\n"]
)
def test_a_file_that_is_something_else_is_one_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    data_file(NAME, tmp_path, suffix).write_bytes(content)
    with pytest.raises(UserError) as caught:
        get_task(NAME).samples(SampleRequest(Tokenizer(), data_dir=tmp_path))
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_damaged_file_is_one_line_or_its_samples(suffix: str, tmp_path: Path) -> None:
    file, draw = data_file(NAME, tmp_path, suffix), random.Random(0)
    rows = rows_of(NAME)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".csv":
        write_csv(file, [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows])
    else:
        file.write_text(jsonl(rows), "utf-8")
    whole = file.read_bytes()
    refused = 0
    for case in range(60):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if case % 3 == 0 else whole)
        for _ in range(draw.randrange(1, 9) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            all_samples(NAME, tmp_path)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and str(file) in str(error) and len(str(error)) < 700
    assert refused > 10


def test_a_file_that_cannot_be_read_is_one_line_and_one_that_is_not_there_is_missing(tmp_path: Path) -> None:
    file = data_file(NAME, tmp_path)
    file.symlink_to("/proc/self/mem")  # reading it is an I/O error
    with pytest.raises(UserError, match=r"trec\.jsonl row 1: cannot be read \(Input/output error\)"):
        get_task(NAME).samples(SampleRequest(Tokenizer(), data_dir=tmp_path))
    for target in ("nowhere", file.name, "/"):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(data.DataMissingError, match=r"trec\.jsonl .* not there"):
            get_task(NAME).samples(SampleRequest(Tokenizer(), data_dir=tmp_path))


@pytest.mark.parametrize("file", ["PaulGrahamEssays.json", "essays.json", "essays.txt", "squad.json", "hotpotqa.json"])
def test_the_texts_of_ruler(file: str, tmp_path: Path) -> None:
    kind = {"P": "niah_single_2", "e": "niah_single_2@own", "s": "qa_1", "h": "qa_2"}[file[0]]
    contents: list[bytes] = [value.encode() for value in VALUES.values()]
    contents += [b"\xff\xfe", b"\0", b"", b"\xef\xbb\xbf[]"]
    for value in VALUES.values():
        qa = f'{{"id": "q", "question": {value}, "answers": [{{"text": {value}}}]}}'
        hotpotqa = '[{{"_id": "q", "question": {}, "answer": "x", "context": {}}}]'
        contents += {
            "niah": [f'{{"text": {value}}}'.encode()],
            "qa_1": [
                f'{{"data": {value}}}'.encode(),
                f'{{"data": [{{"title": "t", "paragraphs": [{{"context": "c", "qas": [{qa}]}}]}}]}}'.encode(),
            ],
            "qa_2": [hotpotqa.format(value, f'[["t", [{value}]]]').encode(), hotpotqa.format('"q"', value).encode()],
        }[kind[:4]]
    for number, content in enumerate(contents):
        path = tmp_path / str(number) / "ruler" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        try:
            get_task(f"ruler/600/{kind}").samples(SampleRequest(WORDS, max_samples=1, data_dir=path.parents[1]))
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 700, content[:80]


class Words(Tokenizer):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]


WORDS = Words()


QUOTED: list[tuple[object, str]] = [
    ("a\x1b[31m\n\u202eb", r"'a\x1b[31m\n\u202eb'"), ("x" * 10**6, "'" + "x" * 196 + "..."), (10**5000, "a value of type int that is"),
    (ValueError("two\nlines\x1b"), "two lines "), ("\ud83d", r"'\ud83d'"), ([1] * 10**5, "[1, 1, "), (None, "None"),
]  # fmt: skip


def test_what_is_quoted_is_short_and_printable() -> None:
    for value, shown in QUOTED:
        text = quoted(value)
        assert text.startswith(shown) and text.isprintable() and len(text) <= 200


# ---- what is wrong with several rows ---------------------------------------------------------------------

QA = "longbench/qasper"


def write_qa(folder: Path, rows: list[tuple[str, str]], name: str = QA, **more: Callable[[int], Any]) -> Path:
    made = [
        {"context": context, "input": question, "answers": ["a"]} | {column: make(i) for column, make in more.items()}
        for i, (context, question) in enumerate(rows)
    ]
    data_file(name, folder).write_text(jsonl(made), "utf-8")
    return folder


@pytest.mark.parametrize("split", ["test", "tuning"])
def test_an_id_that_is_there_twice_is_found_in_either_split(split: str, tmp_path: Path) -> None:
    write_qa(tmp_path, [(f"Text {i}", "Who?") for i in range(40)], _id=lambda i: f"id{min(i, 38)}")
    with pytest.raises(UserError, match=r"qasper\.jsonl row 40: its id is that of row 39 too, got 'longbench/qasper:id38'"):
        get_task(QA).samples(SampleRequest(Tokenizer(), split=split, max_samples=1, data_dir=tmp_path))


def test_a_fault_in_the_data_of_a_task_leaves_the_others(tmp_path: Path) -> None:
    """All rows of both splits are read before the search starts."""
    write_qa(tmp_path, [("Text", "Who?"), ("Text 2", "Who?")], _id=lambda i: "same")
    bad = r'{"context": "half \ud83d", "input": "x", "answers": ["a"], "all_classes": ["a"]}'
    data_file(NAME, tmp_path).write_text(jsonl(rows_of(NAME)) + bad + "\n", "utf-8")
    row = len(rows_of(NAME)) + 1
    tasks = [QA, NAME, "ruler/100/fwe", "infinite_bench/passkey"]
    for phases in ((1,), (2,), (1, 2)):
        settings = Settings(models=("m",), tasks=tuple(tasks), phases=phases, data_dir=tmp_path, search_max_requests=1)
        found = check_samples(settings, tasks, {"m": Tokenizer()})
        assert found.tasks == ["infinite_bench/passkey"] and set(found.missing) == set(tasks[:3])
        assert "qasper.jsonl row 2: its id is that of row 1 too" in found.missing[QA]
        assert f"trec.jsonl row {row}: column 'context' holds half of a surrogate pair" in found.missing[NAME]
        assert found.missing["ruler/100/fwe"].startswith("ruler/100/fwe: a length of 100 tokens is too short: the smallest")


def test_a_long_line_is_cut_before_it_is_encoded(tmp_path: Path) -> None:
    write_qa(tmp_path, [("word " * 2_400_000, "Who?"), ("Text", "Who?")])
    tokenizer = Tokenizer()
    (sample,) = [sample for sample in all_samples(QA, tmp_path) if len(sample.context) > 10**6]
    prompt = build_prompt(sample, tokenizer, max_context_length=1000, max_new_tokens=9, use_chat_template=False)
    assert len(prompt.context_ids) + len(prompt.question_ids) + 9 == 1000
    assert abs(prompt.truncated_tokens / 12_000_000 - 1) < 0.01 and tokenizer.encoded < 6_000_000
