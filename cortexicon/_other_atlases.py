"""`cortexicon other-atlases`: what a codec loses on parcellations that it was not trained on."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from cortexicon.cohorts import Cohort
    from cortexicon.inference import Checkpoint

HELD_OUT = ("test", "test_sites")
# Training scans for mean connectivity and for the Gaussian reference; more would not move them.
MOST_TRAINING = 100
#: Hz; what low-passed releases keep, for the control on the codec's own atlas.
USUAL_BAND = (0.01, 0.1)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser(
        "other-atlases", help="what a codec loses on parcellations that it was not trained on"
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    command.add_argument("own", metavar="OWN", type=Path, help="cohort it was trained on")
    command.add_argument(
        "others", metavar="OTHER", type=Path, nargs="+", help="the same people in other atlases"
    )
    command.add_argument("--split", type=Path, required=True, help="split file of OWN")
    command.add_argument("--fold", type=int, default=0, help="fold of the split (default: 0)")
    command.add_argument("--json", type=Path, required=True, help="file of scores to write")
    command.add_argument("--batch-size", type=int, default=32, help="windows per step")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print and write the report beside the JSON file."""
    from cortexicon.cohorts import CohortError, load_cohort, load_split
    from cortexicon.inference import load_checkpoint

    own = load_cohort(arguments.own)
    split = load_split(arguments.split, own)
    if not 0 <= arguments.fold < len(split):
        raise CohortError(
            f"{arguments.split}: expected --fold in 0..{len(split) - 1}, found {arguments.fold}."
        )
    results = compare_atlases(
        load_checkpoint(arguments.checkpoint),
        own,
        [load_cohort(path) for path in arguments.others],
        split[arguments.fold],
        arguments.json,
        arguments.batch_size,
    )
    print(render(results))
    print(f"scores -> {arguments.json}")
    print(f"report -> {arguments.json.with_suffix('.md')}")
    return 0


def compare_atlases(
    checkpoint: "Checkpoint",
    own: "Cohort",
    others: "Sequence[Cohort]",
    parts: Mapping[str, Sequence[str]],
    json_path: Path,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Score a codec on the same held-out people in its own atlas and in others; write the report.

    The scans of two cohorts may differ in more than regions. Where the other ones were low-passed
    and the codec's own were not, the own ones are scored a second time behind a pass band of
    `USUAL_BAND`, which tells the filter's part of a loss from the rest. Beside every R2 stands what
    a Gaussian source with the covariance of those training scans would allow for as many bits.

    Parameters
    ----------
    checkpoint : Checkpoint
    own : Cohort
        In the checkpoint's atlas.
    others : sequence of Cohort
        Other atlases, with subject ids of `own`.
    parts : mapping of str to list of str
        A fold of a split of `own`. Nobody of `train` and `validation` is scored.
    json_path : pathlib.Path
        Receives the figures; the report in words goes beside it, with the ending ``.md``.
    batch_size : int
        Windows per forward pass.

    Returns
    -------
    dict
        As written: ``atlases`` holds for each of `others` the systems' scores and the losses.

    Raises
    ------
    InferenceError
        `own` has another atlas than the checkpoint.
    EvaluationError
        Nobody held out is in one of `others`.
    """
    from cortexicon.evaluation import EvaluationError, write_json
    from cortexicon.inference import fit_to_atlas
    from cortexicon.inference.doctor import LOW_PASSED, high_share

    at_home = fit_to_atlas(checkpoint, own)
    own_share = high_share(_sample(own))
    atlases = []
    for other in others:
        people = _people(own, other, parts)
        if not people["held_out"]:
            raise EvaluationError(
                f"{other.path or other.atlas}: expected held-out people of the split among its "
                f"{len(other)} scans, found none. Give cohorts with the subject ids of "
                f"{own.path or own.atlas}."
            )
        abroad = fit_to_atlas(checkpoint, other, any_atlas=True)
        share = high_share(_sample(other))
        scored = _score(abroad, other, people, batch_size)
        people["held_out"] = list(scored["r2_per_subject"])  # without those it had to leave out
        systems = {"own": _score(at_home, own, people, batch_size), "other": scored}
        if share < LOW_PASSED <= own_share:
            systems["own, low-passed"] = _score(
                _behind_band(at_home, USUAL_BAND), own, people, batch_size
            )
        atlases.append(
            {
                "atlas": other.atlas,
                "regions": len(other.labels),
                "cohort_hash": other.content_hash,
                "power_in_upper_half": {"own": own_share, "other": share},
                "mm_to_the_nearest_own_region": _distances(other, own).tolist(),
                "region_labels": other.labels,
                "systems": systems,
                "loss": {
                    name: _loss(system, scored)
                    for name, system in systems.items()
                    if name != "other"
                },
            }
        )
    results = {
        "command": shlex.join(["cortexicon", *sys.argv[1:]]),
        "checkpoint": checkpoint.folder.name,
        "model_type": checkpoint.model_type,
        "codebook_fingerprint": checkpoint.codec.codebook_fingerprint(),
        "own_atlas": own.atlas,
        "own_cohort_hash": own.content_hash,
        "atlases": atlases,
    }
    write_json(json_path, results)
    json_path.with_suffix(".md").write_text(render(results) + "\n", encoding="utf-8")
    return results


def render(results: Mapping[str, Any]) -> str:
    """The report in words and a table for each atlas, as Markdown."""
    own = results["own_atlas"]
    lines = [
        f"# {results['checkpoint']}: what it loses outside {own}",
        "",
        "People that the codec was not trained on, the same in every row of a table. R2: share of "
        "the variance that the decoded codes explain. Gaussian: what as many bits would allow for "
        "a Gaussian source with the covariance of those scans. Connectivity: correlation with the "
        "real matrix, whole and as deviation from the training mean.",
    ]
    for atlas in results["atlases"]:
        lines += ["", f"## {atlas['atlas']}, {atlas['regions']} regions", ""]
        lines += _table(atlas, own) + [""] + [f"* {text}" for text in _losses(atlas, own)]
        if results["model_type"] == "avq_lm":
            lines.append(f"* Answers are lost altogether: `predict` reads {own} only.")
    return "\n".join([*lines, "", f"`{results['command']}`"])


def _table(atlas: Mapping[str, Any], own: str) -> list[str]:
    names = {"own": own, "own, low-passed": f"{own}, low-passed", "other": atlas["atlas"]}
    rows = [
        "| scans in | people | R2 [95 %] | Gaussian | connectivity | deviation | codes used |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        if key not in atlas["systems"]:
            continue
        one = atlas["systems"][key]
        low, high = one["r2_interval"]
        kept = one["connectivity"]
        deviation = kept.get("deviation")
        rows.append(
            f"| {name} | {one['num_subjects']} | {one['r2']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {one['gaussian_reference_r2']:.3f} | {kept['full']:.3f} "
            f"| {'-' if deviation is None else f'{deviation:.3f}'} "
            f"| {one['codebook']['usage']:.1%} |"
        )
    return rows


def _losses(atlas: Mapping[str, Any], own: str) -> list[str]:
    """What is lost, in words."""
    import numpy as np

    name, loss = atlas["atlas"], atlas["loss"]["own"]
    here, there = atlas["systems"]["own"], atlas["systems"]["other"]
    texts = [
        f"R2 is {_signed(loss)} against the same people in {own}. Of what the Gaussian reference "
        f"allows, the codes reach {there['r2'] / there['gaussian_reference_r2']:.0%} here and "
        f"{here['r2'] / here['gaussian_reference_r2']:.0%} there."
    ]
    if "own, low-passed" in atlas["loss"]:
        control = atlas["systems"]["own, low-passed"]
        texts.append(
            f"The scans in {name} were low-passed "
            f"({atlas['power_in_upper_half']['other']:.1%} of the power in the upper half of the "
            f"spectrum; {own}: {atlas['power_in_upper_half']['own']:.1%}). Behind a pass band of "
            f"{USUAL_BAND[0]:g}-{USUAL_BAND[1]:g} Hz {own} itself comes to {control['r2']:.3f}; "
            f"against that R2 is {_signed(atlas['loss']['own, low-passed'])}: this is what other "
            "regions and the rest of the preprocessing cost."
        )
    gaps = np.array(atlas["mm_to_the_nearest_own_region"], float)
    r2 = np.array([np.nan if x is None else x for x in there["r2_per_region"]], float)
    third = np.quantile(gaps, [1 / 3, 2 / 3])
    near, far = np.nanmedian(r2[gaps <= third[0]]), np.nanmedian(r2[gaps >= third[1]])
    worst = [atlas["region_labels"][row] for row in np.argsort(np.nan_to_num(r2, nan=9.0))[:5]]
    texts.append(
        f"By region: median R2 {near:.3f} in the third nearest to regions of {own} (within "
        f"{third[0]:.0f} mm), {far:.3f} in the farthest third (beyond {third[1]:.0f} mm). Least "
        f"in {', '.join(worst)}."
    )
    full = there["connectivity"]["full"] - here["connectivity"]["full"]
    texts.append(f"The correlation of connectivity with the real one is {full:+.3f} against {own}.")
    if there["left_out"]:
        texts.append(f"{len(there['left_out'])} scans could not be encoded and are not counted.")
    return texts


def _signed(loss: Mapping[str, Any]) -> str:
    low, high = loss["interval"]
    return f"{loss['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _people(
    own: "Cohort", other: "Cohort", parts: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Held-out and training people who have a recommended scan in both cohorts."""
    both = _recommended(own) & _recommended(other)
    fitted_on = {subject for part in ("train", "validation") for subject in parts.get(part, ())}
    held_out = [subject for part in HELD_OUT for subject in parts.get(part, ())]
    training = [subject for subject in parts.get("train", ()) if subject in both]
    return {
        "held_out": [s for s in held_out if s in both and s not in fitted_on],
        "train": training[:: max(1, -(-len(training) // MOST_TRAINING))],
    }


def _recommended(cohort: "Cohort") -> set[str]:
    table = cohort.participants
    if "recommended" in table:
        table = table[table["recommended"].astype(bool)]
    return {str(subject) for subject in table.index}


def _score(
    checkpoint: "Checkpoint", cohort: "Cohort", people: Mapping[str, list[str]], batch_size: int
) -> dict[str, Any]:
    """Reconstruction scores of the held-out people, and the Gaussian reference of as many bits."""
    from cortexicon.evaluation import evaluate_reconstruction, gaussian_reference
    from cortexicon.inference import SkippedScan, cohort_windows, reconstruct_cohort

    extractor, config = checkpoint.processor.feature_extractor, checkpoint.codec.config
    skipped: list[SkippedScan] = []

    def scans(subjects: list[str], left_out: list[SkippedScan]) -> Iterator[Any]:
        if not subjects:
            return iter(())
        codec = checkpoint.codec
        return reconstruct_cohort(codec, extractor, cohort, subjects, batch_size, left_out)

    scores = evaluate_reconstruction(
        scans(people["train"], []),
        scans(people["held_out"], skipped),
        num_codes=config.num_codes,
        window_seconds=config.window_length * config.sampling_interval,
        tokens_per_window=checkpoint.tokens_per_window,
        regions=cohort.regions,
    )
    # Where the split trained on nobody of this cohort, its covariance comes from the scored scans.
    source = people["train"] if len(people["train"]) >= 20 else people["held_out"]
    scores["gaussian_reference_r2"] = gaussian_reference(
        (windows for _, windows in cohort_windows(extractor, cohort, source)),
        scores["tokens_per_window"] * scores["bits_per_token"],
    )
    scores["left_out"] = {scan.subject_id: scan.reason for scan in skipped}
    return scores


def _behind_band(checkpoint: "Checkpoint", band: tuple[float, float]) -> "Checkpoint":
    """The checkpoint with an extractor that keeps these frequencies (Hz) only."""
    from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor

    settings = checkpoint.processor.feature_extractor
    extractor = AVQFeatureExtractor(
        sampling_interval=settings.sampling_interval,
        window_length=settings.window_length,
        patch_length=settings.patch_length,
        atlas=settings.atlas,
        region_labels=settings.region_labels,
        region_coordinates=settings.region_coordinates,
        band_pass=band,
    )
    processor = AVQProcessor(extractor, checkpoint.processor.tokenizer)
    processor.tokens_per_window = checkpoint.tokens_per_window
    return checkpoint._replace(processor=processor)


def _loss(system: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Mean over people of R2 in the other atlas minus R2 in `system`, with its 95 % interval."""
    import numpy as np

    from cortexicon.evaluation.scores import bootstrap_interval

    subjects = [name for name in other["r2_per_subject"] if name in system["r2_per_subject"]]
    gaps = np.array(
        [other["r2_per_subject"][name] - system["r2_per_subject"][name] for name in subjects]
    )
    interval = bootstrap_interval(lambda rows: float(gaps[rows].mean()), len(gaps))
    return {"difference": float(gaps.mean()), "interval": list(interval), "people": len(gaps)}


def _distances(other: "Cohort", own: "Cohort") -> "np.ndarray":
    """Millimetres from each region of `other` to the nearest one of `own`, (regions,)."""
    import numpy as np

    gaps = other.coordinates[:, None] - own.coordinates[None]
    return np.linalg.norm(gaps, axis=-1).min(axis=1)


def _sample(cohort: "Cohort") -> list[Any]:
    """A few scans, evenly over the recommended ones."""
    from cortexicon.inference.examination import spread

    return [cohort.series(subject) for subject in spread(sorted(_recommended(cohort)), 16)]
