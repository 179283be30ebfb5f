"""From files as a pipeline leaves them to a checked cohort; first it makes such a folder.

    python examples/prepare_a_bids_folder.py --output runs/bids

Eight simulated people get 4-D NIfTI files with BIDS names and sidecars, a label volume and a
participants table. One of the files is cut in the middle: it is named with its reason and stops
no other. `cortexicon prepare` does the same from the command line.
"""

import argparse
import json
from pathlib import Path

import nibabel
import numpy as np

from cortexicon.cohorts import (
    AtlasChoice,
    People,
    Reading,
    load_cohort,
    prepare_cohort,
    simulate_cohort,
)

VOXEL_MM = 6.0


def write_bids(folder: Path, num_subjects: int) -> Path:
    """Write derivatives, participants.tsv and a label volume into FOLDER; the volume's path."""
    cohort = simulate_cohort(num_subjects=num_subjects, num_regions=28, duration=120.0, seed=0)
    affine = np.diag([VOXEL_MM] * 3 + [1.0])
    affine[:3, 3] = -90, -126, -72
    places = np.rint((cohort.coordinates - affine[:3, 3]) / VOXEL_MM).astype(int)
    grid = np.zeros((31, 37, 31), np.int16)
    for value, (x, y, z) in enumerate(places, start=1):
        grid[x - 1 : x + 2, y - 1 : y + 2, z] = value
    for value, (x, y, z) in enumerate(places, start=1):
        grid[x, y, z] = value  # neighbours may have painted over a centre
    folder.mkdir(parents=True, exist_ok=True)
    labels = folder / "atlas-networks_dseg.nii.gz"
    image = nibabel.Nifti1Image(grid, affine)
    image.header["sform_code"] = 4  # MNI
    nibabel.save(image, labels)
    rows = ["value\tlabel"] + [f"{n}\t{name}" for n, name in enumerate(cohort.labels, start=1)]
    labels.with_name("atlas-networks_dseg.tsv").write_text("\n".join(rows) + "\n")
    for number, scan in enumerate(cohort, start=1):
        name = f"sub-{number:02d}"
        place = folder / "derivatives" / name / "func"
        place.mkdir(parents=True, exist_ok=True)
        data = np.zeros((*grid.shape, len(scan.values)), np.float32)
        inside = grid > 0
        data[inside] = 1000 + 10 * scan.values.T[grid[inside] - 1]  # a scanner's units
        volume = nibabel.Nifti1Image(data, affine)
        volume.header["sform_code"] = 4
        path = place / f"{name}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
        nibabel.save(volume, path)
        sidecar = {"RepetitionTime": scan.tr, "TaskName": "rest"}
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))
    path.write_bytes(path.read_bytes()[:2000])  # the last person's file was not copied whole
    people = cohort.participants.reset_index()
    header = ["participant_id\tage\tsex\tsite"]
    lines = [
        f"sub-{number:02d}\t{row.age}\t{row.sex}\t{row.site}"
        for number, row in enumerate(people.itertuples(), start=1)
    ]
    (folder / "participants.tsv").write_text("\n".join(header + lines) + "\n")
    return labels


def main(argv: list[str] | None = None) -> None:
    """Make the folder, prepare it, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for input and cohort")
    parser.add_argument("--subjects", type=int, default=8)
    arguments = parser.parse_args(argv)
    labels = write_bids(arguments.output, arguments.subjects)
    prepared = prepare_cohort(
        arguments.output / "derivatives",
        arguments.output / "cohort",
        People(arguments.output / "participants.tsv"),
        Reading(atlas=AtlasChoice(str(labels))),
    )
    cohort = load_cohort(prepared.path)
    print(f"{len(cohort)} scans x {len(cohort.labels)} regions -> {arguments.output / 'cohort'}")
    left_out = prepared.quality[prepared.quality["status"] == "refused"]
    for row in left_out.itertuples():
        print(f"left out {row.subject_id}: {row.reason}")


if __name__ == "__main__":
    main()
