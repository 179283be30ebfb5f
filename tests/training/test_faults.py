"""Runs that cannot start say so before any work is done."""

import shutil
import subprocess
import sys

import pytest

from cortexicon.training import TrainingError, avq, lm, text

SCRIPTS = {"text": text, "avq": avq, "lm": lm}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_folder_that_holds_a_run_is_not_overwritten(run, stage):
    log = run / stage / "training_log.jsonl"
    before = log.read_bytes()
    with pytest.raises(TrainingError, match="already holds a run") as error:
        SCRIPTS[stage].main([str(run / f"{stage}.yaml")])
    assert str(run / stage) in str(error.value)
    assert "--resume" in str(error.value)
    assert log.read_bytes() == before


@pytest.mark.parametrize("stage", SCRIPTS)
def test_an_output_that_is_a_file_is_refused(run, tmp_path, stage):
    place = tmp_path / "place"
    place.write_text("kept", encoding="utf-8")
    for output in (place, place / "inside"):
        with pytest.raises(TrainingError, match="Cannot write to") as error:
            SCRIPTS[stage].main([str(run / f"{stage}.yaml"), f"output={output}"])
        assert str(output) in str(error.value)
    assert place.read_text(encoding="utf-8") == "kept"


def test_a_missing_text_stage_is_named(run, tmp_path):
    missing = tmp_path / "no_text"
    with pytest.raises(TrainingError, match="cortexicon train text CONFIG") as error:
        avq.main(
            [str(run / "avq.yaml"), f"output={tmp_path / 'avq'}", f"text_model={missing}"],
        )
    assert str(missing) in str(error.value)
    assert not (tmp_path / "avq" / "training_log.jsonl").exists(), (
        "a second try must not be refused"
    )


def test_a_fold_that_does_not_exist_is_named(run, tmp_path):
    with pytest.raises(TrainingError, match=r"fold 3 does not exist.*0\.\.0"):
        avq.main([str(run / "avq.yaml"), f"output={tmp_path / 'avq'}", "fold=3"])


def test_a_prompt_longer_than_the_language_model_is_refused(run, tmp_path):
    arguments = [f"output={tmp_path / 'lm'}", "windows_per_prompt=8"]
    with pytest.raises(TrainingError, match=r"8 windows needs about 136 positions.*has 128"):
        lm.main([str(run / "lm.yaml"), *arguments])


def test_scans_shorter_than_a_window_leave_nothing_to_train_on(run, tmp_path):
    arguments = [f"output={tmp_path / 'avq'}", "model.window_length=400"]
    with pytest.raises(TrainingError, match=r"No training scan is left.*shorter than one window"):
        avq.main([str(run / "avq.yaml"), *arguments])


def test_a_text_table_of_another_run_is_refused(run, tmp_path):
    other = tmp_path / "text"
    text.main([str(run / "text.yaml"), f"output={other}", "seed=1", "max_steps=1"])
    with pytest.raises(ValueError, match="aligned with the embedding table"):
        lm.main([str(run / "lm.yaml"), f"output={tmp_path / 'lm'}", f"text_model={other}"])


def test_the_command_line_says_it_in_one_line(run, tmp_path):
    shutil.copy(run / "avq.yaml", tmp_path / "avq.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "cortexicon.cli", "train", "avq", "avq.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cortexicon train: ")
    assert "already holds a run" in done.stderr
    assert "Traceback" not in done.stderr
