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

from benchmark.command_line import Parser, fail
from sparse_attention_hub.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Write the page that the arguments ask for; the exit code."""
    parser = Parser(
        prog="python -m benchmark.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="a benchmark results folder, or two to compare")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write")
    options = parser.parse_args(argv)
    from benchmark.report.page import write_comparison, write_report  # here, so that --help is quick

    try:
        if len(options.folders) > 2:
            raise UserError(f"give one results folder, or two to compare, got {len(options.folders)}")
        if options.output is not None and options.output.is_dir():
            raise UserError(f"--output {options.output}: is a folder; give a file name")
        if len(options.folders) == 2:
            path = write_comparison(options.folders[0], options.folders[1], options.output)
        else:
            path = write_report(options.folders[0] if options.folders else _default_folder(), options.output)
    except UserError as error:
        return fail(error)
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
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
