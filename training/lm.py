"""`cortexicon train lm CONFIG`: a language model that reads codes and answers about the scan.

The run in one look: codec and language model are joined over one vocabulary; all windows of the
training scans are encoded once; every step takes one prompt of `windows_per_prompt` windows from
each of `batch_size` subjects and asks every clinical target of it. Validation subjects choose the
checkpoint that is kept and the readout of each number.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from cortexicon.inference import load_connectome
from cortexicon.inference.answers import scan_arguments
from cortexicon.inference.predict import encode_prompts, encoded_matrices, scan_matrix
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQProcessor, AVQTokenizer

from .arguments import TrainingError, load_arguments
from .callbacks import (
    Run,
    TrainingLog,
    begin_run,
    learning_rate_at,
    remove_state,
    write_run_facts,
)
from .collators import draw_scans, load_fold, prepare_scans
from .connectome_sources import further_scans
from .faults import StepGuard, written_whole
from .lm_loss import StepLoss
from .lm_readouts import choose_readouts, class_weights, start_heads, validate
from .lm_stages import SideLosses, descriptions_of
from .lm_start import (
    EncodedWindows,
    encode_windows,
    merged,
    patterns_of_all,
    search_leaks,
    start_summary,
    take_language_model,
    with_fresh_blocks,
    with_lora,
)
from .prompts import Answer, RowBuilder, checked_targets
from .scan_patterns import summary_columns
from .stages import wordings_of
from .teacher import AnswerTeacher


@dataclass
class LMArguments:
    """Arguments of `cortexicon train lm`; see training/configs/demo_lm.yaml for what each does."""

    output: str
    cohort: str
    split: str
    avq: str
    text_model: str
    targets: list
    connectome: str = ""
    fmri_input: str = "codes"
    summary_patterns: bool = False
    teacher: bool = False
    lora_rank: int = 0
    fresh_language_model: bool = False
    answer_heads: bool = False
    head_weight: float = 1.0
    class_weight: float = 1.0
    balance_classes: bool = False
    keep: str = "best"
    start: str = ""
    answer_weight: float = 1.0
    code_weight: float = 0.0
    masked_weight: float = 0.0
    description_weight: float = 0.0
    text_weight: float = 0.0
    text_files: list = field(default_factory=list)
    max_characters: int = 700_000
    sentences: int = 8000
    text_length: int = 128
    text_batch_size: int = 0
    text_first_share: float = 0.5
    paraphrases: bool = False
    fold: int = 0
    more_scans: bool = False
    windows_per_prompt: int = 1
    prompts_per_scan: int = 2
    window_stride: int = 10
    number_sd: float = 3.0
    token_dropout: float = 0.1
    train_code_rows: bool = False
    max_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    warmup_steps: int = 50
    log_steps: int = 20
    eval_steps: int = 100
    save_steps: int = 500
    seed: int = 0
    cpu: bool = False
    resume: bool = False


def build_model(
    arguments: LMArguments, targets, num_patterns: int = 0
) -> tuple[AVQLMForConditionalGeneration, AVQProcessor]:
    """Codecs and language model in one, and the processor of all.

    `num_patterns` is what a `ScanSummary` holds; 0: there is none.
    """
    codec = AVQModel.from_pretrained(arguments.avq)
    processor = AVQProcessor.from_pretrained(arguments.avq)
    connectome = None
    if arguments.connectome:
        connectome = load_connectome(arguments.connectome)
        processor = AVQProcessor(
            processor.feature_extractor,
            AVQTokenizer.from_text_tokenizer(
                AutoTokenizer.from_pretrained(arguments.text_model),
                codec.config.num_codes,
                connectome.config.num_codes,
            ),
            codec.config.tokens_per_window if arguments.windows_per_prompt else None,
            connectome.config.num_tokens,
        )
    language_model = AutoModelForCausalLM.from_pretrained(arguments.text_model, dtype=torch.float32)
    if arguments.fresh_language_model:
        language_model = with_fresh_blocks(language_model)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if arguments.dropout and name in language_model.config.to_dict():
            setattr(language_model.config, name, arguments.dropout)
    model = AVQLMForConditionalGeneration.from_avq_and_lm(
        codec,
        language_model,
        processor.tokenizer,
        connectome,
        windows_per_prompt=arguments.windows_per_prompt,
        prompts_per_scan=arguments.prompts_per_scan,
        targets=targets,
        fmri_input=arguments.fmri_input,
        summary_patterns=num_patterns,
        answer_heads=arguments.answer_heads,
    )
    if arguments.start:
        take_language_model(model, arguments.start)
    needed = arguments.windows_per_prompt * (codec.config.tokens_per_window + 1) + 64
    needed += 0 if connectome is None else connectome.config.num_tokens + 2
    available = getattr(language_model.config, "max_position_embeddings", needed)
    if needed > available:
        raise TrainingError(
            f"A prompt of {arguments.windows_per_prompt} windows needs about {needed} positions, "
            f"the language model has {available}. "
            "Lower windows_per_prompt, or train the text model with more positions."
        )
    return model, processor


def _question(target, rng: np.random.Generator, paraphrases: bool) -> str:
    """The target's own question, or any of its wordings that are not held out."""
    return str(rng.choice(wordings_of(target)[0])) if paraphrases else target["question"]


def main(argv: list[str]) -> int:
    """Train the language model; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(LMArguments, argv)
    with begin_run(arguments) as run:
        return train(arguments, run)


def train(arguments: LMArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process

    cohort, split, parts = load_fold(arguments)
    if not arguments.targets:
        raise TrainingError("targets is empty: name at least one column to answer.")
    if arguments.keep not in ("best", "last"):
        raise TrainingError(f"keep must be 'best' or 'last', found {arguments.keep!r}.")
    if not arguments.windows_per_prompt and not arguments.connectome:
        raise TrainingError(
            "windows_per_prompt is 0 and no connectome is named: prompts would hold no scan."
        )
    if not (Path(arguments.avq) / "model.safetensors").is_file():
        raise TrainingError(
            f"{arguments.avq} holds no trained codec. Train it first: cortexicon train avq CONFIG."
        )
    if arguments.more_scans:
        more = further_scans(cohort, parts, parts["train"])
        parts = {**parts, "train": [*parts["train"], *more]}
    people = cohort.participants
    used = people.loc[parts["train"] + parts["validation"]]
    targets = checked_targets(arguments.targets, used)
    columns = []
    if arguments.summary_patterns:
        columns = summary_columns(used, targets)
    model, processor = build_model(arguments, targets, len(columns))
    extractor, codec = processor.feature_extractor, model.to(accelerator.device).avq

    # Every code that training will need, computed once.
    scans = prepare_scans(cohort, extractor, parts["train"], "training", quiet=not main_process)
    windows = EncodedWindows(np.zeros((0, 0), np.int64), [np.zeros(0, np.int64)] * len(scans))
    if arguments.windows_per_prompt:
        windows = encode_windows(model, scans, arguments.window_stride, quiet=not main_process)
    matrices = None
    if model.connectome is not None:
        whole = [
            scan_matrix(extractor, cohort.series(subject))
            for subject in tqdm(scans.subject_ids, "connectivity", disable=not main_process)
        ]
        matrices = list(encoded_matrices(model, extractor, whole))
    validation = encode_prompts(
        model,
        extractor,
        cohort,
        parts["validation"],
        arguments.prompts_per_scan,
        arguments.windows_per_prompt,
        quiet=not main_process,
    )
    search_leaks(processor, scans, windows, matrices, targets, people, arguments)
    rows = RowBuilder(processor, arguments.number_sd)

    def drawn_windows(scan: int, rng: np.random.Generator) -> np.ndarray:
        """Codes (windows, tokens) of as many windows of a scan as a prompt holds."""
        return windows.codes[rng.choice(windows.of_scan[scan], arguments.windows_per_prompt)]

    descriptions: list[list[str]] = []
    if arguments.description_weight:
        descriptions = descriptions_of(cohort, scans.subject_ids)
    side = SideLosses(arguments, processor, drawn_windows, matrices, descriptions)
    fit = everyone = None
    if model.summary is not None:
        fit, everyone = start_summary(
            model, scans.subject_ids, matrices, validation, used, targets, arguments.seed
        )
    teacher = None
    if arguments.teacher:
        if fit is None:
            raise TrainingError(
                "teacher: true needs summary_patterns: true, whose scores it reads."
            )
        teacher = AnswerTeacher(
            fit.scores.numpy(),
            people.loc[scans.subject_ids],
            targets,
            balanced=arguments.balance_classes,
        )
    if model.heads is not None:
        start_heads(model, people.loc[scans.subject_ids])
    embedding = model.get_input_embeddings().weight
    adapted = with_lora(model, arguments.lora_rank) if arguments.lora_rank else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = [model.block("fmri")] + ([] if matrices is None else [model.block("fc")])
    if not arguments.train_code_rows and embedding.requires_grad:
        # The rows of codes stay P(codebook): most codes are too rare to learn a row from a few
        # hundred scans.

        def keep_code_rows(gradient):
            gradient = gradient.clone()
            for first, count in blocks:
                gradient[first : first + count] = 0
            return gradient

        embedding.register_hook(keep_code_rows)
    decayed = [p for p in trained if p.ndim > 1 and p is not embedding]
    others = [p for p in trained if p.ndim <= 1 or p is embedding]
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
        "codebook": codec.codebook_fingerprint(),
        "parameters": sum(p.numel() for p in model.language_model.parameters()),
        "training_scans": len(scans),
        "training_windows": len(windows.codes),
        "refused_scans": {**scans.refused, **validation.skipped},
        "targets": targets,
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("lm", arguments, facts, model, optimizer)
    log = TrainingLog(output, main_process, resumed)
    primary = (
        f"eval_mae_{targets[0]['name']}"
        if targets[0]["kind"] == "number"
        else f"eval_error_{targets[0]['name']}"
    )
    best = best_so_far(log.path, primary) if resumed.step else float("inf")
    step_loss = StepLoss(model, side, arguments.answer_weight, arguments.head_weight)
    step_loss, optimizer = accelerator.prepare(step_loss, optimizer)
    raw_model: AVQLMForConditionalGeneration = accelerator.unwrap_model(step_loss).model
    before = side.perplexity(raw_model) if "text" in side.weights else 0.0
    step_loss.train()
    placeholder = processor.tokenizer.fmri_token_id
    weights = class_weights(
        people.loc[scans.subject_ids],
        targets,
        arguments.class_weight,
        arguments.balance_classes and teacher is None,  # a teacher has balanced them already
    )

    def batch_at(step: int, attempt: int, excluded: set[int]):
        """Rows of one step: different subjects, random windows of each, every target."""
        rng = np.random.default_rng([arguments.seed, step, attempt])
        wanted = arguments.batch_size * accelerator.num_processes
        chosen = draw_scans(rng, wanted, len(scans), excluded)
        codes, answers = [], []
        for scan in chosen:
            codes.append(drawn_windows(scan, rng))
            subject = scans.subject_ids[scan]
            asked = [
                Answer(
                    _question(target, rng, arguments.paraphrases),
                    target,
                    people.at[subject, target["name"]],
                    weights.get((target["name"], str(people.at[subject, target["name"]])), 1.0),
                    None if teacher is None else teacher.shares(scan, target),
                )
                for target in targets
                if people[target["name"]].notna()[subject]
            ]
            answers.append(asked)
        mine = slice(
            accelerator.process_index * arguments.batch_size,
            (accelerator.process_index + 1) * arguments.batch_size,
        )
        more = None if matrices is None else [matrices[scan] for scan in chosen[mine]]
        batch = rows.batch(codes[mine], answers[mine], more)
        batch["scan"] = chosen[mine]
        batch["asked"] = [answer for asked in answers[mine] for answer in asked]
        batch["latents"] = scan_arguments(
            np.stack(codes[mine]), None if more is None else np.stack(more)
        )
        if fit is not None:
            batch["latents"]["connectivity_scores"] = fit.scores[torch.from_numpy(chosen[mine])]
        # Some codes are hidden, so that no single code can be learned by heart as somebody's.
        ids = batch["input_ids"]
        is_code = torch.zeros_like(ids, dtype=torch.bool)
        for first, count in blocks:
            is_code |= (ids >= first) & (ids < first + count)
        hidden = torch.from_numpy(rng.random(ids.shape)) < arguments.token_dropout
        batch["input_ids"] = ids.masked_fill(is_code & hidden, placeholder)
        return batch

    for step in (bar := run.steps(resumed.step, arguments.max_steps, "train lm")):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
            )
        guard = StepGuard(accelerator, step, scans.subject_ids, warned=run.warned)
        while not guard.accepted:
            batch = batch_at(step, guard.attempt, guard.excluded)
            drawn = [arguments.seed, step, guard.attempt, 1 + accelerator.process_index]
            loss, logits = step_loss(batch, drawn)
            guard.watch(logits, batch["scan"])
            accelerator.backward(loss)
            gradient = accelerator.clip_grad_norm_(trained, 1.0)
            guard.judge(loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % arguments.log_steps == 0 or step + 1 == arguments.max_steps:
            log.write(step + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=gradient)
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if (
            (step + 1) % arguments.eval_steps == 0 or step + 1 == arguments.max_steps
        ) and main_process:
            scores = validate(raw_model, processor, validation, people, targets, 32)
            if "text" in side.weights:
                scores["eval_text_perplexity"] = side.perplexity(raw_model)
                scores["text_perplexity_before"] = before
            if "code" in side.weights:
                scores |= side.code_scores(raw_model, validation, windows.codes)
            log.write(step + 1, **scores)
            last = step + 1 == arguments.max_steps
            if last if arguments.keep == "last" else scores[primary] < best:
                best = scores[primary]
                choose_readouts(raw_model, scores)
                with written_whole(output) as folder, patterns_of_all(raw_model, fit, everyone):
                    merged(raw_model, adapted).save_pretrained(folder)
        due = (step + 1) % arguments.save_steps == 0
        if stop := run.end_step(step + 1, due, raw_model, optimizer.optimizer, log.seconds):
            return stop

    accelerator.wait_for_everyone()
    if main_process and best == float("inf"):
        raise TrainingError(
            f"No checkpoint was kept: no validation subject has a value of {targets[0]['name']}."
        )
    if main_process:
        with written_whole(output) as folder:
            processor.save_pretrained(folder)
        write_run_facts(
            output, "lm", arguments, seconds=log.seconds, **facts, **{f"best_{primary}": best}
        )
        remove_state(output)
        print(
            f"Language model in {output}: "
            f"best {primary.removeprefix('eval_')} on validation subjects {best:.2f}"
        )
    return 0


def best_so_far(path: Path, key: str) -> float:
    """The smallest value of `key` in a training log."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return min((line[key] for line in lines if key in line), default=float("inf"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
