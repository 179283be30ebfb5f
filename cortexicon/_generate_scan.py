"""`cortexicon generate-scan`: from a text to a 4-D NIfTI in an atlas's space."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser("generate-scan", help="a text becomes a simulated scan (NIfTI)")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="language model")
    command.add_argument("--prompt", required=True, help="the text that the scan follows")
    command.add_argument("--atlas", required=True, help="name or label volume to paint it in")
    command.add_argument(
        "--atlas-folder", type=Path, default=None, help="its files, for work without a network"
    )
    command.add_argument("--out", type=Path, required=True, help=".nii or .nii.gz to write")
    command.add_argument("--windows", type=int, default=1, help="windows to write (default: 1)")
    command.add_argument(
        "--temperature", type=float, default=1.0, help="0: the likeliest code each time"
    )
    command.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Write the image; the file appears complete or not at all."""
    import os

    import nibabel

    from cortexicon.cohorts.atlases import load_atlas
    from cortexicon.cohorts.painting import paint_series
    from cortexicon.inference import InferenceError
    from cortexicon.inference.predict import load_language_model
    from cortexicon.inference.write_scan import write_scan

    out = arguments.out
    if not out.name.endswith((".nii", ".nii.gz")):
        raise InferenceError(f"{out}: expected a name that ends in .nii or .nii.gz.")
    atlas = load_atlas(arguments.atlas, folder=arguments.atlas_folder)
    loaded = load_language_model(arguments.checkpoint)
    scan = write_scan(
        loaded.model,
        loaded.processor,
        arguments.prompt,
        atlas.coordinates,
        arguments.windows,
        arguments.temperature,
        arguments.seed,
    )
    image = paint_series(scan.values, atlas, scan.tr)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        nibabel.save(image, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{len(scan.values)} volumes every {scan.tr:g} s in {atlas.name} ({atlas.space}), "
        f"z-score units, written by a model and measured in nobody -> {out}"
    )
    return 0
