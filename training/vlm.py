"""`cortexicon train vlm CONFIG`: a vision-language model looks at scans drawn as images.

The run in one look: every window of a scan is one picture, the same number of samples for all;
every step asks one clinical target about one window of each of `batch_size` training scans, and a
LoRA adapter of the language half learns the answers (the vision half stays as published). Targets,
splits, labels and readouts are those of the shared-vocabulary language model.

`--tiny` takes a random model of the same classes instead: the whole path in minutes, without a
network, and nothing that could be compared with the published model.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import networks_of, render_scan
from cortexicon.inference.grammar import Answers, joined_answers, pooled_answers
from cortexicon.inference.image_questions import FAMILIES, ImageQuestions, ScanImage, on_device
from cortexicon.inference.predict import window_starts
from cortexicon.tokenization import AVQFeatureExtractor

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
from .collators import PreparedScans, draw_scans, load_fold, prepare_scans
from .faults import StepGuard, written_whole
from .prompts import answer_loss, checked_targets
from .vlm_models import TrainedParts, load_base, plan, shard_frozen, with_lora

CONTROLS = ("none", "permuted_labels", "other_subject", "blank_image", "text_only")


@dataclass
class VLMArguments:
    """Arguments of `cortexicon train vlm`; training/configs/vlm_*.yaml say what each does."""

    output: str
    cohort: str
    split: str
    family: str
    targets: list
    model_id: str = ""
    architecture: str = ""
    tiny: bool = False
    system: str = ""
    fold: int = 0
    control: str = "none"
    predictions: str = ""
    cost: str = ""
    image_kind: str = "both"
    image_size: list = field(default_factory=lambda: [448, 448])
    palette: str = "gray"
    sampling_interval: float = 2.0
    window_length: int = 80
    prompts_per_scan: int = 2
    lora: dict = field(default_factory=dict)
    quantize: str = "no"
    shard: bool = False
    activation_checkpointing: bool = True
    number_sd: float = 2.0
    max_steps: int = 300
    batch_size: int = 8
    accumulation_steps: int = 1
    eval_batch_size: int = 16
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 20
    log_steps: int = 10
    save_steps: int = 100
    seed: int = 0
    cpu: bool = False
    resume: bool = False
    plan: bool = False


def main(argv: list[str]) -> int:
    """Train an adapter; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(VLMArguments, argv)
    for name, allowed in (
        ("family", FAMILIES),
        ("control", CONTROLS),
        ("quantize", ("no", "nf4")),
    ):
        if getattr(arguments, name) not in allowed:
            raise TrainingError(
                f"{name} must be one of {', '.join(allowed)}, found {getattr(arguments, name)!r}."
            )
    if not (arguments.tiny or arguments.model_id or arguments.plan):
        raise TrainingError(
            "model_id is empty: name a model of the Hub or a folder, or train a tiny random one "
            "(--tiny)."
        )
    if arguments.plan:
        return show_plan(arguments)
    if arguments.shard and arguments.quantize != "no":
        raise TrainingError("shard and quantize are two ways to the same end: choose one.")
    with begin_run(arguments) as run:
        return train(arguments, run)


def show_plan(arguments: VLMArguments) -> int:
    """Print what the full-size run takes, computed on the meta device; nothing is loaded."""
    if not arguments.architecture:
        raise TrainingError("plan needs the name of an `architecture`.")
    found = plan(arguments.architecture, arguments.lora, arguments.batch_size, tokens=512)
    print(f"{arguments.architecture}: computed, not measured")
    for name, value in found.items():
        unit = "" if name in ("parameters", "trainable") else " GiB"
        print(f"{name:<14}{value:>16,.0f}" if not unit else f"{name:<14}{value:>12,.1f}{unit}")
    return 0


class Pictures:
    """Windows of scans as pictures, all of them of one size and length of time."""

    def __init__(self, image: ScanImage, scans: PreparedScans, networks: list[object] | None):
        self.image = image
        self.scans = scans
        self.networks = networks
        self.place = {subject: k for k, subject in enumerate(scans.subject_ids)}

    def windows(self, subject: str, prompts: int) -> np.ndarray:
        """First samples of `prompts` windows spread evenly over the subject's scan."""
        length = len(self.scans.series[self.place[subject]])
        return window_starts(length, self.image.window_length, prompts, 1).ravel()

    def draw(self, subject: str, start: int) -> np.ndarray:
        """The window that begins at sample `start`, uint8 (height, width, 3)."""
        place = self.place[subject]
        values = self.scans.series[place][start : start + self.image.window_length]
        values = np.where(self.scans.region_masks[place], values, np.nan)
        return render_scan(
            values,
            self.scans.region_coordinates,
            self.networks,
            kind=self.image.kind,
            size=(self.image.size[0], self.image.size[1]),
            palette=self.image.palette,
        )


def prepare_pictures(
    arguments: VLMArguments, cohort: Cohort, subjects: list[str], name: str, quiet: bool
) -> Pictures:
    """Scans of `subjects`, resampled and checked, and how they are drawn."""
    image = ScanImage(
        kind="blank" if arguments.control == "blank_image" else arguments.image_kind,
        size=list(arguments.image_size),
        palette=arguments.palette,
        sampling_interval=arguments.sampling_interval,
        window_length=arguments.window_length,
    )
    extractor = AVQFeatureExtractor(
        sampling_interval=image.sampling_interval,
        window_length=image.window_length,
        patch_length=1,
        atlas=cohort.atlas,
        region_labels=list(cohort.labels),
        region_coordinates=cohort.coordinates.tolist(),
    )
    scans = prepare_scans(cohort, extractor, subjects, name, quiet)
    return Pictures(image, scans, networks_of(cohort.regions))


def ask(
    model: Any,
    questions: ImageQuestions,
    pictures: Pictures,
    targets: list[dict[str, Any]],
    book: AnswerBook,
    prompts: int,
    batch_size: int,
    seen_instead: dict[str, str],
) -> dict[str, Answers]:
    """Answers about every scan of `pictures`, pooled over its windows, by name of the target."""
    subjects = pictures.scans.subject_ids
    chunks: dict[str, list[Answers]] = {target["name"]: [] for target in targets}
    for first in tqdm(range(0, len(subjects), batch_size), "ask", mininterval=2.0, disable=None):
        chunk = subjects[first : first + batch_size]
        shown = [seen_instead.get(subject, subject) for subject in chunk]
        drawn = [
            [pictures.draw(s, pictures.windows(s, prompts)[prompt]) for s in shown]
            for prompt in range(prompts)
        ]
        for target in targets:
            by_prompt = [
                questions.answers(model, chunk, images, target["question"], book.valid(target))
                for images in drawn
            ]
            chunks[target["name"]].append(pooled_answers(by_prompt))
    return {name: joined_answers(parts) for name, parts in chunks.items()}


def train(arguments: VLMArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process
    cohort, split, parts = load_fold(arguments)
    if not arguments.targets:
        raise TrainingError("targets is empty: name at least one column to answer.")
    people = cohort.participants
    targets = checked_targets(arguments.targets, people.loc[parts["train"] + parts["validation"]])
    base, processor = load_base(arguments)
    questions = ImageQuestions(processor, with_image=arguments.control != "text_only")
    book = AnswerBook(questions.answer_ids, arguments.number_sd)
    pictures = prepare_pictures(arguments, cohort, parts["train"], "training", not main_process)
    subjects = pictures.scans.subject_ids
    truth, shown = people, {subject: subject for subject in subjects}
    if arguments.control == "permuted_labels":
        truth = permuted_labels(people, subjects, arguments.seed)
    if arguments.control == "other_subject":
        shown = others_of(subjects, arguments.seed)

    torch.manual_seed(arguments.seed)  # of the adapter
    model = with_lora(base, arguments.lora)
    if arguments.activation_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    saved = TrainedParts(model)
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "training_scans": len(subjects),
        "refused_scans": dict(pictures.scans.refused),
        "targets": targets,
        "tiny": arguments.tiny,
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("vlm", arguments, facts, saved, optimizer)
    log = TrainingLog(output, main_process, resumed)
    sharded = arguments.shard and accelerator.num_processes > 1
    if sharded:
        shard_frozen(model, accelerator.device, accelerator.num_processes)
        wrapped, optimizer = model, accelerator.prepare(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()

    def batch_at(step: int, attempt: int, part: int, excluded: set[int]) -> dict[str, Any]:
        """One target, one window of each of this process's subjects, and the labels."""
        rng = np.random.default_rng([arguments.seed, step, attempt, part])
        target = targets[(step * arguments.accumulation_steps + part) % len(targets)]
        unknown = {k for k, s in enumerate(subjects) if pd.isna(truth.at[s, target["name"]])}
        wanted = arguments.batch_size * accelerator.num_processes
        chosen = draw_scans(rng, wanted, len(subjects), excluded | unknown)
        images, labelled = [], []
        for index in chosen:
            subject = subjects[index]
            seen = shown[subject]
            length = len(pictures.scans.series[pictures.place[seen]])
            start = int(rng.integers(0, length - arguments.window_length + 1))
            images.append((seen, start))
            labelled.append(book.labels(target, truth.at[subject, target["name"]]))
        first = accelerator.process_index * arguments.batch_size
        mine = slice(first, first + arguments.batch_size)
        drawn = [pictures.draw(*image) for image in images[mine]]
        inputs = questions.inputs(drawn, target["question"])
        rows = [reply[:-1] for reply, _ in labelled[mine]]
        longest = max(len(row) for row in rows) + 1
        places = [(k, place) for k, row in enumerate(rows) for place in range(len(row) + 1)]
        return {
            "inputs": {**questions.extended(inputs, rows), "logits_to_keep": longest},
            "places": torch.tensor(places),
            "labels": [share for _, shares in labelled[mine] for share in shares],
            "scan": chosen[mine],
        }

    share = arguments.accumulation_steps
    for step in (bar := run.steps(resumed.step, arguments.max_steps, "train vlm")):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
            )
        guard = StepGuard(accelerator, step, subjects, warned=run.warned)
        while not guard.accepted:
            loss = torch.zeros((), device=accelerator.device)
            for part in range(share):
                batch = batch_at(step, guard.attempt, part, guard.excluded)
                keep = batch["inputs"].pop("logits_to_keep")
                inputs = on_device(batch["inputs"], model)
                logits = wrapped(**inputs, logits_to_keep=keep, use_cache=False).logits
                guard.watch(logits, batch["scan"])
                rows, columns = batch["places"].T
                one = answer_loss(logits[rows, columns], batch["labels"])
                accelerator.backward(one / share)
                loss += one.detach() / share
            if sharded:
                for parameter in trained:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            gradient = accelerator.clip_grad_norm_(trained, 1.0)
            guard.judge(loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % arguments.log_steps == 0 or done == arguments.max_steps:
            log.write(done, loss=loss, grad_norm=gradient, lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        # The last state too: the questions take minutes, and a kill there must not cost the steps.
        due = done % arguments.save_steps == 0 or done == arguments.max_steps
        if stop := run.end_step(done, due, saved, optimizer.optimizer, log.seconds):
            return stop

    # Every process asks, for the layers of a sharded model need them all; the first one writes.
    found, scores = ask_all(arguments, model, questions, cohort, parts, targets, main_process)
    if main_process:
        path = Path(arguments.predictions or output / "predictions.csv")
        tiny = " (tiny random model)" if arguments.tiny else ""
        system = arguments.system or f"VLM {arguments.family}{tiny}"
        every = output / "predictions_readouts.csv"
        write_predictions_of(
            found, targets, people, path, every, system=system, fold=arguments.fold
        )
        shown_tokens = questions.inputs([pictures.draw(subjects[0], 0)], targets[0]["question"])
        tokens = shown_tokens["input_ids"].shape[1] * arguments.prompts_per_scan
        write_cost(arguments.cost, facts["parameters"], tokens)
        save_checkpoint(arguments, output, model, questions, targets, pictures.image)
        log.write(arguments.max_steps, **scores)
        write_run_facts(output, "vlm", arguments, seconds=log.seconds, **facts, **scores)
        remove_state(output)
        name = error_name(targets[0])
        print(
            f"Adapter in {output}: {name.removeprefix('eval_')} on validation subjects "
            f"{scores[name]:.2f}" + (" (a tiny random model)" if arguments.tiny else "")
        )
    accelerator.wait_for_everyone()
    return 0


def ask_all(
    arguments: VLMArguments,
    model: Any,
    questions: ImageQuestions,
    cohort: Cohort,
    parts: dict[str, list[str]],
    targets: list[dict[str, Any]],
    main_process: bool,
) -> tuple[dict[str, dict[str, Answers]], dict[str, float]]:
    """Answers about every held-out scan by part and target, and validation scores.

    Sets the readout of each of `targets` to the one that is best on validation subjects.
    """
    model.eval()
    book = AnswerBook(questions.answer_ids, arguments.number_sd)
    found: dict[str, dict[str, Answers]] = {}
    for part in PREDICTED_PARTS:
        if not parts.get(part):
            continue
        held_out = prepare_pictures(arguments, cohort, parts[part], part, not main_process)
        instead = {}
        if arguments.control == "other_subject":
            instead = others_of(held_out.scans.subject_ids, arguments.seed)
        prompts, size = arguments.prompts_per_scan, arguments.eval_batch_size
        found[part] = ask(model, questions, held_out, targets, book, prompts, size, instead)
    scores = validation_scores(found["validation"], targets, cohort.participants)
    choose_readouts(targets, scores)
    return found, scores


def save_checkpoint(
    arguments: VLMArguments,
    output: Path,
    model: Any,
    questions: ImageQuestions,
    targets: list[dict[str, Any]],
    image: ScanImage,
) -> None:
    """Write what `cortexicon.inference.vlm.load_vlm` reads."""
    with written_whole(output) as folder:
        if arguments.tiny:
            base, _ = load_base(arguments)  # anew: the adapter stands inside the other
            base.save_pretrained(folder / "base")
        model.save_pretrained(folder)
        questions.processor.save_pretrained(folder)
        facts = {
            "family": arguments.family,
            "with_image": questions.with_image,
            "image": dataclasses.asdict(image),
            "targets": targets,
        }
        (folder / "questions.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
