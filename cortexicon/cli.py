"""The `cortexicon` command. Every heavy import stands inside the sub-command that needs it.

A user's error ends in one message on stderr and exit code 2; `--debug` shows the traceback. Only
this file knows every room.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cortexicon import __version__

if TYPE_CHECKING:
    from cortexicon.cohorts import Cohort
    from cortexicon.inference import SkippedScan

# What a missing module means for the user: the extra that brings it.
_EXTRA_OF = {
    "datasets": "io",
    "pandas": "io",
    "pyarrow": "io",
    "scipy": "io",
    "nibabel": "io",
    "nilearn": "io",
    "tqdm": "io",
    "accelerate": "train",
    "peft": "train",
    "tokenizers": "train",
    "evaluate": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "jinja2": "train",
    "yaml": "train",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default `sys.argv[1:]`.

    Returns
    -------
    int
        0, or 2 after a user's error, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("cortexicon: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_message(error)
        if message is None or arguments.debug:
            raise
        print(f"cortexicon {arguments.command}: {message}", file=sys.stderr)
        return 2


def user_message(error: Exception) -> str | None:
    """The text for an error that the user can mend, or None for one of ours.

    A missing extra, an error type of one of the rooms and an operating system's error are the
    user's; anything else is a fault of the program and keeps its traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            return None
        return f"needs {error.name}, which is not installed: pip install 'cortexicon[{extra}]'"
    ours = type(error).__module__.partition(".")[0] == "cortexicon"
    if isinstance(error, OSError) or (ours and isinstance(error, ValueError)):
        return str(error)
    return None


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

    command = commands.add_parser("simulate", help="write a simulated cohort")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--num-subjects", type=int, default=None)
    command.add_argument("--num-regions", type=int, default=None)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--effect", type=float, default=1.0, help="strength of age, sex and diagnosis; 0: none"
    )
    command.set_defaults(run=_simulate)

    command = commands.add_parser("split", help="divide a cohort's subjects into parts")
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--out", type=Path, required=True, help="split file to write (JSON)")
    command.add_argument(
        "--scheme",
        choices=("holdout", "site_stratified", "leave_sites_out", "hash"),
        default="holdout",
    )
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_split)

    command = commands.add_parser("train", help="train the text model, the codec or the LLM")
    command.add_argument("what", choices=("text", "avq", "lm"))
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
    command.set_defaults(run=_train)

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
    command.set_defaults(run=_ablate)

    command = commands.add_parser("encode", help="cohort to codes")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--out", type=Path, required=True, help="codes file to write (Parquet)")
    _add_part(command)
    _add_any_atlas(command)
    command.set_defaults(run=_encode)

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
    command.set_defaults(run=_decode)

    command = commands.add_parser("predict", help="clinical answers of an LLM checkpoint")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("cohort", metavar="COHORT", type=Path)
    command.add_argument("--out", type=Path, required=True, help="predictions file to write (CSV)")
    command.add_argument("--targets", nargs="+", default=None, help="columns; default: all trained")
    _add_part(command)
    command.set_defaults(run=_predict)

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
    command.set_defaults(run=_evaluate)

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
    command.set_defaults(run=_reconstruction)

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
    command.set_defaults(run=_cross_atlas)

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
    command.set_defaults(run=_alignment)

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
    command.set_defaults(run=_align)

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
    command.set_defaults(run=_left_out_sites)

    command = commands.add_parser("report", help="results.json and report.html of a run folder")
    command.add_argument("folder", metavar="RUN", type=Path)
    command.set_defaults(run=_report)

    command = commands.add_parser("info", help="what a checkpoint folder holds")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.set_defaults(run=_info)
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


def _fold_parts(arguments: argparse.Namespace, cohort: "Cohort") -> dict[str, list[str]]:
    """Parts of the fold asked for: name to subject ids."""
    from cortexicon.cohorts import CohortError, load_split

    split = load_split(arguments.split, cohort)
    if not 0 <= arguments.fold < len(split):
        raise CohortError(
            f"{arguments.split}: expected --fold in 0..{len(split) - 1}, found {arguments.fold}."
        )
    return dict(split[arguments.fold])


def _chosen(arguments: argparse.Namespace, cohort: "Cohort") -> list[str] | None:
    """Subject ids of the part asked for, or None for everyone."""
    if arguments.split is None:
        return None
    from cortexicon.cohorts import CohortError

    parts = _fold_parts(arguments, cohort)
    if arguments.part not in parts:
        raise CohortError(
            f"{arguments.split}: expected --part to be one of {', '.join(parts)}, "
            f"found {arguments.part!r}."
        )
    return list(parts[arguments.part])


def _name_skipped(skipped: "list[SkippedScan]") -> None:
    """Print the scans that were left out, with the reason of each."""
    for scan in skipped:
        print(f"left out {scan.subject_id}: {scan.reason}", file=sys.stderr)


def _simulate(arguments: argparse.Namespace) -> None:
    from cortexicon.cohorts import save_cohort, simulate_cohort

    given = {
        name: value
        for name, value in (
            ("num_subjects", arguments.num_subjects),
            ("num_regions", arguments.num_regions),
        )
        if value is not None
    }
    cohort = simulate_cohort(**given, seed=arguments.seed, effect=arguments.effect)
    save_cohort(cohort, arguments.out)
    print(f"{len(cohort)} simulated subjects x {len(cohort.labels)} regions -> {arguments.out}")


def _split(arguments: argparse.Namespace) -> None:
    from cortexicon.cohorts import load_cohort, make_split

    cohort = load_cohort(arguments.cohort)
    split = make_split(cohort, arguments.scheme, seed=arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    split.save(arguments.out)
    for number, parts in enumerate(split.folds):
        sizes = ", ".join(f"{name} {len(subjects)}" for name, subjects in parts.items())
        print(f"fold {number}: {sizes}")
    print(f"split -> {arguments.out}")


def _train(arguments: argparse.Namespace) -> int:
    import importlib

    script = importlib.import_module(f"cortexicon.training.{arguments.what}")
    resume = ["resume=true"] if arguments.resume else []
    return int(script.main([arguments.config, *arguments.overrides, *resume]))


def _ablate(arguments: argparse.Namespace) -> int:
    from cortexicon.training import ablation_tables, ablations

    files = [ablations.read_cells(path) for path in arguments.cells]
    if arguments.report:
        missing = ablation_tables.write_tables(files, arguments.results, arguments.document)
        print(f"tables -> {arguments.document} ({missing} runs have no result)")
        return 0
    cells = ablations.choose(files, arguments.only)
    data = ablations.prepare_data(arguments.cohort, arguments.runs, arguments.text_model)
    if arguments.list:
        ablations.show(cells, data, arguments.results)
        return 0
    without = ablations.run_cells(
        cells, data, arguments.runs, arguments.results, arguments.jobs, arguments.retry_failed
    )
    return 1 if without else 0


def _encode(arguments: argparse.Namespace) -> None:
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference import (
        describe_codes,
        encode_cohort,
        fit_to_atlas,
        load_checkpoint,
        write_codes,
    )

    cohort = load_cohort(arguments.cohort)
    checkpoint = load_checkpoint(arguments.checkpoint)
    checkpoint = fit_to_atlas(checkpoint, cohort, arguments.any_atlas)
    skipped: list[SkippedScan] = []
    scans = encode_cohort(
        checkpoint.codec,
        checkpoint.processor.feature_extractor,
        cohort,
        _chosen(arguments, cohort),
        arguments.batch_size,
        skipped,
    )
    count = write_codes(arguments.out, scans, describe_codes(checkpoint.codec, cohort))
    _name_skipped(skipped)
    print(f"codes of {count} scans -> {arguments.out}")


def _decode(arguments: argparse.Namespace) -> None:
    from cortexicon.cohorts import read_regions
    from cortexicon.inference import decode_codes, load_checkpoint

    regions = None if arguments.regions is None else read_regions(arguments.regions)
    cohort = decode_codes(
        load_checkpoint(arguments.checkpoint).codec,
        arguments.codes,
        arguments.out,
        arguments.batch_size,
        regions=regions,
        atlas=arguments.atlas,
    )
    print(f"{len(cohort)} decoded scans x {len(cohort.labels)} regions -> {arguments.out}")


def _predict(arguments: argparse.Namespace) -> None:
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference.predict import predict_cohort

    cohort = load_cohort(arguments.cohort)
    table = predict_cohort(
        arguments.checkpoint,
        cohort,
        subject_ids=_chosen(arguments, cohort),
        targets=arguments.targets,
    )
    table["fold"] = arguments.fold
    table["part"] = arguments.part if arguments.split is not None else "all"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False)
    print(f"{len(table)} predictions -> {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from cortexicon._evaluate import evaluate_checkpoint
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference import fit_to_atlas, load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    cohort = load_cohort(arguments.cohort)
    evaluate_checkpoint(
        fit_to_atlas(checkpoint, cohort, arguments.any_atlas),
        cohort,
        arguments.json,
        parts=None if arguments.split is None else _fold_parts(arguments, cohort),
        fold=arguments.fold,
        baselines=arguments.baselines,
        predictions_folder=arguments.predictions or arguments.json.parent / "predictions",
        batch_size=arguments.batch_size,
    )
    print(f"scores -> {arguments.json}")


def _reconstruction(arguments: argparse.Namespace) -> None:
    from cortexicon._reconstruction import reconstruction_table
    from cortexicon.cohorts import load_cohort, load_split

    cohort = load_cohort(arguments.cohort)
    _fold_parts(arguments, cohort)
    reconstruction_table(
        cohort,
        load_split(arguments.split, cohort),
        arguments.fold,
        arguments.json,
        markdown_path=arguments.markdown,
        checkpoints=arguments.checkpoints,
        band_pass=arguments.band_pass,
        any_atlas=arguments.any_atlas,
        batch_size=arguments.batch_size,
    )
    print(f"table  -> {arguments.json}")
    print(f"figure -> {arguments.json.with_suffix('.png')}")


def _cross_atlas(arguments: argparse.Namespace) -> None:
    from cortexicon._cross_atlas import evaluate_cross_atlas
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference import load_checkpoint

    source = load_cohort(arguments.source)
    evaluate_cross_atlas(
        load_checkpoint(arguments.checkpoint),
        source,
        load_cohort(arguments.target),
        _fold_parts(arguments, source),
        arguments.json,
        arguments.batch_size,
    )
    print(f"scores -> {arguments.json}")


def _alignment(arguments: argparse.Namespace) -> None:
    from cortexicon._alignment import evaluate_alignment
    from cortexicon.cohorts import load_cohort

    cohort = load_cohort(arguments.cohort)
    checkpoints = {
        "codes": arguments.checkpoint,
        "adversary_off": arguments.off,
        "not_reversed": arguments.unreversed,
    }
    evaluate_alignment(
        {name: folder for name, folder in checkpoints.items() if folder is not None},
        arguments.text_model,
        cohort,
        _fold_parts(arguments, cohort),
        arguments.json,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    print(f"table  -> {arguments.json}")
    print(f"figure -> {arguments.json.with_suffix('.png')}")


def _align(arguments: argparse.Namespace) -> int:
    from cortexicon.training.align import AlignArguments, align

    names = ("fold", "text_files", "max_steps", "seed", "cpu", "resume", "language_model")
    return align(
        AlignArguments(
            output=str(arguments.out),
            checkpoint=str(arguments.checkpoint),
            cohort=str(arguments.cohort),
            split=str(arguments.split),
            **{name: getattr(arguments, name) for name in names},
        )
    )


def _left_out_sites(arguments: argparse.Namespace) -> None:
    from cortexicon._left_out_sites import evaluate_left_out_sites
    from cortexicon.cohorts import load_cohort

    evaluate_left_out_sites(
        arguments.within,
        arguments.left_out,
        load_cohort(arguments.cohort),
        arguments.json,
        arguments.batch_size,
    )
    print(f"scores -> {arguments.json}")


def _report(arguments: argparse.Namespace) -> None:
    from cortexicon._cards import write_cards
    from cortexicon.evaluation import collect_results, write_report

    results = collect_results(arguments.folder)
    write_report(arguments.folder)
    for card in write_cards(arguments.folder, results):
        print(f"card    -> {card}")
    print(f"report  -> {arguments.folder / 'report.html'}")
    print(f"results -> {arguments.folder / 'results.json'}")


def _info(arguments: argparse.Namespace) -> None:
    from cortexicon.inference import load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    codec = checkpoint.codec
    config = codec.config
    regions = len(config.region_labels) if config.region_labels else "any number of"
    facts = {
        "model": f"{checkpoint.model_type}, {checkpoint.model.num_parameters():,} parameters",
        "atlas": f"{config.atlas or 'not stored'}, {regions} regions",
        "sampling": f"every {config.sampling_interval} s, {config.window_length} samples a window",
        "tokens": f"{config.tokens_per_window} per window ({config.token_layout} layout)",
        "codebook": f"{config.num_codes} codes, fingerprint {codec.codebook_fingerprint()[:12]}",
        "vocabulary": f"{len(checkpoint.processor.tokenizer)} ids",
    }
    for name, fact in facts.items():
        print(f"{name:<11}{fact}")


if __name__ == "__main__":
    sys.exit(main())
