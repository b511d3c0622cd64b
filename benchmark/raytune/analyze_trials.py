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
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.report.search_run import Run

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(argv: list[str] | None = None) -> int:
    """Analyse or compare; the exit code."""
    options = parse_arguments(argv)
    from benchmark.command_line import fail
    from sparse_attention_hub.errors import UserError

    try:
        if options.output_dir.exists() and not options.output_dir.is_dir():
            raise UserError(f"--output-dir {options.output_dir}: is a file, not a folder")
        if options.compare:
            if options.run:
                raise UserError("--run and --compare cannot be given together: --compare names its two runs")
            compare(options.optimal_configs_dir, options.compare, options.output_dir)
        else:
            analyze(options.optimal_configs_dir, options.run, options.output_dir)
    except UserError as error:
        return fail(error)
    except OSError as error:
        print(f"error: {error.filename or options.output_dir}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def analyze(configs_dir: Path, name: str | None, output: Path) -> None:
    """Print and save everything about one run. UserError if it cannot be read."""
    from benchmark.report.search_tables import describe, hyperparameter_effects
    from benchmark.storage.results import write_text

    run = _read(choose_search(configs_dir, name))
    _quiet_optuna()
    effects = {id(study): found for study in run.studies if (found := hyperparameter_effects(study))}
    text = describe(run, effects)
    print(text)
    write_text(output / "analysis.txt", text + "\n")
    write_text(output / "all_trials_data.csv", trials_csv(run))
    from benchmark.report.search_plots import draw_all

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

    first, second = (_read(choose_run(configs_dir, name)) for name in names)
    text = compare_table(first, second)
    print(text)
    write_text(output / "comparison.txt", text + "\n")
    write_text(output / "comparison.csv", _csv(compare_rows(first, second)))
    print(f"\nWritten to {output}: comparison.txt, comparison.csv")


def trials_csv(run: Run) -> str:
    """One row per trial; a trial that several levels share has one row. error, density and kv_fraction are those of the highest
    rung up to the forced forward, score is that of generation; columns of every rung follow."""
    parameters = list(dict.fromkeys(name for study in run.studies for trial in study.trials for name in trial.params))
    rows = []
    for study in run.studies:
        bests = {level.name: level.trial.trial_id for level in study.levels if level.trial is not None}
        for number, trial in enumerate(study.trials):
            row: dict[str, Any] = {
                "model": study.model,
                "task": study.task,
                "combination": study.combination,
                "levels": " ".join(level.name for level in study.levels),
                "best_of": " ".join(name for name, best in bests.items() if best == trial.trial_id),
                "trial_id": trial.trial_id,
                "number": number,
                "status": trial.status,
                "error_message": trial.error_message,
                "rung": trial.reached,
                "pruned_at": trial.pruned_at,
                "error": trial.last("error"),
                "density": trial.last("density"),
                "kv_fraction": trial.last("kv_fraction"),
                "score": trial.figure("score", 3),
                "reproduced": trial.figure("reproduced", 2),
                "seconds": trial.seconds,
            }
            for rung in range(len(run.rung_names)):
                for figure in ("error", "density", "seconds"):
                    row[f"rung{rung}_{figure}"] = trial.figure(figure, rung)
            rows.append(row | {f"config/{name}": trial.params.get(name) for name in parameters})
    return _csv(rows)


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _quiet_optuna() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from benchmark.command_line import Parser

    parser = Parser(prog="analyze_trials.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--optimal-configs-dir",
        type=Path,
        metavar="DIR",
        default=Path("optimal_configs"),
        help="where searches are (%(default)s)",
    )
    parser.add_argument("--run", metavar="RUN", help="which search (the newest), as run_20240315_143022")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", default=Path("trial_analysis"), help="where results go (%(default)s)"
    )
    parser.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="two searches side by side instead")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
