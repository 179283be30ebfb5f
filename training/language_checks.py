"""Does a language model of scans listen to the scan, whatever the wording, and write what is asked?

    python -m cortexicon.training.language_checks CHECKPOINT COHORT --split SPLIT --json FILE \
        --text-model RUN/text --text FILE.txt ... [--seen FILE.txt ...]

Five checks, of people that were not trained on and of texts that were not:

* *codes*: perplexity of their next code, beside the best unigram of training people's codes;
* *text*: perplexity of texts, beside that of the language model that tuning began with;
* *wordings*: the same questions in words that training used, and in words that were held out;
* *swapped scans*: everybody's question with somebody else's scan;
* *written scans*: connectivity that the model writes after a sentence about it. Is its mean nearer
  to that of the people of whom the sentence is true, or to that of another sentence's people?
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from cortexicon.cohorts import Cohort, load_cohort, load_split
from cortexicon.evaluation import write_json
from cortexicon.evaluation.connectivity import correlation_by_scan
from cortexicon.evaluation.scores import area_under_curve, mean_absolute_error
from cortexicon.inference import cohort_matrices
from cortexicon.inference.answers import pooled_answers
from cortexicon.inference.predict import (
    LanguageCheckpoint,
    PromptCodes,
    encode_prompts,
    load_language_model,
)

from .arguments import TrainingError
from .lm_stages import descriptions_of, next_code_scores, text_perplexity
from .stages import wordings_of

#: What each sentence of `describe_scan` that connectivity decides is about.
SENTENCES = (
    "how closely regions are coupled",
    "networks that rise together",
    "networks that go their own ways",
    "tightest network",
)
_FEWEST = 5  # people of whom a sentence is true
_LENGTH = 128  # tokens of a sequence of text


def text_scores(
    loaded: LanguageCheckpoint,
    text_model: Path,
    files: Sequence[Path],
    seen: Sequence[Path] = (),
    most: int = 256,
) -> dict[str, dict[str, float]]:
    """Perplexity of texts before and after tuning, in sequences of 128 tokens.

    Parameters
    ----------
    loaded : LanguageCheckpoint
        Scored over its whole vocabulary: a code where a word stands counts against it.
    text_model : Path
        The language model that tuning began with, scored over its own vocabulary.
    files : sequence of Path
        UTF-8 texts that neither was trained on.
    seen : sequence of Path
        Texts that they were trained on: lines of theirs are left out of `files`.
    most : int
        Sequences read of each file, from its start.

    Returns
    -------
    dict
        File name -> `before`, `after`, `ratio`.

    Raises
    ------
    TrainingError
        A text is shorter than one sequence.
    """
    tokenizer = loaded.processor.tokenizer
    earlier = AutoModelForCausalLM.from_pretrained(text_model).to(loaded.model.device)
    known = {part for file in seen for part in file.read_text(encoding="utf-8").split("\n")}
    found = {}
    for file in files:
        parts = file.read_text(encoding="utf-8").split("\n")
        text = "\n".join(part for part in parts if not part or part not in known)
        text = text[: most * _LENGTH * 8]  # a token has fewer letters
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if len(ids) < _LENGTH:
            raise TrainingError(f"{file}: expected {_LENGTH} tokens or more, found {len(ids)}.")
        before, after = (
            text_perplexity(model, np.asarray(ids), _LENGTH, most)
            for model in (earlier, loaded.model)
        )
        found[file.name] = {"before": before, "after": after, "ratio": after / before}
    return found


def wording_scores(
    loaded: LanguageCheckpoint, prompts: PromptCodes, people: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """Error of every wording of every target.

    Parameters
    ----------
    loaded : LanguageCheckpoint
    prompts : PromptCodes
        Of people that were not trained on.
    people : DataFrame
        Participants.

    Returns
    -------
    dict
        Target -> `score` ("mae" or "auc"), `trained` and `held_out` (wording -> score), and their
        means `trained_mean`, `held_out_mean`.
    """
    found: dict[str, dict[str, Any]] = {}
    for target in loaded.model.config.targets or []:
        trained, held_out = wordings_of(target)
        number = target["kind"] == "number"
        row: dict[str, Any] = {"score": "mae" if number else "auc"}
        for key, wordings in (("trained", trained), ("held_out", held_out)):
            row[key] = {
                wording: _score(target, _answers(loaded, prompts, target, wording), prompts, people)
                for wording in tqdm(wordings, f"{target['name']}, {key}", leave=False)
            }
            row[f"{key}_mean"] = float(np.mean(list(row[key].values())))
        found[target["name"]] = row
    return found


def swapped_scores(
    loaded: LanguageCheckpoint, prompts: PromptCodes, people: pd.DataFrame, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Answers about everybody's own scan, and about another person's.

    Returns
    -------
    dict
        Target -> `own`, `swapped` (MAE or AUC against the truth about the person asked about) and
        `changed` (share of answers that are another class, or a number half a unit away).
    """
    # One cycle through everybody in random order: neighbours in a table are of one site, and often
    # of one sex or diagnosis.
    cycle = np.random.default_rng(seed).permutation(len(prompts.subject_ids))
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, 1)
    more = None if prompts.connectivity is None else prompts.connectivity[order]
    swapped = prompts._replace(codes=prompts.codes[order], connectivity=more)
    found = {}
    for target in loaded.model.config.targets or []:
        own, other = (_answers(loaded, part, target) for part in (prompts, swapped))
        if target["kind"] == "number":
            changed = np.abs(own - other) > 0.5
        else:
            changed = own.argmax(1) != other.argmax(1)
        found[target["name"]] = {
            "own": _score(target, own, prompts, people),
            "swapped": _score(target, other, prompts, people),
            "changed": float(changed.mean()),
        }
    return found


def _answers(loaded, prompts, target, question: str | None = None) -> np.ndarray:
    answers = pooled_answers(loaded.model, loaded.processor, prompts, target, question=question)
    return answers.numbers(target) if target["kind"] == "number" else answers.classes(target)


def _score(target, answers: np.ndarray, prompts: PromptCodes, people: pd.DataFrame) -> float:
    truth = people.loc[prompts.subject_ids, target["name"]]
    known = truth.notna().to_numpy()
    if target["kind"] == "number":
        return float(mean_absolute_error(truth[known].to_numpy(float), answers[known]))
    last = int(np.argsort(target["classes"])[-1])
    positive = truth[known].astype(str).to_numpy() == target["classes"][last]
    return float(area_under_curve(positive, answers[known, last]))


@torch.inference_mode()
def written_scans(
    loaded: LanguageCheckpoint,
    cohort: Cohort,
    subject_ids: Sequence[str],
    count: int = 32,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Connectivity written after the two commonest sentences of each kind, beside people's.

    Parameters
    ----------
    loaded : LanguageCheckpoint
        With a connectivity stream.
    cohort : Cohort
    subject_ids : sequence of str
        People who were not trained on.
    count : int
        Scans to write after each sentence, drawn at temperature 1.
    seed : int

    Returns
    -------
    list of dict
        For each kind of sentence: `kind`, `sentences` (two), `people` (of whom each is true),
        `position` of the two written means on the line between the two groups' means (1 at the
        asked group's, 0 at the other's; above 0.5: nearer to the asked group's), `correlation`
        over connections of the difference between the two written means with that between the
        groups', and `halves`, the same for the differences between halves of what was written
        after one sentence: what noise alone would give.

    Raises
    ------
    TrainingError
        A model without the connectivity stream.
    """
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    if model.connectome is None:
        raise TrainingError("written scans: expected a model with the connectivity stream.")
    told = descriptions_of(cohort, subject_ids)
    raw = cohort_matrices(cohort, subject_ids).matrices.numpy()
    upper = np.triu_indices(raw.shape[1], 1)
    places = torch.tensor(np.asarray(cohort.coordinates, np.float32))[None].to(model.device)
    rows = []
    for kind, name in enumerate(SENTENCES):
        having = Counter(sentences[kind] for sentences in told if len(sentences) > kind)
        pair = [text for text, people in having.most_common(2) if people >= _FEWEST]
        if len(pair) < 2:
            continue
        real, written = [], []
        for text in pair:
            ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            prompts = torch.tensor([ids] * count, device=model.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                codes = model.generate_codes(prompts, "fc", do_sample=True, temperature=1.0)
            ids = codes + model.block("fc")[0]
            matrices = model.decode_fmri_tokens(ids, places, stream="fc").cpu().numpy()
            written.append(matrices[:, *upper])
            mine = [row for row, sentences in enumerate(told) if text in sentences]
            real.append(raw[mine][:, *upper].mean(0))
        wanted = (real[0] - real[1])[None]
        drawn = [written[0].mean(0) - written[1].mean(0)]
        drawn += [part[::2].mean(0) - part[1::2].mean(0) for part in written]
        along = wanted[0] / np.square(wanted).sum()
        place = [
            float((part.mean(0) - other) @ (sign * along))
            for part, other, sign in zip(written, real[::-1], (1, -1), strict=True)
        ]
        near = [float(correlation_by_scan(part[None], wanted)[0]) for part in drawn]
        rows.append(
            {
                **{"kind": name, "sentences": pair, "people": [having[text] for text in pair]},
                **{"position": place, "correlation": near[0], "halves": near[1:]},
            }
        )
    return rows


def main(argv: list[str]) -> int:
    """Check, print, write."""
    parser = argparse.ArgumentParser(prog="python -m cortexicon.training.language_checks")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--part", default="test")
    parser.add_argument("--count", type=int, default=32, help="scans written after a sentence")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="texts not trained on")
    parser.add_argument("--seen", type=Path, nargs="+", default=[], help="texts trained on")
    parser.add_argument("--text-model", type=Path, help="the language model before tuning")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.text and arguments.text_model is None:
        parser.error("--text needs --text-model, whose perplexity it is compared with")
    cohort = load_cohort(arguments.cohort)
    parts = load_split(arguments.split, cohort)[arguments.fold]
    people = parts[arguments.part]
    loaded = load_language_model(arguments.checkpoint)
    config = loaded.model.config
    encoded = partial(
        encode_prompts,
        loaded.model,
        loaded.processor.feature_extractor,
        cohort,
        prompts=config.prompts_per_scan,
        windows=config.windows_per_prompt,
    )
    prompts = encoded(subject_ids=people)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "cortexicon.training.language_checks", *argv]),
        "people": len(prompts.subject_ids),
        "wordings": wording_scores(loaded, prompts, cohort.participants),
        "swapped": swapped_scores(loaded, prompts, cohort.participants),
    }
    if arguments.text:
        found["text"] = text_scores(loaded, arguments.text_model, arguments.text, arguments.seen)
    if config.fmri_input == "codes":
        held, more = encoded(subject_ids=parts["train"]).flat
        streams = (("fmri", held), ("fc", more))
        counted = {name: codes for name, codes in streams if codes is not None and codes.size}
        found["codes"] = next_code_scores(loaded.model, loaded.processor, counted, prompts)
    if loaded.model.connectome is not None and config.fmri_input == "codes":
        found["written"] = written_scans(loaded, cohort, people, arguments.count)
    write_json(arguments.json, found)
    print("| target | score | own scan | another's | wordings trained on | held out |")
    print("|---|---|---|---|---|---|")
    for name, row in found["wordings"].items():
        scans = found["swapped"][name]
        figures = (scans["own"], scans["swapped"], row["trained_mean"], row["held_out_mean"])
        print(f"| {name} | {row['score']} | " + " | ".join(f"{x:.3f}" for x in figures) + " |")
    for name, row in found.get("text", {}).items():
        print(
            f"text, {name}: perplexity {row['after']:.1f}, before tuning {row['before']:.1f} "
            f"(ratio {row['ratio']:.3f})"
        )
    for name, row in found.get("codes", {}).items():
        print(
            f"codes, {name}: perplexity {row['perplexity']:.0f} of {row['codes']}, unigram "
            f"{row['unigram']:.0f} ({row['saved']:.1%} saved)"
        )
    for row in found.get("written", ()):
        noise = ", ".join(f"{value:+.3f}" for value in row["halves"])
        places = ", ".join(f"{value:.2f}" for value in row["position"])
        print(
            f"written, {row['kind']}: {row['correlation']:+.3f} (halves: {noise}), between the "
            f"other group's mean and the asked one's at {places}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
