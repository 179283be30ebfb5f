"""`cortexicon train avq CONFIG`: the codec, a vector-quantised autoencoder of windows of scans.

The run in one look: scans are normalised and held in memory; the linear path starts in closed form
from the covariances of many windows; every step draws one window of each of `batch_size` subjects;
for the first `codebook_start` share of the steps (default: none) nothing is quantised, then k-means
places the codebook; from then on codes are straight-through and follow the encoder by EMA. A domain
classifier tells P(code) from real text embeddings all the while, and its reversed gradient grows.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer

from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.modeling.losses_avq import reversal_strength
from cortexicon.modeling.outputs_avq import AVQOutput
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

from .arguments import load_arguments
from .atlases import (
    AtlasScans,
    Turns,
    hash_of_all,
    paired_loss,
    prepare_atlases,
    refused_scans,
)
from .callbacks import (
    Run,
    TrainingLog,
    begin_run,
    learning_rate_at,
    remove_state,
    write_run_facts,
)
from .collators import (
    PreparedScans,
    TextDomain,
    augment,
    draw_windows,
    load_fold,
    load_text_side,
    whole_windows,
)
from .faults import StepGuard, written_whole


@dataclass
class AVQArguments:
    """Arguments of `cortexicon train avq`; training/configs/demo_avq.yaml says what each does."""

    output: str
    cohort: str
    split: str
    text_model: str
    fold: int = 0
    more_cohorts: list = field(default_factory=list)
    paired_decoding: float = 0.0
    model: dict = field(default_factory=dict)
    band_pass: list | None = None
    max_steps: int = 1000
    batch_size: int = 16
    accumulation_steps: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    closed_form_start: bool = True
    component_batches: int = 60
    codebook_start: float = 0.0
    codebook_batches: int = 60
    text_batch_size: int = 1024
    window_jitter: bool = True
    flip_sign: bool = False
    reverse_time: bool = False
    region_dropout: float = 0.0
    adversary: bool = True
    reverse_gradient: bool = True
    codebook_from_text: bool = False
    classifier_rate: float = 0.1
    encoder_rate: float = 0.1
    component_rate: float = 0.03
    eval_windows: int = 256
    log_steps: int = 20
    eval_steps: int = 200
    save_steps: int = 500
    seed: int = 0
    mixed_precision: str = "no"
    cpu: bool = False
    resume: bool = False


def build_model(arguments: AVQArguments, cohort, text_model, text_domain: TextDomain) -> AVQModel:
    """An untrained codec for the cohort's atlas and the language model's embedding table.

    With the adversary P starts at mean and leading directions of the text that the model reads.
    """
    table = text_model.get_input_embeddings().weight
    # This script starts the codebook itself, from the windows of many scans.
    values = {"codebook_start_step": None, **arguments.model}
    if not arguments.adversary:
        values |= {"domain_weight": 0.0, "moment_weight": 0.0, "energy_weight": 0.0}
    config = AVQConfig(
        atlas=cohort.atlas,
        region_labels=list(cohort.labels),
        region_coordinates=cohort.coordinates.tolist(),
        text_width=table.shape[1],
        **values,
    )
    model = AVQModel(config)
    share = text_domain.share if arguments.adversary else None
    model.set_text_space(table, model_id=str(arguments.text_model), share=share)
    return model


@torch.no_grad()
def evaluate(
    model: AVQModel, scans: PreparedScans, batch_size: int, limit: int, device
) -> dict[str, float]:
    """R2 and share of the codebook used on held-out windows.

    R2 is pooled over windows and regions, around 0, which is the scan's own region mean.
    """
    model.eval()
    error = total = 0.0
    used = torch.zeros(model.config.num_codes, dtype=torch.bool)
    for batch in whole_windows(scans, model.config.window_length, batch_size, limit):
        batch = {key: value.to(device) for key, value in batch.items()}
        output = model(**batch)
        mask = batch["region_mask"][:, None]
        error += float(((output.reconstruction - batch["input_values"]).square() * mask).sum())
        total += float((batch["input_values"].square() * mask).sum())
        used[output.codes.flatten().cpu()] = True
    model.train()
    return {"eval_r2": 1 - error / total, "eval_usage": float(used.float().mean())}


def evaluate_atlases(
    model: AVQModel, atlases: list[AtlasScans], batch_size: int, limit: int, device
) -> dict[str, float]:
    """`evaluate` of every atlas; the keys of those after the primary one end in its name."""
    values: dict[str, float] = {}
    for number, one in enumerate(atlases):
        ending = f"_{one.atlas}" if number else ""
        scores = evaluate(model, one.validation, batch_size, limit, device)
        values |= {f"{key}{ending}": value for key, value in scores.items()}
    return values


def domain_gradient_norms(model: AVQModel, out: AVQOutput) -> dict[str, float]:
    """Norms of the gradient of the weighted alignment losses at P and at the encoder.

    Both must be alive, unless `domain_gradient` says otherwise.
    """
    projection = list(model.projection.parameters())
    encoder = [
        *model.components.analysis.parameters(),
        *model.encoder.parameters(),
        *model.encoder_out.parameters(),
    ]
    gradients = torch.autograd.grad(
        model.weighted_alignment(out),
        projection + encoder,
        retain_graph=True,
        allow_unused=True,
    )

    def norm(parts):
        return float(sum(g.square().sum() for g in parts if g is not None) ** 0.5)

    return {
        "domain_grad_norm_projection": norm(gradients[: len(projection)]),
        "domain_grad_norm_encoder": norm(gradients[len(projection) :]),
    }


def parameter_groups(
    model: AVQModel,
    weight_decay: float,
    classifier_rate: float,
    encoder_rate: float = 1.0,
    component_rate: float = 1.0,
) -> list[dict]:
    """Matrices decay; biases, norms, embeddings, the linear path do not; three parts learn slowly.

    NOTE: a classifier that wins early is certain, and a certain one has no gradient to reverse; one
    with large weights reverses gradients that tear the codebook apart. Adam hides the loss's weight
    from it, so its learning rate is held back, and strong decay keeps it smooth.
    The encoder is held back because the codebook has to follow it, and the linear path because it
    starts near its best: at the full rate both lose more in a hundred steps than they ever regain.
    """
    decay, keep = {"weight_decay": weight_decay}, {"weight_decay": 0.0}
    slow = {"classifier": {"rate": classifier_rate, "weight_decay": 1.0}}
    for name in ("components", "token_maps", "token_maps_back"):
        slow[name] = {"rate": component_rate} | keep
    for name in ("encoder", "encoder_in", "encoder_out"):
        slow[name] = {"rate": encoder_rate}
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and "embedding" not in name and name[:10] != "read_code."
        values = {"rate": 1.0} | (decay if plain else keep) | slow.get(name.split(".")[0], {})
        group = groups.setdefault(tuple(values.items()), {"params": []} | values)
        group["params"].append(parameter)
    return list(groups.values())


def text_vectors(model: AVQModel, text_domain: TextDomain, arguments: AVQArguments) -> torch.Tensor:
    """Text embeddings on their leading whitened directions, for a codebook that starts as text."""
    rows = text_domain.draw(4 * model.config.num_codes, [arguments.seed, 4])
    rows = model.text_moments(model.projection.standardize(rows.to(model.device)))
    return rows @ torch.linalg.svd(rows, full_matrices=False)[2][: model.config.code_dim].T


def main(argv: list[str]) -> int:
    """Train the codec; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(AVQArguments, argv)
    with begin_run(arguments, arguments.mixed_precision) as run:
        return train(arguments, run)


def train(arguments: AVQArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process

    # The cohort, its split, and the text side.
    cohort, split, people = load_fold(arguments)
    text_model, text_domain = load_text_side(arguments.text_model)
    text_tokenizer = AutoTokenizer.from_pretrained(arguments.text_model)

    # The model and what prepares its input.
    model = build_model(arguments, cohort, text_model, text_domain)
    if accelerator.device.type == "cpu":  # see modeling/layers_avq.py, eager_attention
        model.set_attn_implementation("eager")
    config = model.config
    extractor = AVQFeatureExtractor(
        sampling_interval=config.sampling_interval,
        window_length=config.window_length,
        patch_length=config.patch_length,
        atlas=cohort.atlas,
        region_labels=config.region_labels,
        region_coordinates=config.region_coordinates,
        band_pass=arguments.band_pass,
    )
    tokenizer = AVQTokenizer.from_text_tokenizer(
        text_tokenizer, config.num_codes, config.num_connectivity_codes
    )
    processor = AVQProcessor(extractor, tokenizer, tokens_per_window=config.tokens_per_window)
    atlases = prepare_atlases(cohort, arguments.more_cohorts, people, extractor, not main_process)
    turns = Turns(atlases, arguments.seed, arguments.paired_decoding > 0)

    optimizer = torch.optim.AdamW(
        parameter_groups(
            model,
            arguments.weight_decay,
            arguments.classifier_rate,
            arguments.encoder_rate,
            arguments.component_rate,
        ),
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "more_cohorts_hash": hash_of_all([one.content_hash for one in atlases[1:]]),
        "atlases": {one.atlas: len(one.training) for one in atlases},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_scans": len(atlases[0].training),
        "refused_scans": refused_scans(atlases),
        "tokens_per_window": config.tokens_per_window,
        "text_table": config.text_table_sha256,
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("avq", arguments, facts, model, optimizer)
    log = TrainingLog(output, main_process, resumed)
    model, optimizer = accelerator.prepare(model, optimizer)
    raw_model: AVQModel = accelerator.unwrap_model(model)
    model.train()

    def batches_at(stream: int, step: int, parts: int, guard: StepGuard):
        """This process's `parts` batches of a step's common draw.

        With each, the same windows in the regions of other atlases, and whose windows they are.
        """
        while True:
            batches = [
                draw_windows(
                    turns.scans_at(step),
                    config.window_length,
                    arguments.batch_size,
                    [arguments.seed, stream, step, guard.attempt],
                    part * accelerator.num_processes + accelerator.process_index,
                    parts * accelerator.num_processes,
                    guard.excluded,
                    arguments.window_jitter,
                )
                for part in range(parts)
            ]
            if not guard.refuses(batches):
                break
        for part, batch in enumerate(batches):
            scans = batch.pop("scan")
            batch = augment(
                batch,
                [arguments.seed, 3, stream, step, part, accelerator.process_index],
                arguments.flip_sign,
                arguments.reverse_time,
                arguments.region_dropout,
            )
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            yield *turns.own(batch, step), scans

    def guard_at(step: int, place: int) -> StepGuard:
        names = turns.scans_at(place).subject_ids
        return StepGuard(accelerator, step, names, raw_model, run.warned)

    if arguments.closed_form_start and not resumed.step:
        draws = range(max(arguments.component_batches, len(atlases)))
        own = (batches_at(5, k, 1, guard_at(0, k)) for k in draws if turns.at(k) == 0)
        drawn = [batch for one in own for batch in one]
        raw_model.start_components([batch[0] for batch in drawn], [batch[1] for batch in drawn])
    start_step = int(arguments.codebook_start * arguments.max_steps)
    parts = arguments.accumulation_steps
    for step in (bar := run.steps(resumed.step, arguments.max_steps, "train avq")):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        if step == start_step:
            raw_model.start_codebook(
                [
                    batch
                    for k in range(max(arguments.codebook_batches, len(atlases)))
                    for batch, *_ in batches_at(1, k, 1, guard_at(step, k))
                ],
                seed=arguments.seed,
                vectors=text_vectors(raw_model, text_domain, arguments)
                if arguments.codebook_from_text
                else None,
            )
        strength = reversal_strength(step / arguments.max_steps)
        if not arguments.reverse_gradient:  # the control: P is helped to stand apart from text
            strength = -strength
        rate = learning_rate_at(
            step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        logging = (step + 1) % arguments.log_steps == 0 or step + 1 == arguments.max_steps
        guard = guard_at(step, step)
        while not guard.accepted:
            loss = torch.zeros((), device=accelerator.device)
            for part, drawn in enumerate(batches_at(0, step, parts, guard)):
                batch, other_regions, scans_of_batch = drawn
                text = None
                if arguments.adversary:
                    place = part * accelerator.num_processes + accelerator.process_index
                    text = text_domain.draw(
                        arguments.text_batch_size, [arguments.seed, 2, step, place]
                    ).to(accelerator.device)
                # Gradients are exchanged once a step. NOTE: the codebook's statistics are exchanged
                # and updated by every batch, so a later part meets the codebook of the ones before.
                last = part + 1 == parts
                with nullcontext() if last else accelerator.no_sync(model):
                    out = model(**batch, text_embeddings=text, reversal=strength)
                    guard.watch(out.reconstruction, scans_of_batch)
                    norms = (
                        domain_gradient_norms(raw_model, out)
                        if last and logging and arguments.adversary
                        else {}
                    )
                    total, paired = out.loss, None
                    if other_regions:
                        with accelerator.autocast():
                            paired = paired_loss(raw_model, out, batch, other_regions)
                        total = total + arguments.paired_decoding * paired
                    accelerator.backward(total / parts)
                    loss += total.detach() / parts
            gradient = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            guard.judge(loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if logging:
            started = step >= start_step
            log.write(
                step + 1,
                atlas=turns.at(step) if atlases[1:] else None,
                loss=loss,  # the mean of all parts; what follows is the last one's
                reconstruction_loss=out.reconstruction_loss,
                paired_loss=paired,
                commitment_loss=out.commitment_loss if started else None,
                spectrum_loss=out.spectrum_loss,
                connectivity_loss=out.connectivity_loss,
                domain_loss=out.domain_loss,
                domain_accuracy=out.domain_accuracy,
                moment_loss=out.moment_loss,
                energy_loss=out.energy_loss,
                neighbour_loss=out.neighbour_loss,
                reversal_strength=strength if arguments.adversary else None,
                perplexity=out.perplexity if started else None,
                usage=out.usage if started else None,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=gradient,
                **norms,
            )
            bar.set_postfix(mse=f"{out.reconstruction_loss.item():.3f}", refresh=False)
        # Before the codebook starts nothing is quantised, and an R2 would flatter the codec.
        due = (step + 1) % arguments.eval_steps == 0 and step >= start_step
        if due and step + 1 < arguments.max_steps and main_process:
            log.write(
                step + 1,
                **evaluate_atlases(
                    raw_model, atlases, 32, arguments.eval_windows, accelerator.device
                ),
            )
        due = (step + 1) % arguments.save_steps == 0
        if stop := run.end_step(step + 1, due, raw_model, optimizer.optimizer, log.seconds):
            return stop

    accelerator.wait_for_everyone()
    if main_process:
        final = evaluate_atlases(raw_model, atlases, 32, arguments.eval_windows, accelerator.device)
        log.write(arguments.max_steps, **final)
        raw_model.eval()
        with written_whole(output) as folder:
            raw_model.save_pretrained(folder)
            processor.save_pretrained(folder)
        write_run_facts(output, "avq", arguments, seconds=log.seconds, **facts, **final)
        remove_state(output)
        print(
            f"Codec in {output}: validation R2 {final['eval_r2']:.3f}, "
            f"codebook usage {final['eval_usage']:.0%} ({config.tokens_per_window} tokens "
            f"per {config.window_length * config.sampling_interval:g} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
