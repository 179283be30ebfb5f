"""`cortexicon publish` and `cortexicon protect`: checks first, then one commit to the Hub."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What the first argument turned out to be.

    Attributes
    ----------
    kind : {"checkpoint", "adapter", "cohort", "metric", "space"}
    folder : pathlib.Path
    repository_kind : {"model", "dataset", "space"}
    connectome : pathlib.Path or None
        The second stream of a run whose codecs go into one repository.
    """

    kind: str
    folder: Path
    repository_kind: str
    connectome: Path | None = None


def add(commands: argparse._SubParsersAction) -> None:
    """Add both sub-commands to the parser of `cortexicon`."""
    command = commands.add_parser(
        "publish", help="checks, then one commit to the Hub: checkpoint, adapter, cohort or metric"
    )
    command.add_argument(
        "what",
        metavar="RUN",
        type=Path,
        help="run (its language model, else its codecs of either stream), checkpoint, adapter, "
        "cohort, metric, Space",
    )
    command.add_argument("repository", metavar="REPO", help="OWNER/NAME on the Hub")
    command.add_argument("--private", action="store_true", help="for a repository made now")
    command.add_argument(
        "--dry-run", action="store_true", help="write the folder that would be pushed; no network"
    )
    command.add_argument(
        "--out", type=Path, default=None, help="folder of --dry-run (default: published/NAME)"
    )
    command.add_argument(
        "--data", default=None, help="facts of the data: a YAML file, `simulated` or `abide1`"
    )
    command.add_argument(
        "--license", default=None, help="of the weights (default: what the data ask for)"
    )
    command.add_argument(
        "--cohort", type=Path, default=None, help="cohort of training, if it was moved"
    )
    command.add_argument("--base", default=None, help="OWNER/NAME@REVISION of an adapter's base")
    command = commands.add_parser(
        "protect", help="move codes of a codec that are, in effect, one training person's"
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="changed in place")
    command.add_argument("--cohort", type=Path, default=None, help="if it was moved")


def run(arguments: argparse.Namespace) -> None:
    """`cortexicon publish`: stage a folder, check it, then write or push it."""
    from cortexicon.model_cards import PublishError, push_folder
    from cortexicon.model_cards.push import tag

    owner, _, name = arguments.repository.partition("/")
    if not owner or not name or "/" in name:
        raise PublishError(
            f"{arguments.repository}: expected OWNER/NAME of a repository on the Hub."
        )
    target = find_target(arguments.what)
    with tempfile.TemporaryDirectory(prefix="cortexicon-publish-") as work:
        folder = Path(work) / name
        revision = _STAGE[target.kind](target, folder, arguments)
        if arguments.dry_run:
            out = arguments.out or Path("published") / name
            _replace(out, folder)
            print(
                f"{len(_files(out))} files, {_megabytes(out):.1f} MB -> {out}; nothing was pushed"
            )
            return
        pushed = push_folder(
            folder,
            arguments.repository,
            target.repository_kind,
            arguments.private,
            f"Publish {target.folder.name} with cortexicon",
        )
        if revision is not None:
            tag(arguments.repository, target.repository_kind, revision, pushed.revision)
    print(f"{pushed.url} {'is now' if pushed.changed else 'was already'} at {pushed.revision}")


def find_target(what: Path) -> Target:
    """What a path given to `publish` is.

    Raises
    ------
    PublishError
        Nothing that can be published.
    """
    from cortexicon.model_cards import PublishError

    if (what / f"{what.name}.py").is_file():
        return Target("metric", what, "space")
    if (what / "app.py").is_file():
        return Target("space", what, "space")
    if (what / "cohort.json").is_file() or (what / "regions.tsv").is_file():
        return Target("cohort", what, "dataset")
    if (what / "adapter_config.json").is_file():
        return Target("adapter", what, "model")
    for folder in (what, what / "lm", what / "avq", what / "connectome"):
        if (folder / "config.json").is_file():
            second = what / "connectome"  # beside `avq` in a run, inside what was published
            both = folder in (what, what / "avq") and (second / "config.json").is_file()
            return Target("checkpoint", folder, "model", second if both else None)
    raise PublishError(
        f"{what}: expected a run, a checkpoint, an adapter, a cohort or a metric module, found "
        f"{'none of these' if what.exists() else 'nothing'}."
    )


def protect(arguments: argparse.Namespace) -> None:
    """`cortexicon protect`: blur exposed codes, and note it in run.json."""
    from cortexicon._publish_facts import latents_of, read_run
    from cortexicon.inference import load_checkpoint
    from cortexicon.inference.connectome import is_connectome, load_connectome
    from cortexicon.inference.exposure import blur_exposed
    from cortexicon.model_cards import PublishError

    folder = arguments.checkpoint
    facts = read_run(folder, arguments.cohort)
    if is_connectome(folder):
        model = codec = load_connectome(folder)
        latents = latents_of(facts, connectome=codec)
    else:
        checkpoint = load_checkpoint(folder)
        if checkpoint.model_type != "avq":
            raise PublishError(
                f"{folder}: a language model was trained on the codes as they are. Protect its "
                "codec, and train the language model on that."
            )
        model = codec = checkpoint.codec
        latents = latents_of(facts, checkpoint=checkpoint)
    moved = blur_exposed(codec.quantizer, latents)
    if moved:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".protect-") as work:
            model.save_pretrained(work)
            os.replace(Path(work) / "model.safetensors", folder / "model.safetensors")
        values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        values["protected_codes"] = values.get("protected_codes", 0) + len(moved)
        (folder / "run.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"{len(moved)} of {codec.quantizer.num_codes} codes moved to means of several people")


def _stage_cohort(target: Target, folder: Path, arguments: argparse.Namespace) -> str:
    from cortexicon import _publish_facts as gather
    from cortexicon.model_cards import stage_cohort
    from cortexicon.model_cards.checks import (
        card_complaints,
        refuse,
        secret_complaints,
        subject_id_complaints,
    )

    cohort = gather.load(target.folder)
    data = gather.facts_of_cohort(cohort, arguments.data, target.folder)
    tag = stage_cohort(cohort, folder, arguments.repository, data)
    ids = () if data.public_ids else gather.names_of(cohort)
    refuse(
        target.folder,
        [
            *subject_id_complaints(folder, ids),
            *secret_complaints(folder),
            *card_complaints(folder),
        ],
    )
    return tag


def _stage_metric(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon.model_cards import stage_metric
    from cortexicon.model_cards.checks import refuse, secret_complaints

    stage_metric(target.folder, folder, arguments.repository)
    refuse(target.folder, secret_complaints(folder))


def _stage_space(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon.model_cards.checks import refuse, secret_complaints

    shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    refuse(target.folder, secret_complaints(folder))


def _stage_checkpoint(target: Target, folder: Path, arguments: argparse.Namespace) -> str:
    from cortexicon._publish_checkpoint import stage

    return stage(target.folder, target.connectome, folder, arguments)


def _stage_adapter(target: Target, folder: Path, arguments: argparse.Namespace) -> str:
    from cortexicon._publish_adapter import stage

    return stage(target.folder, folder, arguments)


_STAGE: dict[str, Callable[[Target, Path, argparse.Namespace], str | None]] = {
    "checkpoint": _stage_checkpoint,
    "adapter": _stage_adapter,
    "cohort": _stage_cohort,
    "metric": _stage_metric,
    "space": _stage_space,
}


def _replace(out: Path, folder: Path) -> None:
    """Move a staged folder to `out`, where nothing or an earlier one may be."""
    from cortexicon.model_cards import PublishError

    card = out / "README.md"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not card.is_file() or "ortexicon" not in card.read_text(encoding="utf-8"):
            raise PublishError(
                f"{out}: expected a new folder or one that `publish` wrote, found something else. "
                "Choose another with --out."
            )
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, out, dirs_exist_ok=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in _files(folder)) / 1e6
