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
    """

    kind: str
    folder: Path
    repository_kind: str


def add(commands: argparse._SubParsersAction) -> None:
    """Add both sub-commands to the parser of `cortexicon`."""
    command = commands.add_parser(
        "publish", help="checks, then one commit to the Hub: checkpoint, adapter, cohort or metric"
    )
    command.add_argument(
        "what",
        metavar="RUN",
        type=Path,
        help="run (its language model, else its codec), checkpoint, adapter, cohort, metric, Space",
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
    command.add_argument("--base", default=None, help="OWNER/NAME of an adapter's base checkpoint")
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
    for folder in (what, what / "lm", what / "avq"):
        if (folder / "config.json").is_file():
            return Target("checkpoint", folder, "model")
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


def _stage_checkpoint(target: Target, folder: Path, arguments: argparse.Namespace) -> str:
    from cortexicon import _publish_facts as gather
    from cortexicon.inference import Checkpoint, load_checkpoint
    from cortexicon.inference.exposure import COSINE, SUBJECTS, find_exposed
    from cortexicon.model_cards import (
        PublishError,
        check_clean_load,
        check_folder,
        check_licenses,
        stage_checkpoint,
        weights_license,
        without_subjects,
        write_eval_results,
        write_license,
        write_model_card,
    )

    source = target.folder
    run_facts = gather.read_run(source, arguments.cohort)
    data = gather.data_facts(run_facts, arguments.data)
    license_id = arguments.license or weights_license(data.license)
    check_licenses(data.license, license_id)
    loaded = stage_checkpoint(source, folder)
    model = loaded.model
    kind = model.config.model_type
    if kind == "avq_connectome":
        latents = gather.latents_of(run_facts, connectome=model)
        codebook = model.quantizer
    else:
        checkpoint: Checkpoint = load_checkpoint(source)
        latents = gather.latents_of(run_facts, checkpoint=checkpoint)
        codebook = checkpoint.codec.quantizer
    found = find_exposed(codebook, latents)
    if found.exposed:
        raise PublishError(
            f"{source}: {len(found.exposed)} of {found.num_codes} codes (such as "
            f"{found.exposed[0]}) lie within cosine {COSINE} of one training latent, and fewer "
            f"than {SUBJECTS} people map to them: they are, in effect, one person's. Run "
            f"`cortexicon protect` on the codec, score it, and publish again."
        )
    protected = int(run_facts.values.get("protected_codes", 0))
    privacy = (
        f"Privacy of the codebook: no code lies within cosine {COSINE} of a single training latent "
        f"unless {SUBJECTS} or more people map to it ({found.num_codes} codes against "
        f"{found.num_latents} latents of {found.num_subjects} people; highest cosine "
        f"{found.highest_cosine:.4f}"
        + (f"; {protected} codes were moved to means of several people" if protected else "")
        + ")."
    )
    ids = run_facts.cohort.subject_ids
    facts = gather.card_facts(run_facts, source, model, data) | {
        "license": license_id,
        "data": data._asdict(),
        "repository": arguments.repository,
        "revision": loaded.revision,
        "privacy": privacy,
    }
    write_model_card(folder, facts)
    dataset = f"{arguments.repository.partition('/')[0]}/{run_facts.name}"
    write_eval_results(folder, facts, dataset)
    write_license(folder, license_id, data)
    results = {"scores": facts["scores"], "groups": facts["groups"]} | run_facts.results
    for name, values in (("results.json", results), ("run.json", run_facts.values)):
        cleaned = json.dumps(without_subjects(values, ids), indent=1)
        (folder / name).write_text(cleaned + "\n", encoding="utf-8")
    _refuse(source, check_folder(folder, gather.names_of(run_facts.cohort)))
    check_clean_load(folder, model)
    return loaded.revision


def _stage_adapter(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon import _publish_facts as gather
    from cortexicon.model_cards import PublishError, check_licenses, stage_adapter, weights_license
    from cortexicon.model_cards.checks import (
        card_complaints,
        secret_complaints,
        subject_id_complaints,
    )
    from cortexicon.model_cards.facts import read_data_facts

    if arguments.base is None or arguments.data is None:
        raise PublishError(
            f"{target.folder}: an adapter needs --base OWNER/NAME, the checkpoint that it changes, "
            "and --data, the facts of the data that it was fitted on."
        )
    data = read_data_facts(arguments.data)
    license_id = arguments.license or weights_license(data.license)
    check_licenses(data.license, license_id)
    base, _, revision = arguments.base.partition("@")
    facts = {
        "title": arguments.repository.partition("/")[2],
        "license": license_id,
        "data": data._asdict(),
        "repository": arguments.repository,
        "revision": revision or None,
    }
    stage_adapter(target.folder, folder, base, facts)
    ids = () if arguments.cohort is None else gather.names_of(gather.load(arguments.cohort))
    _refuse(
        target.folder,
        [
            *subject_id_complaints(folder, ids),
            *secret_complaints(folder),
            *card_complaints(folder),
        ],
    )


def _stage_cohort(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon import _publish_facts as gather
    from cortexicon.model_cards import stage_cohort
    from cortexicon.model_cards.checks import (
        card_complaints,
        secret_complaints,
        subject_id_complaints,
    )

    cohort = gather.load(target.folder)
    data = gather.facts_of_cohort(cohort, arguments.data, target.folder)
    stage_cohort(cohort, folder, arguments.repository, data)
    ids = () if data.public_ids else gather.names_of(cohort)
    _refuse(
        target.folder,
        [
            *subject_id_complaints(folder, ids),
            *secret_complaints(folder),
            *card_complaints(folder),
        ],
    )


def _stage_metric(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon.model_cards import stage_metric
    from cortexicon.model_cards.checks import secret_complaints

    stage_metric(target.folder, folder, arguments.repository)
    _refuse(target.folder, secret_complaints(folder))


def _stage_space(target: Target, folder: Path, arguments: argparse.Namespace) -> None:
    from cortexicon.model_cards.checks import secret_complaints

    shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    _refuse(target.folder, secret_complaints(folder))


_STAGE: dict[str, Callable[[Target, Path, argparse.Namespace], str | None]] = {
    "checkpoint": _stage_checkpoint,
    "adapter": _stage_adapter,
    "cohort": _stage_cohort,
    "metric": _stage_metric,
    "space": _stage_space,
}


def _refuse(source: Path, complaints: list[str]) -> None:
    from cortexicon.model_cards import PublishError

    if complaints:
        listed = "\n  ".join(complaints[:20])
        raise PublishError(f"{source}: not published, for\n  {listed}")


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
