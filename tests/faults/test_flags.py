"""Every flag of every command with bad values, and every folder flag with bad paths: one line on stderr, exit code 2, nothing
written. The tables are made from the parsers, so that a new flag is in them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import sparse_attention_hub.models as models
from benchmark import tasks
from benchmark.command_line import Parser
from benchmark.raytune import analyze_trials, plan, run_full_benchmark
from benchmark.report import __main__ as report

Command = Callable[[list[str]], int]
BAD = {
    "empty": "",
    "huge": "9" * 400,
    "too long for an int": "9" * 5000,
    "negative": "-7",
    "NaN": "nan",
    "infinite": "-inf",
    "control characters": "\x1b[31mred\nline",
    "wrong type": "[1]",
}
#: What a folder or file may be called, and where it is not looked for.
NAMES = {"negative", "NaN", "infinite", "wrong type", "huge"}
#: Values that are fine, by flag.
FINE = {
    "--models": set(BAD) - {"empty"},  # test_bad_models_are_one_line
    "--output-dir": NAMES | {"control characters"},
    "--optimal-configs-dir": NAMES | {"control characters"},
    "--benchmark-results-dir": NAMES | {"control characters"},
    "--ray-results-dir": NAMES | {"control characters"},
    "--ray-address": set(BAD) - {"empty"},  # looked up when Ray is started
}


def run(arguments: list[str]) -> int:
    """The main program up to the end of its checks."""
    phase = ["--phase", "2"] if arguments[0].startswith(("--config-run", "--rescore")) else []
    return run_full_benchmark.main(["--debug", "--dry-run", "--device=cpu", *phase, *arguments])


def analyze(arguments: list[str]) -> int:
    return analyze_trials.main(arguments)


def write_report(arguments: list[str]) -> int:
    return report.main(arguments)


COMMANDS: dict[str, Command] = {"run": run, "analyze": analyze, "report": write_report}


def flags_of(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """The flags of a command that take values, as its own parser has them."""
    found: list[argparse.Action] = []

    def collect(parser: Parser, *_: object) -> argparse.Namespace:
        for action in parser._actions:
            if action.nargs != 0 and action.option_strings:
                found.append(action)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", collect)
        with pytest.raises(KeyboardInterrupt):
            command([""])
    return found


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without models and samples: what is tested comes before them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "check_model", lambda *_, **__: SimpleNamespace(chat_template=""))
    monkeypatch.setattr(plan, "check_samples", lambda settings, names, tokenizers: plan.SampleCheck(names, {}, {}, {}))
    monkeypatch.setattr(plan, "describe", lambda *_: "the plan")


def outcome(command: Command, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = command(arguments)
    except SystemExit as stopped:  # argparse
        assert isinstance(stopped.code, int)
        code = stopped.code
    return code, capsys.readouterr().err


def is_one_line(problem: str) -> bool:
    return problem.startswith("error: ") and problem.endswith("\n") and len(problem) < 1100 and problem[:-1].isprintable()


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_values_of_every_flag(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, wrong = flags_of(COMMANDS[name], monkeypatch), []
    assert len(flags) >= {"run": 30, "analyze": 4, "report": 1}[name], "the table follows the parser"
    for action in flags:
        flag = action.option_strings[-1]
        for kind, value in BAD.items():
            arguments = [f"{flag}={value}"] if action.nargs != 2 else [flag, value, value]
            code, problem = outcome(COMMANDS[name], arguments, capsys)
            if code == 0 and kind in FINE.get(flag, ()):
                continue
            if code != 2 or not is_one_line(problem):
                wrong.append((flag, kind, code, problem[:1200]))
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def paths(base: Path) -> dict[str, str]:
    (base / "nowhere").symlink_to(base / "absent")
    (base / "loop").symlink_to(base / "loop")
    (base / "file").write_text("")
    return {
        "a link to nothing": str(base / "nowhere"),
        "below a link to nothing": str(base / "nowhere" / "x"),
        "a loop": str(base / "loop"),
        "below a loop": str(base / "loop" / "x"),
        "a file": str(base / "file"),
        "below a file": str(base / "file" / "x"),
        "a long name": str(base / ("n" * 300)),
        "a long name below a new folder": str(base / "new" / ("n" * 300)),
        "a long name of few characters": str(base / ("名" * 100)),
        "a long path": str(base / "/".join(["d" * 100] * 50)),
        "of nobody": "~nobody-of-this-name/x",
    }


FOLDERS: list[tuple[Command, str]] = [
    *((run, flag) for flag in ("--optimal-configs-dir", "--benchmark-results-dir", "--ray-results-dir", "--data-dir")),
    *((analyze, flag) for flag in ("--optimal-configs-dir", "--output-dir")),
    (write_report, "--output"),
    (write_report, "DIR"),
]


@pytest.mark.parametrize(("command", "flag"), FOLDERS)
def test_bad_paths_of_every_folder(command: Command, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, path in paths(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        arguments = [path] if flag == "DIR" else [flag, f"{path}/page.html" if flag == "--output" else path]
        code, problem = outcome(command, arguments, capsys)
        assert code == 2, (flag, kind, problem)
        assert is_one_line(problem), problem[:2000]
        assert flag in problem or flag == "DIR", problem
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("phase", ["1", "2"])
def test_all_folders_are_checked_before_anything_starts(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "check_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for flag in ("--optimal-configs-dir", "--benchmark-results-dir", "--ray-results-dir"):
        code, problem = outcome(run, [flag, "loop", "--phase", phase], capsys)
        assert code == 2 and flag in problem


def test_home_is_expanded_after_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = run_full_benchmark.parse_arguments(["--benchmark-results-dir=~/x", "--models", "./tiny", "../other"])
    settings = plan.make_settings(options, {"tasks": ["t"]})
    assert settings.benchmark_results_dir == tmp_path / "x"
    assert settings.models == ("tiny", str(tmp_path.parent / "other")), "names of result folders begin with no dot"


@pytest.mark.parametrize("name", ["./no/such", "../no", "a" * 5000, "\x1b[31m", "a\nb", "..", "nan", "[1]"])
def test_bad_models_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()  # the real check
    code, problem = outcome(run, ["--models", name], capsys)
    assert code == 2
    assert is_one_line(problem), problem[:2000]


def test_unknown_names_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("x" * 100_000, "ruler/" + "9" * 500, "ruler/4096/" + "x" * 100_000, "\x1b]0;title\x07"):
        for flag in ("--tasks", "--configs"):
            code, problem = outcome(run, [flag, value], capsys)
            assert code == 2
            assert is_one_line(problem), problem[:2000]
    assert tasks.available_tasks()
