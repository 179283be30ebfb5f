"""The Space's page over HTTP, its pictures, and the folder that is pushed as a Space."""

import ast
import html
import shutil
import time

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("gradio", reason="needs pip install 'cortexicon[demo]'")

from cortexicon.inference import cohort_matrices, encode_matrices, load_checkpoint
from cortexicon.model_cards import (
    space,
    space_app,
    space_connectivity,
    space_export,
    space_pictures,
)
from cortexicon.model_cards.space_limits import SpaceError
from cortexicon.modeling import AVQConnectomeConfig, AVQConnectomeModel, fisher_z_matrices


@pytest.fixture(scope="module")
def reader(kept_checkpoints):
    return load_checkpoint(kept_checkpoints / "lm")


@pytest.fixture(scope="module")
def page(kept_checkpoints):
    """The served page, as a client sees it."""
    from gradio_client import Client

    served = space_app.serve(kept_checkpoints / "lm", wait=False)
    yield Client(served.local_url, verbose=False)
    served.close()


def read(page, **changed):
    values = {
        "which": space_app.SIMULATED,
        "number": 3,
        "path": None,
        "labels": None,
        "seconds": None,
        "asked": "Age?",
        **changed,
    }
    return page.predict(*values.values(), api_name="/read")


def test_a_scan_is_read_and_a_question_answered_within_ten_seconds(page):
    began = time.process_time()  # of all threads: server and client are one process here
    facts, answer, picture, *pictures = read(page)
    assert time.process_time() - began < 10
    assert "R² of what comes back" in facts
    assert "Age? <b>" in answer
    assert picture["visible"]
    assert all(pictures)
    assert len(pictures) == 3


def test_a_file_is_read(page, series, tmp_path):
    from gradio_client import handle_file

    np.save(tmp_path / "mine.npy", series)
    mine = handle_file(str(tmp_path / "mine.npy"))
    facts, answer, *_ = read(page, which=space_app.UPLOADED, path=mine, seconds=2.0)
    assert "12 codes" not in answer
    assert "codes for 120 s" in facts
    facts, answer, *_ = read(page, which=space_app.UPLOADED, path=mine, seconds=2000.0)
    assert 'role="alert"' in facts
    assert "milliseconds" in facts
    assert answer == ""


def test_without_a_file_there_is_a_message(page):
    facts, *_ = read(page, which=space_app.UPLOADED)
    assert "Choose a file first" in facts


def test_hostile_text_comes_back_as_text(page):
    _, answer, *_ = read(page, asked="<img src=x onerror=alert(1)> {{7*7}} <fmri_3>")
    assert "<img" not in answer
    assert html.escape("<img src=x onerror=alert(1)> {{7*7}} <fmri_3>") in answer
    assert "49" not in answer
    _, answer, *_ = read(page, asked="a\x00b")
    assert "control characters" in answer


@pytest.mark.parametrize(
    "changed",
    [
        {"which": "../../etc/passwd"},  # none of the choices
        {"which": space_app.UPLOADED, "path": {"path": "/etc/passwd"}},
        {"which": space_app.UPLOADED, "path": {"path": "../../../etc/hostname"}},
        {"number": "$(id)"},
        {"number": 1e99},
        {"number": -4},
    ],
)
def test_what_the_page_could_not_send_is_refused(page, changed):
    try:
        facts, *_ = read(page, **changed)
    except Exception as error:  # Gradio's own refusal, before any code of ours
        text = str(error)
    else:
        assert 'role="alert"' in facts
        text = facts
    assert "root:" not in text
    assert "Traceback" not in text


def test_the_files_of_the_machine_are_not_served(page):
    import urllib.error
    import urllib.request

    for path in ("/etc/passwd", str(space_app.__file__), "../../etc/passwd"):
        address = f"{page.src.rstrip('/')}/gradio_api/file={path}"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address, timeout=10)


def test_a_fault_of_ours_is_logged_and_shows_no_traceback(caplog):
    def work():
        raise KeyError("secret")

    shown = space_app.guarded(work, lambda text: [text])
    assert shown == [space_app.OUR_FAULT]
    assert "secret" in caplog.text


def test_another_parcellation_is_said(reader):
    reading = space.simulate_reading(0, reader)._replace(own_regions=False)
    assert "Another parcellation" in space_app._facts(reading)


# -------------------------------------------------------------------------------- pictures


def test_pictures_show_the_scan(reader):
    first, second = (space.simulate_reading(person, reader) for person in (1, 2))
    for draw in (
        space_pictures.draw_carpets,
        space_pictures.draw_codes,
        space_pictures.draw_brain,
    ):
        picture = draw(first)
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert picture.shape[1] == 1100
        assert picture.std() > 10  # not blank
        assert np.array_equal(picture, draw(first))
        assert not np.array_equal(picture, draw(second))


def test_like_codes_have_like_colours(reader):
    reading = space.simulate_reading(1, reader)
    book = reading.checkpoint.codec.quantizer.codebook.numpy()
    colours = space_pictures._code_colours(reading)
    assert colours.shape == (len(book), 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    rows, columns = np.triu_indices(len(book), 1)
    apart = np.linalg.norm(book[rows] - book[columns], axis=1)
    seen = np.linalg.norm(colours[rows] - colours[columns], axis=1)
    assert np.corrcoef(apart, seen)[0, 1] > 0.5


def test_an_answer_is_drawn_with_the_truth(reader):
    reading = space.simulate_reading(1, reader)
    age, sex = space.ask(reading, "Age?"), space.ask(reading, "Sex?")
    for found, truth in ((age, "50"), (sex, "F")):
        plain = space_pictures.draw_answer(found)
        told = space_pictures.draw_answer(found, truth)
        assert plain.shape == told.shape
        assert not np.array_equal(plain, told)
    free = space.ask(reading, "Who is this?")
    assert space_pictures.draw_answer(free) is None


# ------------------------------------------------------------------------------ two streams


@pytest.fixture(scope="module")
def both(kept_checkpoints, tmp_path_factory):
    """A codec with the connectivity stream in its subfolder."""
    folder = tmp_path_factory.mktemp("both") / "checkpoint"
    shutil.copytree(kept_checkpoints / "avq", folder)
    config = load_checkpoint(folder).codec.config
    torch.manual_seed(0)
    model = AVQConnectomeModel(
        AVQConnectomeConfig(
            atlas=config.atlas,
            region_labels=config.region_labels,
            region_coordinates=config.region_coordinates,
            num_tokens=2,
            num_codes=8,
            num_maps=4,
            num_coordinates=10,
            code_dim=4,
            text_width=16,
            position_features=8,
            projection_hidden_size=8,
            classifier_hidden_size=8,
        )
    )
    series = torch.randn(30, 50, len(config.region_labels)).cumsum(1)
    dealt = model.start_components(fisher_z_matrices(series)[0])
    model.start_codebook(dealt, iterations=2)
    model.eval().save_pretrained(folder / "connectome")
    return folder


def test_the_connectivity_of_a_scan_is_shown_with_its_codes(both):
    checkpoint = load_checkpoint(both)
    model = space_connectivity.connectome_of(checkpoint)
    reading = space.simulate_reading(5, checkpoint)
    found = space_connectivity.read_connectivity(reading, model)
    assert found.codes.shape == (2,)
    assert found.raw.shape == found.decoded.shape == (len(reading.region_mask),) * 2
    np.testing.assert_allclose(found.raw, found.raw.T)
    wanted = encode_matrices(model, cohort_matrices(reading.cohort), reading.cohort.coordinates)
    np.testing.assert_array_equal(found.codes, wanted[0])
    assert -1 <= found.kept <= 1
    first = space_connectivity.draw_connectivity(reading, found)
    other = space_connectivity.draw_connectivity(reading, found._replace(decoded=-found.decoded))
    assert first.shape == other.shape
    assert not np.array_equal(first, other)


def test_a_checkpoint_of_one_stream_shows_no_connectivity(reader):
    assert space_connectivity.connectome_of(reader) is None


def test_the_page_and_the_folder_hold_both_streams(both, tmp_path):
    from gradio_client import Client

    folder = space_export.export_space(both, tmp_path / "space")
    saved = {path.name for path in (folder / "checkpoint" / "connectome").iterdir()}
    assert saved == {"config.json", "model.safetensors"}
    served = space_app.serve(folder / "checkpoint", wait=False)
    try:
        facts, _, _, *pictures = read(Client(served.local_url, verbose=False))
    finally:
        served.close()
    assert "R² of what comes back" in facts
    assert all(pictures)
    assert len(pictures) == 4


# ------------------------------------------------------------------------------ the folder


def test_the_folder_of_a_space_is_whole(kept_checkpoints, tmp_path):
    (kept_checkpoints / "lm" / "training_log.jsonl").write_text("{}")
    (kept_checkpoints / "lm" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# x\n")
    folder = space_export.export_space(
        kept_checkpoints / "lm", tmp_path / "space", title='Ours: "mine"\nsdk: docker'
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "app.py",
        "checkpoint",
        "cortexicon",
        "requirements.txt",
    ]
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio"
    assert header["app_file"] == "app.py"
    assert header["license"] == "cc-by-nc-sa-4.0"
    assert header["title"] == "Ours minesdk docker"
    saved = {path.name for path in (folder / "checkpoint").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= saved
    assert not any(name.endswith((".py", ".jsonl")) for name in saved)
    needs = (folder / "requirements.txt").read_text().split()
    assert all("==" in need for need in needs)
    assert "gradio" not in "".join(needs)
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(SpaceError, match="new or empty"):
        space_export.export_space(kept_checkpoints / "lm", folder)


def test_the_package_in_the_folder_needs_nothing_outside_it(kept_checkpoints, tmp_path):
    folder = space_export.export_space(kept_checkpoints / "avq", tmp_path / "space")
    needs = (folder / "requirements.txt").read_text().split()
    listed = {need.partition("==")[0] for need in needs}
    # Some come with what is listed: threadpoolctl by way of scikit-learn.
    names = {"yaml": "pyyaml", "PIL": "pillow", "threadpoolctl": "nilearn"}
    names |= {"huggingface_hub": "huggingface-hub", "tokenizers": "transformers"}
    room_files = list((folder / "cortexicon").glob("*/*.py"))
    assert len(room_files) > 50
    for path in room_files:
        for node in ast.parse(path.read_text()).body:  # what is imported when the module is
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                first, _, rest = module.partition(".")
                if first == "cortexicon" and rest:
                    inside = folder / "cortexicon" / rest.replace(".", "/")
                    assert inside.is_dir() or inside.with_suffix(".py").is_file(), module
                elif first not in ("cortexicon", "gradio") and first not in sys_names():
                    assert names.get(first, first) in listed, f"{path.name} imports {first}"


def sys_names():
    import sys

    return sys.stdlib_module_names
