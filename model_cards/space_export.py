"""A folder that is the Space: its app, the package, one checkpoint, and what they need.

FOLDER/app.py             serves checkpoint/
FOLDER/requirements.txt   the versions that ran here
FOLDER/README.md          the header by which a Space is configured, and what it is
FOLDER/cortexicon/        the package, rooms inside, as in a wheel
FOLDER/checkpoint/        weights, configuration, tokenizer, card, licence
FOLDER/atlas/             the label volume for visitors' NIfTI files, if one was given
"""

import importlib
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import cortexicon
from cortexicon.cohorts.atlas_files import find_known, known_atlas
from cortexicon.inference import load_checkpoint
from cortexicon.inference.connectome import is_connectome

from .space_limits import SpaceError
from .stage import CONNECTOME

ROOMS = ("modeling", "tokenization", "cohorts", "inference", "model_cards")
#: What the page imports; Gradio itself comes with the Space's SDK.
NEEDS = (
    "torch", "transformers", "numpy", "safetensors", "huggingface-hub", "datasets", "pandas",
    "pyarrow", "scipy", "nibabel", "nilearn", "joblib", "tqdm", "matplotlib", "jinja2", "pillow",
    "pyyaml",
)  # fmt: skip
#: Files of a checkpoint that inference reads, or that say what it is. Logs and code stay behind.
CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE*",
)  # fmt: skip
APP = '''"""The Space: `checkpoint/`, read and shown by Cortexicon."""

from pathlib import Path

from cortexicon.model_cards.space_app import serve

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    atlas = HERE / "atlas"
    serve(HERE / "checkpoint", host="0.0.0.0", atlas_folder=atlas if atlas.is_dir() else None)
'''


def export_space(
    checkpoint: str | Path,
    folder: str | Path,
    atlas_folder: str | Path | None = None,
    title: str = "Cortexicon",
) -> Path:
    """Write everything that a Space for one checkpoint holds.

    Parameters
    ----------
    checkpoint : path
        A codec or a language model of codes; it is loaded once, so that a damaged one is refused.
    folder : path
        New or empty. It appears whole, or not at all.
    atlas_folder : path, optional
        Where the label volume of the checkpoint's atlas lies.
    title : str
        Of the Space.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    SpaceError
        The folder holds something already.
    InferenceError, CohortError
        The checkpoint or its atlas cannot be read.
    """
    loaded, folder = load_checkpoint(checkpoint), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpaceError(f"{folder}: expected a new or empty folder. Choose another name.")
    name = loaded.processor.feature_extractor.atlas
    atlas = [] if atlas_folder is None else find_known(known_atlas(name or ""), Path(atlas_folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "checkpoint").mkdir(parents=True)
    for pattern in CHECKPOINT_FILES:
        for path in sorted(Path(checkpoint).glob(pattern)):
            shutil.copyfile(path, part / "checkpoint" / path.name)
    if is_connectome(Path(checkpoint) / CONNECTOME):
        (part / "checkpoint" / CONNECTOME).mkdir()
        for name in ("config.json", "model.safetensors"):
            source = Path(checkpoint) / CONNECTOME / name
            shutil.copyfile(source, part / "checkpoint" / CONNECTOME / name)
    for path in filter(None, atlas):
        (part / "atlas").mkdir(exist_ok=True)
        shutil.copyfile(path, part / "atlas" / path.name)
    _copy_package(part / "cortexicon")
    (part / "app.py").write_text(APP, encoding="utf-8")
    needs = "".join(f"{need}=={_version(need)}\n" for need in NEEDS)
    (part / "requirements.txt").write_text(needs, encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("cortexicon.model_cards", "."),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, of our own words and of names that are checked
        keep_trailing_newline=True,
    )
    text = environment.get_template("space.md.jinja").render(
        title=_one_line(title),
        gradio_version=_version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        license=_license(Path(checkpoint) / "README.md"),
        answers=loaded.model_type == "avq_lm",
        kind="language model of codes" if loaded.model_type == "avq_lm" else "codec",
        atlas=_one_line(name or "any atlas"),
        has_card=(part / "checkpoint" / "README.md").is_file(),
        version=cortexicon.__version__,
        minutes=20,
    )
    (part / "README.md").write_text(text, encoding="utf-8")
    if folder.is_dir():
        folder.rmdir()
    part.rename(folder)
    return folder


def _copy_package(target: Path) -> None:
    """The rooms that the page needs, laid out as in a wheel, whether installed or a checkout."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    source = Path(str(cortexicon.__file__)).parent
    target.mkdir()
    for path in sorted(source.glob("*.py")):
        shutil.copyfile(path, target / path.name)
    shutil.copyfile(source / "py.typed", target / "py.typed")
    for room in ROOMS:
        module = importlib.import_module(f"cortexicon.{room}")
        shutil.copytree(Path(str(module.__file__)).parent, target / room, ignore=ignore)


def _version(name: str) -> str:
    """The installed version, without the +cpu of a local build."""
    return importlib.metadata.version(name).partition("+")[0]


def _one_line(text: str) -> str:
    """A name that stays one value of the header."""
    return re.sub(r"[^\w .,()-]", "", text).strip() or "Cortexicon"


def _license(card: Path) -> str:
    """The checkpoint's licence, which a page that carries its weights shares; else the code's."""
    if card.is_file():
        match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
        header = yaml.safe_load(match[1]) if match else None
        found = header.get("license") if isinstance(header, dict) else None
        if isinstance(found, str):
            return _one_line(found)
    return "apache-2.0"
