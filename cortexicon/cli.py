"""The `cortexicon` command. Every heavy import stands inside the sub-command that needs it.

A user's error ends in one message on stderr and exit code 2; `--debug` shows the traceback. Only
this file knows every room.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cortexicon import (
    _benchmark,
    _doctor,
    _fetch,
    _generate_scan,
    _other_atlases,
    _predict,
    _prepare,
    _publish,
    _simulate,
    _space,
)
from cortexicon._parser import build_parser
from cortexicon._parts import chosen, fold_parts

if TYPE_CHECKING:
    from cortexicon.inference import SkippedScan

# What a missing module means for the user: the extra that brings it.
_EXTRA_OF = {
    "datasets": "io",
    "pandas": "io",
    "pyarrow": "io",
    "scipy": "io",
    "nibabel": "io",
    "nilearn": "io",
    "joblib": "io",
    "tqdm": "io",
    "dask": "dask",
    "distributed": "dask",
    "h5py": "mat73",
    "accelerate": "train",
    "peft": "train",
    "tokenizers": "train",
    "evaluate": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "PIL": "train",
    "jinja2": "train",
    "yaml": "train",
    "gradio": "demo",
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
        return int(_function_of(arguments.command)(arguments) or 0)
    except KeyboardInterrupt:
        print("cortexicon: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_message(error)
        if message is None or arguments.debug:
            raise
        print(f"cortexicon {arguments.command}: {message}", file=sys.stderr)
        return 2


def _function_of(command: str) -> Callable[[argparse.Namespace], int | None]:
    """What runs a command of `_parser.build_parser`."""
    return {
        "simulate": _simulate.simulate,
        "split": _simulate.split,
        "fetch": _fetch.run,
        "prepare": _prepare.run,
        "doctor": _doctor.run,
        "other-atlases": _other_atlases.run,
        "train": _train,
        "ablate": _ablate,
        "benchmark": _run_benchmark,
        "encode": _encode,
        "decode": _decode,
        "predict": _predict.run,
        "generate-scan": _generate_scan.run,
        "evaluate": _evaluate,
        "reconstruction": _reconstruction,
        "cross-atlas": _cross_atlas,
        "connectome-table": _connectome_table,
        "alignment": _alignment,
        "align": _align,
        "left-out-sites": _left_out_sites,
        "speed": _speed,
        "report": _report,
        "publish": _publish.run,
        "protect": _publish.protect,
        "info": _info,
        "space": _space.run,
    }[command]


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


def _name_skipped(skipped: "list[SkippedScan]") -> None:
    """Print the scans that were left out, with the reason of each."""
    for scan in skipped:
        print(f"left out {scan.subject_id}: {scan.reason}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> int:
    import importlib

    from cortexicon.training.arguments import read_config

    name, stream = arguments.what, arguments.stream
    if stream is None and Path(arguments.config).is_file():  # the script says what is missing
        stream = read_config(arguments.config).get("stream")
    if name == "avq" and stream == "connectivity":
        name = "connectome"
    script = importlib.import_module(f"cortexicon.training.{name.replace('-', '_')}")
    flags = [f"{flag}=true" for flag in ("resume", "tiny") if getattr(arguments, flag)]
    if arguments.control is not None:
        flags.append(f"control={arguments.control}")
    return int(script.main([arguments.config, *arguments.overrides, *flags]))


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


def _run_benchmark(arguments: argparse.Namespace) -> int:
    from cortexicon.training.benchmark import run_benchmark

    return 1 if run_benchmark(**_benchmark.options(arguments)) else 0


def _encode(arguments: argparse.Namespace) -> None:
    if _is_connectome(arguments.checkpoint):
        from cortexicon import _connectome

        _connectome.encode(arguments)
        return
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
        chosen(arguments, cohort, arguments.any_atlas),
        arguments.batch_size,
        skipped,
    )
    count = write_codes(arguments.out, scans, describe_codes(checkpoint.codec, cohort))
    _name_skipped(skipped)
    print(f"codes of {count} scans -> {arguments.out}")


def _decode(arguments: argparse.Namespace) -> None:
    if _is_connectome(arguments.checkpoint):
        from cortexicon import _connectome

        _connectome.decode(arguments)
        return
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


def _connectome_table(arguments: argparse.Namespace) -> None:
    from cortexicon import _connectome

    _connectome.table(arguments)


def _is_connectome(folder: Path) -> bool:
    from cortexicon.inference.connectome import is_connectome

    return is_connectome(folder)


def _evaluate(arguments: argparse.Namespace) -> None:
    if _is_connectome(arguments.checkpoint):
        from cortexicon import _connectome

        _connectome.evaluate(arguments)
        return
    from cortexicon._evaluate import evaluate_checkpoint
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference import fit_to_atlas, load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    cohort = load_cohort(arguments.cohort)
    evaluate_checkpoint(
        fit_to_atlas(checkpoint, cohort, arguments.any_atlas),
        cohort,
        arguments.json,
        parts=None
        if arguments.split is None
        else fold_parts(arguments, cohort, arguments.any_atlas),
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
    fold_parts(arguments, cohort)
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
        fold_parts(arguments, source),
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
        fold_parts(arguments, cohort),
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


def _speed(arguments: argparse.Namespace) -> None:
    from cortexicon._speed import measure_codec

    if arguments.codec.is_dir():
        from cortexicon.inference import load_checkpoint

        config = load_checkpoint(arguments.codec).codec.config
    else:
        from transformers import AutoConfig

        from cortexicon.modeling import AVQConfig
        from cortexicon.training.arguments import load_arguments
        from cortexicon.training.avq import AVQArguments

        given = load_arguments(AVQArguments, [str(arguments.codec)])
        values = dict(given.model)
        if Path(given.text_model, "config.json").is_file():
            values["text_width"] = AutoConfig.from_pretrained(given.text_model).hidden_size
        config = AVQConfig(**values)
    numbers = (arguments.regions, arguments.batch_size, arguments.repeats, arguments.threads)
    measure_codec(config, arguments.json, *numbers)


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
    from cortexicon import _info

    _info.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
