"""Local text for a language model made from nothing: Python's help pages, sentences about scans."""

import glob
import random
from pathlib import Path

NETWORKS = (
    "visual",
    "somatomotor",
    "dorsal attention",
    "ventral attention",
    "limbic",
    "frontoparietal",
    "default mode",
    "subcortical",
    "cerebellar",
    "auditory",
    "salience",
)

_STATEMENTS = (
    "The {a} network and the {b} network rise and fall together in this scan.",
    "When the {a} network is active, the {b} network tends to be quiet.",
    "Functional connectivity is the correlation between the time series of two regions of the "
    "brain.",
    "The BOLD signal follows neural activity after a delay of about {n} seconds, blurred by the "
    "haemodynamic response.",
    "One volume was acquired every {m} seconds, so a scan of {n} minutes holds many volumes.",
    "Regions of the {a} network lie in both hemispheres and are coupled across the midline.",
    "Head motion of more than half a millimetre leaves its trace in the {a} network.",
    "A parcellation divides the cortex into {n} regions, each with a centre in MNI space.",
    "The {a} network answered to the task, the {b} network to rest.",
    "The participant lay still with eyes open and looked at a cross for {n} minutes.",
    "A codebook holds patterns of activity, and a scan is written as a sequence of its codes.",
    "Between {n} and {k} years of age the coupling of the {a} network changes slowly.",
    "The scanner's repetition time and its noise tell one site from another.",
    "A prediction is worth little unless a simple baseline stands beside it.",
    "In the {a} network the signal varied {n} per cent more than in the {b} network.",
)
_QUESTIONS = (
    ("How strongly are the {a} and {b} networks coupled, from 0 to 100?", "{n}"),
    ("Coupling of {a} and {b}?", "{n}"),
    ("How old is this person, in years?", "{n}"),
    ("Age?", "{n}"),
    ("Which number follows {n}?", "{next}"),
    ("Which network is this, {a} or {b}?", "{a}"),
    ("Is this person female or male?", "female"),
    ("Is this person female or male?", "male"),
    ("Is this person a patient or a control?", "patient"),
    ("Is this person a patient or a control?", "control"),
)


def brain_sentences(count: int, seed: int = 0) -> str:
    """`count` sentences and question-answer pairs about scans, filled at random.

    Every number from 0 to 100 occurs often.
    """
    rng = random.Random(seed)
    lines = []
    for index in range(count):
        a, b = rng.sample(NETWORKS, 2)
        number = index % 101
        words = {
            "a": a,
            "b": b,
            "n": number,
            "k": min(100, number + 9),
            "next": number + 1,
            "m": rng.randint(1, 3),
        }
        if rng.random() < 0.5:
            lines.append(rng.choice(_STATEMENTS).format(**words))
        else:
            question, answer = rng.choice(_QUESTIONS)
            lines.append(f"Question: {question.format(**words)}\nAnswer: {answer.format(**words)}")
    return "\n".join(lines)


def local_corpus(
    text_files: list[str], max_characters: int, sentences: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Documents of local text, and the names of their sources.

    Parameters
    ----------
    text_files : list of str
        Paths or glob patterns; patterns that match nothing are passed over.
    max_characters : int
        Upper bound for the files together; they are cut, the rest is always there.
    sentences : int
        Number of `brain_sentences`.
    """
    from pydoc_data import topics

    documents = [text for _, text in sorted(topics.topics.items())]
    sources = ["pydoc_data.topics"]
    left = max_characters
    for pattern in text_files:
        for path in sorted(glob.glob(str(Path(pattern).expanduser()))):
            text = Path(path).read_text(encoding="utf-8")[: max(0, left)]
            left -= len(text)
            if text:
                documents.extend(part for part in text.split("\n\n") if part.strip())
                sources.append(Path(path).name)
    documents.append(brain_sentences(sentences, seed))
    sources.append("brain_sentences")
    return documents, sources
