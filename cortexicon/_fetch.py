"""`cortexicon fetch`: a public cohort from the network, ready for `cortexicon prepare`."""

import argparse
import shlex
import sys
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser("fetch", help="download a public cohort")
    command.add_argument("name", choices=("abide", "adhd", "development"))
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--num-subjects", type=int, default=None, help="default: all")
    command.add_argument(
        "--atlas", default=None, help="of abide's series (default: cc200; also cc400, aal, ho ...)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Fetch, and say what to do next; 1 when subjects were left out."""
    from cortexicon.cohorts import fetch_cohort

    fetched = fetch_cohort(arguments.name, arguments.out, arguments.num_subjects, arguments.atlas)
    for subject, reason in fetched.left_out.items():
        print(f"left out {subject}: {reason}", file=sys.stderr)
    print(f"{fetched.num_scans} scans -> {fetched.scans}")
    print(f"participants -> {fetched.participants}")
    command = ["cortexicon", "prepare", str(fetched.scans)]
    command += ["--atlas", fetched.atlas or "schaefer400"]
    command += ["--participants", str(fetched.participants), "--out", "COHORT"]
    print(f"next: {shlex.join(command)}")
    return 1 if fetched.left_out else 0
