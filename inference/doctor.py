"""Does this input fit this checkpoint, and what to do when not.

Every aspect gets a verdict: it fits, it is changed on the way in (resampled, reordered), it is
worth a look, or something has to be done first. The last ones decide. What is done to the scans
and what is refused is decided by the feature extractor alone: `doctor` runs it, and explains.
"""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import CohortError, ParcelSeries
from cortexicon.cohorts.atlases import Atlas
from cortexicon.tokenization import AVQFeatureExtractor, TokenizationError

from .checkpoints import Checkpoint
from .encode import evaluation_mode
from .examination import Examined, examine, spread

FITS, CHANGED, LOOK, NO = "fits", "changed", "look", "NO"
#: Regions that lie farther than this (mm) from every region of the checkpoint are named.
FAR_MM = 15.0
#: Coordinates closer than this (mm) are of one region: tables are rounded.
SAME_MM = 1.0
#: A spectrum with a smaller share of its power in its upper half was low-passed; white noise: 0.5.
LOW_PASSED = 0.05
#: Scans that the codec is tried on.
TRIAL_SCANS = 3
#: A trial below this share of the validation R2 of training is worth a look.
WEAK_TRIAL = 0.5


class Finding(NamedTuple):
    """One aspect of the input.

    Attributes
    ----------
    aspect : str
    verdict : str
        `FITS`, `CHANGED`, `LOOK` or `NO`.
    found : str
    advice : str
        What to do; empty where nothing needs to be done.
    """

    aspect: str
    verdict: str
    found: str
    advice: str = ""


class Diagnosis(NamedTuple):
    """All findings about one input.

    Attributes
    ----------
    path : pathlib.Path
    examined : Examined or None
        None where nothing could be read.
    findings : list of Finding
    """

    path: Path
    examined: Examined | None
    findings: list[Finding]

    @property
    def fits(self) -> bool:
        """Whether nothing has to be done first."""
        return all(finding.verdict != NO for finding in self.findings)


def diagnose(
    path: str | Path,
    checkpoint: Checkpoint | None = None,
    atlas: Atlas | None = None,
    tr: float | None = None,
) -> Diagnosis:
    """Examine an input, alone or against a checkpoint.

    Parameters
    ----------
    path : path
        A cohort folder, a folder of scans in any form that `prepare` reads, or one scan. At most
        `MOST_SERIES` scans of it are read (volumes: `MOST_VOLUMES`).
    checkpoint : Checkpoint, optional
        Without it only the input itself is judged.
    atlas : Atlas, optional
        For volumes, and for series that do not say where their regions lie.
    tr : float, optional
        Seconds, where the files do not say.

    Raises
    ------
    InferenceError
        Nothing is at `path`.
    """
    path = Path(path)
    extractor = None if checkpoint is None else checkpoint.processor.feature_extractor
    try:
        examined = examine(path, atlas, tr, extractor)
    except CohortError as error:
        return Diagnosis(path, None, [Finding("scans", NO, str(error))])
    findings = [_scans(examined)]
    if examined.needs_atlas:
        findings.append(_atlas_needed(path, extractor))
    if examined.notes:
        listed = " ".join(examined.notes[:3])
        findings.append(Finding("warnings", LOOK, listed))
    if examined.scans and checkpoint is not None:
        findings += _against(examined.scans, checkpoint)
    elif examined.scans:
        findings += [_signal(examined.scans), _described(examined.scans)]
    return Diagnosis(path, examined, findings)


def _scans(examined: Examined) -> Finding:
    """How many scans can be read."""
    looked_at = len(examined.scans) + len(examined.unreadable)
    found = f"{examined.total} ({examined.kind})"
    if looked_at < examined.total and not examined.needs_atlas:
        found += f", {looked_at} of them read"
    if not examined.unreadable:
        return Finding("scans", FITS, found)
    reasons = list(examined.unreadable.values())
    found += f"; {len(reasons)} cannot be used, the first: {reasons[0]}"
    if examined.scans:
        return Finding("scans", LOOK, found, "`prepare` leaves such scans out and lists them.")
    return Finding("scans", NO, found)


def _atlas_needed(path: Path, extractor: AVQFeatureExtractor | None) -> Finding:
    name = "NAME" if extractor is None or extractor.atlas is None else extractor.atlas
    return Finding(
        "atlas",
        NO,
        "volumes, which a model reads as the means of regions",
        f"Look again with --atlas {name}, then: cortexicon prepare {path} --atlas {name} "
        "--participants FILE --out COHORT.",
    )


def _signal(scans: list[ParcelSeries]) -> Finding:
    """Regions without signal."""
    health = [scan.validate() for scan in scans]
    lost = [len(one.missing_regions) + len(one.constant_regions) for one in health]
    spikes = [text for one in health for text in one.warnings]
    if not any(lost) and not spikes:
        return Finding("signal", FITS, "in every region of every scan")
    names = Counter(n for one in health for n in one.missing_regions + one.constant_regions)
    found = f"{sum(n > 0 for n in lost)} of {len(scans)} scans lack regions, {max(lost)} at most"
    if names:
        often = ", ".join(f"{name} ({count} x)" for name, count in names.most_common(3))
        found += f"; most often {often}; they are masked"
    if spikes:
        found += f"; {spikes[0]}"
    return Finding("signal", LOOK if spikes else CHANGED, found)


def _described(scans: list[ParcelSeries]) -> Finding:
    """What a checkpoint would have to fit, where none is given."""
    first = scans[0]
    lengths = [len(scan.values) * scan.tr for scan in scans]
    return Finding(
        "input",
        FITS,
        f"{len(first.labels)} regions of {first.atlas}, TR {_seconds(scans)}, "
        f"{min(lengths):g} to {max(lengths):g} s long, {_filtering(scans)}",
        "Name a checkpoint to see whether it fits: cortexicon doctor PATH CHECKPOINT.",
    )


# ------------------------------------------------------------------- against a checkpoint


def _against(scans: list[ParcelSeries], checkpoint: Checkpoint) -> list[Finding]:
    """All aspects of scans that a checkpoint has demands on."""
    extractor = checkpoint.processor.feature_extractor
    regions, fitted = _regions(scans[0], checkpoint)
    findings = [regions, _signal(scans), _interval(scans, extractor), _length(scans, extractor)]
    findings += [_band(scans, extractor), _scaling(scans, fitted)]
    if fitted is not None:
        findings += _trial(scans, checkpoint, fitted)
    return findings


def _regions(
    scan: ParcelSeries, checkpoint: Checkpoint
) -> tuple[Finding, AVQFeatureExtractor | None]:
    """Whether the regions are the checkpoint's, and the extractor that reads them if one can."""
    extractor = checkpoint.processor.feature_extractor
    own = None if extractor.region_labels is None else list(extractor.region_labels)
    places = extractor.region_coordinates
    count = f"{len(scan.labels)} regions of {scan.atlas}"
    if extractor.atlas is None or own is None or places is None:
        return Finding("regions", FITS, f"{count}; the checkpoint reads any"), extractor
    expected = f"{len(own)} regions of {extractor.atlas}"
    place = {label: row for row, label in enumerate(scan.labels)}
    same_labels = set(own) == set(place)
    same_places = False
    if same_labels:
        rows = [place[label] for label in own]
        shift = np.linalg.norm(scan.coordinates[rows] - np.asarray(places), axis=1)
        same_places = bool((shift <= SAME_MM).all())
    if same_labels and same_places and scan.atlas == extractor.atlas:
        if scan.labels == own:
            return Finding("regions", FITS, f"{count}, as the checkpoint stores them"), extractor
        found = f"{count} in another order; they are put into the checkpoint's"
        return Finding("regions", CHANGED, found), extractor
    if same_labels and same_places:
        found = f"the checkpoint's {len(own)} regions under the name {scan.atlas!r}, not "
        found += f"{extractor.atlas!r}"
        how = f"Prepare the cohort with --atlas {extractor.atlas}, or add --any-atlas."
    elif scan.atlas == extractor.atlas:
        extra = [label for label in scan.labels if label not in set(own)]
        absent = [label for label in own if label not in place]
        found = f"{count}, but not the {len(own)} that the checkpoint stores"
        if extra or absent:
            found += f" (unknown: {_few(extra)}; missing: {_few(absent)})"
        else:
            found += f" (the same names up to {shift.max():.0f} mm away)"
        how = "Extract the series with the checkpoint's version of the atlas, without a "
        how += "background column."
        return Finding("regions", NO, f"{found}. Expected {expected}.", how), None
    else:
        found = f"{count}, where the checkpoint stores {expected}; {_distances(scan, places)}"
        how = f"Prepare the scans with --atlas {extractor.atlas}, or have these regions read by "
        how += "their coordinates: encode, evaluate and reconstruction with --any-atlas."
    if checkpoint.model_type == "avq_lm":
        how += " Answers (predict) need the checkpoint's own regions."
    try:
        fitted = extractor.for_atlas(scan.atlas, scan.labels, scan.coordinates)
    except TokenizationError as error:
        return Finding("regions", NO, found, f"{error}."), None
    return Finding("regions", NO, found, how), fitted


def _distances(scan: ParcelSeries, places: Any) -> str:
    """How far the regions lie from those that the codec learned."""
    gaps = np.linalg.norm(scan.coordinates[:, None] - np.asarray(places)[None], axis=-1).min(axis=1)
    far = np.flatnonzero(gaps > FAR_MM)
    text = f"each lies {np.median(gaps):.0f} mm (median) from the nearest of those"
    if len(far):
        names = [scan.labels[row] for row in far[np.argsort(-gaps[far])]]
        text += f", {len(far)} more than {FAR_MM:g} mm ({_few(names)})"
    return text


def _interval(scans: list[ParcelSeries], extractor: AVQFeatureExtractor) -> Finding:
    """Repetition times beside the model's sampling interval."""
    wanted = extractor.sampling_interval
    found = f"TR {_seconds(scans)}; the model works at {wanted:g} s"
    if all(abs(scan.tr - wanted) <= 1e-3 for scan in scans):
        return Finding("TR", FITS, found)
    slow = max(scan.tr for scan in scans)
    if slow > 1.25 * wanted:
        found += f". Scans are resampled; those of {slow:g} s hold nothing above "
        found += f"{0.5 / slow:.3f} Hz, where the model expects signal up to {0.5 / wanted:.3f} Hz"
        return Finding("TR", LOOK, found)
    return Finding("TR", CHANGED, f"{found}. Scans are resampled, with anti-aliasing")


def _length(scans: list[ParcelSeries], extractor: AVQFeatureExtractor) -> Finding:
    """Whole windows in a scan, and what lies after the last one."""
    window = extractor.window_length * extractor.sampling_interval
    lengths = np.array([len(scan.values) * scan.tr for scan in scans])
    counts = np.floor(lengths / window + 1e-6)
    short = int((counts < 1).sum())
    found = f"{lengths.min():g} to {lengths.max():g} s; a window is {window:g} s"
    how = "In Python, the feature extractor's remainder='pad' pads them with a mask."
    if short == len(scans):
        return Finding("length", NO, f"{found}: every scan is too short", how)
    unread = 1 - float((counts * window).sum() / lengths.sum())
    found += f", {counts[counts > 0].mean():.1f} whole windows a scan, {unread:.0%} of the time "
    found += "lies after the last one and is not read"
    if short:
        found += f"; {short} of {len(scans)} scans are too short and left out"
        return Finding("length", LOOK, found, how)
    return Finding("length", FITS, found)


def _band(scans: list[ParcelSeries], extractor: AVQFeatureExtractor) -> Finding:
    """Whether the scans were filtered, and whether the extractor filters."""
    found = _filtering(scans)
    filtered = high_share(scans) < LOW_PASSED
    if extractor.band_pass is not None:
        low, high = extractor.band_pass
        return Finding("pass band", CHANGED, f"{found}; the checkpoint keeps {low:g}-{high:g} Hz")
    if filtered:
        return Finding(
            "pass band",
            LOOK,
            f"{found}; the checkpoint does not filter, so it was trained on whatever its cohort "
            "held",
            "If that was unfiltered, prepare these scans without a pass band.",
        )
    return Finding("pass band", FITS, f"{found}; the checkpoint does not filter")


def _scaling(scans: list[ParcelSeries], extractor: AVQFeatureExtractor | None) -> Finding:
    """The unit of the signal, which matters only against stored statistics."""
    medians = [float(np.nanmedian(scan.values)) for scan in scans]
    spreads = [float(np.nanmedian(np.nanstd(scan.values, axis=0))) for scan in scans]
    found = f"median {np.median(medians):.3g}, SD {np.median(spreads):.3g} of a region"
    if extractor is None or extractor.scaling == "zscore":
        return Finding("scaling", FITS, f"{found}; every region is z-scored, so any unit will do")
    centre = float(np.median(np.asarray(extractor.scaling_center)))
    scale = float(np.median(np.asarray(extractor.scaling_scale)))
    found += f"; the checkpoint's own scans: median {centre:.3g}, SD {scale:.3g}"
    shift = abs(np.median(medians) - centre) / scale
    ratio = np.median(spreads) / scale
    if shift > 5 or not 0.2 < ratio < 5:
        how = "Bring the scans into the unit of the training scans; a checkpoint with "
        how += "scaling='zscore' reads any."
        return Finding("scaling", NO, f"{found}: another unit", how)
    return Finding("scaling", FITS, found)


def _trial(
    scans: list[ParcelSeries], checkpoint: Checkpoint, extractor: AVQFeatureExtractor
) -> list[Finding]:
    """What the extractor refuses, and how well the codec gives back what it accepts."""
    refused: dict[str, str] = {}
    batches = []
    window = extractor.window_length * extractor.sampling_interval
    scans = [scan for scan in scans if len(scan.values) * scan.tr >= window]  # the rest: `_length`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spikes: `_signal` has named them
        for scan in scans:
            try:
                prepared = extractor(
                    scan.values, scan.tr, scan.labels, scan.coordinates, scan.atlas
                )
            except TokenizationError as error:
                refused[scan.subject_id] = str(error)
            else:
                batches.append(prepared)
    findings = []
    if refused:
        name, reason = next(iter(refused.items()))
        found = f"{len(refused)} of {len(scans)} refused, the first: {name}: {reason}"
        findings.append(Finding("preparation", LOOK if batches else NO, found))
    if not batches:
        return findings
    scores, codes = zip(
        *(reconstruct(checkpoint, batch) for batch in spread(batches, TRIAL_SCANS)), strict=True
    )
    r2 = float(np.mean(scores))
    used = len(np.unique(np.concatenate(codes)))
    found = f"{len(scores)} scans encoded and decoded: R2 {r2:.2f} with {used} different codes"
    expected = _training_r2(checkpoint)
    if expected is None:
        return [*findings, Finding("trial", FITS if r2 > 0 else LOOK, found)]
    found += f"; {expected:.2f} on the validation scans of training"
    if r2 < WEAK_TRIAL * expected:
        how = "The codec knows such signals badly; see the aspects above before you trust its codes"
        return [*findings, Finding("trial", LOOK, found, f"{how}.")]
    return [*findings, Finding("trial", FITS, found)]


@torch.inference_mode()
def reconstruct(checkpoint: Checkpoint, batch: Any) -> tuple[float, np.ndarray]:
    """R2 over the usable regions of one prepared scan, and its codes int64 (windows, tokens)."""
    values, mask = batch["input_values"], batch["region_mask"].bool()
    codec = checkpoint.codec
    places = batch["region_coordinates"].float()
    with evaluation_mode(codec):
        encoded = codec.encode(values, region_coordinates=places, region_mask=mask, codes_only=True)
        codes = encoded.codes
        decoded = codec.decode(codes, places).reconstruction.float()
    usable = mask[:, None].expand_as(values)  # (windows, time, regions)
    error = (decoded - values)[usable].square().sum()
    return 1 - float(error / values[usable].square().sum()), codes.numpy()


def _training_r2(checkpoint: Checkpoint) -> float | None:
    """Validation R2 that training wrote beside the checkpoint, if it is there."""
    try:
        facts = json.loads((checkpoint.folder / "run.json").read_text(encoding="utf-8"))
        return float(facts["eval_r2"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------- helpers


def high_share(scans: list[ParcelSeries]) -> float:
    """Median share of a region's power that lies in the upper half of its spectrum."""
    shares = []
    for scan in spread(scans, 8):
        values = np.nan_to_num(scan.values.astype(np.float64))
        steps = np.arange(len(values)) - (len(values) - 1) / 2
        values -= values.mean(axis=0)
        values -= np.outer(steps, steps @ values / (steps @ steps))  # drift leaks into all of it
        power = np.abs(np.fft.rfft(values * np.hanning(len(values))[:, None], axis=0)) ** 2
        total = power[1:].sum(axis=0)
        upper = power[len(power) // 2 :].sum(axis=0)
        shares.append(np.median(upper[total > 0] / total[total > 0]))
    return float(np.median(shares))


def _filtering(scans: list[ParcelSeries]) -> str:
    share = high_share(scans)
    nyquist = 0.5 / float(np.median([scan.tr for scan in scans]))
    text = f"{share:.1%} of the power lies above {nyquist / 2:.3f} Hz"
    return f"{text}: the scans were low-passed" if share < LOW_PASSED else text


def _seconds(scans: list[ParcelSeries]) -> str:
    counts = Counter(round(scan.tr, 4) for scan in scans)
    if len(counts) == 1:
        return f"{scans[0].tr:g} s"
    return ", ".join(f"{tr:g} s ({count} scans)" for tr, count in sorted(counts.items()))


def _few(names: list[str]) -> str:
    return (", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "none"
