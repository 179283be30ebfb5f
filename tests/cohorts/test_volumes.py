"""Region means: nilearn's masker as oracle, lost regions, NaN, damaged files, memory."""

import gzip
import io
import tracemalloc
import warnings

import nibabel
import numpy as np
import pytest
from nilearn.maskers import NiftiLabelsMasker

from cortexicon.cohorts import CohortError
from cortexicon.cohorts.atlases import load_atlas
from cortexicon.cohorts.images import load_image, repetition_time
from cortexicon.cohorts.volumes import nearest, region_means

SHAPE, TIME = (12, 13, 10), 23
AFFINE = np.diag([-3.0, 3.0, 3.0, 1.0])
AFFINE[:3, 3] = [16, -20, -14]


def label_data(regions: int = 30) -> np.ndarray:
    """Regions in blocks that do not follow each other in memory, background around them."""
    rng = np.random.default_rng(5)
    data = np.zeros(SHAPE, np.int16)
    inner = data[1:-1, 1:-1, 1:-1]
    inner[:] = rng.integers(0, regions + 1, inner.shape)
    return data


def bold_data(dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(6)
    return (900 + 40 * rng.standard_normal((*SHAPE, TIME))).astype(dtype)


def save(path, data, affine=AFFINE, slope=None):
    image = nibabel.Nifti1Image(data, affine)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return load_atlas(save(tmp_path_factory.mktemp("atlas") / "toy.nii.gz", label_data()))


@pytest.fixture
def bold(tmp_path):
    return save(tmp_path / "bold.nii", bold_data())


def oracle(image, labels, mask=None):
    """What nilearn says, (time, regions)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masker = NiftiLabelsMasker(labels, mask_img=mask, standardize=False)
        return masker.fit_transform(image if not hasattr(image, "suffix") else str(image))


@pytest.mark.parametrize(
    ("name", "dtype", "slope"),
    [
        ("bold.nii", "<i2", None),
        ("bold.nii", ">i2", (0.25, -3.0)),
        ("bold.nii.gz", "<i2", (0.25, 10.0)),
        ("bold.nii.gz", "<f4", None),
        ("bold.nii", ">f4", None),
        ("bold.nii", "<f8", None),
        ("bold.nii.gz", "<u2", None),
        ("bold.img", "<i4", (2.0, 1.0)),
    ],
)
def test_equals_nilearn(tmp_path, atlas, name, dtype, slope):
    path = tmp_path / name
    data = bold_data().astype(dtype)
    header = nibabel.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(np.dtype(dtype))
    kind = nibabel.Nifti1Pair if name.endswith("img") else nibabel.Nifti1Image
    image = kind(data, AFFINE, header)
    image.header.set_slope_inter(*(slope or (1, 0)))
    nibabel.save(image, path)
    means = region_means(path, atlas)
    assert load_image(path).get_data_dtype() == np.dtype(dtype)
    assert means.values.dtype == np.float32
    assert means.values.shape == (TIME, len(atlas))
    if name.endswith("img"):  # nilearn reads no pairs
        path = nibabel.Nifti1Image(np.asanyarray(load_image(path).dataobj), AFFINE)
    np.testing.assert_allclose(means.values, oracle(path, atlas.image), rtol=1e-6)
    assert means.voxels.tolist() == atlas.sizes.tolist()
    assert (means.covered == 1).all()


def test_equals_nilearn_within_a_mask(tmp_path, atlas, bold):
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:9, 1:11, 2:] = 1
    path = save(tmp_path / "mask.nii.gz", mask)
    means = region_means(bold, atlas, mask=path)
    np.testing.assert_allclose(means.values, oracle(bold, atlas.image, str(path)), rtol=1e-6)
    kept = np.bincount(label_data()[mask > 0], minlength=31)[1:]
    assert means.voxels.tolist() == kept.tolist()
    np.testing.assert_allclose(means.covered, kept / atlas.sizes)


OTHER_GRIDS = {
    "finer and flipped": (np.array([2.0, 2.0, 2.0]), [-17, -19, -13], (18, 19, 15)),
    "coarser": (np.array([-4.0, 4.0, 4.0]), [17, -20, -14], (9, 10, 8)),
    "between": (np.array([-2.7, 3.1, 2.9]), [15.2, -19.3, -13.1], (13, 12, 11)),
}


@pytest.mark.parametrize("grid", OTHER_GRIDS)
def test_equals_nilearn_on_another_grid(tmp_path, atlas, grid):
    scale, start, shape = OTHER_GRIDS[grid]
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = start
    data = np.random.default_rng(0).normal(100, 5, (*shape, TIME)).astype(np.float32)
    path = save(tmp_path / "bold.nii.gz", data, affine)
    means = region_means(path, atlas)
    np.testing.assert_allclose(means.values, oracle(path, atlas.image), rtol=1e-6)
    assert (means.voxels > 0).all()


def test_nearest_takes_oblique_grids(atlas):
    turned = AFFINE.copy()
    turned[:3, 3] += 0.37  # no centre falls on a border, where either side would do
    turned[:3, :3] = turned[:3, :3] @ np.array([[0.91, 0.23, 0], [-0.2, 0.9, 0.13], [0, -0.1, 1]])
    labels = label_data()
    out = nearest(labels, AFFINE, turned, (11, 10, 9))
    inverse = np.linalg.inv(AFFINE) @ turned
    for i, j, k in ((0, 0, 0), (5, 5, 5), (10, 9, 8), (3, 7, 2)):
        x, y, z = np.rint((inverse @ [i, j, k, 1])[:3]).astype(int)
        inside = all(0 <= n < size for n, size in zip((x, y, z), SHAPE, strict=True))
        assert out[i, j, k] == (labels[x, y, z] if inside else 0)
    assert len(np.unique(out)) > 20
    assert nearest(labels, AFFINE, AFFINE + 1e-5, SHAPE) is labels


def test_the_block_size_changes_no_bit(tmp_path, atlas):
    path = save(tmp_path / "bold.nii.gz", bold_data(np.int16), slope=(0.3, 1))
    volume = 2 * int(np.prod(SHAPE))
    first = region_means(path, atlas, block_bytes=1)
    for size in (volume * 2, volume * 7 + 1, 10**9):
        again = region_means(path, atlas, block_bytes=size)
        assert again.values.tobytes() == first.values.tobytes()
        assert again.covered.tobytes() == first.covered.tobytes()


def test_an_image_in_memory_gives_the_same(atlas, bold):
    means = region_means(bold, atlas)
    image = nibabel.Nifti1Image(bold_data(), AFFINE)
    again = region_means(image, atlas, mask=nibabel.Nifti1Image(np.ones(SHAPE, "u1"), AFFINE))
    assert np.array_equal(again.values, means.values)


def test_equal_voxels_come_back_exactly(tmp_path, atlas):
    """The mean of equal numbers is that number, whatever the header's scaling."""
    series = np.random.default_rng(1).integers(-9000, 9000, (TIME, 31)).astype(np.int16)
    series[:, 0] = 0
    data = np.moveaxis(series[:, label_data()], 0, -1)
    path = tmp_path / "bold.nii.gz"
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(data, AFFINE, header)
    image.header.set_slope_inter(0.0625, 1000)
    nibabel.save(image, path)  # nibabel stores (data - 1000) / 0.0625, which overflows: so by hand
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[352:] = data.tobytes(order="F")
    path.write_bytes(gzip.compress(bytes(raw)))
    means = region_means(path, atlas)
    assert np.array_equal(means.values, (series[:, 1:] * 0.0625 + 1000).astype(np.float32))


# ------------------------------------------------------------------ lost regions, NaN, Inf


def test_a_lost_region_stays_in_its_column(tmp_path, atlas, bold):
    labels = label_data()
    mask = save(tmp_path / "mask.nii.gz", (labels != 7).astype(np.uint8))
    means = region_means(bold, atlas, mask=mask)
    assert np.isnan(means.values[:, 6]).all()
    assert (means.voxels[6], means.covered[6]) == (0, 0)
    others = np.delete(np.arange(30), 6)
    full = region_means(bold, atlas)
    assert np.array_equal(means.values[:, others], full.values[:, others])
    assert (means.covered[others] == 1).all()


def test_zeros_count_as_not_covered_but_are_averaged(tmp_path, atlas):
    data, labels = bold_data(), label_data()
    data[labels == 3] = 0  # a region without signal
    half = np.argwhere(labels == 9)[::2]
    data[tuple(half.T)] = 0  # a cut one
    path = save(tmp_path / "bold.nii.gz", data)
    means, wanted = region_means(path, atlas), oracle(path, atlas.image)
    assert np.isnan(means.values[:, 2]).all()
    assert means.covered[2] == 0
    np.testing.assert_allclose(means.values[:, 8], wanted[:, 8], rtol=1e-6)
    assert means.covered[8] == pytest.approx(1 - len(half) / atlas.sizes[8])
    alive_later = bold_data()
    alive_later[labels == 3, :5] = 0
    means = region_means(save(tmp_path / "late.nii", alive_later), atlas)
    assert means.covered[2] == 1
    assert means.values[0, 2] == 0


def test_nan_outside_the_brain_is_no_data(tmp_path, atlas):
    data, labels = bold_data(), label_data()
    cut = np.argwhere(labels == 9)[:3]
    data[tuple(cut.T)] = np.nan
    means = region_means(save(tmp_path / "bold.nii.gz", data), atlas)
    rest = np.argwhere(labels == 9)[3:]
    np.testing.assert_allclose(means.values[:, 8], data[tuple(rest.T)].mean(axis=0), rtol=1e-6)
    assert means.voxels[8] == len(rest)
    assert means.covered[8] == pytest.approx(len(rest) / (len(rest) + 3))


def test_nan_in_the_middle_of_a_scan_marks_the_region(tmp_path, atlas):
    data, labels = bold_data(), label_data()
    x, y, z = np.argwhere(labels == 9)[0]
    data[x, y, z, 11] = np.nan
    means = region_means(save(tmp_path / "bold.nii.gz", data), atlas)
    assert np.argwhere(np.isnan(means.values)).tolist() == [[11, 8]]


@pytest.mark.parametrize("other", [0.0, -np.inf])
def test_an_infinite_voxel_is_refused_with_its_place(tmp_path, atlas, other):
    data, labels = bold_data(), label_data()
    places = np.argwhere(labels == 9)
    data[(*places[1], 17)] = other
    data[(*places[0], 17)] = np.inf
    path = save(tmp_path / "bold.nii.gz", data)
    with pytest.raises(
        CohortError, match=r"expected finite numbers, found -?inf in volume 17, vox"
    ):
        region_means(path, atlas)


def test_too_few_regions_in_the_image(tmp_path, atlas):
    away = AFFINE.copy()
    away[2, 3] -= 21  # the image's box ends within the atlas
    path = save(tmp_path / "native.nii.gz", bold_data(), away)
    slabs = np.broadcast_to(np.arange(10, dtype=np.int16), SHAPE)
    fewer = load_atlas(save(tmp_path / "slabs.nii", np.array(slabs)))
    with pytest.raises(
        CohortError,
        match=r"only 2 of 9 regions overlap the image; is it in MNI space\? Lost of atlas slabs: "
        r"7 outside its box \(slabs_003, .* and 2 more\)\. Normalise",
    ):
        region_means(path, fewer)
    header = nibabel.Nifti1Header()  # sform and qform 0, voxels of 1 mm around the origin
    header.set_data_shape((*SHAPE, TIME))
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "nowhere.nii"
    path.write_bytes(header.binaryblock + bytes(4) + bold_data().tobytes(order="F"))
    with pytest.raises(CohortError, match=r"Its header places it nowhere \(sform, qform 0\)"):
        region_means(path, fewer)


def test_every_way_to_lose_regions_is_named(tmp_path, atlas, bold):
    labels = label_data()
    coarse = np.diag([-12.0, 12.0, 12.0, 1.0])
    coarse[:3, 3] = [12, -16, -10]
    path = save(tmp_path / "coarse.nii", bold_data()[:3, :3, :3], coarse)
    with pytest.raises(
        CohortError, match=r"smaller than its voxels of 12 x 12 x 12 mm.*larger regi"
    ):
        region_means(path, atlas)
    mask = save(tmp_path / "mask.nii", (labels > 5).astype(np.uint8))
    with pytest.raises(CohortError, match=r"only 25 of 30 regions .* 5 outside the mask \(toy_001"):
        region_means(bold, atlas, mask=mask)
    for fill in (0, np.nan):
        data = bold_data()
        data[labels > 26] = fill
        path = save(tmp_path / "holes.nii", data)
        with pytest.raises(
            CohortError, match=r"only 26 of 30 .* 4 where it is NaN or 0 throughout"
        ):
            region_means(path, atlas)


def test_masks_that_are_none(tmp_path, atlas, bold):
    empty = save(tmp_path / "empty.nii", np.zeros(SHAPE, np.uint8))
    with pytest.raises(CohortError, match=r"empty\.nii: expected a mask with voxels"):
        region_means(bold, atlas, mask=empty)
    with pytest.raises(CohortError, match="expected a mask with three axes"):
        region_means(bold, atlas, mask=bold)


def test_an_atlas_without_a_volume(atlas, bold):
    from dataclasses import replace

    with pytest.raises(CohortError, match="atlas toy: expected a label volume, found none"):
        region_means(bold, replace(atlas, image=None))


# ------------------------------------------------------------------ damaged files


def damage(tmp_path, fault):
    """Write one bad file; returns its path."""
    path = tmp_path / "bold.nii.gz"
    plain, packed = tmp_path / "plain.nii", save(tmp_path / "good.nii.gz", bold_data())
    good = packed.read_bytes()
    raw = gzip.decompress(good)
    texts = {
        "web page": b"<!DOCTYPE html><html>404</html>",
        "empty": b"",
        "text": b"this is no image, however long it may become" * 20,
        "not compressed": raw,
        "truncated gz": good[: len(good) // 2],
        "no end": good[:-4],
        "flipped": good[:5000] + bytes([good[5000] ^ 255]) + good[5001:],
        "header only": gzip.compress(raw[:2000]),
    }
    if fault in texts:
        path.write_bytes(texts[fault])
        return path
    if fault == "compressed as .nii":
        plain.write_bytes(good)
    elif fault == "truncated":
        plain.write_bytes(raw[: len(raw) // 2])
    elif fault == "cut header":
        plain.write_bytes(raw[:200])
    elif fault == "too large":
        header = nibabel.Nifti1Header()
        header.set_data_shape((30000, 30000, 30000, 400))
        path.write_bytes(gzip.compress(header.binaryblock + raw[348:]))
        return path
    elif fault in ("flat affine", "NaN affine"):
        affine = AFFINE.copy()
        affine[2, :3] = 0 if fault == "flat affine" else np.nan
        header = nibabel.Nifti1Header.from_fileobj(io.BytesIO(raw))
        header.set_sform(affine, 1)
        plain.write_bytes(header.binaryblock + raw[348:])
    elif fault == "complex":
        save(plain, bold_data(np.complex64))
    elif fault == "folder":
        plain.mkdir()
    elif fault == "ending":
        plain = tmp_path / "bold.mgz"
        plain.write_bytes(good)
    else:
        data = bold_data()
        shapes = {"3-D": data[..., 0], "5-D": data[..., None, :], "one": data[..., :1],
                  "five": data[..., :5]}  # fmt: skip
        if fault in shapes:
            save(plain, shapes[fault])
    return plain


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("absent", "expected a NIfTI file, found nothing"),
        ("folder", "expected a NIfTI file, found a folder"),
        ("ending", r"found the ending '\.mgz'"),
        ("empty", "found an empty file"),
        ("web page", "found what looks like a web page"),
        ("text", "found bytes that are not compressed"),
        ("not compressed", r"not compressed .*Rename it to \.nii"),
        ("compressed as .nii", r"compressed bytes\. Rename it to end in \.nii\.gz"),
        ("cut header", "truncated or corrupted"),
        ("header only", r"volume 0 of 23: .*truncated or corrupted\. Copy or download"),
        ("truncated", r"expected 143,\d+ bytes for shape .* found a file of .*truncated"),
        ("truncated gz", r"volume \d+ of 23: .*truncated or corrupted"),
        ("no end", "truncated or corrupted"),
        ("flipped", "truncated or corrupted"),
        ("too large", "truncated or corrupted"),
        ("flat affine", "affine that places the voxels"),
        ("NaN affine", "affine that places the voxels"),
        ("complex", "expected real numbers, found voxels of complex64"),
        ("3-D", r"4-D with at least 10 volumes, found shape \(12, 13, 10\)\. This is one volume"),
        ("5-D", r"4-D with at least 10 volumes, found shape \(12, 13, 10, 1, 23\)"),
        ("one", r"at least 10 volumes, found shape \(12, 13, 10(, 1)?\)"),
        ("five", r"at least 10 volumes, found shape \(12, 13, 10, 5\)"),
    ],
)
def test_damage_is_named(tmp_path, atlas, fault, message):
    path = damage(tmp_path, fault)
    with pytest.raises(CohortError, match=message) as error:
        region_means(path, atlas)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_byte_flips_end_in_data_or_in_words(tmp_path, atlas, name):
    path = save(tmp_path / name, bold_data(np.int16))
    good = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    ends = {"data": 0, "words": 0}
    for trial in range(150):
        bad = good.copy()
        # Mostly where the header says shape, type, scaling and place.
        most = len(bad) if name.endswith("gz") or trial % 3 == 0 else 352
        bad[rng.integers(0, most, 1 + trial % 4)] = rng.integers(0, 256, 1 + trial % 4)
        path.write_bytes(bad.tobytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                region_means(path, atlas)
            ends["data"] += 1
        except CohortError:
            ends["words"] += 1
    assert ends["words"] >= 10, ends


def test_memory_does_not_grow_with_the_file(tmp_path, atlas):
    long = np.repeat(bold_data(np.int16), 40, axis=-1)  # 920 volumes, 2.9 MB
    path = save(tmp_path / "long.nii.gz", long)
    region_means(path, atlas)
    tracemalloc.start()
    try:
        means = region_means(path, atlas, block_bytes=2**16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    results = 8 * means.values.size * 2  # sums and their means, float64
    assert peak < results + 0.4 * long.nbytes


def test_repetition_times(tmp_path):
    for unit, number, seconds in (
        ("sec", 2.5, 2.5), ("msec", 2500, 2.5), ("usec", 2.5e6, 2.5), ("unknown", 720.0, 720.0),
        ("sec", 0, None), ("hz", 3, None),
    ):  # fmt: skip
        image = nibabel.Nifti1Image(bold_data(), AFFINE)
        image.header.set_zooms((3, 3, 3, number))
        image.header.set_xyzt_units("mm", unit)
        nibabel.save(image, tmp_path / "bold.nii")
        found = repetition_time(load_image(tmp_path / "bold.nii"))
        assert found == (None if seconds is None else pytest.approx(seconds, rel=1e-6)), unit
    save(tmp_path / "mask.nii", label_data())
    assert repetition_time(load_image(tmp_path / "mask.nii")) is None


# ------------------------------------------------------------------ real files


@pytest.mark.data
def test_the_painted_image_comes_back_exactly(data_folder):
    folder = data_folder / "nifti" / "derived_abide_cc200_painted"
    atlas = load_atlas("cc200", folder=data_folder / "atlases")
    image = next(folder.glob("*_bold.nii.gz"))
    wanted = np.load(folder / "expected_regions_40x200_float32.npy", allow_pickle=False)
    for mask in (None, folder / "brainmask.nii.gz"):
        means = region_means(image, atlas, mask=mask)
        assert np.array_equal(means.values, wanted)
    assert repetition_time(load_image(image)) == 2.0


@pytest.mark.data
@pytest.mark.parametrize("run", [1, 2, 3])
def test_haxby_equals_nilearn(data_folder, run):
    folder = data_folder / "nifti" / "haxby2001_25mm"
    labels = folder / "mask_hoc_25mm.nii.gz"
    image = folder / f"task001_run00{run}_bold_25mm.nii.gz"
    means, wanted = region_means(image, load_atlas(labels)), oracle(image, str(labels))
    assert means.values.shape == (121, 21)
    np.testing.assert_allclose(means.values, wanted, rtol=1e-5)
    # Not only to 1e-5: nilearn's float64, rounded to float32, is what comes back.
    assert np.array_equal(means.values, wanted.astype(np.float32))


@pytest.mark.data
def test_every_real_file_gives_data_or_words(data_folder):
    atlas = load_atlas("cc200", folder=data_folder / "atlases")
    read, refused = [], {}
    for path in sorted((data_folder / "nifti").rglob("*.nii*")):
        try:
            region_means(path, atlas)
            read.append(path.name)
        except CohortError as error:
            refused[path.name] = str(error)
    assert [name for name in read if "cc200painted" not in name] == []
    assert len(read) == 1
    assert "CIFTI" in refused["sub-NYU0050954_task-rest_desc-cc200.ptseries.nii"]
    assert "only 0 of 200 regions overlap" in refused["fmri1.nii.gz"]
    assert "places it nowhere" in refused["filtered_func_data.nii.gz"]
    assert "at least 10 volumes, found shape (39, 50, 33, 5)" in refused["echo1.nii.gz"]
