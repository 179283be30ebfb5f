"""Random damage to every kind of file: a scan or a `CohortError`, never anything else."""

import json
import shutil
import warnings

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cortexicon.cohorts import CohortError, ParcelSeries
from cortexicon.cohorts.scan_files import read_scan
from cortexicon.cohorts.sources import find_scans

# Half of the damage goes to the first kilobyte, where headers are. The text of an exception is
# evaluated by nobody, so shrinking an example would only cost time.
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
PLACES = st.one_of(st.floats(0, 1), st.integers(0, 1023))
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=8)
CUTS = st.one_of(st.none(), st.none(), st.floats(0, 1))


def damage(raw: bytes, flips, cut) -> bytes:
    """Bytes with some replaced (a place is an offset or a share of the length), and a cut."""
    spoiled = bytearray(raw)
    for place, byte in flips:
        at = int(place * (len(raw) - 1)) if isinstance(place, float) else place
        spoiled[min(at, len(raw) - 1)] = byte
    return bytes(spoiled if cut is None else spoiled[: int(cut * len(raw))])


def read_all(source, atlas, **options):
    """Every scan of a source, or the error that stands for it."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for scan in find_scans(source):
                try:
                    found.append(read_scan(scan, atlas, **options)[0])
                except CohortError as error:
                    found.append(error)
        except CohortError as error:
            found.append(error)
    return found


def attack(source, atlas, **options):
    """Damage each file of a folder many times; returns how often a scan was read all the same."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    originals = {path: path.read_bytes() for path in files}
    outcomes: list[bool] = []

    @SETTINGS
    @given(which=st.integers(0, len(files) - 1), flips=FLIPS, cut=CUTS)
    def once(which, flips, cut):
        path = files[which]
        # A new file, not the old one written over: readers may still have that one mapped.
        path.unlink()
        path.write_bytes(damage(originals[path], flips, cut))
        try:
            for result in read_all(source, atlas, **options):
                assert isinstance(result, ParcelSeries | CohortError)
                outcomes.append(isinstance(result, ParcelSeries))
                if isinstance(result, ParcelSeries):
                    assert result.values.shape[1] == len(atlas)
                    result.validate()
        finally:
            path.unlink()
            path.write_bytes(originals[path])

    once()
    return outcomes


def test_random_damage(example, kind, tmp_path):
    path = example.write(kind, tmp_path)
    source = path if path.is_dir() else tmp_path
    undamaged = read_all(source, example.atlas, tr=2.0)
    assert all(isinstance(result, ParcelSeries) for result in undamaged), undamaged
    outcomes = attack(source, example.atlas, tr=2.0)
    assert not all(outcomes), "no damage was ever noticed"


def test_random_damage_to_what_lies_beside_a_scan(example, tmp_path):
    """Sidecar, confounds with their JSON, brain mask, region table."""
    path = example.write("nii_gz", tmp_path)
    stem = "sub-01_task-rest"
    path.rename(tmp_path / f"{stem}_space-MNI_desc-preproc_bold.nii.gz")
    mask = example.image().slicer[..., 0]
    mask.to_filename(tmp_path / f"{stem}_space-MNI_desc-brain_mask.nii.gz")
    (tmp_path / f"{stem}_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    rng = np.random.default_rng(0)
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    table = pd.DataFrame(rng.standard_normal((40, 6)), columns=names)
    for name in names:
        for suffix in ("derivative1", "power2", "derivative1_power2"):
            table[f"{name}_{suffix}"] = rng.standard_normal(40)
    table = table[names[:3] + [c for c in table if "power2" in c or "derivative1" in c] + names[3:]]
    table["framewise_displacement"] = 0.1
    table.to_csv(tmp_path / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", index=False)
    (tmp_path / f"{stem}_desc-confounds_timeseries.json").write_text("{}")
    example.write_regions(tmp_path)
    options = {"confounds": "motion", "scrub_mm": 0.5, "band_pass": (0.01, 0.1)}
    results = read_all(tmp_path, example.atlas, **options)
    assert all(isinstance(result, ParcelSeries) for result in results), results
    outcomes = attack(tmp_path, example.atlas, **options)
    assert any(outcomes)
    assert not all(outcomes)


def test_a_file_under_another_name(example, file_kind, tmp_path):
    """The content of one format with the ending of another."""
    path = example.write(file_kind, tmp_path)
    for ending in (".nii.gz", ".ptseries.nii", ".1D", ".npy", ".npz", ".mat", ".tsv", ".csv"):
        if path.name.endswith(ending):
            continue
        other = tmp_path / f"sub-02{ending}"
        shutil.copy(path, other)
        for result in read_all(other, example.atlas, tr=2.0):
            assert isinstance(result, ParcelSeries | CohortError)
        other.unlink()
