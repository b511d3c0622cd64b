#!/usr/bin/env python3
"""What a search found: tables, plots and one CSV of every trial.

    python benchmark/raytune/analyze_trials.py              # the newest run in ./optimal_configs, else the sample run
    python benchmark/raytune/analyze_trials.py --run run_20240315_143022
    python benchmark/raytune/analyze_trials.py --compare run_20240315_143022 run_20240316_090000

Writes into --output-dir: analysis.txt (what is printed), all_trials_data.csv, and each plot as .svg and .png; --compare
writes comparison.txt and comparison.csv. Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.report.search_run import Run

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(argv: list[str] | None = None) -> int:
    """Analyse or compare; the exit code."""
    from benchmark.command_line import check_folder, run_command
    from sparse_attention_hub.errors import UserError

    options = parse_arguments(argv)

    def command() -> int:
        check_folder("--output-dir", options.output_dir)
        check_folder("--optimal-configs-dir", options.optimal_configs_dir, write=False)
        if options.compare:
            if options.run:
                raise UserError("--run and --compare cannot be given together: --compare names its two runs")
            compare(options.optimal_configs_dir, options.compare, options.output_dir)
        else:
            analyze(options.optimal_configs_dir, options.run, options.output_dir)
        return 0

    return run_command(command)


def analyze(configs_dir: Path, name: str | None, output: Path) -> None:
    """Print and save everything about one run. UserError if it cannot be read."""
    import optuna

    from benchmark.report.search_budgets import budgets_table
    from benchmark.report.search_plots import draw_all
    from benchmark.report.search_tables import describe, hyperparameter_effects
    from benchmark.storage.results import write_text

    run = _read(choose_search(configs_dir, name))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    effects = {id(study): found for study in run.studies if (found := hyperparameter_effects(study))}
    text = f"{describe(run, effects)}\n\n{budgets_table(run)}"
    print(text)
    write_text(output / "analysis.txt", text + "\n")
    write_text(output / "all_trials_data.csv", trials_csv(run))
    plots = draw_all(run, effects, output)
    print(f"\nWritten to {output}: analysis.txt, all_trials_data.csv and {len(plots)} plots (.svg and .png):")
    print("\n".join(f"  {path.stem}" for path in plots))


def choose_search(configs_dir: Path, name: str | None) -> Path:
    """The named run, else the user's newest one, else the sample run of the repository. UserError if there is none."""
    from benchmark.report.search_run import choose_run
    from sparse_attention_hub.errors import UserError

    try:
        return choose_run(configs_dir, name)
    except UserError:
        sample = configs_dir / "sample"
        if name is not None or not sample.is_dir():
            raise
    run = choose_run(sample, None)
    print(f"No search in {configs_dir} yet; this is the sample run {run}.\n")
    return run


def _read(folder: Path) -> Run:
    """Read a run; each damaged file is named on stderr and left out."""
    from benchmark.report.search_run import read_run

    run = read_run(folder)
    for problem in run.left_out:
        print(f"left out: {problem}", file=sys.stderr)
    return run


def compare(configs_dir: Path, names: list[str], output: Path) -> None:
    """Print and save the best of two runs side by side."""
    from benchmark.report.search_run import choose_run
    from benchmark.report.search_tables import compare_rows, compare_table
    from benchmark.storage.results import write_text

    first, second = (_read(choose_run(configs_dir, name, "--compare")) for name in names)
    rows = compare_rows(first, second)
    text = compare_table(first, second, rows)
    print(text)
    write_text(output / "comparison.txt", text + "\n")
    write_text(output / "comparison.csv", _csv(rows))
    print(f"\nWritten to {output}: comparison.txt, comparison.csv")


def trials_csv(run: Run) -> str:
    """One row per trial; a trial that several levels share has one row. error, density and kv_fraction are those of the highest
    rung up to the forced forward, score is that of generation; columns of every rung follow."""
    rows = []
    for study in run.studies:
        for number, trial in enumerate(study.trials):
            row: dict[str, object] = {
                "model": study.model,
                "task": study.task,
                "combination": study.combination,
                "levels": " ".join(level.masker_name for level in study.levels),
                "best_of": " ".join(level.masker_name for level in study.levels if level.best_trial_id == trial.trial_id),
                "trial_id": trial.trial_id,
                "number": number,
            }
            names = ("status", "error_message", "rung", "pruned_at", "error", "density", "kv_fraction", "score")
            row |= {name: getattr(trial, name) for name in names}
            row |= {"reproduced": trial.figure("reproduced", 2), "seconds": trial.seconds}
            row["head_budgets"] = trial.table and trial.table.by
            for rung in range(len(run.rung_names)):
                for figure in ("error", "density", "seconds"):
                    row[f"rung{rung}_{figure}"] = trial.figure(figure, rung)
            row |= {f"config/{name}": value for name, value in trial.params.items()}
            rows.append(row)
    return _csv(rows)


def _csv(rows: list[dict[str, Any]]) -> str:
    """Rows as a CSV file that a spreadsheet can open safely."""
    import pandas as pd

    from benchmark.storage.tables import cell

    safe = [{name: cell(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
    text: str = pd.DataFrame(safe, dtype=object).to_csv(index=False)
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from benchmark.command_line import Parser, folder, text

    parser = Parser(prog="analyze_trials.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimal-configs-dir", type=folder, metavar="DIR", default="optimal_configs", help="where searches are (%(default)s)")
    add("--run", type=text, metavar="RUN", help="which search (the newest), as run_20240315_143022")
    add("--output-dir", type=folder, metavar="DIR", default="trial_analysis", help="where results go (%(default)s)")
    add("--compare", type=text, nargs=2, metavar=("RUN_A", "RUN_B"), help="two searches side by side instead")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
