"""`cortexicon align CHECKPOINT LM`: a trained codec, fitted to another language model.

The run in one look: encoder, codebook, codes and the body of the decoder stay as they are. Anew
come P, the linear map by which the decoder reads P's output, and the domain classifier. They start
in closed form: P's former output, turned and stretched so that its mean and covariance are those of
the new embedding table, and a read-in that undoes it, so that the decoder hears the same as before.
From there they are trained as in `train avq`: reconstruction through the frozen decoder, against
the domain classifier.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cortexicon.inference import load_checkpoint
from cortexicon.modeling import AVQModel
from cortexicon.modeling.losses_avq import reversal_strength
from cortexicon.tokenization import AVQProcessor, AVQTokenizer

from .arguments import TrainingError
from .avq import evaluate, parameter_groups
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
    draw_windows,
    load_fold,
    prepare_scans,
    whole_windows,
)
from .corpus import local_corpus
from .faults import written_whole

# What belongs to the text space; every other weight stays, bit for bit.
NEW_PARTS = ("projection.", "read_code.", "classifier.", "text_moments.")


@dataclass
class AlignArguments:
    """Arguments of `cortexicon align`.

    `text_files` are paths or glob patterns of text in which the language model's tokens are
    counted, where its folder holds no counts; `sentences` and `max_characters` as in `train text`.
    """

    output: str
    checkpoint: str
    language_model: str
    cohort: str
    split: str
    fold: int = 0
    text_files: list = field(default_factory=list)
    max_characters: int = 1_500_000
    sentences: int = 8000
    max_steps: int = 300
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 20
    text_batch_size: int = 1024
    classifier_rate: float = 0.1
    eval_windows: int = 256
    log_steps: int = 20
    save_steps: int = 100
    seed: int = 0
    cpu: bool = False
    resume: bool = False


def align(arguments: AlignArguments) -> int:
    """Fit a codec to another language model; the exit code."""
    with begin_run(arguments) as run:
        return train(arguments, run)


def train(arguments: AlignArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process

    # The codec, the language model, and scans of the training and the validation part.
    checkpoint = load_checkpoint(arguments.checkpoint)
    if checkpoint.model_type != "avq":
        raise TrainingError(
            f"{arguments.checkpoint}: expected a codec (model_type 'avq'), found "
            f"{checkpoint.model_type!r}. Give the folder of the codec that it was made from."
        )
    if checkpoint.codec.dtype != torch.float32:
        raise TrainingError(
            f"{arguments.checkpoint}: expected float32 weights, found {checkpoint.codec.dtype}. "
            "Give the checkpoint as training left it."
        )
    before, extractor = checkpoint.codec, checkpoint.processor.feature_extractor
    text_tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    text_model = AutoModelForCausalLM.from_pretrained(arguments.language_model, dtype=torch.float32)
    table = text_model.get_input_embeddings().weight.detach()
    counts = token_counts(arguments, len(table), text_tokenizer)
    text_domain = TextDomain(table, counts)
    cohort, split, parts = load_fold(arguments)
    scans, validation = (
        prepare_scans(cohort, extractor, parts[part], name, quiet=not main_process)
        for part, name in (("train", "training"), ("validation", "validation"))
    )

    # The same codec in the new text space, and how it stands before any training.
    code_counts = count_codes(before, scans, arguments.batch_size)
    model = move_to_text_space(
        before, table, text_domain.share, code_counts, arguments.language_model
    )
    kept = {name: value.clone() for name, value in model.state_dict().items() if not _is_new(name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_new(name))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay, arguments.classifier_rate),
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    limit = arguments.eval_windows
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "codebook": before.codebook_fingerprint(),
        "text_table": model.config.text_table_sha256,
        "former_text_table": before.config.text_table_sha256,
        "training_scans": len(scans),
        "refused_scans": {**scans.refused, **validation.refused},
        "processes": accelerator.num_processes,
        "r2_before": evaluate(before, validation, 32, limit, "cpu")["eval_r2"],
        "r2_at_start": evaluate(model, validation, 32, limit, "cpu")["eval_r2"],
    }
    resumed = run.begin("align", arguments, facts, model, optimizer)
    log = TrainingLog(output, main_process, resumed)
    model, optimizer = accelerator.prepare(model, optimizer)
    raw_model: AVQModel = accelerator.unwrap_model(model)

    for step in (bar := run.steps(resumed.step, arguments.max_steps, "align")):
        # NOTE: evaluation mode, although P learns: the codebook must not follow, nor regions drop
        # out; gradients pass P all the same.
        model.eval()
        batch = draw_windows(
            scans,
            raw_model.config.window_length,
            arguments.batch_size,
            [arguments.seed, 0, step],
            accelerator.process_index,
            accelerator.num_processes,
        )
        batch.pop("scan")
        text = text_domain.draw(
            arguments.text_batch_size, [arguments.seed, 2, step, accelerator.process_index]
        )
        strength = reversal_strength(step / arguments.max_steps)
        rate = learning_rate_at(
            step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        out = model(
            **{key: value.to(accelerator.device) for key, value in batch.items()},
            text_embeddings=text.to(accelerator.device),
            reversal=strength,
        )
        accelerator.backward(out.loss)
        gradient = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(gradient):
            raise TrainingError(
                f"The gradient is not finite at step {step + 1}. Lower learning_rate."
            )
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % arguments.log_steps == 0 or step + 1 == arguments.max_steps:
            log.write(
                step + 1,
                loss=out.loss,
                reconstruction_loss=out.reconstruction_loss,
                domain_loss=out.domain_loss,
                domain_accuracy=out.domain_accuracy,
                moment_loss=out.moment_loss,
                energy_loss=out.energy_loss,
                neighbour_loss=out.neighbour_loss,
                reversal_strength=strength,
                lr=rate,
                grad_norm=gradient,
            )
            bar.set_postfix(mse=f"{out.reconstruction_loss.item():.3f}", refresh=False)
        due = (step + 1) % arguments.save_steps == 0
        if stop := run.end_step(step + 1, due, raw_model, optimizer.optimizer, log.seconds):
            return stop

    accelerator.wait_for_everyone()
    if main_process:
        raw_model.to("cpu")
        now = raw_model.state_dict()
        changed = [name for name, value in kept.items() if not torch.equal(now[name], value)]
        assert not changed, f"alignment changed {changed}"
        final = evaluate(raw_model, validation, 32, limit, "cpu")
        raw_model.eval()
        log.write(arguments.max_steps, **final)
        tokenizer = AVQTokenizer.from_text_tokenizer(
            text_tokenizer, raw_model.config.num_codes, raw_model.config.num_connectivity_codes
        )
        processor = AVQProcessor(
            extractor, tokenizer, tokens_per_window=checkpoint.processor.tokens_per_window
        )
        with written_whole(output) as folder:
            raw_model.save_pretrained(folder)
            processor.save_pretrained(folder)
        save_file({"counts": counts}, output / "token_counts.safetensors")
        write_run_facts(output, "align", arguments, seconds=log.seconds, **facts, **final)
        remove_state(output)
        print(
            f"Codec for {arguments.language_model} in {output}: validation R2 "
            f"{facts['r2_before']:.3f} before, {final['eval_r2']:.3f} now; codes unchanged"
        )
    return 0


def token_counts(arguments: AlignArguments, rows: int, tokenizer: Any) -> torch.Tensor:
    """How often each row of the embedding table occurs in text, int64 (rows,).

    As `train text` counted them beside the language model, or else counted now, in the same local
    text and in `text_files`.
    """
    path = Path(arguments.language_model) / "token_counts.safetensors"
    if path.is_file():
        return load_file(path)["counts"]
    documents, _ = local_corpus(
        arguments.text_files, arguments.max_characters, arguments.sentences, arguments.seed
    )
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for document in encoded for token in document])
    if int(ids.max()) >= rows:
        raise TrainingError(
            f"{arguments.language_model}: expected a tokenizer of at most {rows} tokens, the rows "
            f"of the embedding table, found id {int(ids.max())}. Are both of one model?"
        )
    return torch.bincount(ids, minlength=rows)


@torch.no_grad()
def count_codes(codec: AVQModel, scans: PreparedScans, batch_size: int) -> torch.Tensor:
    """Occurrences of each code in the whole windows of `scans`, int64 (codes,)."""
    counts = torch.zeros(codec.config.num_codes, dtype=torch.int64)
    for batch in whole_windows(scans, codec.config.window_length, batch_size):
        output: Any = codec.encode(**batch, codes_only=True)
        counts += torch.bincount(output.codes[output.token_mask], minlength=len(counts))
    return counts


def move_to_text_space(
    codec: AVQModel,
    table: torch.Tensor,
    text_share: torch.Tensor,
    code_counts: torch.Tensor,
    model_id: str,
) -> AVQModel:
    """The codec in another language model's text space, its codes and what decodes them unchanged.

    Parameters
    ----------
    codec : AVQModel
    table : float32, shape (types, width)
        The other model's input embeddings; `width` may differ from the codec's.
    text_share : float64, shape (types,)
        Frequencies of types in real text, sum 1.
    code_counts : int64, shape (codes,)
        Occurrences of codes in scans.
    model_id : str

    Returns
    -------
    AVQModel
        In evaluation mode.
    """
    config = copy.deepcopy(codec.config)
    config.text_width = table.shape[1]
    config.domain_gradient = "both"  # of what it reaches, P alone still learns
    model = AVQModel(config)
    model.load_state_dict(
        {name: value for name, value in codec.state_dict().items() if not _is_new(name)},
        strict=False,
    )
    model.set_text_space(table, model_id, text_share)
    match_moments(codec, model, table, text_share, code_counts)
    return model.eval()


@torch.no_grad()
def match_moments(
    codec: AVQModel,
    model: AVQModel,
    table: torch.Tensor,
    text_share: torch.Tensor,
    code_counts: torch.Tensor,
) -> None:
    """Start `model`'s P and read-in: mean and covariance of text, and what `codec`'s decoder heard.

    With z the output of `codec`'s P and h = W z + v what its decoder reads, let y be z whitened,
    its directions in the order of their effect on h. The new output is the text's mean plus y along
    the text's principal components, at their SDs. The new read-in maps it back to h: exactly, where
    the width is no smaller than the rank of z; otherwise the directions of least effect are lost.
    """
    old, new = codec.projection, model.projection
    z = old.standardize(codec.project_codebook()).double()  # (codes, old width)
    z_mean, z_values, z_vectors = _moments(z, code_counts)
    kept = z_values > 1e-8 * z_values[0]
    spread = z_vectors[:, kept] * z_values[kept].sqrt()  # (old width, rank): y -> z
    whiten = (z_vectors[:, kept] / z_values[kept].sqrt()).T  # (rank, old width): z -> y
    # The decoder reads whitened embeddings, see AVQModel._decode.
    read = codec.read_code.weight.double() @ codec.text_moments.whitening.double()
    offset = codec.read_code.bias.double() - read @ codec.text_moments.mean.double()
    # Directions without effect follow: the decoder is deaf to them, but text fills them.
    effect, strength, turn = torch.linalg.svd(read @ spread)
    count = min(len(turn), table.shape[1])
    heard = min(len(strength), count)
    effect, strength, turn = effect[:, :heard], strength[:heard], turn[:count]

    text = new.standardize(table).double()
    text_mean, text_values, text_vectors = _moments(text, text_share)
    scale = text_values[:count].clamp(min=1e-6 * text_values[0]).sqrt()
    along = text_vectors[:, :count]  # (new width, count)
    carry = (along * scale) @ turn @ whiten  # (new width, old width)
    back = (effect * strength / scale[:heard]) @ along[:, :heard].T  # (hidden, new width)

    new.linear.weight.copy_(carry @ old.linear.weight.double())
    new.linear.bias.copy_(carry @ (old.linear.bias + old.down.bias - z_mean) + text_mean)
    new.up.load_state_dict(old.up.state_dict())
    new.code_mean.copy_(old.code_mean)
    new.code_scale.copy_(old.code_scale)
    new.down.weight.copy_(carry @ old.down.weight.double())
    new.down.bias.zero_()
    whitening, mean = model.text_moments.whitening.double(), model.text_moments.mean.double()
    model.read_code.weight.copy_(torch.linalg.solve(whitening, back.T).T)
    model.read_code.bias.copy_(offset + read @ z_mean + back @ (mean - text_mean))


def _moments(
    rows: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted mean (width,), and principal variances (width,) and axes in columns, descending."""
    share = weights.double() / weights.sum()
    mean = share @ rows
    values, vectors = torch.linalg.eigh(((rows - mean) * share[:, None]).T @ (rows - mean))
    return mean, values.flip(0).clamp(min=0), vectors.flip(1)


def _is_new(name: str) -> bool:
    return name.startswith(NEW_PARTS)
