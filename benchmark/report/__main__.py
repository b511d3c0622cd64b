"""The report of a results folder: one HTML file that opens anywhere, without network.

    python -m benchmark.report                            # writes benchmark_results/report.html, else the sample run's
    python -m benchmark.report results_a                  # writes results_a/report.html
    python -m benchmark.report results_a results_b        # compares two: writes comparison.html into the current folder
    python -m benchmark.report results_a --output page.html

Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.command_line import Parser, check_folder, folder, run_command
from sparse_attention_hub.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Write the page that the arguments ask for; the exit code."""
    parser = Parser(
        prog="python -m benchmark.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=folder, metavar="DIR", help="a benchmark results folder, or two to compare")
    parser.add_argument("--output", type=folder, metavar="FILE", help="the file to write")
    options = parser.parse_args(argv)
    return run_command(lambda: write(options.folders, options.output))


def write(folders: list[Path], output: Path | None) -> int:
    from benchmark.report.page import write_comparison, write_report  # here, so that --help is quick

    if len(folders) > 2:
        raise UserError(f"give one results folder, or two to compare, got {len(folders)}")
    if output is not None:
        check_folder("--output", output.parent)
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder; give a file name")
    for results in folders:
        check_folder("DIR", results, write=False)
    if len(folders) == 2:
        path = write_comparison(folders[0], folders[1], output)
    else:
        path = write_report(folders[0] if folders else _default_folder(), output)
    print(f"report: {path}")
    return 0


def _default_folder() -> Path:
    """./benchmark_results, or the sample run in it until there are results."""
    own = Path("benchmark_results")
    sample = own / "sample"
    if any(own.glob("*/*/*/metrics.json")) or not sample.is_dir():
        return own
    print(f"No results in {own} yet; this is the sample run {sample}.")
    return sample


if __name__ == "__main__":
    sys.exit(main())
