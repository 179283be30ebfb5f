"""`cortexicon train encoder-lm CONFIG`: a language model that reads features of a frozen encoder.

The run in one look: `encoder: avq | mae | vision` says whose features; those of a few windows of
every scan are computed once; every step asks one clinical target about one window of each of
`batch_size` training scans; a projector makes the features a prefix of the prompt, and it and the
language model learn. Targets, splits, labels and readouts are those of the shared-vocabulary model.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cortexicon.cohorts import Cohort
from cortexicon.inference.grammar import Answers, grammar_answers, joined_answers, pooled_answers
from cortexicon.modeling import FMRIPrefixLM

from .answers import (
    PREDICTED_PARTS,
    AnswerBook,
    choose_readouts,
    error_name,
    others_of,
    permuted_labels,
    validation_scores,
    write_cost,
    write_predictions_of,
)
from .arguments import TrainingError, load_arguments
from .callbacks import Run, TrainingLog, begin_run, learning_rate_at, remove_state, write_run_facts
from .collators import draw_scans, load_fold
from .faults import StepGuard, written_whole
from .frozen_encoders import ENCODERS, ScanFeatures, encode_features, load_encoder
from .prompts import answer_loss, checked_targets

CONTROLS = ("none", "permuted_labels", "other_subject", "random_features", "text_only")


@dataclass
class EncoderLMArguments:
    """Arguments of the stage; training/configs/abide_encoder_lm_avq.yaml says what each does."""

    output: str
    cohort: str
    split: str
    encoder: str
    checkpoint: str
    text_model: str
    targets: list
    image: dict = field(default_factory=dict)
    system: str = ""
    fold: int = 0
    control: str = "none"
    predictions: str = ""
    cost: str = ""
    windows_per_scan: int = 4
    prefix_tokens: int = 0
    projector_hidden_size: int = 256
    freeze_language_model: bool = False
    number_sd: float = 2.0
    feature_dropout: float = 0.1
    max_steps: int = 400
    batch_size: int = 32
    eval_batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 40
    log_steps: int = 20
    eval_steps: int = 100
    save_steps: int = 200
    seed: int = 0
    cpu: bool = False
    resume: bool = False


class PrefixQuestions:
    """Text of prompts for one tokenizer; the wording is that of `AVQProcessor`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def prompt_ids(self, question: str) -> list[int]:
        """Ids of the text behind the scan, up to where the answer begins."""
        return self._ids(f"\nQuestion: {question}\nAnswer:")

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of a blank and the answer, then the end-of-text id."""
        return [*self._ids(" " + answer), self.tokenizer.eos_token_id]


@torch.inference_mode()
def ask(
    model: FMRIPrefixLM,
    questions: PrefixQuestions,
    book: AnswerBook,
    features: ScanFeatures,
    targets: list[dict[str, Any]],
    batch_size: int,
    with_prefix: bool,
) -> dict[str, Answers]:
    """Answers about every scan, pooled over its windows, by name of the target."""
    found = {}
    for target in targets:
        prompt = questions.prompt_ids(target["question"])
        chunks = []
        for first in range(0, len(features.subject_ids), batch_size):
            subjects = features.subject_ids[first : first + batch_size]
            block = torch.from_numpy(features.values[first : first + batch_size]).float()
            by_window = []
            for window in range(block.shape[1]):
                prefix = block[:, window].to(model.device) if with_prefix else None
                next_logits = partial(_next_logits, model, prefix, prompt, len(subjects))
                by_window.append(grammar_answers(subjects, next_logits, book.valid(target)))
            chunks.append(pooled_answers(by_window))
        found[target["name"]] = joined_answers(chunks)
    return found


def _next_logits(
    model: FMRIPrefixLM,
    prefix: torch.Tensor | None,
    prompt: list[int],
    rows: int,
    beginning: tuple[int, ...],
) -> torch.Tensor:
    """Logits of the token after `beginning`, (rows, vocabulary)."""
    ids = torch.tensor([prompt + list(beginning)] * rows, device=model.device)
    return model(ids, prefix, logits_to_keep=1, use_cache=False).logits[:, -1]


def controlled(features: ScanFeatures, control: str, seed: int) -> ScanFeatures:
    """The features as the control shows them: somebody else's, or noise of their mean and SD."""
    values = features.values
    if control == "other_subject":
        others = others_of(features.subject_ids, seed)
        place = {subject: k for k, subject in enumerate(features.subject_ids)}
        values = values[[place[others[subject]] for subject in features.subject_ids]]
    elif control == "random_features":
        rng = np.random.default_rng([seed, 19, len(values)])
        mean = values.mean((0, 1), dtype=np.float64)
        spread = values.std((0, 1), dtype=np.float64)
        values = (mean + spread * rng.standard_normal(values.shape)).astype(np.float16)
    return ScanFeatures(features.subject_ids, values, features.refused)


def main(argv: list[str]) -> int:
    """Train projector and language model; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(EncoderLMArguments, argv)
    for name, allowed in (("encoder", ENCODERS), ("control", CONTROLS)):
        if getattr(arguments, name) not in allowed:
            raise TrainingError(
                f"{name} must be one of {', '.join(allowed)}, found {getattr(arguments, name)!r}."
            )
    with begin_run(arguments) as run:
        return train(arguments, run)


def build_model(
    arguments: EncoderLMArguments, targets: list[dict[str, Any]], width: int, count: int
) -> tuple[FMRIPrefixLM, PrefixQuestions]:
    """The language model with an untrained projector for `count` features of `width`."""
    if not (Path(arguments.text_model) / "config.json").is_file() and "/" not in (
        arguments.text_model
    ):
        raise TrainingError(f"{arguments.text_model} is no folder of a language model.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.text_model)
    language_model = AutoModelForCausalLM.from_pretrained(arguments.text_model, dtype=torch.float32)
    model = FMRIPrefixLM.from_language_model(
        language_model,
        encoder=arguments.encoder,
        feature_width=width,
        prefix_tokens=arguments.prefix_tokens,
        projector_hidden_size=arguments.projector_hidden_size,
        windows_per_scan=arguments.windows_per_scan,
        targets=targets,
    )
    needed = (arguments.prefix_tokens or count) + 64
    available = getattr(language_model.config, "max_position_embeddings", needed)
    if needed > available:
        raise TrainingError(
            f"A prompt needs about {needed} positions, the language model has {available}. "
            "Set prefix_tokens, or train the text model with more positions."
        )
    return model, PrefixQuestions(tokenizer)


def train(arguments: EncoderLMArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process
    cohort, split, parts = load_fold(arguments)
    if not arguments.targets:
        raise TrainingError("targets is empty: name at least one column to answer.")
    people = cohort.participants
    targets = checked_targets(arguments.targets, people.loc[parts["train"] + parts["validation"]])
    encoder = load_encoder(
        arguments.encoder, arguments.checkpoint, cohort, accelerator.device, arguments.image
    )

    def features_of(part: str) -> ScanFeatures:
        found = encode_features(
            encoder, cohort, parts[part], arguments.windows_per_scan, part, not main_process
        )
        return controlled(found, arguments.control, arguments.seed)

    training, validation = features_of("train"), features_of("validation")
    subjects = training.subject_ids
    truth = people
    if arguments.control == "permuted_labels":
        truth = permuted_labels(people, subjects, arguments.seed)
    with_prefix = arguments.control != "text_only"

    torch.manual_seed(arguments.seed)  # of the projector
    count, width = training.values.shape[2:]
    model, questions = build_model(arguments, targets, width, count)
    model.language_model.requires_grad_(not arguments.freeze_language_model)
    book = AnswerBook(questions.answer_ids, arguments.number_sd)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    table = model.get_input_embeddings().weight
    decayed = [p for p in trained if p.dim() > 1 and p is not table]
    others = [p for p in trained if p.dim() <= 1 or p is table]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": arguments.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "codebook": encoder.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "features": [count, width],
        "training_scans": len(subjects),
        "refused_scans": {**training.refused, **validation.refused},
        "targets": targets,
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("encoder-lm", arguments, facts, model, optimizer)
    log = TrainingLog(output, main_process, resumed)
    model, optimizer = accelerator.prepare(model, optimizer)
    raw_model: FMRIPrefixLM = accelerator.unwrap_model(model)
    model.train()

    def batch_at(step: int, attempt: int, excluded: set[int]) -> dict[str, Any]:
        """One target, one window of each of this process's subjects, and the labels."""
        rng = np.random.default_rng([arguments.seed, step, attempt])
        target = targets[step % len(targets)]
        unknown = {k for k, s in enumerate(subjects) if pd.isna(truth.at[s, target["name"]])}
        wanted = arguments.batch_size * accelerator.num_processes
        chosen = draw_scans(rng, wanted, len(subjects), excluded | unknown)
        windows = rng.integers(0, training.values.shape[1], wanted)
        first = accelerator.process_index * arguments.batch_size
        mine = slice(first, first + arguments.batch_size)
        chosen, windows = chosen[mine], windows[mine]
        prompt = questions.prompt_ids(target["question"])
        rows, places, labels = [], [], []
        for row, index in enumerate(chosen):
            reply, shares = book.labels(target, truth.at[subjects[index], target["name"]])
            places += [(row, len(prompt) + offset - 1) for offset in range(len(reply))]
            labels += shares
            rows.append(prompt + reply[:-1])
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, text in enumerate(rows):
            ids[row, : len(text)] = torch.tensor(text)
        features = None
        if with_prefix:
            features = torch.from_numpy(training.values[chosen, windows]).float()
            # Some features are hidden, so that none can be learned by heart as somebody's.
            kept = torch.from_numpy(rng.random(features.shape[:2])) >= arguments.feature_dropout
            features = (features * kept[..., None]).to(accelerator.device)
        return {
            "inputs": {"input_ids": ids.to(accelerator.device), "features": features},
            "places": torch.tensor(places),
            "labels": labels,
            "scan": chosen,
        }

    for step in (bar := run.steps(resumed.step, arguments.max_steps, "train encoder-lm")):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
            )
        guard = StepGuard(accelerator, step, subjects, warned=run.warned)
        while not guard.accepted:
            batch = batch_at(step, guard.attempt, guard.excluded)
            length = batch["inputs"]["input_ids"].shape[1]
            logits = model(**batch["inputs"], logits_to_keep=length, use_cache=False).logits
            guard.watch(logits, batch["scan"])
            row, column = batch["places"].T
            loss = answer_loss(logits[row, column], batch["labels"])
            accelerator.backward(loss)
            gradient = accelerator.clip_grad_norm_(trained, 1.0)
            guard.judge(loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % arguments.log_steps == 0 or done == arguments.max_steps:
            log.write(done, loss=loss, grad_norm=gradient, lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if (done % arguments.eval_steps == 0 or done == arguments.max_steps) and main_process:
            raw_model.eval()
            size = arguments.eval_batch_size
            found = ask(raw_model, questions, book, validation, targets, size, with_prefix)
            scores = validation_scores(found, targets, people)
            log.write(done, **scores)
            if scores[error_name(targets[0])] < best_error(output, error_name(targets[0]), done):
                choose_readouts(targets, scores)
                raw_model.config.targets = targets
                with written_whole(output) as folder:
                    raw_model.save_pretrained(folder)
            raw_model.train()
        stop = run.stop_code()
        if stop or done % arguments.save_steps == 0 or done == arguments.max_steps:
            run.save_state(raw_model, optimizer.optimizer, done, log.seconds)
        if stop:
            return run.stop(stop, done)

    accelerator.wait_for_everyone()
    if main_process:
        kept = FMRIPrefixLM.from_pretrained(output).to(accelerator.device).eval()
        finish(arguments, kept, questions, cohort, parts, features_of, with_prefix)
        best = best_error(output, error_name(targets[0]), arguments.max_steps + 1)
        facts |= {"targets": kept.config.targets, f"best_{error_name(targets[0])}": best}
        write_run_facts(output, "encoder-lm", arguments, seconds=log.seconds, **facts)
        tokens = (arguments.prefix_tokens or count) * training.values.shape[1]
        write_cost(arguments.cost, facts["parameters"], tokens if with_prefix else 0)
        remove_state(output)
        print(
            f"Language model in {output}: best {error_name(targets[0]).removeprefix('eval_')} on "
            f"validation subjects {best:.2f}"
        )
    return 0


def best_error(folder: Path, name: str, before: int) -> float:
    """The smallest error in the run's log of steps below `before`; infinite where there is none."""
    lines = pd.read_json(folder / "training_log.jsonl", lines=True)
    if name not in lines:
        return float("inf")
    found = lines.loc[lines["step"] < before, name].min()
    return float("inf") if pd.isna(found) else float(found)


def finish(
    arguments: EncoderLMArguments,
    model: FMRIPrefixLM,
    questions: PrefixQuestions,
    cohort: Cohort,
    parts: dict[str, list[str]],
    features_of: Any,
    with_prefix: bool,
) -> None:
    """Ask about every held-out scan; write predictions and what the checkpoint lacks."""
    output = Path(arguments.output)
    targets = model.config.targets or []
    book = AnswerBook(questions.answer_ids, arguments.number_sd)
    found = {
        part: ask(
            model,
            questions,
            book,
            features_of(part),
            targets,
            arguments.eval_batch_size,
            with_prefix,
        )
        for part in PREDICTED_PARTS
        if parts.get(part)
    }
    name = {"avq": "AVQ", "mae": "masked autoencoder", "vision": "visual encoder"}
    write_predictions_of(
        found,
        targets,
        cohort.participants,
        Path(arguments.predictions or output / "predictions.csv"),
        output / "predictions_readouts.csv",
        system=arguments.system or f"{name[arguments.encoder]} features + GPT-2",
        fold=arguments.fold,
    )
    with written_whole(output) as folder:
        questions.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
