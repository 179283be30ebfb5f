"""Whether a codebook holds a code that is, in effect, one person's; and what to do about it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cortexicon.cohorts import Cohort, Split
from cortexicon.modeling import AVQConnectomeModel, AVQModel
from cortexicon.modeling.quantization_avq import AVQCodebook

from .checkpoints import Checkpoint, fit_to_atlas
from .connectome import cohort_matrices
from .encode import evaluation_mode
from .errors import InferenceError

COSINE, SUBJECTS = 0.999, 5
_ROWS = 8192  # latents compared with the codebook at once


class TrainingLatents(NamedTuple):
    """What reached the codebook in training.

    Attributes
    ----------
    vectors : float32, shape (latents, code_dim)
        Of length 1.
    owners : int64, shape (latents,)
        Number of the person that each is of.
    num_subjects : int
    """

    vectors: torch.Tensor
    owners: torch.Tensor
    num_subjects: int


class Exposure(NamedTuple):
    """What comparing a codebook with training latents found.

    Attributes
    ----------
    exposed : list of int
        Codes within cosine `COSINE` of a single training latent to which fewer than `SUBJECTS`
        people map.
    highest_cosine : float
        Of any code with any latent of training.
    fewest_subjects : int
        People who map to the code that fewest map to, among codes that are used.
    num_codes, num_latents, num_subjects : int
    """

    exposed: list[int]
    highest_cosine: float
    fewest_subjects: int
    num_codes: int
    num_latents: int
    num_subjects: int


def training_subjects(facts: dict[str, Any], split: Split, cohort: Cohort) -> list[str]:
    """People whose scans a run fitted its codec on, by its run.json, its split and its cohort."""
    arguments, parts = facts["arguments"], split[int(facts["arguments"].get("fold", 0))]
    fitted = list(parts["train"])
    if arguments.get("fit_validation"):
        fitted += parts["validation"]
    if arguments.get("more_scans"):
        named = {subject for subjects in parts.values() for subject in subjects}
        fitted += [subject for subject in cohort.subject_ids if subject not in named]
    return fitted


def codec_latents(
    checkpoint: Checkpoint, cohorts: Sequence[Cohort], subject_ids: Sequence[str], flipped: bool
) -> TrainingLatents:
    """Latents of the dynamics stream.

    Parameters
    ----------
    checkpoint : Checkpoint
        Codec, or language model with one inside.
    cohorts : sequence of Cohort
        That of training, and the same people in other parcellations where training took those.
    subject_ids : sequence of str
        People of training. Their windows are taken whole, from the scan's start on; training also
        drew windows in between, whose latents are not looked at one by one.
    flipped : bool
        Whether training also saw windows with their sign turned and backwards.
    """

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        model = checkpoint.codec
        for cohort in cohorts:
            extractor = fit_to_atlas(checkpoint, cohort, True).processor.feature_extractor
            known = set(cohort.subject_ids)
            for number, subject in enumerate(subject_ids):
                if subject not in known:
                    continue
                series = cohort.series(subject)
                try:
                    prepared = extractor(series.values, tr=series.tr)
                except ValueError:
                    continue  # a scan that the extractor refuses was not trained on either
                inputs = {
                    name: torch.as_tensor(value).to(model.device)
                    for name, value in prepared.items()
                    if name != "num_windows"
                }
                for batch in _variants(inputs) if flipped else (inputs,):
                    vectors, _ = _vectors(model, **batch)
                    yield vectors, torch.full((len(vectors),), number)

    return _gathered(parts())


def connectome_latents(
    model: AVQConnectomeModel, cohort: Cohort, subject_ids: Sequence[str], batch_size: int = 64
) -> TrainingLatents:
    """Latents of the connectivity stream: of whole scans, and of their halves.

    The codebook is fitted to vectors with signs drawn anew, all but the constant beside them; so
    each counts with both signs.
    """

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        where = torch.tensor(cohort.coordinates)[None].to(model.device)
        for share in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)):
            for start in range(0, len(subject_ids), batch_size):
                chosen = list(subject_ids[start : start + batch_size])
                scans = cohort_matrices(cohort, chosen, share)
                vectors, rows = _vectors(
                    model,
                    matrices=scans.matrices.to(model.device),
                    region_coordinates=where,
                    region_mask=scans.region_mask.to(model.device),
                )
                turned = torch.cat([-vectors[:, :-1], vectors[:, -1:]], 1)
                yield torch.cat([vectors, turned]), start + torch.cat([rows, rows])

    return _gathered(parts())


@torch.inference_mode()
def find_exposed(codebook: AVQCodebook, latents: TrainingLatents) -> Exposure:
    """Compare every code with every latent."""
    return _compared(codebook.codebook.detach().cpu(), latents.vectors, codebook, latents)


@torch.inference_mode()
def find_exposed_rows(
    codec: AVQModel | AVQConnectomeModel, rows: torch.Tensor, latents: TrainingLatents
) -> Exposure:
    """Compare rows of codes, as a language model or an adapter has trained them, with latents.

    Such rows lie in text space, so P carries the latents there; both are seen from the mean of P
    over the codebook, for whatever they share tells nobody apart.

    Parameters
    ----------
    codec : AVQModel or AVQConnectomeModel
        Of the stream that the rows are of.
    rows : float, shape (codes, text_width)
        One per code.
    latents : TrainingLatents
        Of that codec.
    """
    centre = codec.project_codebook().mean(0)
    vectors = torch.cat(
        [
            F.normalize(codec.projection(part.to(codec.device)) - centre, dim=-1).cpu()
            for part in latents.vectors.split(_ROWS)
        ]
    )
    moved = F.normalize(rows.float().to(codec.device) - centre, dim=-1).cpu()
    return _compared(moved, vectors, codec.quantizer, latents)


def _compared(
    codes: torch.Tensor, seen: torch.Tensor, codebook: AVQCodebook, latents: TrainingLatents
) -> Exposure:
    """Unit `codes` (codes, width) beside unit `seen` (latents, width), the latents in their space.

    Who maps to a code is for the codebook to say, whatever space the two are compared in.
    """
    highest = torch.full((len(codes),), -1.0)
    mapped = torch.zeros(len(codes), latents.num_subjects, dtype=torch.bool)
    for shown, vectors, owners in zip(
        *(column.split(_ROWS) for column in (seen, latents.vectors, latents.owners)), strict=True
    ):
        highest = torch.maximum(highest, (shown @ codes.T).amax(0))
        mapped[codebook.search(vectors.to(codebook.codebook.device)).cpu(), owners] = True
    people = mapped.sum(1)
    exposed = (highest >= COSINE) & (people < SUBJECTS)
    used = people[people > 0]
    return Exposure(
        exposed=exposed.nonzero()[:, 0].tolist(),
        highest_cosine=float(highest.max()),
        fewest_subjects=int(used.min()) if len(used) else 0,
        num_codes=len(codes),
        num_latents=len(latents.vectors),
        num_subjects=latents.num_subjects,
    )


@torch.inference_mode()
def blur_exposed(codebook: AVQCodebook, latents: TrainingLatents, rounds: int = 6) -> list[int]:
    """Move every exposed code to the mean of the nearest latents of several people, in place.

    Of `SUBJECTS` people first, of twice as many in each further round where that is still too near
    to one person.

    Returns
    -------
    list of int
        The codes that were moved.

    Raises
    ------
    InferenceError
        Codes are still exposed after all rounds; the codebook then is as it was.
    """
    before = codebook.codebook.clone()
    moved: set[int] = set()
    for turn in range(rounds):
        exposed = find_exposed(codebook, latents).exposed
        if not exposed:
            return sorted(moved)
        wanted = min(SUBJECTS * 2**turn, latents.num_subjects)
        for code in exposed:
            similarity = latents.vectors @ before[code].cpu()
            best = torch.full((latents.num_subjects,), -2.0)
            best.scatter_reduce_(0, latents.owners, similarity, "amax")
            near = [
                latents.vectors[(similarity == best[person]) & (latents.owners == person)][0]
                for person in best.topk(wanted).indices
            ]
            codebook.codebook[code] = F.normalize(torch.stack(near).mean(0), dim=0)
            codebook.code_sum[code] = codebook.codebook[code] * codebook.code_count[code]
            moved.add(code)
    left = find_exposed(codebook, latents).exposed
    if left:
        codebook.codebook.copy_(before)
        raise InferenceError(
            f"{len(left)} codes stay within cosine {COSINE} of one person's latent, however many "
            "people they are averaged over. Train with fewer codes, or on more people."
        )
    return sorted(moved)


@torch.inference_mode()
def _vectors(
    model: AVQModel | AVQConnectomeModel, **inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the codebook when the model encodes: unit vectors, and the row of each."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        latents = arguments[0].float()  # (batch, tokens, code_dim)
        mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
        if len(arguments) > 1:
            mask = arguments[1]
        rows = torch.arange(len(latents), device=latents.device)[:, None].expand(mask.shape)
        found.append((F.normalize(latents[mask], dim=-1).cpu(), rows[mask].cpu()))

    handle = model.quantizer.register_forward_pre_hook(keep)
    try:
        with evaluation_mode(model):
            model.encode(**inputs)
    finally:
        handle.remove()
    return found[0]


def _gathered(parts: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> TrainingLatents:
    found = list(parts)
    if not found:
        raise InferenceError(
            "expected scans of training to compare the codebook with, found none that can be "
            "encoded. Give the cohort that the checkpoint was trained on."
        )
    vectors, owners = (torch.cat(column) for column in zip(*found, strict=True))
    _, owners = owners.unique(return_inverse=True)
    return TrainingLatents(vectors, owners, int(owners.max()) + 1)


def _variants(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The windows as they are, with their sign turned, and both backwards."""
    values, mask = inputs["input_values"], inputs.get("time_mask")
    for sign in (1.0, -1.0):
        yield inputs | {"input_values": sign * values}
        backwards = {"input_values": sign * values.flip(1)}
        if mask is not None:
            backwards["time_mask"] = mask.flip(1)
        yield inputs | backwards
