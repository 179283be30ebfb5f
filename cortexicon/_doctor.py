"""`cortexicon doctor`: does this input fit this checkpoint, and what to do when not."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser("doctor", help="does this input fit this checkpoint?")
    command.add_argument("path", metavar="PATH", type=Path, help="cohort, folder of scans, or scan")
    command.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, nargs="?", help="codec or language model"
    )
    command.add_argument("--atlas", default=None, help="name or label volume, for volumes")
    command.add_argument(
        "--atlas-folder", type=Path, default=None, help="its files, for work without a network"
    )
    command.add_argument("--tr", type=float, default=None, help="s, where the files do not say")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 0 when the input fits, 1 when something has to be done first."""
    from cortexicon.cohorts.atlases import load_atlas
    from cortexicon.inference import load_checkpoint
    from cortexicon.inference.doctor import diagnose

    checkpoint = None if arguments.checkpoint is None else load_checkpoint(arguments.checkpoint)
    atlas = None
    if arguments.atlas is not None:
        atlas = load_atlas(arguments.atlas, folder=arguments.atlas_folder)
    diagnosis = diagnose(arguments.path, checkpoint, atlas, arguments.tr)
    print(arguments.path if checkpoint is None else f"{arguments.path} for {checkpoint.folder}")
    for finding in diagnosis.findings:
        print(f"  {finding.verdict:<8}{finding.aspect:<12}{finding.found}")
        if finding.advice:
            print(f"{'':<22}-> {finding.advice}")
    if checkpoint is not None:
        print("fits" if diagnosis.fits else "does not fit: see NO above")
    elif not diagnosis.fits:
        print("cannot be used as it is: see NO above")
    return 0 if diagnosis.fits else 1
