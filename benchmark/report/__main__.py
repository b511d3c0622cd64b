"""The report of a results tree: one HTML file that opens anywhere, without network.

    python -m benchmark.report benchmark_results                    # writes benchmark_results/report.html
    python -m benchmark.report results_a results_b                  # writes comparison.html into the current folder
    python -m benchmark.report benchmark_results --output page.html

Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.command_line import Parser
from sparse_attention_hub.errors import UserError


def write_report(results_dir: Path, output: Path | None = None) -> Path:
    """Write the report of all results under a folder, by default into it; its path. UserError if there are none."""
    from benchmark.report.data import read_tree
    from benchmark.report.page import report_page
    from benchmark.storage.results import write_text

    path = output or results_dir / "report.html"
    write_text(path, report_page(read_tree(results_dir)))
    return path


def write_comparison(first: Path, second: Path, output: Path | None = None) -> Path:
    """Write the comparison of two results trees, by default ./comparison.html; its path."""
    from benchmark.report.data import read_tree
    from benchmark.report.page import comparison_page
    from benchmark.storage.results import write_text

    path = output or Path("comparison.html")
    write_text(path, comparison_page(read_tree(first), read_tree(second)))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmark.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a benchmark results folder, or two to compare")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes")
    options = parser.parse_args(argv)
    try:
        if len(options.folders) > 2:
            raise UserError(f"give one results folder, or two to compare, got {len(options.folders)}")
        if options.output is not None and options.output.is_dir():
            raise UserError(f"--output {options.output}: is a folder; name a file")
        if len(options.folders) == 2:
            path = write_comparison(*options.folders, options.output)
        else:
            path = write_report(options.folders[0], options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
