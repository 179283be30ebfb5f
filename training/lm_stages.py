"""Losses of `train lm` beside the answers: codes, descriptions of scans, and plain text.

Each has a weight in the configuration; a stage of training is a configuration in which some of
them are not zero. Code modelling and descriptions come first (`answer_weight: 0`), questions
after, from where the stage before ended (`start: FOLDER`); `text_weight` keeps what was read
before from being forgotten.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cortexicon.modeling import AVQLMForConditionalGeneration

from .arguments import TrainingError
from .corpus import local_corpus
from .stages import (
    IGNORED,
    best_unigram_perplexity,
    code_loss,
    code_perplexity,
    describe_scan,
    masked_code_rows,
    next_code_rows,
    paired_text_rows,
    without_summary,
)

#: Share of the corpus that is held out: its last part, as in `train text`.
HELD_OUT_TEXT = 20


class SideLosses:
    """Rows and losses of one step beside its answers.

    Parameters
    ----------
    arguments : LMArguments
        `code_weight` (next code), `masked_weight` (hidden codes), `description_weight` (sentences
        computed from the scan; a share `text_first_share` of steps has them before it, the others
        after it), `text_weight` with `text_files`, `max_characters` and `sentences` as in `train
        text`, in `text_batch_size` rows (0: `batch_size`) of `text_length` tokens.
    processor : AVQProcessor
    codes : function of a scan's index and a generator to int64 (windows, tokens)
    connectivity : list of int64 arrays (tokens,), or None
    descriptions : list of list of str
        Per scan; empty where `description_weight` is 0.

    Raises
    ------
    TrainingError
        Codes are to be modelled by a model that reads features, or the corpus is too short.
    """

    def __init__(self, arguments, processor, codes, connectivity, descriptions):
        self.weights = {
            name: getattr(arguments, f"{name}_weight")
            for name in ("code", "masked", "description", "text")
            if getattr(arguments, f"{name}_weight")
        }
        self.processor, self.codes, self.connectivity = processor, codes, connectivity
        self.descriptions, self.seed = descriptions, arguments.seed
        self.text_rows = arguments.text_batch_size or arguments.batch_size
        self.length, self.text_first_share = arguments.text_length, arguments.text_first_share
        about_codes = {"code", "masked", "description"} & set(self.weights)
        if about_codes and arguments.fmri_input == "features":
            raise TrainingError(
                f"{about_codes.pop()}_weight needs codes, but fmri_input is 'features'. Set "
                "fmri_input to 'codes', or the weight to 0."
            )
        self.text, self.held_out = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if "text" in self.weights:
            self.text, self.held_out = corpus_ids(
                processor.tokenizer, arguments, at_least=arguments.text_length
            )

    def loss(self, model, scans: np.ndarray, seed: list[int]) -> torch.Tensor:
        """Weighted sum of the losses, a tensor of one number, for the scans of a step."""
        rng = np.random.default_rng(seed)
        total = torch.zeros(())
        for name, weight in self.weights.items():
            rows = self._rows(name, scans, rng)
            labels = rows.pop("labels")
            device = next(model.parameters()).device
            rows |= without_summary(model)
            # Only where something is to be predicted: over text and two blocks of codes, logits
            # are what costs.
            kept = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
            logits = model(
                **{key: value.to(device) for key, value in rows.items()},
                logits_to_keep=kept.to(device),
                use_cache=False,
            ).logits
            wanted = labels[:, kept + 1].flatten().to(device)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted, ignore_index=IGNORED)
            total = total.to(device) + weight * loss
        return total

    def _rows(self, name: str, scans, rng: np.random.Generator) -> dict[str, Any]:
        if name == "text":
            starts = rng.integers(0, len(self.text) - self.length, self.text_rows)
            ids = torch.from_numpy(np.stack([self.text[s : s + self.length] for s in starts]))
            return {"input_ids": ids, "labels": ids}
        codes = [self.codes(scan, rng) for scan in scans]
        more = None
        if self.connectivity is not None:
            more = [self.connectivity[scan] for scan in scans]
        if name == "code":
            return next_code_rows(self.processor, codes, more)
        if name == "masked":
            return masked_code_rows(self.processor, codes, more, seed=int(rng.integers(2**31)))
        texts = [str(rng.choice(self.descriptions[scan])) for scan in scans]
        first = bool(rng.random() < self.text_first_share)
        return paired_text_rows(self.processor, codes, texts, more, text_first=first)

    def perplexity(self, model: AVQLMForConditionalGeneration) -> float:
        """Perplexity of held-out text: exp of the mean cross entropy in nats."""
        return text_perplexity(model, self.held_out, self.length)

    def code_scores(self, model, validation, training_windows: np.ndarray) -> dict[str, float]:
        """Perplexity of validation people's next code, and of the best unigram of training codes.

        Parameters
        ----------
        model : AVQLMForConditionalGeneration
        validation : PromptCodes
        training_windows : int64 array, (windows, tokens)
        """
        counted = {} if self.connectivity is None else {"fc": np.stack(self.connectivity)}
        if training_windows.size:
            counted["fmri"] = training_windows
        found = {}
        for stream, row in next_code_scores(model, self.processor, counted, validation).items():
            found[f"eval_{stream}_code_perplexity"] = row["perplexity"]
            found[f"eval_{stream}_unigram_perplexity"] = row["unigram"]
        return found


def next_code_scores(
    model, processor, counted: dict[str, np.ndarray], prompts
) -> dict[str, dict[str, float]]:
    """Perplexity of every stream's next code, for a model that reads codes.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
    processor : AVQProcessor
    counted : dict of str to int64 array
        Stream ("fmri", "fc") -> codes of people that were trained on, of any shape.
    prompts : PromptCodes
        Of people that were not.

    Returns
    -------
    dict
        Stream -> `codes` (in its block), `perplexity`, `unigram` (of what was counted, with the
        smoothing that serves the people scored best) and `saved`, 1 - perplexity / unigram.
    """
    held, more = prompts.flat
    rows = [
        next_code_rows(processor, held[k : k + 8], None if more is None else more[k : k + 8])
        for k in range(0, len(held), 8)
    ]
    found = {}
    for stream, training in counted.items():
        size = model.block(stream)[1]
        perplexity = code_perplexity(model, rows, stream)
        unigram = best_unigram_perplexity(training, held if stream == "fmri" else more, size)
        found[stream] = {
            **{"codes": size, "perplexity": perplexity, "unigram": unigram},
            "saved": 1 - perplexity / unigram,
        }
    return found


def corpus_ids(tokenizer, arguments, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the local corpus, int64 (tokens,): to train on, and held out.

    Raises
    ------
    TrainingError
        Either is shorter than `at_least`.
    """
    documents, _ = local_corpus(
        arguments.text_files, arguments.max_characters, arguments.sentences, arguments.seed
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [
        tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) + end
        for text in documents
    ]
    ids = np.concatenate(parts).astype(np.int64)
    cut = len(ids) - len(ids) // HELD_OUT_TEXT
    if len(ids) - cut <= at_least:
        raise TrainingError(
            f"The corpus holds {len(ids)} tokens; its held-out part must be longer than one "
            f"sequence of {at_least}. Name more text_files, or lower text_length."
        )
    return ids[:cut], ids[cut:]


@torch.inference_mode()
def text_perplexity(model, ids: np.ndarray, length: int, most: int = 64) -> float:
    """Perplexity of text, int64 (tokens,), in up to `most` sequences of `length` tokens."""
    count = min(most, len(ids) // length)
    rows = torch.from_numpy(ids[: count * length].reshape(count, length)).to(model.device)
    was_training = model.training
    model.eval()
    losses = [code_loss(model(input_ids=part).logits, part) for part in rows.split(8)]
    model.train(was_training)
    sizes = torch.tensor([len(part) for part in rows.split(8)], dtype=torch.float64)
    total = (torch.stack(losses).double().cpu() * sizes).sum() / sizes.sum()
    return float(total.exp())


def descriptions_of(cohort, subject_ids) -> list[list[str]]:
    """Sentences about each scan, computed from its series and its regions' networks."""
    if "network" not in cohort.regions:
        raise TrainingError(
            "description_weight needs the regions' networks: a column `network` in regions.tsv."
        )
    networks = [str(name) for name in cohort.regions["network"]]
    found = []
    for subject in subject_ids:
        values = np.asarray(cohort.series(subject).values, dtype=np.float32)
        spread = values.std(0)
        values = (values - values.mean(0)) / np.where(spread > 1e-6, spread, 1.0)
        found.append(describe_scan(values, networks))
    return found
