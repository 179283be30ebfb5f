"""What region means cost, beside nilearn's ``NiftiLabelsMasker`` on the same files, in one run.

    python -m cortexicon.evaluation.extraction_speed --json figures.json

makes a volume of the usual size (91 x 109 x 91 voxels of 2 mm, 400 volumes, 400 regions in the grey
matter of an ellipsoid brain), as int16 and as float32, plain and compressed. Every measurement is a
process of its own with one thread that imports, then takes the seconds of one extraction from path
to array; the systems take turns and a median is reported. Peak memory is the most that the whole
process held, libraries included. The files were just written: they are read from the page cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .errors import EvaluationError
from .json_files import write_json

SHAPE = (91, 109, 91)
VOLUMES = 400
REGIONS = 400
TYPES = ("int16", "float32")
OURS, RIVAL = "region_means", "NiftiLabelsMasker"
#: Times faster on plain and on compressed files, and share of the rival's peak memory.
MARKS = {"plain": "at least 5", "gz": "at least 1.5", "memory": "at most 0.33"}
#: Half axes in voxels of 2 mm of head and brain, and the share of them that white matter fills.
HEAD, BRAIN, WHITE = (41.0, 51.0, 40.0), (34.0, 43.0, 31.0), 0.72


def compare_extraction(
    folder: Path,
    shape: tuple[int, int, int] = SHAPE,
    volumes: int = VOLUMES,
    regions: int = REGIONS,
    types: Sequence[str] = TYPES,
    repeats: int = 3,
) -> dict[str, Any]:
    """Make the files in `folder`, measure both systems on each, and take the files away again.

    Parameters
    ----------
    folder : path
        An empty folder with room for about 3 GB at the default sizes.
    shape, volumes, regions : int
        Sizes of the image and of the atlas.
    types : sequence of str
        Types of the stored voxels.
    repeats : int
        Turns of each system on each file.

    Returns
    -------
    dict
        ``files``: by name, bytes, and by system median seconds (wall and processor) and peak
        bytes; how many times faster region means are (``faster``, of wall seconds), their share of
        the rival's peak (``memory``) and the largest relative difference of the values. Beside
        them the sizes and the versions.

    Raises
    ------
    EvaluationError
        A size below 1, or a measurement that failed.
    """
    if min(*shape, volumes, regions, repeats) < 1:
        raise EvaluationError("sizes and repeats must be at least 1.")
    atlas, signal = make_atlas(folder / "atlas.nii.gz", shape, regions)
    bar = tqdm(total=len(types) * 2 * (1 + 2 * repeats), desc="extraction", mininterval=1.0)
    files: dict[str, Any] = {}
    for kind in types:
        plain = make_image(folder / f"{kind}.nii", signal, volumes, kind)
        bar.update()
        files[plain.name] = _measure(plain, atlas, repeats, bar)
        packed = plain.with_name(plain.name + ".gz")
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as sink:
            shutil.copyfileobj(source, sink, 2**22)
        plain.unlink()
        bar.update()
        files[packed.name] = _measure(packed, atlas, repeats, bar)
        packed.unlink()
    bar.close()
    import nibabel
    import nilearn

    return {
        "shape": [*shape, volumes],
        "regions": regions,
        "labelled_voxels": int(np.count_nonzero(np.asanyarray(nibabel.load(atlas).dataobj))),
        "repeats": repeats,
        "nilearn": nilearn.__version__,
        "nibabel": nibabel.__version__,
        "numpy": np.__version__,
        "files": files,
        "marks": MARKS,
    }


def make_atlas(path: Path, shape: tuple[int, int, int], regions: int) -> tuple[Path, np.ndarray]:
    """Write a label volume, and return it with the mean signal of the head it belongs to.

    Returns
    -------
    pathlib.Path
    numpy.ndarray of float32, shape (x, y, z)
        Above 0 inside the head, 0 in the air.
    """
    import nibabel
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    centre = (np.array(shape) - 1) / 2
    scale = np.array(shape) / SHAPE
    place = np.moveaxis(np.indices(shape), 0, -1) - centre
    head = (np.square(place / (HEAD * scale)).sum(axis=-1)) < 1
    depth = np.sqrt(np.square(place / (BRAIN * scale)).sum(axis=-1))
    grey = place[(depth < 1) & (depth > WHITE)]
    if len(grey) < regions:
        raise EvaluationError(f"{shape} voxels have no room for {regions} regions.")
    seeds = grey[rng.choice(len(grey), regions, replace=False)]
    labels = np.zeros(shape, np.int16)
    labels[(depth < 1) & (depth > WHITE)] = cKDTree(seeds).query(grey)[1] + 1
    nibabel.save(nibabel.Nifti1Image(labels, _affine(shape)), path)
    return path, (head * rng.uniform(8000, 10000, shape)).astype(np.float32)


def make_image(path: Path, signal: np.ndarray, volumes: int, kind: str) -> Path:
    """Write a 4-D image: the signal with one per cent of noise, volume by volume."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((*signal.shape, volumes))
    header.set_data_dtype(kind)
    header.set_zooms((2, 2, 2, 2))
    header.set_sform(_affine(signal.shape), 4)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    rng = np.random.default_rng(1)
    flat = signal.ravel(order="F")
    inside = np.flatnonzero(flat)
    with path.open("wb") as stream:
        stream.write(header.binaryblock + bytes(4))
        for _ in range(volumes):
            volume = flat.copy()
            volume[inside] *= 1 + 0.01 * rng.standard_normal(len(inside), dtype=np.float32)
            stream.write(volume.astype(kind).tobytes())
    return path


def _affine(shape: tuple[int, ...]) -> np.ndarray:
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [shape[0] - 1, 1 - shape[1], 1 - shape[2]]
    return affine


def _measure(image: Path, atlas: Path, repeats: int, bar: tqdm) -> dict[str, Any]:
    """Figures of both systems on one file."""
    turns: dict[str, list[dict[str, float]]] = {OURS: [], RIVAL: []}
    for _ in range(repeats):
        for system, found in turns.items():
            found.append(_in_own_process(system, image, atlas))
            bar.update()
    values = {system: np.load(image.with_name(f"{system}.npy")) for system in turns}
    systems = {
        system: {
            "seconds": statistics.median(turn["seconds"] for turn in found),
            "processor_seconds": statistics.median(turn["processor_seconds"] for turn in found),
            "peak_bytes": int(statistics.median(turn["peak_bytes"] for turn in found)),
            "imported_bytes": int(statistics.median(turn["imported_bytes"] for turn in found)),
        }
        for system, found in turns.items()
    }
    ours, rival = systems[OURS], systems[RIVAL]
    return {
        "bytes": image.stat().st_size,
        "systems": systems,
        "faster": rival["seconds"] / ours["seconds"],
        "faster_processor": rival["processor_seconds"] / ours["processor_seconds"],
        "memory": ours["peak_bytes"] / rival["peak_bytes"],
        "largest_relative_difference": float(np.max(np.abs(values[OURS] / values[RIVAL] - 1))),
    }


def _in_own_process(system: str, image: Path, atlas: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--measure", system, str(image), str(atlas)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise EvaluationError(f"{system} on {image.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(system: str, image: Path, atlas: Path) -> dict[str, float]:
    """Extract once in this process; the values go into a file beside the image."""
    if system == OURS:
        from cortexicon.cohorts.atlases import load_atlas
        from cortexicon.cohorts.volumes import region_means
    else:
        from nilearn.maskers import NiftiLabelsMasker
    imported = _peak_bytes()
    wall, processor = time.perf_counter(), time.process_time()
    if system == OURS:
        values = region_means(image, load_atlas(atlas)).values
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = NiftiLabelsMasker(str(atlas), standardize=False).fit_transform(str(image))
    figures = {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": _peak_bytes(),
        "imported_bytes": imported,
    }
    np.save(image.with_name(f"{system}.npy"), values)
    return figures


def _peak_bytes() -> int:
    """The most bytes that this process has held; Linux's VmHWM starts anew in every program."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def render_extraction(results: dict[str, Any]) -> str:
    """The table of `compare_extraction`'s results, as Markdown."""
    sizes = " x ".join(str(size) for size in results["shape"])
    lines = [
        f"{sizes}, {results['regions']} regions, {results['labelled_voxels']:,} labelled voxels; "
        f"one thread, medians of {results['repeats']}; nilearn {results['nilearn']}",
        "",
        "| file | MB | system | seconds | processor seconds | peak, MiB | of that imports |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, file in results["files"].items():
        for system, one in file["systems"].items():
            lines.append(
                f"| {name} | {file['bytes'] / 1e6:.0f} | {system} | {one['seconds']:.2f} "
                f"| {one['processor_seconds']:.2f} | {one['peak_bytes'] / 2**20:.0f} "
                f"| {one['imported_bytes'] / 2**20:.0f} |"
            )
    lines += [
        "",
        "| file | times faster | of processor seconds | share of peak memory | difference |",
        "|---|---|---|---|---|",
    ]
    for name, file in results["files"].items():
        lines.append(
            f"| {name} | {file['faster']:.1f} | {file['faster_processor']:.1f} "
            f"| {file['memory']:.2f} | {file['largest_relative_difference']:.1e} |"
        )
    marks = results["marks"]
    lines.append(f"| mark | plain {marks['plain']}, gz {marks['gz']} | | {marks['memory']} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--volumes", type=int, default=VOLUMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile (3 GB)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        system, image, atlas = given.measure
        print(json.dumps(measure_one(system, Path(image), Path(atlas))))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        try:
            results = compare_extraction(
                Path(folder), volumes=given.volumes, types=given.types, repeats=given.repeats
            )
        except EvaluationError as error:
            print(error, file=sys.stderr)
            return 2
    print(render_extraction(results))
    if given.json is not None:
        command = shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]])
        write_json(given.json, {"command": command, **results})
        print(f"figures -> {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
