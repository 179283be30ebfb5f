"""Options of `cortexicon benchmark`; the work is in `training/benchmark.py`."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser(
        "benchmark", help="systems x targets x folds x seeds in one table, with controls"
    )
    command.add_argument("suite", metavar="SUITE", type=Path, help="see evaluation/suites")
    command.add_argument("--out", type=Path, required=True, help="folder of cells and results")
    command.add_argument("--cohort", type=Path, default=None, help="in place of the suite's")
    command.add_argument("--jobs", type=int, default=1, help="cells at once (default: 1)")
    command.add_argument("--only", metavar="SYSTEM", nargs="+", default=None, help="these systems")
    command.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    command.add_argument("--list", action="store_true", help="show the cells and run nothing")
    command.add_argument(
        "--report", action="store_true", help="score and report what is there, run nothing"
    )


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `run_benchmark`."""
    names = ("out", "cohort", "jobs", "only", "retry_failed")
    return {
        "suite_path": arguments.suite,
        **{name: getattr(arguments, name) for name in names},
        "show": arguments.list,
        "report_only": arguments.report,
    }
