"""One scan of twenty regions, written in every format that can be read."""

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ParcelsAxis, SeriesAxis
from scipy.io import savemat

from cortexicon.cohorts import ParcelSeries, cohort_from_series, save_cohort
from cortexicon.cohorts.atlases import Atlas, load_atlas

REGIONS, TIME, TR = 20, 40, 2.0
AFFINE = np.array([[4.0, 0, 0, -20], [0, 4, 0, -20], [0, 0, 4, -20], [0, 0, 0, 1]])
SHAPE = (10, 10, 10)


class Example:
    """The scan, and how each program would have written it."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(0)
        self.values = (1000 + 10 * rng.standard_normal((TIME, REGIONS))).astype(np.float32)
        self.labels = [f"Area_{i:02d}" for i in range(REGIONS)]
        self.codes = [100 + i for i in range(REGIONS)]  # values of the label volume
        grid = np.zeros(SHAPE, np.int16)
        for i, code in enumerate(self.codes):
            x, y, z = i % 5, i // 5 % 2, i // 10
            grid[2 * x : 2 * x + 2, 4 * y : 4 * y + 3, 4 * z : 4 * z + 3] = code
        self.grid = grid
        folder.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(grid, AFFINE), folder / "toy.nii.gz")
        table = pd.DataFrame({"index": self.codes, "name": self.labels})
        table.to_csv(folder / "toy.tsv", sep="\t", index=False)
        self.atlas: Atlas = load_atlas(folder / "toy.nii.gz", labels=folder / "toy.tsv")

    def frame(self) -> pd.DataFrame:
        """Values under the names of the regions."""
        return pd.DataFrame(self.values, columns=self.labels)

    def series(self, subject: str = "01", seed: int = 0) -> ParcelSeries:
        """The scan in memory; other seeds are other scans."""
        extra = np.random.default_rng(seed).standard_normal(self.values.shape).astype(np.float32)
        return ParcelSeries(
            self.values + (extra if seed else 0),
            self.labels,
            self.atlas.coordinates,
            self.atlas.name,
            TR,
            subject,
            site="A",
        )

    def painted(self) -> np.ndarray:
        """Volumes (x, y, z, time) in which every voxel of a region carries its series."""
        data = np.zeros((*SHAPE, TIME), np.float32)
        for column, code in enumerate(self.codes):
            data[self.grid == code] = self.values[:, column]
        return data

    def image(self) -> nibabel.Nifti1Image:
        """`painted` with TR and units in the header."""
        image = nibabel.Nifti1Image(self.painted(), AFFINE)
        image.header.set_zooms((4, 4, 4, TR))
        image.header.set_xyzt_units("mm", "sec")
        return image

    def parcels(self) -> ParcelsAxis:
        """Axis of parcels that lie in the volume."""
        voxels = [np.argwhere(self.grid == code) for code in self.codes]
        return ParcelsAxis(self.labels, voxels, [{}] * REGIONS, AFFINE, SHAPE)

    def write(self, kind: str, folder: Path) -> Path:
        """Write the scan as `kind` into a folder; returns the file that `find_scans` takes."""
        folder.mkdir(parents=True, exist_ok=True)
        return getattr(self, f"_{kind}")(folder)

    def _nii(self, folder):
        nibabel.save(self.image(), path := folder / "sub-01_task-rest_bold.nii")
        return path

    def _nii_gz(self, folder):
        nibabel.save(self.image(), path := folder / "sub-01_task-rest_bold.nii.gz")
        return path

    def _ptseries(self, folder):
        header = (SeriesAxis(0, TR, TIME), self.parcels())
        image = nibabel.Cifti2Image(self.values, header)
        nibabel.save(image, path := folder / "sub-01_task-rest_desc-toy_bold.ptseries.nii")
        return path

    def grayordinates(self):
        """Axis of 60 vertices and 40 voxels, and the code of each, 0 for none."""
        vertices = np.arange(0, 120, 2)
        surface = BrainModelAxis.from_surface(vertices, 130, name="CortexLeft")
        voxels = np.argwhere(self.grid > 0)[:40]
        volume = BrainModelAxis("thalamus_left", voxels, affine=AFFINE, volume_shape=SHAPE)
        codes = [*np.repeat(self.codes[:12], 5), *np.repeat(self.codes[12:], 5)]
        return surface + volume, np.array(codes)

    def _dtseries(self, folder):
        axis, codes = self.grayordinates()
        names = {0: ("???", (0, 0, 0, 0))}
        names |= {c: (n, (1, 0, 0, 1)) for c, n in zip(self.codes, self.labels, strict=True)}
        labels = LabelAxis(["toy"], [names])
        image = nibabel.Cifti2Image(codes[None].astype(np.float32), (labels, axis))
        nibabel.save(image, folder / "toy.dlabel.nii")
        columns = np.array([self.codes.index(code) for code in codes])
        image = nibabel.Cifti2Image(self.values[:, columns], (SeriesAxis(0, TR, TIME), axis))
        nibabel.save(image, path := folder / "sub-01_task-rest_bold.dtseries.nii")
        return path

    def _1D(self, folder):
        path = folder / "sub-01_rois_toy.1D"
        header = "\t".join(f"#{code}" for code in self.codes)
        np.savetxt(path, self.values, delimiter="\t", header=header, comments="", fmt="%.9g")
        return path

    def _tsv(self, folder):
        self.frame().to_csv(path := folder / "sub-01_timeseries.tsv", sep="\t", index=False)
        return path

    def _csv(self, folder):
        self.frame().to_csv(path := folder / "sub-01_timeseries.csv")  # with pandas' row numbers
        return path

    def _npy(self, folder):
        np.save(path := folder / "sub-01.npy", self.values)
        return path

    def _npz(self, folder):
        path = folder / "sub-01.npz"
        np.savez(path, time_series=self.values, labels=self.labels, tr=TR, age=30.0)
        return path

    def _mat(self, folder):
        path, cells = folder / "sub-01.mat", np.array(self.labels, object)
        savemat(path, {"ROISignals": self.values, "labels": cells, "TR": TR})
        return path

    def _mat73(self, folder):
        h5py = pytest.importorskip("h5py")
        path = folder / "sub-01.mat"
        with h5py.File(path, "w", userblock_size=512) as file:
            file["ROISignals"] = self.values.T
            file["TR"] = [[TR]]
            cells = []
            for i, label in enumerate(self.labels):
                file[f"#refs#/{i}"] = np.array([[ord(c)] for c in label], np.uint16)
                cells.append(file[f"#refs#/{i}"].ref)
            file.create_dataset("labels", data=np.array([cells], h5py.ref_dtype))
        with path.open("r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file, made by a test".ljust(128))
        return path

    def _cohort(self, folder):
        save_cohort(cohort_from_series([self.series(), self.series("02", 1)]), folder / "cohort")
        return folder / "cohort"

    def _tables(self, folder):
        (folder / "tables_toy" / "timeseries").mkdir(parents=True)
        folder = folder / "tables_toy"
        frame = pd.concat([self.frame(), self.frame() + 1])
        frame.insert(0, "participant_id", ["01"] * TIME + ["02"] * TIME)
        frame.insert(1, "t", [*range(TIME), *range(TIME)])
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table, folder / "timeseries" / "bold.parquet")
        people = pd.DataFrame({"participant_id": ["01", "02"], "site": "A", "tr": "2.0"})
        people.to_csv(folder / "participants.tsv", sep="\t", index=False)
        self.write_regions(folder)
        return folder

    def write_regions(self, folder: Path) -> Path:
        """regions.tsv with names and coordinates."""
        table = self.atlas.regions_table()[["label", "x", "y", "z"]]
        table.to_csv(folder / "regions.tsv", sep="\t", index=False)
        return folder / "regions.tsv"


#: Every format; those of the second line do not hold the TR.
KINDS = ["nii", "nii_gz", "ptseries", "dtseries", "npz", "mat", "mat73", "cohort"]
KINDS += ["1D", "tsv", "csv", "npy", "tables"]


FILE_KINDS = [kind for kind in KINDS if kind not in ("cohort", "tables")]


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> Example:
    """The scan that all tests of this folder read back."""
    return Example(tmp_path_factory.mktemp("atlas"))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Each format in turn."""
    return request.param


@pytest.fixture(params=FILE_KINDS)
def file_kind(request) -> str:
    """Each format that is one file."""
    return request.param
