"""From a YAML file and overrides to arguments; every mistake is named."""

from dataclasses import dataclass, field

import pytest

from cortexicon.training import TrainingError, avq, lm, text
from cortexicon.training.arguments import load_arguments, read_config


@dataclass
class Toy:
    """Arguments of no script."""

    output: str
    model: dict = field(default_factory=dict)
    max_steps: int = 10
    learning_rate: float = 1e-3
    cpu: bool = False


def config(folder, body, name="config.yaml"):
    path = folder / name
    path.write_text(body, encoding="utf-8")
    return str(path)


def test_a_base_is_merged_into_nested_mappings(tmp_path):
    config(tmp_path, "output: a\nmodel: {width: 8, depth: 2}\nmax_steps: 5\n", "grand.yaml")
    config(tmp_path, "base: grand.yaml\nmodel: {depth: 3}\n", "base.yaml")
    path = config(tmp_path, "base: base.yaml\noutput: b\nmodel: {heads: 4}\n")
    found = load_arguments(Toy, [path])
    assert found == Toy("b", {"width": 8, "depth": 3, "heads": 4}, max_steps=5)


def test_overrides_reach_into_nested_mappings_and_win(tmp_path):
    path = config(tmp_path, "output: a\nmodel: {width: 8, sizes: {x: 1, y: 2}}\n")
    overrides = ["model.sizes.x=7", "model.kind=grid", "max_steps=3", "output=c=d", "cpu=true"]
    found = load_arguments(Toy, [path, *overrides])
    assert found == Toy(
        "c=d", {"width": 8, "sizes": {"x": 7, "y": 2}, "kind": "grid"}, max_steps=3, cpu=True
    )


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 0.001), ("2", 2.0), ("5.0e-3", 0.005), (".5", 0.5)]
)
def test_numbers_that_yaml_reads_as_text_or_whole_become_float(tmp_path, written, value):
    found = load_arguments(Toy, [config(tmp_path, f"output: a\nlearning_rate: {written}\n")])
    assert type(found.learning_rate) is float
    assert found.learning_rate == value


@pytest.mark.parametrize(
    ("body", "overrides", "parts"),
    [
        ("output: a\nmax_step: 3\n", [], ["'max_step'", "'max_steps'?"]),
        ("output: a\n", ["learning_rat=1"], ["'learning_rat'", "'learning_rate'?"]),
        ("output: a\nzzz: 3\n", [], ["unknown key 'zzz'."]),
        ("max_steps: 3\n", [], ["'output' is missing"]),
        ("", [], ["'output' is missing"]),
        ("output: a\nmax_steps: 3.5\n", [], ["max_steps must be int", "3.5"]),
        ("output: a\nmax_steps: true\n", [], ["max_steps must be int", "True"]),
        ("output: a\nmax_steps: many\n", [], ["max_steps must be int", "'many'"]),
        ("output: a\nlearning_rate: fast\n", [], ["learning_rate must be float", "'fast'"]),
        ("output: a\nlearning_rate: true\n", [], ["learning_rate must be float", "True"]),
        ("output: a\ncpu: 1\n", [], ["cpu must be bool", "found 1"]),
        ("output: 7\n", [], ["output must be str", "found 7"]),
        ("output: a\n", ["cpu"], ["key=value", "'cpu'"]),
        ("output: [a\n", [], ["config.yaml", "not valid YAML"]),
        ("- a\n- b\n", [], ["config.yaml", "`key: value`", "list"]),
        ("base: gone.yaml\noutput: a\n", [], ["gone.yaml", "No configuration file"]),
    ],
)
def test_bad_configurations_are_named(tmp_path, body, overrides, parts):
    with pytest.raises(TrainingError) as error:
        load_arguments(Toy, [config(tmp_path, body), *overrides])
    for part in parts:
        assert part in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"nowhere\.yaml"):
        load_arguments(Toy, [str(tmp_path / "nowhere.yaml")])
    with pytest.raises(TrainingError, match="configuration file is needed"):
        load_arguments(Toy, [])


@pytest.mark.parametrize("cohort", ["demo", "abide"])
@pytest.mark.parametrize(
    ("stage", "cls"),
    [("text", text.TextArguments), ("avq", avq.AVQArguments), ("lm", lm.LMArguments)],
)
def test_the_configurations_of_the_repository_are_valid(repository, cohort, stage, cls):
    path = repository / "training" / "configs" / f"{cohort}_{stage}.yaml"
    found = load_arguments(cls, [str(path)])
    assert found.output == f"runs/{cohort}/{stage}"
    assert "base" not in read_config(path)
