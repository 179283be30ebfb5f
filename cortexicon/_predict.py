"""`cortexicon predict`: answers about a cohort into a file, or about one scan in plain words."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    add_part: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser("predict", help="clinical answers of an LLM checkpoint")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument(
        "cohort", metavar="COHORT_OR_SCAN", type=Path, help="cohort; with --ask also one scan"
    )
    command.add_argument("--out", type=Path, default=None, help="predictions file to write (CSV)")
    command.add_argument("--targets", nargs="+", default=None, help="columns; default: all trained")
    command.add_argument("--ask", metavar="QUESTION", default=None, help="about one scan, in words")
    command.add_argument("--subject", default=None, help="of --ask: one person of a cohort")
    command.add_argument("--atlas", default=None, help="of --ask: name or label volume, for NIfTI")
    command.add_argument("--atlas-folder", type=Path, default=None, help="of --ask: its files")
    command.add_argument("--tr", type=float, default=None, help="of --ask: s, if no file says it")
    add_part(command)


def run(arguments: argparse.Namespace) -> int:
    """Write the predictions of a cohort, or print the answer about one scan."""
    from cortexicon.inference import InferenceError

    if arguments.ask is not None:
        return _ask(arguments)
    if arguments.out is None:
        raise InferenceError("expected --out FILE for predictions, or --ask QUESTION; found none.")
    from cortexicon._parts import chosen
    from cortexicon.cohorts import load_cohort
    from cortexicon.inference.predict import predict_cohort

    cohort = load_cohort(arguments.cohort)
    table = predict_cohort(
        arguments.checkpoint,
        cohort,
        subject_ids=chosen(arguments, cohort),
        targets=arguments.targets,
    )
    table["fold"] = arguments.fold
    table["part"] = arguments.part if arguments.split is not None else "all"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False)
    print(f"{len(table)} predictions -> {arguments.out}")
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    from cortexicon.cohorts.atlases import load_atlas
    from cortexicon.inference.ask import ask, scan_to_ask
    from cortexicon.inference.predict import load_language_model

    loaded = load_language_model(arguments.checkpoint)
    atlas = None
    if arguments.atlas is not None:
        atlas = load_atlas(arguments.atlas, folder=arguments.atlas_folder)
    scan = scan_to_ask(arguments.cohort, loaded.processor, arguments.subject, atlas, arguments.tr)
    answer = ask(loaded.model, loaded.processor, scan, arguments.ask)
    print(answer.text)
    if answer.target is None:
        print("note: the model was not trained on this question; this is free text")
    elif answer.asked != arguments.ask:
        print(f"note: asked as {answer.asked!r}, the wording that the model was trained on")
    return 0
