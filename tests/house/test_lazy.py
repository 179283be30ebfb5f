"""`import cortexicon` costs nothing and still teaches the Auto classes."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "pandas", "datasets", "scipy", "sklearn", "matplotlib")


def run_python(source: str, cwd) -> str:
    """Run a script in a fresh interpreter that sees this checkout; return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(repository, argv):
    out = run_python(
        f"""
import json, sys
from cortexicon.cli import main
try:
    main({argv!r})
except SystemExit as stop:
    assert stop.code == 0
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
""",
        repository,
    )
    assert json.loads(out.splitlines()[-1]) == []
    assert "cortexicon" in out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny AVQ as training would save it, but untrained."""
    from cortexicon.modeling import AVQConfig, AVQModel

    folder = tmp_path_factory.mktemp("avq")
    AVQModel(
        AVQConfig(
            hidden_size=16,
            intermediate_size=16,
            num_latents=2,
            num_codes=8,
            text_width=16,
            encoder_layers=1,
            decoder_layers=1,
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import cortexicon; from transformers import AutoModel",
        "import cortexicon, transformers; AutoModel = transformers.AutoModel",
        "import transformers, cortexicon; from transformers import AutoModel",
        "from transformers import AutoModel; import cortexicon",
        "from cortexicon.modeling import AVQConfig; from transformers import AutoModel",
        "from cortexicon.tokenization import AVQTokenizer; from transformers import AutoModel",
        # transformers loads its Auto classes half-way through this module
        "import cortexicon, transformers.modeling_layers; from transformers import AutoModel",
        "import cortexicon; from transformers import Trainer, AutoModel",
    ],
)
def test_auto_model_loads_whatever_was_imported_first(repository, checkpoint, imports):
    out = run_python(
        f"""
{imports}
import sys
model = AutoModel.from_pretrained({str(checkpoint)!r})
assert not any(type(f).__module__ == "cortexicon._auto" for f in sys.meta_path), "hook left behind"
print(type(model).__module__, type(model).__name__)
""",
        repository,
    )
    assert out.split() == ["cortexicon.modeling.modeling_avq", "AVQModel"]


def test_auto_classes_know_both_models():
    from transformers import AutoConfig, AutoModelForMultimodalLM
    from transformers.models.auto.processing_auto import processor_class_from_name
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    import cortexicon

    assert isinstance(AutoConfig.for_model("avq"), cortexicon.AVQConfig)
    assert tokenizer_class_from_name("AVQTokenizer") is cortexicon.AVQTokenizer
    assert processor_class_from_name("AVQProcessor") is cortexicon.AVQProcessor
    mapping = AutoModelForMultimodalLM._model_mapping
    assert mapping[cortexicon.AVQLMConfig] is cortexicon.AVQLMForConditionalGeneration


def test_public_names_are_those_of_the_rooms():
    import cortexicon

    for name in cortexicon.__all__:
        assert getattr(cortexicon, name) is not None
    assert set(cortexicon.__all__) <= set(dir(cortexicon))
    with pytest.raises(AttributeError, match="no attribute 'AVQNodel'"):
        _ = cortexicon.AVQNodel


def test_an_error_inside_a_room_is_not_hidden(repository, tmp_path):
    import shutil

    shutil.copytree(repository / "cortexicon", tmp_path / "cortexicon")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "modeling").mkdir()
    (tmp_path / "modeling" / "__init__.py").write_text("raise RuntimeError('broken room')\n")
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import cortexicon
from transformers import AutoModel
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "broken room" in done.stderr
