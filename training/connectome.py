"""`cortexicon train avq CONFIG --stream connectivity`: matrices of connectivity to codes and back.

The run in one look: the Fisher-z matrix of every scan is held in memory; maps, components and
codebook start in closed form from training people, which takes a minute and is nearly all there is
to gain; `steps` gradient steps may follow, and what they reach is kept only where validation
says that it is better than the start.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort
from cortexicon.evaluation.connectivity import correlation_by_scan
from cortexicon.modeling import AVQConnectomeConfig, AVQConnectomeModel
from cortexicon.modeling.losses_avq import reversal_strength

from .arguments import TrainingError, load_arguments
from .callbacks import Run, TrainingLog, begin_run, learning_rate_at, remove_state, write_run_facts
from .collators import TextDomain, draw_scans, load_fold, load_text_side
from .connectome_sources import (
    Matrices,
    further_scans,
    matrices_of,
    mirrored,
    other_atlases,
    sub_windows,
)
from .faults import written_whole
from .patterns import ridge_patterns, target_columns


@dataclass
class ConnectomeArguments:
    """Arguments of the stage; training/configs/abide_connectome.yaml says what each does."""

    output: str
    cohort: str
    split: str
    stream: str = "connectivity"
    label: str = ""
    text_model: str = ""
    fold: int = 0
    model: dict = field(default_factory=dict)
    shrinkage: float = 0.1
    targets: list = field(default_factory=list)
    target_penalty: float = 1.0
    more_scans: bool = True
    sub_windows: int = 0
    mirrored: bool = False
    more_cohorts: list = field(default_factory=list)
    flip_sign: bool = True
    adversary: bool = True
    fit_validation: bool = True
    kmeans_iterations: int = 14
    kmeans_draws: int = 80000
    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    text_batch_size: int = 1024
    log_steps: int = 20
    eval_steps: int = 50
    seed: int = 0
    cpu: bool = False
    resume: bool = False


@torch.no_grad()
def evaluate(
    model: AVQConnectomeModel, scans: Matrices, batch_size: int, centre: torch.Tensor
) -> dict[str, float]:
    """Median over scans of the correlation with the decoded matrix, and of deviations; usage.

    `centre` (regions, regions) is what both deviate from. NOTE: not the model's own mean, which
    steps move: far enough away, everything deviates from it alike.
    """
    training = model.training
    model.eval()
    upper = tuple(torch.triu_indices(len(centre), len(centre), 1))
    used = torch.zeros(model.config.num_codes, dtype=torch.bool)
    raw, decoded = [], []
    for rows in torch.arange(len(scans.matrices)).split(batch_size):
        batch = {key: value.to(model.device) for key, value in scans.rows(rows).items()}
        codes = model.encode(**batch).codes
        used[codes.flatten().cpu()] = True
        decoded.append(model.decode(codes).matrices.cpu()[:, *upper])
        mask = scans.region_mask[rows]
        there = (mask[:, :, None] & mask[:, None, :])[:, *upper]
        raw.append(scans.matrices[rows][:, *upper].masked_fill(~there, torch.nan))
    model.train(training)
    first, second, mean = torch.cat(raw).numpy(), torch.cat(decoded).numpy(), centre[upper].numpy()
    return {
        "eval_correlation": float(np.nanmedian(correlation_by_scan(first, second))),
        "eval_deviation": float(np.nanmedian(correlation_by_scan(first - mean, second - mean))),
        "eval_usage": float(used.float().mean()),
    }


def main(argv: list[str]) -> int:
    """Train the stream; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(ConnectomeArguments, argv)
    if arguments.stream != "connectivity":
        raise TrainingError(
            f"stream must be connectivity here, found {arguments.stream!r}. Windows of series are "
            "trained without --stream."
        )
    if arguments.steps < 0 or (arguments.steps and arguments.fit_validation):
        raise TrainingError(
            f"steps = {arguments.steps}: steps are kept where validation says so, which "
            "therefore cannot be fitted. Set fit_validation to false, or steps to 0."
        )
    with begin_run(arguments) as run:
        return train(arguments, run)


def train(arguments: ConnectomeArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    if run.accelerator.num_processes > 1:
        raise TrainingError(
            "The connectivity stream trains on one process: start it without torchrun."
        )
    cohort, split, parts = load_fold(arguments)
    text_domain, table = None, None
    if arguments.text_model:
        text_domain = load_text_side(arguments.text_model)[1]
        table = text_domain.table
    model = build_model(arguments, cohort, table, text_domain)

    fitted = list(parts["train"])
    if arguments.fit_validation:
        fitted += parts["validation"]
    training = matrices_of(cohort, fitted)
    validation = matrices_of(cohort, list(parts["validation"]))
    free = further_scans(cohort, parts, fitted) if arguments.more_scans else []
    more = [matrices_of(cohort, free)] if free else []
    labelled = Matrices(*(torch.cat(part) for part in zip(training, *more, strict=True)))
    more += sub_windows(cohort, fitted, arguments.sub_windows)
    more += [mirrored(training, cohort.coordinates)] if arguments.mirrored else []
    more += other_atlases(arguments.more_cohorts, fitted, training, cohort.coordinates)

    told = target_columns(cohort.participants.loc[[*fitted, *free]], arguments.targets)
    if len(told) > model.config.num_directions:
        raise TrainingError(
            f"targets: expected at most num_directions = {model.config.num_directions} patterns, "
            f"found {len(told)}: {', '.join(name for name, _ in told)}. Raise num_directions."
        )

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_scans": len(fitted),
        "more_matrices": sum(len(one.matrices) for one in more),
        "patterns": [name for name, _ in told],
        "tokens": model.config.num_tokens,
        "text_table": model.config.text_table_sha256,
        "processes": 1,
    }
    run.begin("avq", arguments, facts, model, optimizer)
    log = TrainingLog(run.output, True)
    extra = [torch.cat(part) for part in zip(*more, strict=True)] if more else [None, None]
    dealt = model.start_components(
        training.matrices,
        region_mask=training.region_mask,
        more_matrices=extra[0],
        more_region_mask=extra[1],
        patterns=patterns_of(labelled, told, arguments.target_penalty),
        shrinkage=arguments.shrinkage,
    )
    model.start_codebook(
        dealt,
        arguments.kmeans_iterations,
        arguments.kmeans_draws,
        seed=arguments.seed,
        flip_sign=arguments.flip_sign,
    )
    del dealt, extra, more, labelled
    centre = model.components.mean_at(model._coordinates(None, None))[0].clone()
    final = evaluate(model, validation, arguments.batch_size, centre)
    log.write(0, **final)
    if arguments.steps:
        sides = training, validation, centre
        final = refine(arguments, run, model, optimizer, sides, text_domain, log)
    model.cpu().eval()
    with written_whole(run.output) as folder:
        model.save_pretrained(folder)
    write_run_facts(run.output, "avq", arguments, seconds=log.seconds, **facts, **final)
    remove_state(run.output)
    # What was fitted on validation is not judged by it.
    judged = "" if arguments.fit_validation else " on validation"
    print(
        f"Codec in {run.output}: correlation {final['eval_correlation']:.3f}, deviation "
        f"{final['eval_deviation']:.3f}{judged or ' on scans it was fitted on'} "
        f"({model.config.num_tokens} tokens a scan)"
    )
    return 0


def patterns_of(
    scans: Matrices, told: list[tuple[str, np.ndarray]], penalty: float
) -> torch.Tensor | None:
    """What `start_components` is to code finely, (patterns, regions, regions); None for nothing."""
    if not told:
        return None
    regions = scans.matrices.shape[1]
    upper = np.triu_indices(regions, 1)
    there = (scans.region_mask[:, :, None] & scans.region_mask[:, None, :])[:, *upper]
    rows = scans.matrices[:, *upper].masked_fill(~there, torch.nan).numpy()
    square = np.zeros((len(told), regions, regions), np.float32)
    square[:, *upper] = ridge_patterns(rows, told, penalty)
    return torch.from_numpy(square + square.transpose(0, 2, 1))


def build_model(
    arguments: ConnectomeArguments,
    cohort: Cohort,
    table: torch.Tensor | None,
    text_domain: TextDomain | None,
) -> AVQConnectomeModel:
    """An untrained codec for the cohort's atlas and, where given, a language model.

    With the adversary P starts at mean and leading directions of the text that the model reads.
    """
    values = dict(arguments.model)
    if table is not None:
        values["text_width"] = table.shape[1]
    if not arguments.adversary:
        values |= {"domain_weight": 0.0, "moment_weight": 0.0, "energy_weight": 0.0}
    model = AVQConnectomeModel(
        AVQConnectomeConfig(
            atlas=cohort.atlas,
            region_labels=list(cohort.labels),
            region_coordinates=cohort.coordinates.tolist(),
            **values,
        )
    )
    if table is not None and text_domain is not None:
        share = text_domain.share if arguments.adversary else None
        model.set_text_space(table, model_id=arguments.text_model, share=share)
    return model


def refine(
    arguments: ConnectomeArguments,
    run: Run,
    model: AVQConnectomeModel,
    optimizer: torch.optim.Optimizer,
    sides: tuple[Matrices, Matrices, torch.Tensor],
    text_domain: TextDomain | None,
    log: TrainingLog,
) -> dict[str, float]:
    """Gradient steps from the start; the model ends as what validation found best, scores too.

    `sides` are training and validation scans, and what both are judged to deviate from.

    Without text the best has the highest `eval_deviation`. With it the last is kept, for alignment
    is what the steps are for, and validation does not see it.
    """
    device, (training, validation, centre) = run.accelerator.device, sides
    model.to(device).train()
    best = evaluate(model, validation, arguments.batch_size, centre)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    log_every, names = arguments.log_steps, ("reconstruction_loss", "commitment_loss")
    for step in tqdm(range(arguments.steps), desc="train avq", mininterval=2.0):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, arguments.steps
            )
        rng = np.random.default_rng([arguments.seed, step])
        chosen = draw_scans(rng, arguments.batch_size, len(training.matrices))
        batch = {key: value.to(device) for key, value in training.rows(chosen).items()}
        text = None
        if text_domain is not None:
            text = text_domain.draw(arguments.text_batch_size, [arguments.seed, 2, step]).to(device)
        out = model(
            **batch, text_embeddings=text, reversal=reversal_strength(step / arguments.steps)
        )
        if not bool(torch.isfinite(out.loss)):
            raise TrainingError(
                f"step {step}: the loss is not finite. Lower learning_rate, or set steps to 0."
            )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0:
            values = {
                name: getattr(out, name) for name in (*names, "domain_loss", "domain_accuracy")
            }
            log.write(step + 1, loss=out.loss, **values)
        if (step + 1) % arguments.eval_steps == 0 or step + 1 == arguments.steps:
            scores = evaluate(model, validation, arguments.batch_size, centre)
            log.write(step + 1, **scores)
            if text_domain is not None or scores["eval_deviation"] > best["eval_deviation"]:
                best = scores | {"best_step": float(step + 1)}
                kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
