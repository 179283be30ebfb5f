"""The control of the demo: without a planted effect the language model learns nothing about age."""

from pathlib import Path

import numpy as np
import pytest

from cortexicon.cohorts import load_cohort, load_split, make_split, save_cohort, simulate_cohort
from cortexicon.inference.predict import predict_cohort
from cortexicon.training import avq, lm, text


def age_errors(
    configs: Path,
    folder: Path,
    subjects: int,
    effect: float,
    steps: dict[str, int],
) -> tuple[float, float, int]:
    """Age MAE on the demo's test parts, of the cohort median and of the LLM, and their size.

    Parameters
    ----------
    configs : Path
        Folder of the demo's configurations.
    steps : dict of str to int
        `max_steps` of text, avq and lm.
    """
    save_cohort(simulate_cohort(subjects, seed=0, effect=effect, progress=False), folder / "cohort")
    cohort = load_cohort(folder / "cohort")
    make_split(cohort, "holdout").save(folder / "split.json")
    data = [f"cohort={folder / 'cohort'}", f"split={folder / 'split.json'}"]
    text_model = f"text_model={folder / 'text'}"
    inputs = {
        "text": ["text_files=[]"],
        "avq": [*data, text_model],
        "lm": [*data, text_model, f"avq={folder / 'avq'}"],
    }
    for name, script in (("text", text), ("avq", avq), ("lm", lm)):
        overrides = [
            *inputs[name],
            f"output={folder / name}",
            f"max_steps={steps[name]}",
            "cpu=true",
        ]
        assert script.main([str(configs / f"demo_{name}.yaml"), *overrides]) == 0
    parts = load_split(folder / "split.json", cohort)[0]
    tested = [*parts["test"], *parts.get("test_sites", [])]
    table = predict_cohort(folder / "lm", cohort, tested, ["age"], quiet=True)
    assert list(table["subject_id"]) == tested
    truth, predicted = table["y"].to_numpy(dtype=float), table["y_hat"].to_numpy(dtype=float)
    median = np.median(cohort.participants.loc[parts["train"], "age"].to_numpy(dtype=float))
    return np.abs(truth - median).mean(), np.abs(truth - predicted).mean(), len(tested)


@pytest.mark.slow
def test_without_an_effect_the_language_model_gains_nothing(repository, tmp_path):
    median, model, tested = age_errors(
        repository / "training" / "configs",
        tmp_path,
        subjects=700,
        effect=0.0,
        steps={"text": 100, "avq": 600, "lm": 400},
    )
    assert tested >= 200
    # Half a year is left to chance.
    assert median - model < 0.5
