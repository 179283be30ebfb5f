"""What the Space computes: a file or a simulated person in; codes, what they keep, an answer out.

No page in here. Whatever a visitor does wrong ends in a `SpaceError` with one plain sentence.
"""

import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import (
    Cohort,
    CohortError,
    ParcelSeries,
    cohort_from_series,
    simulate_cohort,
)
from cortexicon.cohorts.atlases import Atlas, load_atlas
from cortexicon.inference import (
    Checkpoint,
    InferenceError,
    SkippedScan,
    fit_to_atlas,
    reconstruct_cohort,
)
from cortexicon.inference.answers import (
    answers_of,
    pooled_answers,
    prompt_rows,
    scan_arguments,
)
from cortexicon.inference.ask import interval_of, scan_prompts, target_of, wordings
from cortexicon.inference.examination import examine
from cortexicon.inference.predict import PromptCodes
from cortexicon.tokenization import TokenizationError

from .space_limits import MAX_NUMBERS, SpaceError, check_file, check_question

#: People of the simulation that no run of `make demo` was trained on (it draws with seed 0).
FIRST_PERSON = 1_000_000
#: Regions of the simulation that is read at other coordinates; mm within which a region listens.
SIMULATED_REGIONS, LISTENING_MM = 100, 10.0
ANSWER_TOKENS = 16


class ScanReading(NamedTuple):
    """One scan, what its codes keep of it, and what is needed to ask about it.

    Attributes
    ----------
    cohort : Cohort
        Of this scan alone.
    checkpoint : Checkpoint
        As it reads this scan's regions.
    own_regions : bool
        The scan comes in the regions of the checkpoint, so that questions make sense.
    raw, decoded : float32 array, (time, regions), z-score units
    region_mask : bool array, (regions,)
    codes : int64 array, (windows, tokens)
    r2 : float
        1 - SSE/SST pooled over usable regions, SST around each region's own mean.
    region_r2 : float array, (regions,)
        NaN for regions without signal.
    truth : dict of str to str
        What is known of a simulated person; empty for a file.
    """

    cohort: Cohort
    checkpoint: Checkpoint
    own_regions: bool
    raw: np.ndarray
    decoded: np.ndarray
    region_mask: np.ndarray
    codes: np.ndarray
    r2: float
    region_r2: np.ndarray
    truth: dict[str, str]


class SpaceAnswer(NamedTuple):
    """An answer in words, and the probabilities behind it.

    Attributes
    ----------
    question, text : str
        As the model was asked, and what it says.
    options : list of str
        All valid answers; empty where the model wrote freely.
    probabilities : float64 array, (options,)
    number : float or None
        What the answer says, for questions about numbers.
    target : str
        Column that the question was taken to ask for; empty where the model wrote freely.
    """

    question: str
    text: str
    options: list[str]
    probabilities: np.ndarray
    number: float | None
    target: str


def read_upload(
    path: str | Path,
    checkpoint: Checkpoint,
    tr: float | None = None,
    atlas: Atlas | None = None,
    label_volume: str | Path | None = None,
) -> ScanReading:
    """Read a visitor's file, encode it and decode it.

    Parameters
    ----------
    path : path
        .nii, .nii.gz, .tsv, .csv, .1D, .npy or .npz, as `cortexicon prepare` reads them.
    checkpoint : Checkpoint
    tr : float, optional
        Seconds, where the file does not say.
    atlas : Atlas, optional
        For volumes without a label volume of their own.
    label_volume : path, optional
        The visitor's parcellation.

    Raises
    ------
    SpaceError
        Whatever is wrong with the files, without the folders they lie in.
    """
    with tempfile.TemporaryDirectory(prefix="cortexicon-") as folder:
        # A file of its own folder: nothing that lies beside an upload is ever looked at.
        scan_path = _copy_in(Path(path), Path(folder) / "scan", "The file")
        try:
            if label_volume is not None:
                atlas = _label_volume(Path(label_volume), Path(folder) / "atlas")
            scan = _one_scan(scan_path, checkpoint, tr, atlas)
        except (CohortError, InferenceError, TokenizationError) as error:
            raise SpaceError(_without_folders(str(error), Path(folder))) from None
    return read_scan(scan, checkpoint, {})


def simulate_reading(person: int, checkpoint: Checkpoint) -> ScanReading:
    """A person who never lived, in the regions of the checkpoint.

    Where the checkpoint's regions are not the simulation's own, each of them hears the simulated
    regions around it, the nearer the louder, and some noise.

    Parameters
    ----------
    person : int
        0 to 999999; the same number is the same person.
    """
    if not 0 <= person < FIRST_PERSON:
        raise SpaceError(f"expected a person from 0 to {FIRST_PERSON - 1}, found {person}.")
    extractor = checkpoint.processor.feature_extractor
    own = re.fullmatch(r"simulated(\d{2,3})", extractor.atlas or "")
    regions = int(own[1]) if own else SIMULATED_REGIONS
    try:
        cohort = simulate_cohort(1, regions, seed=FIRST_PERSON + person, progress=False)
        name = cohort.subject_ids[0]
        scan, row = cohort.series(name), cohort.participants.loc[name]
    except CohortError as error:
        raise SpaceError(str(error)) from None
    truth = {"age": f"{row['age']:.0f}", "sex": str(row["sex"]), "diagnosis": str(row["diagnosis"])}
    if own is None and extractor.region_coordinates is not None:
        scan = _heard_at(scan, checkpoint, person)
        truth = {}  # the language model learned other people's answers
    return read_scan(scan, checkpoint, truth)


def read_scan(scan: ParcelSeries, checkpoint: Checkpoint, truth: dict[str, str]) -> ScanReading:
    """Encode and decode one scan, in the checkpoint's regions or, if it has to be, in its own."""
    if scan.values.size > MAX_NUMBERS:
        raise SpaceError(
            f"expected at most {MAX_NUMBERS:,} numbers, found {len(scan.values):,} volumes x "
            f"{len(scan.labels)} regions. Cut the scan."
        )
    skipped: list[SkippedScan] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # spikes: they show in the picture
            cohort = cohort_from_series([scan])
            fitted = fit_to_atlas(checkpoint, cohort, any_atlas=True)
            (result,) = reconstruct_cohort(
                fitted.codec,
                fitted.processor.feature_extractor,
                cohort,
                skipped=skipped,
                progress=False,
            )
    except (CohortError, InferenceError, TokenizationError) as error:
        raise SpaceError(skipped[0].reason if skipped else str(error)) from None
    usable = result.region_mask & (np.ptp(result.raw, axis=0) > 0)
    error_sums = ((result.raw - result.reconstruction) ** 2).sum(axis=0, dtype=np.float64)
    total_sums = ((result.raw - result.raw.mean(axis=0)) ** 2).sum(axis=0, dtype=np.float64)
    region_r2 = np.full(len(usable), np.nan)
    region_r2[usable] = 1 - error_sums[usable] / total_sums[usable]
    return ScanReading(
        cohort,
        fitted,
        fitted is checkpoint,
        result.raw,
        result.reconstruction,
        usable,
        result.codes,
        float(1 - error_sums[usable].sum() / total_sums[usable].sum()),
        region_r2,
        truth,
    )


@torch.inference_mode()
def ask(reading: ScanReading, question: str) -> SpaceAnswer:
    """Answer a question about a scan that was read.

    Questions about a target of its training, in plain words, are answered under a grammar of valid
    answers, pooled over windows; any other text is continued freely, by text alone.

    Raises
    ------
    SpaceError
        The checkpoint is no language model, the scan is of another parcellation, or the question is
        empty, too long or holds control characters.
    """
    checkpoint, question = reading.checkpoint, check_question(question)
    if checkpoint.model_type != "avq_lm":
        raise SpaceError("This checkpoint is a codec: it answers no questions.")
    if not reading.own_regions:
        raise SpaceError(
            "The model answers about scans in the regions that it was trained on "
            f"({checkpoint.processor.feature_extractor.atlas!r} is another parcellation)."
        )
    try:
        prompts = scan_prompts(
            checkpoint.model,
            checkpoint.processor.feature_extractor,
            reading.cohort.series(reading.cohort.subject_ids[0]),
        )
    except (CohortError, InferenceError, TokenizationError) as error:
        raise SpaceError(str(error)) from None
    target = target_of(question, checkpoint.model.config.targets or [])
    if target is None:
        return _free_answer(checkpoint, prompts, question)
    if len(wordings(target)) == 1:
        question = target["question"]  # the only wording that the model has learned to read
    return _trained_answer(checkpoint, prompts, target, question)


def _trained_answer(
    checkpoint: Checkpoint, prompts: PromptCodes, target: dict, question: str
) -> SpaceAnswer:
    """The pooled answer to a question of the training."""
    answers = pooled_answers(
        checkpoint.model, checkpoint.processor, prompts, target, question=question
    )
    options, name = answers_of(target), target["name"]
    if target["kind"] == "number":
        number, shares = float(answers.numbers(target)[0]), answers.probabilities[0]
        low, high, coverage = interval_of(number, shares, target)
        text = f"{number:.0f} ({coverage:.0%} interval {low:.0f} to {high:.0f})"
        return SpaceAnswer(question, text, options, shares, number, name)
    shares = answers.classes(target)[0]
    best = int(shares.argmax())
    text = f"{options[best]} ({shares[best] / shares.sum():.0%})"
    return SpaceAnswer(question, text, options, shares, None, name)


def _free_answer(checkpoint: Checkpoint, prompts: PromptCodes, question: str) -> SpaceAnswer:
    """What the model writes after a question it was not trained on: text only."""
    processor, model = checkpoint.processor, checkpoint.model
    codes, connectivity = prompts.flat
    codes, connectivity = codes[:1], None if connectivity is None else connectivity[:1]
    ids = prompt_rows(processor, codes, connectivity, question)[0]
    room = getattr(model.config.text_config, "max_position_embeddings", len(ids) + ANSWER_TOKENS)
    if len(ids) + ANSWER_TOKENS > room:
        raise SpaceError(f"The question is too long: {len(ids) + ANSWER_TOKENS - room} tokens.")
    first = processor.tokenizer.bof_token_id  # markers and codes begin here
    written = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        suppress_tokens=list(range(first, model.get_input_embeddings().num_embeddings)),
        **scan_arguments(codes, connectivity),
    )[0, len(ids) :]
    text = processor.tokenizer.decode(written, skip_special_tokens=True).partition("\n")[0].strip()
    return SpaceAnswer(question, text or "(nothing)", [], np.zeros(0), None, "")


def _copy_in(path: Path, stem: Path, what: str) -> Path:
    """The upload under a name of ours that keeps its ending; nothing of its own name remains."""
    target = stem.with_name(stem.name + check_file(path, what))
    shutil.copyfile(path, target)
    return target


def _label_volume(path: Path, stem: Path) -> Atlas:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise SpaceError("The label volume: expected .nii or .nii.gz, found another kind of file.")
    return load_atlas(_copy_in(path, stem, "The label volume"))


def _one_scan(
    path: Path, checkpoint: Checkpoint, tr: float | None, atlas: Atlas | None
) -> ParcelSeries:
    volume = path.name.endswith((".nii", ".nii.gz"))
    given = atlas if volume else None  # series are taken for the checkpoint's regions
    extractor = checkpoint.processor.feature_extractor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examine(path, given, tr, extractor)
    if found.needs_atlas:
        raise SpaceError(
            "A volume is read as the means of regions: upload the label volume of a parcellation "
            "in the same space (MNI) too."
        )
    if found.unreadable:
        raise SpaceError(_without_folders(next(iter(found.unreadable.values())), path.parent))
    scan = found.scans[0]
    scan.subject_id = "visitor"
    return scan


def _without_folders(message: str, folder: Path) -> str:
    """A message about files of `folder` that names them as the visitor would."""
    for place in {str(folder), str(folder.resolve())}:
        for stem, words in (("scan", "The file"), ("atlas", "The label volume")):
            message = re.sub(rf"{re.escape(place)}/{stem}[.\w]*", words, message)
        message = message.replace(place, "")
    return message.strip()


def _heard_at(scan: ParcelSeries, checkpoint: Checkpoint, person: int) -> ParcelSeries:
    """The simulated series as the checkpoint's regions would hear them."""
    extractor = checkpoint.processor.feature_extractor
    places = np.asarray(extractor.region_coordinates, np.float32)
    squares = ((places[:, None] - scan.coordinates[None]) ** 2).sum(axis=-1)
    # Relative to the nearest: a region far from all of them still hears something.
    weights = np.exp(-(squares - squares.min(axis=1, keepdims=True)) / (2 * LISTENING_MM**2))
    values = (scan.values - scan.values.mean(axis=0)) / scan.values.std(axis=0)
    heard = values @ (weights / np.linalg.norm(weights, axis=1, keepdims=True)).T
    noise = np.random.default_rng(person).standard_normal(heard.shape)
    labels = extractor.region_labels or [f"region {row + 1}" for row in range(len(places))]
    return ParcelSeries(
        (heard + 0.3 * noise).astype(np.float32),
        list(labels),
        places,
        extractor.atlas or "of the checkpoint",
        scan.tr,
        scan.subject_id,
        site=scan.site,
    )
