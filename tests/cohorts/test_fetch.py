"""Public cohorts through nilearn's own client, from a server on the loopback.

The server holds files of the layout that nilearn's fetchers ask for. The only thing that is not as
it is outside: a request for https://HOST/PATH goes to http://127.0.0.1:PORT/HOST/PATH.
"""

import io
import json
import tarfile
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np
import pandas as pd
import pytest
import requests

from cortexicon.cohorts import CohortError, fetch_cohort, load_cohort, read_participants
from cortexicon.cohorts.prepare import People, prepare_cohort
from cortexicon.cohorts.scan_results import AtlasChoice, Reading
from cortexicon.cohorts.sources import find_scans

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class Server:
    """Files by host and path, and the requests that were made."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = urllib.parse.urlparse(self.path).path.lstrip("/").replace("//", "/")
                outer.asked.append(path)
                body = outer.files.get(path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    served = Server()
    send = requests.adapters.HTTPAdapter.send

    def to_loopback(self, request, **options):
        url = urllib.parse.urlparse(request.url)
        port = served.http.server_address[1]
        request.url = f"http://127.0.0.1:{port}/{url.netloc}{url.path}"
        return send(self, request, **options | {"proxies": {}})

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", to_loopback)
    yield served
    served.http.shutdown()
    served.http.server_close()


def volume(seed):
    """A NIfTI file of 5 x 6 x 4 voxels and 60 volumes at 2 s, and its numbers."""
    values = np.random.default_rng(seed).integers(0, 900, (5, 6, 4, 60)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0]))
    image.header.set_zooms((4.0, 4.0, 4.0, 2.0))
    return nibabel.Nifti1Image.to_bytes(image), values


def gzipped(data):
    import gzip

    return gzip.compress(data)


def archive(members):
    """A .tgz of name -> bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# --------------------------------------------------------------------- ABIDE

ABIDE = "s3.amazonaws.com/fcp-indi/data/Projects/ABIDE_Initiative"
ABIDE_ROWS = [  # FILE_ID, SUB_ID, SITE_ID, AGE, SEX, DX, FIQ, EYES, rater 3
    ("Pitt_0050003", 50003, "PITT", 24.45, 1, 1, 124, 1, "OK"),
    ("no_filename", 50004, "PITT", 19.09, 1, 1, 113, 1, "OK"),
    ("UM_1_0050272", 50272, "UM_1", 14.2, 2, 2, -9999, 2, "OK"),
    ("Leuven_1_0050682", 50682, "LEUVEN_1", 22.0, 1, 2, 101, 1, "fail"),
]


def serve_abide(server, rows=ABIDE_ROWS):
    head = "Unnamed: 0,SUB_ID,X,SITE_ID,FILE_ID,DX_GROUP,AGE_AT_SCAN,SEX,FIQ,EYE_STATUS_AT_SCAN,"
    head += "COMMENT,qc_rater_1,qc_anat_rater_2,qc_func_rater_2,qc_anat_rater_3,qc_func_rater_3"
    lines = [head]
    for number, (name, sub, site, age, sex, group, iq, eyes, rater) in enumerate(rows):
        comment = '"moved, a little"'  # commas within quotes, as in the real table
        facts = [number, sub, number, site, name, group, age, sex, iq, eyes, comment]
        lines.append(",".join(map(str, [*facts, "OK", "maybe", "OK", "OK", rater])))
    path = f"{ABIDE}/Phenotypic_V1_0b_preprocessed1.csv"
    server.files[path] = "\n".join(lines).encode()
    series = {}
    for seed, (name, *_) in enumerate(rows):
        if name == "no_filename":
            continue
        series[name] = np.random.default_rng(seed).normal(0, 9, (30, 6)).round(4)
        buffer = io.BytesIO()
        head = "\t".join(f"#{value}" for value in range(1, 7))
        np.savetxt(buffer, series[name], "%.4f", "\t", header=head, comments="")
        url = f"{ABIDE}/Outputs/cpac/nofilt_noglobal/rois_cc200/{name}_rois_cc200.1D"
        server.files[url] = buffer.getvalue()
    return series


def test_abide_comes_as_series_with_intervals_and_people(server, tmp_path):
    series = serve_abide(server)
    fetched = fetch_cohort("abide", tmp_path, quiet=True)
    assert (fetched.num_scans, fetched.atlas, fetched.left_out) == (3, "cc200", {})
    people = read_participants(fetched.participants)
    assert people["subject_id"].tolist() == ["Pitt_0050003", "UM_1_0050272", "Leuven_1_0050682"]
    assert people["tr"].tolist() == [1.5, 2.0, 1.656]
    assert people["sex"].tolist() == ["M", "F", "M"]
    assert people["diagnosis"].tolist() == ["ASD", "control", "control"]
    assert people["eyes"].tolist() == ["open", "closed", "open"]
    assert people["recommended"].tolist() == [True, True, False]
    assert np.isnan(people["fiq"][1])  # -9999 in the table of the release
    found = {scan.subject_id: scan for scan in find_scans(fetched.scans)}
    assert set(found) == set(series)
    for subject, scan in found.items():
        np.testing.assert_array_equal(np.loadtxt(scan.path), series[subject])
    assert found["UM_1_0050272"].tr == 2.0


def label_volume(folder, shape, size_mm):
    """Six regions on a grid, as a label volume."""
    labels = np.zeros(shape, np.int16)
    labels.reshape(-1)[: labels.size // 6 * 6] = np.repeat(np.arange(1, 7), labels.size // 6)
    path = folder / "six.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([*[size_mm] * 3, 1.0])), path)
    return str(path)


def test_what_was_fetched_can_be_prepared(server, tmp_path):
    series = serve_abide(server)
    fetched = fetch_cohort("abide", tmp_path / "fetched", quiet=True)
    reading = Reading(AtlasChoice(label_volume(tmp_path, (4, 3, 2), 30.0)))
    people = People(fetched.participants)
    prepared = prepare_cohort(fetched.scans, tmp_path / "cohort", people, reading)
    cohort = load_cohort(prepared.path)
    assert cohort.subject_ids == ["Pitt_0050003", "UM_1_0050272", "Leuven_1_0050682"]
    for scan in cohort:
        np.testing.assert_allclose(scan.values, series[scan.subject_id], rtol=1e-6)
    assert [scan.tr for scan in cohort] == [1.5, 2.0, 1.656]
    assert cohort.participants["recommended"].tolist() == [True, True, False]


def test_fetched_volumes_can_be_prepared_with_their_confounds(server, tmp_path):
    serve_adhd(server)
    fetched = fetch_cohort("adhd", tmp_path / "fetched", num_subjects=3, quiet=True)
    volume_of_labels = label_volume(tmp_path, (5, 6, 4), 4.0)
    reading = Reading(AtlasChoice(volume_of_labels), confounds="motion+wm_csf")
    people = People(fetched.participants)
    prepared = prepare_cohort(fetched.scans, tmp_path / "cohort", people, reading)
    cohort = load_cohort(prepared.path)
    assert cohort.subject_ids == ["0010042", "0010064", "0010128"]
    assert cohort.participants["diagnosis"].tolist() == ["control", "ADHD", "ADHD"]
    assert cohort.series("0010042").values.shape == (60, 6)


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    serve_abide(server)
    fetch_cohort("abide", tmp_path, num_subjects=2, quiet=True)
    asked = list(server.asked)
    assert len(asked) == 3
    fetched = fetch_cohort("abide", tmp_path, quiet=True)
    assert fetched.num_scans == 3
    assert len(server.asked) == 4  # the third scan


def test_missing_and_damaged_files_are_listed_and_tried_again(server, tmp_path):
    rows = [*ABIDE_ROWS, ("Mars_0059999", 59999, "MARS", 30.0, 2, 2, 99, 1, "OK")]
    serve_abide(server, rows)
    folder = f"{ABIDE}/Outputs/cpac/nofilt_noglobal/rois_cc200"
    gone = server.files.pop(f"{folder}/UM_1_0050272_rois_cc200.1D")
    page = f"{folder}/Leuven_1_0050682_rois_cc200.1D"
    good, server.files[page] = server.files[page], PAGE
    fetched = fetch_cohort("abide", tmp_path, quiet=True)
    assert fetched.num_scans == 1
    assert fetched.left_out == {
        "UM_1_0050272": "the server answered with status 404",
        "Leuven_1_0050682": "the server sent a web page in place of the scan",
        "Mars_0059999": "no repetition time is known of site MARS",
    }
    assert len(read_participants(fetched.participants)) == 1
    server.files[page] = good
    server.files[f"{folder}/UM_1_0050272_rois_cc200.1D"] = gone
    again = fetch_cohort("abide", tmp_path, quiet=True)
    assert (again.num_scans, list(again.left_out)) == (3, ["Mars_0059999"])


# ---------------------------------------------------------------------- ADHD

ADHD = "www.nitrc.org/frs/download.php"
ADHD_PEOPLE = [("0010042", 7782, "F", 0), ("0010064", 7783, "M", 1), ("0010128", 7784, "M", 1)]


def serve_adhd(server):
    lines = ['"","Subject","Rest.Scan","MeanFD","site","age","sex","viq","adhd"']
    volumes = {}
    for number, (subject, key, sex, adhd) in enumerate(ADHD_PEOPLE):
        lines.append(f"{number},{int(subject)},1,0.1,NYU,{10 + number}.5,{sex},-999,{adhd}")
        data, volumes[subject] = volume(number)
        names = ["csf", "global", "wm", "motion-pitch", "motion-roll", "motion-yaw"]
        names += ["motion-x", "motion-y", "motion-z", "compcor1", "linearTrend"]
        numbers = np.random.default_rng(number).normal(size=(60, len(names)))
        table = pd.DataFrame(numbers, columns=names).to_csv(index=False, sep="\t")
        prefix = f"data/{subject}/{subject}"
        server.files[f"{ADHD}/{key}/adhd40_{subject}.tgz"] = archive(
            {
                f"{prefix}_rest_tshift_RPI_voreg_mni.nii.gz": gzipped(data),
                f"{prefix}_regressors.csv": table.encode(),
            }
        )
    name = "ADHD200_40subs_motion_parameters_and_phenotypics.csv"
    server.files[f"{ADHD}/7781/adhd40_metadata.tgz"] = archive({name: "\n".join(lines).encode()})
    return volumes


def test_adhd_comes_as_volumes_whose_confounds_can_be_loaded(server, tmp_path):
    from nilearn.interfaces.fmriprep import load_confounds

    volumes = serve_adhd(server)
    fetched = fetch_cohort("adhd", tmp_path, num_subjects=3, quiet=True)
    assert (fetched.num_scans, fetched.atlas) == (3, "")
    people = read_participants(fetched.participants)
    assert people["subject_id"].tolist() == ["0010042", "0010064", "0010128"]
    assert people["diagnosis"].tolist() == ["control", "ADHD", "ADHD"]
    assert people["viq"].isna().all()
    found = find_scans(fetched.scans)
    assert [scan.subject_id for scan in found] == ["0010042", "0010064", "0010128"]
    for scan in found:
        np.testing.assert_array_equal(nibabel.load(scan.path).get_fdata(), volumes[scan.subject_id])
        assert scan.tr == 2.0
        assert scan.confounds is not None
        confounds, _ = load_confounds(
            str(scan.path), strategy=("motion", "wm_csf"), motion="full", wm_csf="basic"
        )
        assert confounds.shape == (60, 26)


# --------------------------------------------------------------- development


def serve_development(server):
    from importlib.resources import files

    keys = pd.read_csv(files("nilearn") / "datasets" / "data" / "development_fmri.csv")
    chosen = keys.set_index("participant_id").loc[["sub-pixar001", "sub-pixar123"]]
    table = pd.DataFrame(
        {
            "participant_id": list(chosen.index),
            "Age": [4.77, 21.5],
            "AgeGroup": ["4yo", "Adult"],
            "Child_Adult": ["child", "adult"],
            "Gender": ["M", "F"],
            "Handedness": ["R", "R"],
        }
    )
    server.files["osf.io/yr3av/download"] = table.to_csv(sep="\t", index=False).encode()
    for number, row in enumerate(chosen.itertuples()):
        confounds = pd.DataFrame({"csf": np.arange(20.0), "framewise_displacement": 0.1})
        confounds.loc[0, "framewise_displacement"] = np.nan
        text = confounds.to_csv(sep="\t", index=False, na_rep="n/a")
        server.files[f"osf.io/download/{row.key_r}/"] = text.encode()
        server.files[f"osf.io/download/{row.key_b}/"] = gzipped(volume(number)[0])


def test_development_comes_under_its_bids_names(server, tmp_path):
    serve_development(server)
    fetched = fetch_cohort("development", tmp_path, quiet=True)
    people = read_participants(fetched.participants).set_index("subject_id")
    assert people.loc["sub-pixar123", ["age", "sex", "child_adult"]].tolist() == [
        21.5,
        "F",
        "adult",
    ]
    found = {scan.subject_id: scan for scan in find_scans(fetched.scans)}
    assert set(found) == {"pixar001", "pixar123"}
    scan = found["pixar001"]
    assert (scan.task, scan.space, scan.tr) == ("pixar", "MNI152NLin2009cAsym", 2.0)
    assert pd.read_csv(scan.confounds, sep="\t")["csf"].tolist() == list(range(20))


def test_a_page_in_place_of_a_volume_is_not_kept(server, tmp_path):
    serve_development(server)
    key = next(path for path in server.files if server.files[path][:2] == b"\x1f\x8b")
    good, server.files[key] = server.files[key], PAGE
    fetched = fetch_cohort("development", tmp_path, quiet=True)
    (reason,) = fetched.left_out.values()
    assert "web page" in reason
    assert fetched.num_scans == 1
    server.files[key] = good
    assert fetch_cohort("development", tmp_path, quiet=True).left_out == {}


# -------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("abide", f"{ABIDE}/Phenotypic_V1_0b_preprocessed1.csv"),
        ("adhd", f"{ADHD}/7781/adhd40_metadata.tgz"),
        ("development", "osf.io/yr3av/download"),
    ],
)
def test_a_page_in_place_of_the_people_is_one_message(server, tmp_path, name, path):
    server.files[path] = PAGE
    with pytest.raises(CohortError, match=f"fetch {name}: expected the files of nilearn's fetcher"):
        fetch_cohort(name, tmp_path, quiet=True)
    assert not any(PAGE in item.read_bytes() for item in tmp_path.rglob("*") if item.is_file())


def test_a_server_that_is_down_is_one_message(server, tmp_path):
    with pytest.raises(
        CohortError, match=r"fetch adhd: expected a file, found status 404 for .*7781"
    ):
        fetch_cohort("adhd", tmp_path, quiet=True)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(CohortError, match=r"fetch abide: no connection .*Check the network"):
        fetch_cohort("abide", tmp_path, quiet=True)
    assert not (tmp_path / "scans").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "hcp"}, "expected one of abide, adhd, development, found 'hcp'"),
        ({"name": "abide", "atlas": "schaefer"}, "expected an atlas of cc200"),
        ({"name": "adhd", "atlas": "cc200"}, "get their atlas from `prepare`"),
        ({"name": "adhd", "num_subjects": 0}, "at least 1 subject"),
    ],
)
def test_wrong_choices_are_refused_before_any_request(server, tmp_path, given, message):
    with pytest.raises(CohortError, match=message):
        fetch_cohort(out=tmp_path, **given)
    assert server.asked == []


def test_sidecars_hold_the_interval(server, tmp_path):
    serve_abide(server)
    fetched = fetch_cohort("abide", tmp_path, num_subjects=1, quiet=True)
    (sidecar,) = fetched.scans.glob("*.json")
    assert json.loads(sidecar.read_text()) == {"RepetitionTime": 1.5}
