"""`cortexicon train text CONFIG`: the text side, which comes first.

Offline: a byte-level BPE tokenizer and a small GPT-2, trained on local text. With a network: any
causal language model of the Hub (`model_id`). Leaves in `output` the model, its tokenizer, and how
often each token occurs in the corpus (`token_counts.safetensors`): the text domain that the codec
is aligned with.
"""

import hashlib
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from .arguments import TrainingError, load_arguments
from .callbacks import (
    Run,
    TrainingLog,
    begin_run,
    learning_rate_at,
    remove_state,
    write_run_facts,
)
from .corpus import local_corpus
from .faults import StepGuard, written_whole

END = "<|endoftext|>"


@dataclass
class TextArguments:
    """Arguments of `cortexicon train text`; training/configs/demo_text.yaml says what each does."""

    output: str
    model_id: str | None = None
    text_files: list = field(default_factory=list)
    max_characters: int = 1_500_000
    sentences: int = 8000
    vocab_size: int = 4096
    model: dict = field(default_factory=dict)
    max_steps: int = 300
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    log_steps: int = 10
    save_steps: int = 200
    seed: int = 0
    cpu: bool = False
    resume: bool = False


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens with GPT-2's splitting rule."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=END
    )


def main(argv: list[str]) -> int:
    """Run the text stage; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(TextArguments, argv)
    with begin_run(arguments) as run:
        return train(arguments, run)


def train(arguments: TextArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output

    documents, sources = local_corpus(
        arguments.text_files, arguments.max_characters, arguments.sentences, arguments.seed
    )
    if arguments.model_id:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_id)
        model = AutoModelForCausalLM.from_pretrained(arguments.model_id, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(documents, arguments.vocab_size)
        end = tokenizer.eos_token_id
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **arguments.model
            )
        )
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = np.concatenate(
        [tokenizer(text, add_special_tokens=False)["input_ids"] + separator for text in documents]
    ).astype(np.int64)
    if len(ids) <= arguments.sequence_length:
        raise TrainingError(
            f"The corpus holds {len(ids)} tokens, "
            f"fewer than one sequence of {arguments.sequence_length}."
        )
    counts = torch.bincount(
        torch.from_numpy(ids), minlength=model.get_input_embeddings().weight.shape[0]
    )
    held_out = ids[-len(ids) // 20 :]  # the last twentieth: sentences about scans
    ids = ids[: -len(ids) // 20]

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95))
    steps = 0 if arguments.model_id else arguments.max_steps
    facts = {
        "sources": sources,
        "corpus_tokens": len(ids),
        "corpus_hash": hashlib.sha256(ids.tobytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("text", arguments, facts, model, optimizer)
    log = TrainingLog(output, accelerator.is_main_process, resumed)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    table = accelerator.unwrap_model(model).get_input_embeddings().weight

    def windows(source, count, step, attempt=0):
        rng = np.random.default_rng([arguments.seed, step, accelerator.process_index, attempt])
        starts = rng.integers(0, len(source) - arguments.sequence_length, count)
        rows = np.stack([source[s : s + arguments.sequence_length] for s in starts])
        return torch.from_numpy(rows).to(accelerator.device)

    for step in (bar := run.steps(resumed.step, steps, "train text")):
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, steps
            )
        guard = StepGuard(accelerator, step, warned=run.warned)
        while not guard.accepted:
            rows = windows(ids, arguments.batch_size, step, guard.attempt)
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            gradient = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            guard.judge(loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            # Tied rows drift together (the softmax does not see their mean), and behind a large
            # common part a layer norm hides what tells tokens, and later codes, apart. So keep
            # them centred.
            table.sub_(table.mean(0))
        if (step + 1) % arguments.log_steps == 0 or step + 1 == steps:
            log.write(step + 1, loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=gradient)
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        due, whole = (step + 1) % arguments.save_steps == 0, accelerator.unwrap_model(model)
        if stop := run.end_step(step + 1, due, whole, optimizer.optimizer, log.seconds):
            return stop

    model = accelerator.unwrap_model(model).eval()
    with torch.no_grad():
        rows = windows(held_out, 2 * arguments.batch_size, steps)
        held_out_loss = float(model(input_ids=rows, labels=rows).loss)
    if accelerator.is_main_process:
        log.write(steps, eval_loss=held_out_loss)
        with written_whole(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            save_file({"counts": counts}, folder / "token_counts.safetensors")
        write_run_facts(
            output, "text", arguments, seconds=log.seconds, eval_loss=held_out_loss, **facts
        )
        remove_state(output)
        print(
            f"Language model and tokenizer ({facts['parameters'] / 1e6:.1f} M parameters) "
            f"in {output}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
