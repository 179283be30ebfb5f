"""Commands of `cortexicon` that make and check cohorts; imports nothing that takes time."""

import argparse
from pathlib import Path

from cortexicon import _doctor, _fetch, _other_atlases, _prepare


def add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands about data: their options, and nothing that runs them."""
    command = commands.add_parser("simulate", help="write a simulated cohort")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--num-subjects", type=int, default=None)
    command.add_argument("--num-regions", type=int, default=None)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--effect", type=float, default=1.0, help="strength of age, sex and diagnosis; 0: none"
    )

    command = commands.add_parser("split", help="divide a cohort's subjects into parts")
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--out", type=Path, required=True, help="split file to write (JSON)")
    command.add_argument(
        "--scheme",
        choices=("holdout", "site_stratified", "leave_sites_out", "hash"),
        default="holdout",
    )
    command.add_argument("--seed", type=int, default=0)

    _fetch.add_parser(commands)
    _prepare.add_parser(commands)
    _doctor.add_parser(commands)
    _other_atlases.add_parser(commands)
