"""Commands of `cortexicon` and their options; imports nothing that takes time."""

import argparse
from pathlib import Path

from cortexicon import __version__, _benchmark, _generate_scan, _predict, _publish, _space
from cortexicon._parser_data import add_data_commands


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cortexicon",
        description="Parcellated fMRI as discrete tokens that a language model reads.",
        epilog="COHORT is a folder that `cortexicon simulate` or `save_cohort` wrote, or one with "
        "participants.tsv, regions.tsv and timeseries/bold.parquet.",
    )
    parser.add_argument("--version", action="version", version=f"cortexicon {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_data_commands(commands)

    command = commands.add_parser("train", help="train the text model, a codec or another system")
    command.add_argument("what", choices=("text", "avq", "lm", "mae", "vlm", "encoder-lm"))
    command.add_argument("config", metavar="CONFIG", help="YAML file, see training/configs")
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="replace values of the config",
    )
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument(
        "--tiny",
        action="store_true",
        help="of `train vlm`: a tiny random model of the same classes",
    )
    for flag, control, what in (
        ("--blank-image", "blank_image", "an image that shows nothing"),
        ("--text-only", "text_only", "the question alone"),
        ("--permuted-labels", "permuted_labels", "labels dealt out at random in training"),
    ):
        command.add_argument(
            flag, dest="control", action="store_const", const=control, help=f"control: {what}"
        )
    command.add_argument(
        "--stream",
        choices=("dynamics", "connectivity"),
        default=None,
        help="of `train avq`: windows of series, or matrices of scans (default: as CONFIG says)",
    )

    command = commands.add_parser("ablate", help="train and score the cells of an ablation")
    command.add_argument("cells", metavar="CELLS", nargs="+", help="YAML file of cells")
    command.add_argument("--only", metavar="NAME", nargs="+", default=None, help="these cells")
    command.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    command.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    command.add_argument("--list", action="store_true", help="show the cells and run nothing")
    command.add_argument("--report", action="store_true", help="write the tables, run nothing")
    command.add_argument(
        "--document", type=Path, default=Path("evaluation/RESULTS.md"), help="for the tables"
    )
    command.add_argument("--cohort", type=Path, default=Path("../shared/data/abide1_cc200"))
    command.add_argument("--text-model", type=Path, default=None, help="default: RUNS/text")
    command.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="run folders")
    command.add_argument("--results", type=Path, default=Path("results"), help="folder of scores")

    _benchmark.add_parser(commands)

    command = commands.add_parser("encode", help="cohort to codes")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--out", type=Path, required=True, help="codes file to write (Parquet)")
    _add_part(command)
    _add_any_atlas(command)

    command = commands.add_parser("decode", help="codes to region series")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("codes", metavar="CODES", type=Path)
    command.add_argument("--out", type=Path, required=True, help="cohort folder to write")
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")
    command.add_argument(
        "--regions",
        type=Path,
        default=None,
        help="regions.tsv of another parcellation to decode into (default: the encoded one)",
    )
    command.add_argument("--atlas", default=None, help="its name; needed with --regions")

    _predict.add_parser(commands, _add_part)
    _generate_scan.add_parser(commands)

    command = commands.add_parser("evaluate", help="score a checkpoint on a cohort")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--json", type=Path, required=True, help="file of scores to write")
    command.add_argument("--split", type=Path, default=None, help="score its held-out parts only")
    command.add_argument(
        "--baselines", action="store_true", help="fit the baselines on the same fold too"
    )
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument(
        "--predictions",
        type=Path,
        default=None,
        help="folder for files of predictions (default: `predictions` beside the JSON file)",
    )
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")
    _add_any_atlas(command)

    command = commands.add_parser(
        "reconstruction", help="table of reconstructions: codecs, plain tokenizers, reference"
    )
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--split", type=Path, required=True, help="split file")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--json", type=Path, required=True, help="file of the table to write")
    command.add_argument("--markdown", type=Path, default=None, help="the table for people")
    command.add_argument(
        "--checkpoints", metavar="DIR", type=Path, nargs="+", default=[], help="codecs to score"
    )
    command.add_argument(
        "--band-pass",
        metavar=("LOW", "HIGH"),
        type=float,
        nargs=2,
        default=None,
        help="Hz; a second table, of band-passed windows",
    )
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")
    _add_any_atlas(command)

    command = commands.add_parser(
        "cross-atlas", help="encode one parcellation, decode another, against plain ways there"
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("source", metavar="SOURCE", type=Path, help="cohort to encode")
    command.add_argument("target", metavar="TARGET", type=Path, help="same scans, another atlas")
    command.add_argument("--split", type=Path, required=True, help="split file of SOURCE")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--json", type=Path, required=True, help="file of scores to write")
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")

    command = commands.add_parser(
        "connectome-table", help="what connectivity codes keep of people, beside plain codes"
    )
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument(
        "checkpoints", metavar="DIR", type=Path, nargs="+", help="one of each fold to score"
    )
    command.add_argument("--json", type=Path, required=True, help="file of the table to write")
    command.add_argument("--markdown", type=Path, default=None, help="the table for people")
    command.add_argument(
        "--other", type=Path, default=None, help="same scans in another atlas, to decode into"
    )
    command.add_argument(
        "--plain",
        choices=("all", "few", "raw", "none"),
        default="all",
        help="plain rows beside the checkpoints (few: raw, group mean, PCA + k-means of our bits)",
    )
    command.add_argument(
        "--residual",
        metavar="TIMES",
        type=int,
        nargs="*",
        default=[],
        help="rows of the same components as residual codes, so many to a group (1: one each)",
    )

    command = commands.add_parser("alignment", help="can fresh probes tell codes from text?")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("text_model", metavar="TEXT_MODEL", help="its language model")
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--split", type=Path, required=True, help="split file")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--json", type=Path, required=True, help="file of the table to write")
    command.add_argument("--off", type=Path, default=None, help="checkpoint without the adversary")
    command.add_argument(
        "--unreversed",
        type=Path,
        default=None,
        help="checkpoint with the classifier on and its gradient not reversed",
    )
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")
    command.add_argument("--seed", type=int, default=0)

    command = commands.add_parser("align", help="fit a codec to another language model")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("language_model", metavar="LM", help="folder or Hub id")
    command.add_argument("--cohort", type=Path, required=True)
    command.add_argument("--split", type=Path, required=True, help="split file")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    command.add_argument(
        "--text-files",
        nargs="+",
        default=[],
        help="text to count the language model's tokens in, where it brings no counts",
    )
    command.add_argument("--max-steps", type=int, default=300)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--cpu", action="store_true", help="leave the accelerator alone")
    command.add_argument("--resume", action="store_true", help="go on from the last state")

    command = commands.add_parser(
        "left-out-sites", help="what a codec loses on scanners that it was not trained on"
    )
    command.add_argument("within", metavar="WITHIN", type=Path, help="codec trained on all sites")
    command.add_argument(
        "left_out", metavar="LEFT_OUT", type=Path, nargs="+", help="codecs trained without some"
    )
    command.add_argument("--cohort", type=Path, required=True, help="cohort of their training")
    command.add_argument("--json", type=Path, required=True, help="file of scores to write")
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")

    command = commands.add_parser(
        "speed", help="cost of a codec beside a plain transformer over all regions and patches"
    )
    command.add_argument(
        "codec", metavar="CHECKPOINT_OR_CONFIG", type=Path, help="checkpoint folder or YAML file"
    )
    command.add_argument("--json", type=Path, default=None, help="file of figures to write")
    command.add_argument(
        "--regions", type=int, default=200, help="regions, for a config (default: 200)"
    )
    command.add_argument("--batch-size", type=int, default=None, help="windows per step")
    command.add_argument("--repeats", type=int, default=3, help="turns of each system")
    command.add_argument("--threads", type=int, default=1, help="threads on CPU (default: 1)")

    command = commands.add_parser("report", help="results.json and report.html of a run folder")
    command.add_argument("folder", metavar="RUN", type=Path)

    _publish.add(commands)
    command = commands.add_parser("info", help="what a checkpoint folder holds")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)

    _space.add_parser(commands)
    return parser


def _add_part(command: argparse.ArgumentParser) -> None:
    """Options of the commands that may run on one part of a split."""
    command.add_argument("--split", type=Path, default=None, help="split file; default: everyone")
    command.add_argument("--part", default="test", help="part of the split (default: test)")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")


def _add_any_atlas(command: argparse.ArgumentParser) -> None:
    """The option that lets a codec read another parcellation than its checkpoint stores."""
    command.add_argument(
        "--any-atlas",
        action="store_true",
        help="read the cohort's regions by their coordinates, whatever the checkpoint's atlas",
    )
