"""The command line: bad input is one line and exit code 2 with nothing written; plans; help without heavy imports."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmark.report.__main__ as report
from benchmark.command_line import run_command
from benchmark.raytune import analyze_trials, plan, run_full_benchmark
from benchmark.raytune.configurations import choose_configs
from benchmark.raytune.plan import make_settings
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs, main, parse_arguments
from benchmark.settings import Settings, as_sparse_configs, snake_case
from benchmark.workers import pools
from sparse_attention_hub import OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig, export
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers import drawing

SCRIPT = Path(run_full_benchmark.__file__)
ROOT = SCRIPT.parents[2]
SIZES = ("sink_size", "window_size", "heavy_size", "sampling_rate", "base_rate_sampling")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = {
    "unknown task": (["--tasks", "rulr/4096"], "rulr"),
    "task without a subset": (["--tasks", "loogle"], "needs a subset"),
    "unknown subset": (["--tasks", "loogle/nothing"], "loogle/nothing"),
    "unknown configuration": (["--configs", "sink_locl_10pct"], "sink_locl_10pct"),
    "unknown model": (["--models", "./no/such/folder"], "no/such/folder"),
    "unreachable model": (["--models", "meta-llama/Llama-3.1-8B-Instruct"], "needs no network"),
    "zero samples": (["--num-samples", "0"], "--num-samples"),
    "negative requests": (["--max-requests", "-3"], "--max-requests"),
    "zero timeout": (["--search-timeout", "0"], "--search-timeout"),
    "objective": (["--objective", "fastest"], "--objective"),
    "dtype": (["--dtype", "int4"], "--dtype"),
    "backend": (["--attention-backend", "magic"], "--attention-backend"),
    "data folder": (["--data-dir", "nowhere"], "--data-dir"),
    "config run in phase 1": (["--phase", "1", "--config-run", "run_20240315_143022"], "--phase 2"),
    "unknown config run": (["--phase", "2", "--config-run", "run_20240315_143022"], "run_20240315_143022"),
    "nothing searched": (["--phase", "2"], "--phase 1"),
    "no GPU": (["--device", "cuda:7"], "cuda:7"),
    "no device of a cluster": (["--device", "nonsense", "--ray-address", "local"], "--device must be auto, cpu, cuda"),
    "a million workers": (["--max-concurrent-benchmarks", "1000000"], "--max-concurrent-benchmarks is at most 1024"),
    "no GPU for the kernels": (["--device", "cpu", "--attention-backend", "triton"], "--attention-backend triton"),
    "search over shards": (["--device", "sharded"], "--phase 2 --device sharded"),
    "no sparse row": (["--sparse-from", "decode", "--search-max-new-tokens", "1"], "--search-max-new-tokens 1"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "seed of too many bits": (["--seed", str(2**32)], "--seed"),
    "endless timeout": (["--search-timeout", "nan"], "--search-timeout"),
    "boundless traces": (["--trace-budget-gb", "inf"], "--trace-budget-gb"),
    "traces smaller than a layer": (
        ["--phase", "1", "--tasks", "infinite_bench/passkey", "--trace-budget-gb", "1e-6"],
        "--trace-budget-gb",
    ),
    "models of one folder": (["--models", "some/model", "some_model"], "some_model"),
    "a folder that cannot be made": (["--phase", "1", "--optimal-configs-dir", "/proc/found"], "--optimal-configs-dir"),
    "a folder in a file": (["--phase", "1", "--ray-results-dir", f"{__file__}/ray"], "--ray-results-dir"),
    "a folder that is read-only": (["--phase", "2", "--benchmark-results-dir", "/proc/results"], "--benchmark-results-dir"),
    "no level": (["--levels", "0"], "--levels must be percentages from 0.01 to 100, got 0"),
    "a level above all keys": (["--levels", "5", "101"], "got 101"),
    "a level that is no number": (["--levels", "nan"], "got nan"),
    "a configuration of another level": (["--levels", "2", "--configs", "sink_local_10pct"], "sink_local_10pct"),
    "rescoring without answers": (["--phase", "2", "--rescore", "--configs", "dense"], "--rescore"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    case: str, empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, named = BAD[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = main(["--debug", *arguments])
    printed = capsys.readouterr().err.strip()
    assert code == 2, printed
    assert named in printed and len(printed.splitlines()) == 1 and printed.startswith("error: ")
    assert list(empty_folder.iterdir()) == []


def test_bad_choices_of_argparse_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--phase", "3"], ["--num-samples", "many"], ["--sparse-from", "prefill"], ["--modles", "x"]):
        assert_one_line_and_2(main, arguments, capsys)
    assert_one_line_and_2(analyze_trials.main, ["--rnu", "x"], capsys)
    assert_one_line_and_2(report.main, ["folder", "--outptu", "x"], capsys)


def assert_one_line_and_2(command: Callable[[list[str]], int], arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    printed = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(printed.splitlines()) == 1
    assert printed.startswith("error: ") and arguments[-2] in printed and "--help" in printed


def test_what_is_listed_twice_is_run_once() -> None:
    options = parse_arguments(["--models", "a", "b", "a", "--tasks", "ruler/4096/vt", "ruler/4096/vt"])
    settings = make_settings(options, {})
    assert settings.models == ("a", "b") and settings.tasks == ("ruler/4096/vt",)
    chosen = choose_configs(get_all_sparse_configs(), ["dense", "dense"])
    assert [config.name for config in chosen] == ["dense"]


def test_a_context_too_short_for_the_question(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--tasks", "infinite_bench/passkey"]
    assert main(["--debug", "--phase", "1", "--search-max-context-length", "20", *tasks]) == 2
    assert "--search-max-context-length" in capsys.readouterr().err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "should be an object, got [1]"),
        (json.dumps({"model": "m", "task": "t", "masker_name": "x", "sparse_config": None}), "field sparse_config"),
    ],
)
def test_foreign_files_among_the_results(
    content: str, problem: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = empty_folder / "optimal_configs" / "run_20240315_143022"
    run.mkdir(parents=True)
    (run / "notes.json").write_text(content)
    assert main(["--debug", "--phase", "2"]) == 2
    printed = capsys.readouterr().err
    assert problem in printed and "notes.json" in printed and len(printed.strip().splitlines()) == 1


def test_the_plan(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    assert main(["--debug", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("15 studies", "at most 180 trials", "ruler/1024/fwe", "Phase 2", "GB", "benchmark_summary.json"):
        assert part in printed
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "limit", "address", "words"),
    [
        (8, None, None, "8, one per GPU (of 8)"),
        (8, 3, None, "3, one per GPU (of 8)"),
        (0, 2, None, "2 on auto, 4 CPU threads each"),
        (0, None, "auto", "one per GPU of the Ray cluster, or per two CPUs"),
        (0, 5, "auto", "one per GPU of the Ray cluster, or per two CPUs, at most 5"),
    ],
)
def test_the_plan_names_the_workers(
    gpus: int, limit: int | None, address: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (plan, pools):
        monkeypatch.setattr(module, "visible_gpus", lambda: [str(gpu) for gpu in range(gpus)])
    monkeypatch.setattr(pools, "usable_cores", lambda: 8)
    assert plan._workers(Settings((), (), max_concurrent_benchmarks=limit, ray_address=address)) == words


DRY = {
    "unknown model": (["--models", "./no/such/folder"], "no/such/folder"),
    "unsupported model": (["--models", "encoder"], "encoder"),
    "no such run": (["--phase", "2", "--config-run", "run_20240315_143022"], "run_20240315_143022"),
    "a folder that cannot be made": (["--optimal-configs-dir", "/proc/found"], "--optimal-configs-dir"),
    "too short a context": (["--tasks", "infinite_bench/passkey", "--search-max-context-length", "20"], "--search-max-context"),
    "no tuning samples": (["--tasks", "infinite_bench/passkey"], "has no tuning samples"),
}


@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_checks_what_a_run_checks(
    case: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_folder / "encoder").mkdir()
    (empty_folder / "encoder/config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    if case == "no tuning samples":
        message = "task 'infinite_bench/passkey' has no tuning samples"

        def none(*_: Any) -> Any:
            raise UserError(message)

        monkeypatch.setattr("benchmark.search.samples.tuning_samples", none)
    arguments, named = DRY[case]
    assert main(["--debug", "--dry-run", *arguments]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and len(printed.err.strip().splitlines()) == 1 and printed.out == ""


def test_traces_have_the_lengths_of_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--phase", "1", "--tasks", "ruler/1024/fwe", "--search-max-requests", "1", "--search-max-context-length", "8192"]
    assert main(["--debug", "--dry-run", "--device", "cpu", "--dtype", "float32", *flags]) == 0
    # 30 layers of 3 kv heads with 64 channels, keys and values of 4 bytes, for 1024 tokens
    assert "about 0.05 GB of keys and values" in capsys.readouterr().out


def test_the_plan_says_that_a_model_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--phase", "2", "--configs", "dense", "--tasks", "infinite_bench/passkey", "--max-context-length", "64000"]
    assert main(["--debug", "--dry-run", *flags]) == 0
    assert "takes 8192 tokens: prompts are at most that long, not --max-context-length 64000" in capsys.readouterr().out


def test_a_console_that_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        print("\u540d\u524d")
        raise UserError("model '\u540d' is not there")

    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert run_command(fails) == 2
    written = {}
    for name, stream in streams.items():
        stream.flush()
        written[name] = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert written["stdout"] == b"\\u540d\\u524d\n" and b"model '\\u540d' is not there" in written["stderr"]


@pytest.mark.parametrize("command", ["draw", "export"])
def test_commands_of_the_library_on_such_a_console(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    out = tmp_path / "\u540d.png"
    if command == "draw":
        drawing.main("sink", ["--out", str(out)])
    else:
        (file,) = ROOT.glob("optimal_configs/sample/run_*/*_ruler_1024_fwe_sink_local_10pct.json")
        assert export.main([str(file), "--to", str(out)]) == 0
    stream.flush()
    assert out.exists() and b"\\u540d.png" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_what_a_file_system_refuses_is_one_line(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    assert run_command(fails) == code
    assert capsys.readouterr().err == f"error: /some/file: {os.strerror(number)}\n"


@pytest.mark.parametrize("folder", [".", "benchmark/raytune"])
def test_help_is_fast_and_imports_nothing_heavy(folder: str) -> None:
    code = (
        "import sys, runpy; sys.argv = ['run_full_benchmark.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'optuna', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, check=True, capture_output=True, timeout=60)
    best = min(_seconds([sys.executable, str(SCRIPT), "--help"], ROOT / folder) for _ in range(3))
    assert best < 0.5


def _seconds(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return time.perf_counter() - started


def test_every_flag_is_documented_and_every_setting_has_a_flag() -> None:
    page = (ROOT / "docs/command_line.md").read_text()
    given = vars(parse_arguments([]))
    for name in given:
        assert f"--{name.replace('_', '-')}" in page, name
    fields = set(Settings.__dataclass_fields__) - {"phases"}
    assert fields <= given.keys()


def test_defaults_are_the_documented_ones() -> None:
    settings = Settings(models=("m",), tasks=("t",))
    assert (settings.num_samples, settings.search_timeout, settings.search_max_new_tokens) == (50, 900, 20)
    assert (settings.search_max_context_length, settings.search_max_requests) == (8192, 10)
    assert (settings.benchmark_timeout, settings.max_new_tokens, settings.max_context_length) == (7200, 200, 64000)
    assert (settings.seed, settings.sparse_from, settings.micro_metrics, settings.objective) == (
        0,
        "question",
        "sample",
        "default",
    )


def test_configurations_are_named_after_their_maskers() -> None:
    configs = as_sparse_configs(get_all_sparse_configs())
    assert configs[0].name == "dense" and len({config.name for config in configs}) == len(configs)
    for config in configs[1:]:
        assert config.masker_classes is not None and config.budget is not None
        maskers = "_".join(snake_case(masker.__name__) for masker in config.masker_classes)
        assert config.name == f"{maskers}_{round(config.budget * 100)}pct"
    assert {config.budget for config in configs[1:]} == {0.05, 0.1, 0.25, 0.5}


def test_levels_name_configurations_and_set_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--configs", "list", "--levels", "2", "20", "0.5", "2"]) == 0
    names = [name for name in capsys.readouterr().out.splitlines() if not name.startswith("preset:")]
    assert {name.rpartition("_")[2] for name in names} == {"dense", "2pct", "20pct", "0.5pct"} and len(names) % 3 == 1
    for config in as_sparse_configs(get_all_sparse_configs([0.5, 1, 2, 3, 7, 20, 80, 100]))[1:]:
        assert config.config is not None and config.budget is not None
        sizes = [getattr(masker, name, 0) for masker in config.config.masker_configs for name in SIZES]
        if config.family.endswith("_twilight"):  # which leaves few of its candidates
            sizes = [size / 3 for size in sizes if isinstance(size, float)]
        assert 0 < sum(size for size in sizes if isinstance(size, float)) <= config.budget, config.name
        assert as_sparse_configs([(config.name, config.config, list(config.masker_classes or ()))])[0].budget == config.budget


def test_levels_apply_to_the_combinations_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--levels", "2", "0.5", "--tasks", "infinite_bench/passkey", "--phase", "1"]
    assert main(["--debug", "--dry-run", *flags]) == 0
    printed = capsys.readouterr().out
    assert "configurations: 10 sparse and dense" in printed and "sink_local_oracle_top_k (2%, 0.5%)" in printed


def test_an_oracle_cannot_meet_a_budget_on_kv_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--budget-on",
        "kv",
        "--tasks",
        "infinite_bench/passkey",
        "--configs",
        "sink_local_oracle_top_k_10pct",
        "sink_local_*_25pct",
    ]
    assert main(["--debug", "--dry-run", *flags]) == 0
    printed = capsys.readouterr().out
    assert "left out sink_local_oracle_top_k_10pct, " in printed and "an oracle reads every key to choose" in printed
    assert "sink_local_quest_top_k (25%)" in printed and "| sink_local_oracle_top_k" not in printed


@pytest.mark.parametrize(("signature", "names"), [("", ["own_5pct"]), ("levels", ["own_2pct", "own_0.5pct"])])
def test_a_plugin_may_take_the_levels(signature: str, names: list[str], empty_folder: Path, capsys: Any) -> None:
    name = f"own_{signature or 'none'}"  # a module of its own
    (empty_folder / f"{name}.py").write_text(
        "from sparse_attention_hub import OracleTopKConfig, ResearchAttentionConfig\n"
        f"def get_all_sparse_configs({signature}):\n"
        f"    return [(f'own_{{level:g}}pct', ResearchAttentionConfig([OracleTopKConfig(0.9 * level / 100)]), [OracleTopKConfig])\n"
        f"            for level in {signature or [5]}]\n"
    )
    assert main(["--configs", "list", "--levels", "2", "0.5", "--plugin", f"{name}.py"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("own")] == names


def test_the_third_element_must_name_the_maskers() -> None:
    config = ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(8)])
    with pytest.raises(ValueError, match="third element"):
        as_sparse_configs([("x", config, [SinkMaskerConfig])])
    with pytest.raises(ValueError, match="twice"):
        as_sparse_configs([("dense", None, None), ("dense", None, None)])


def test_patterns_choose_configurations_in_order() -> None:
    chosen = choose_configs(get_all_sparse_configs(), ["sink_local_oracle_*_10pct", "dense"])
    assert [config.name for config in chosen][:2] == ["dense", "sink_local_oracle_top_k_10pct"]


def test_snake_case() -> None:
    assert snake_case("HashAttentionTopKMaskerConfig") == "hash_attention_top_k" and snake_case("PQCacheConfig") == "pq_cache"
    assert snake_case("H2OConfig") == "h2o" and snake_case("SnapKVConfig") == "snap_kv"


def test_ctrl_c_outside_the_phases_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_full_benchmark, "run", interrupt)
    assert main(["--debug"]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
