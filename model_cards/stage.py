"""Puts together the folder that is published: of a checkpoint, adapter, cohort or metric module."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from cortexicon.cohorts import Cohort, build_cohort, save_cohort
from cortexicon.inference import Checkpoint, load_checkpoint
from cortexicon.inference.connectome import is_connectome, load_connectome

from .errors import PublishError
from .facts import DataFacts
from .write import render, write_whole

#: Subfolder of the connectivity stream beside a codec of windows.
CONNECTOME = "connectome"
_LICENSE = """The weights and results in this folder are under {license}: {url}

They were fitted on: {data}
{attribution}
The code files (*.py) are part of cortexicon and under the Apache License, Version 2.0:
http://www.apache.org/licenses/LICENSE-2.0
"""
# An absolute path, alone or in a command; not what follows a scheme or a relative path.
_PLACE = re.compile(r"(?<![\w.:/~-])(?:/[\w.@+~-]+){2,}")
_URLS = {
    "apache-2.0": "http://www.apache.org/licenses/LICENSE-2.0",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}


class Loaded(NamedTuple):
    """A checkpoint as it is published.

    Attributes
    ----------
    models : dict of str to PreTrainedModel
        By subfolder: "" for the folder itself, `CONNECTOME` for a second stream. On CPU, in
        evaluation mode.
    revision : str
        Tag that pins these weights, made from them.
    """

    models: dict[str, PreTrainedModel]
    revision: str


def stage_checkpoint(source: Path, folder: Path, connectome: Path | None = None) -> Loaded:
    """Write model, processor and code files of a checkpoint into a new folder.

    Layout::

        FOLDER/config.json, model.safetensors    AutoConfig, AutoModel
        FOLDER/connectome/config.json, ...       AutoModel with subfolder="connectome": the second
                                                 stream, where `connectome` is given
        FOLDER/generation_config.json            of a language model
        FOLDER/processor_config.json, tokenizer.json, tokenizer_config.json
                                                 AutoProcessor, AutoTokenizer, AutoFeatureExtractor
        FOLDER/*.py                              the code that these load where cortexicon is not
                                                 installed, byte for byte the package's
        FOLDER/README.md, LICENSE                card and terms of the weights
        FOLDER/results.json, run.json            scores, and facts of training, without subjects
        FOLDER/.eval_results/cortexicon.yaml     scores as the Hub reads them

    The first three groups are written here, the others by whoever knows the run. Nothing of
    training's state is among them. A checkpoint of the connectivity stream alone has no processor;
    beside windows the one processor of the folder serves both streams.

    Parameters
    ----------
    source : pathlib.Path
        Checkpoint folder of a codec, of either stream, or of a language model.
    folder : pathlib.Path
    connectome : pathlib.Path, optional
        Checkpoint of the connectivity stream, beside a codec of windows in `source`.

    Raises
    ------
    InferenceError
        A checkpoint is damaged or incomplete.
    PublishError
        The two streams do not belong to one vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, PreTrainedModel] = {}
    if is_connectome(source):
        models[""] = load_connectome(source)
    else:
        checkpoint = load_checkpoint(source)
        models[""], processor = checkpoint.model, checkpoint.processor
        if connectome is not None:
            models[CONNECTOME] = load_connectome(connectome)
            _check_streams(checkpoint, models[CONNECTOME], connectome)
            processor.connectivity_tokens = models[CONNECTOME].config.num_tokens
        processor.save_pretrained(folder)
        vocabulary = folder / "tokenizer.json"  # half of it is indentation of thousands of codes
        content = json.loads(vocabulary.read_text(encoding="utf-8"))
        write_whole(vocabulary, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    for subfolder, model in models.items():
        model.save_pretrained(folder / subfolder)
        # NOTE: transformers looks for code files in the repository's root, whatever the subfolder.
        for path in (folder / subfolder).glob("*.py") if subfolder else ():
            path.replace(folder / path.name)
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        if path.name != "tokenizer.json":
            content = without_places(json.loads(path.read_text(encoding="utf-8")))
            write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return Loaded(models, weights_tag(folder))


def _check_streams(checkpoint: Checkpoint, connectome: PreTrainedModel, where: Path) -> None:
    """Refuse two streams that no language model could read together."""
    windows, matrices = checkpoint.codec.config, connectome.config
    reserved = checkpoint.processor.tokenizer.num_connectivity_codes
    for what, first, second in (
        ("text table (sha256)", windows.text_table_sha256, matrices.text_table_sha256),
        ("atlas", windows.atlas, matrices.atlas),
        ("number of connectivity codes", reserved, matrices.num_codes),
    ):
        if first != second:
            raise PublishError(
                f"{where}: expected the {what} of the codec in {checkpoint.folder}, {first}, found "
                f"{second}. Train both with the same text_model and cohort, and the codec with "
                f"model.num_connectivity_codes={matrices.num_codes}; or publish each by itself."
            )


def weights_tag(folder: Path) -> str:
    """Name of the tag for the weights in a folder, such as ``w-0123456789ab``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return f"w-{digest.hexdigest()[:12]}"


def write_license(folder: Path, license_id: str, data: DataFacts) -> None:
    """LICENSE of a staged folder: the terms of the weights, and those of the code."""
    name, _, version = license_id.removeprefix("cc-").rpartition("-")
    url = _URLS.get(license_id, f"https://creativecommons.org/licenses/{name}/{version}/")
    if not license_id.startswith("cc") and license_id not in _URLS:
        url = "see the terms of the data"
    text = _LICENSE.format(
        license=license_id,
        url=url,
        data=data.name + (f", {data.url}" if data.url else ""),
        attribution=f"Attribution: {data.attribution}\n" if data.attribution else "",
    )
    write_whole(folder / "LICENSE", text)


def without_subjects(value: Any, subject_ids: Iterable[str]) -> Any:
    """A JSON value without what is told of single people.

    A mapping with a subject among its keys becomes the number of its entries, and so does a list
    with a subject among its items; all else stays.
    """
    ids = set(subject_ids)

    def cleaned(one: Any) -> Any:
        if isinstance(one, Mapping):
            if any(key in ids for key in one):
                return {"count": len(one)}
            return {key: cleaned(inner) for key, inner in one.items()}
        if isinstance(one, list):
            if any(isinstance(item, str) and item in ids for item in one):
                return {"count": len(one)}
            return [cleaned(item) for item in one]
        return one

    return cleaned(value)


def without_places(value: Any) -> Any:
    """A JSON value in which paths of one machine are shortened to their last two parts."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if isinstance(value, str):
        return _PLACE.sub(lambda match: "/".join(match[0].split("/")[-2:]), value)
    return value


def stage_adapter(source: Path, folder: Path, base: str, facts: Mapping[str, Any]) -> str:
    """Write a PEFT adapter, with its tokenizer and card, into a new folder; its tag is returned.

    Parameters
    ----------
    source : pathlib.Path
        Folder with adapter_config.json and adapter_model.safetensors.
    base : str
        ``OWNER/NAME`` of the base checkpoint on the Hub; a local path would load nowhere else.
    facts : mapping
        ``title``, ``license``, ``data``, ``privacy`` and ``revision`` (of the base).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": facts["revision"]}
    write_whole(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
    for name in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tag = weights_tag(folder)
    values = {**facts, "base": base, "config": config, "tag": tag}
    write_whole(folder / "README.md", render("adapter.md.jinja", values))
    return tag


def stage_cohort(cohort: Cohort, folder: Path, repository: str, data: DataFacts) -> str:
    """Write a cohort in Parquet shards, with its card, into a new folder; its tag is returned.

    Ids that are not public are replaced by ``sub-00001`` and so on, in the order of a hash of
    series and id, which says nothing of the order before.

    Raises
    ------
    PublishError
        The terms of the data do not let the scans be passed on.
    """
    if not data.redistribution:
        raise PublishError(
            f"{data.name}: its facts do not say that the scans may be passed on. Set "
            "`redistribution: true` there once you have made sure of it."
        )
    if not data.public_ids:
        cohort = renamed(cohort)
    save_cohort(cohort, folder)
    columns = [name for name in cohort.participants.columns if name not in ("session",)]
    tag = f"c-{cohort.content_hash[:12]}"
    card = render(
        "cohort.md.jinja",
        {
            "cohort": cohort,
            "data": data,
            "repository": repository,
            "columns": columns,
            "sites": int(cohort.participants["site"].nunique()),
            "tag": tag,
        },
    )
    write_whole(folder / "README.md", card)
    return tag


def renamed(cohort: Cohort) -> Cohort:
    """The same scans under new ids, in a new order, without columns that name people otherwise."""
    order = sorted(
        cohort.subject_ids,
        key=lambda one: hashlib.sha256(cohort.series(one).values.tobytes() + one.encode()).digest(),
    )
    shuffled = cohort.subset(order)
    table = shuffled.participants.reset_index()
    table["subject_id"] = [f"sub-{number:05d}" for number in range(1, len(order) + 1)]
    unique = [
        name
        for name in table.columns
        if name != "subject_id" and table[name].dtype == object and table[name].is_unique
    ]
    import numpy as np

    values = np.concatenate([shuffled.series(one).values for one in order])
    return build_cohort(values, table.drop(columns=unique), cohort.regions, cohort.atlas)


def stage_metric(source: Path, folder: Path, repository: str) -> Path:
    """Write an `evaluate` module, with the card of its Space, into a new folder.

    The Hub finds ``NAME.py`` in ``OWNER/NAME``, so the repository must bear the module's name.

    Raises
    ------
    PublishError
        The folder holds no module of its name, or the repository has another one.
    """
    name = source.name
    if not (source / f"{name}.py").is_file():
        raise PublishError(f"{source}: expected a metric module {name}.py, found none.")
    if repository.rpartition("/")[2] != name:
        raise PublishError(
            f"{repository}: `evaluate.load` looks for NAME.py in OWNER/NAME; expected a repository "
            f"named {name}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
    if (folder / "README.md").is_file():
        return folder / "README.md"  # the module brings its own card
    docstring = (source / f"{name}.py").read_text(encoding="utf-8").partition('"""')[2]
    text = docstring.partition('"""')[0].strip()
    values = {"name": name, "text": text, "repository": repository}
    return write_whole(folder / "README.md", render("metric.md.jinja", values))
