"""What moves an answer: occlusion of codes, pulled back to regions; what codes stand for."""

import numpy as np
import pytest

from cortexicon._interpretation import interpret
from cortexicon.cohorts import build_cohort, load_cohort, load_split
from cortexicon.evaluation import EvaluationError
from cortexicon.evaluation.rendering import render_figures
from cortexicon.evaluation.rendering_interpretation import (
    INTERPRETATION,
    draw_attribution,
    draw_code_networks,
)
from cortexicon.evaluation.report import write_report
from cortexicon.inference import InferenceError, load_checkpoint
from cortexicon.inference.ask import scan_prompts
from cortexicon.inference.interpret import (
    attribute,
    by_network,
    code_networks,
    matrix_footprints,
    window_footprints,
)
from cortexicon.inference.predict import load_language_model


@pytest.fixture(scope="module")
def loaded(two_stream_run):
    return load_language_model(two_stream_run / "lm2")


@pytest.fixture(scope="module")
def prompt(two_stream_run, loaded):
    cohort = load_cohort(two_stream_run / "cohort")
    subject = load_split(two_stream_run / "split.json", cohort)[0]["test"][0]
    prompts = scan_prompts(loaded.model, loaded.processor.feature_extractor, cohort.series(subject))
    codes, connectivity = prompts.flat
    return codes[0], connectivity[0]


@pytest.mark.parametrize("target", [0, 1])
def test_hiding_a_code_changes_the_answer_by_its_attribution(loaded, prompt, target):
    codes, connectivity = prompt
    target = loaded.model.config.targets[target]
    found = attribute(loaded.model, loaded.processor, codes, target, connectivity)
    assert found.fmri.shape == (2, 8)
    assert found.fc.shape == (4,)
    assert found.regions.shape == (28,)
    assert (found.regions > 0).all()
    sizes = np.abs(found.fmri).sum() + np.abs(found.fc).sum()
    assert sizes > 0
    assert found.regions.sum() == pytest.approx(sizes)
    # Batches do not matter, and a prompt of connectivity alone has no windows to hide.
    again = attribute(loaded.model, loaded.processor, codes, target, connectivity, batch_size=5)
    np.testing.assert_allclose(again.fmri, found.fmri, atol=1e-5)
    alone = attribute(
        loaded.model, loaded.processor, np.zeros((0, 0), np.int64), target, connectivity
    )
    assert alone.fmri.size == 0
    assert alone.fc.shape == (4,)


def test_footprints_are_where_the_decoder_puts_a_code(loaded, prompt):
    codes, connectivity = prompt
    windows = window_footprints(loaded.model, codes)
    matrices = matrix_footprints(loaded.model, connectivity)
    assert windows.shape == (2, 8, 28)
    np.testing.assert_allclose(windows.sum(-1), 1)
    np.testing.assert_allclose(matrices.sum(-1), 1)
    assert windows.std(-1).max() > 1e-4  # not everywhere alike


def test_codes_stand_for_networks_and_the_pictures_show_it(loaded, two_stream_run, tmp_path):
    regions = load_cohort(two_stream_run / "cohort").regions
    networks = regions["network"].tolist()
    shares, names = code_networks(loaded.model, range(6), networks)
    assert shares.shape == (6, len(names))
    np.testing.assert_allclose(shares.sum(1), 1)
    values = np.zeros(28)
    values[[network == networks[0] for network in networks]] = 2.0
    means, order = by_network(values, networks)
    assert means[order.index(networks[0])] == pytest.approx(1)
    with pytest.raises(InferenceError, match="each of 28 regions"):
        by_network(values, networks[:3])
    places = regions[["x", "y", "z"]].to_numpy()
    figures = (
        draw_attribution(values, places, networks, "age"),
        draw_code_networks(shares, names, range(6)),
    )
    for number, figure in enumerate(figures):
        path = tmp_path / f"{number}.png"
        figure.savefig(path)
        assert path.stat().st_size > 5000
    with pytest.raises(EvaluationError, match="same regions"):
        draw_attribution(values[:5], places, networks, "age")
    with pytest.raises(EvaluationError, match="at least 0"):
        draw_attribution(-values, places, networks, "age")
    with pytest.raises(EvaluationError, match="shares of 6 codes"):
        draw_code_networks(shares[:2], names, range(6))


def test_the_report_shows_what_moves_answers(two_stream_run, tmp_path):
    cohort = load_cohort(two_stream_run / "cohort")
    people = load_split(two_stream_run / "split.json", cohort)[0]["test"][:2]
    path = tmp_path / "evaluation" / INTERPRETATION
    checkpoint = load_checkpoint(two_stream_run / "lm2")
    interpret(checkpoint, cohort, people, path)
    with np.load(path) as held:
        assert held["targets"].tolist() == ["age", "sex"]
        assert held["people"] == 2
        moved = np.zeros(28)
        model, processor = checkpoint.model, checkpoint.processor
        for subject in people:
            prompts = scan_prompts(model, processor.feature_extractor, cohort.series(subject))
            codes, more = prompts.codes[0, 0], prompts.connectivity[0]
            moved += attribute(model, processor, codes, model.config.targets[0], more).regions
        np.testing.assert_allclose(held["regions"][0], moved / 2, rtol=1e-4)
        np.testing.assert_allclose(held["shares"].sum(1), 1)
    names = [picture.name for picture in render_figures(tmp_path) if picture.path]
    assert names == ["moves_age", "moves_sex", "code_networks"]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.index("What moves the answer: sex") > page.index("2 held-out people")
    # Regions that the checkpoint does not have cannot be laid out: nothing is written.
    fewer = build_cohort(
        np.concatenate([cohort.series(s).values[:, :20] for s in cohort.subject_ids]),
        cohort.participants.reset_index(),
        cohort.regions.iloc[:20],
        cohort.atlas,
    )
    interpret(checkpoint, fewer, people, tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()


def test_features_hold_no_code_to_hide(loaded, prompt):
    codes, connectivity = prompt
    loaded.model.config.fmri_input = "features"
    try:
        with pytest.raises(InferenceError, match="reads features"):
            attribute(
                loaded.model,
                loaded.processor,
                codes,
                loaded.model.config.targets[0],
                connectivity,
            )
    finally:
        loaded.model.config.fmri_input = "codes"
