"""What the report shows of a language model's answers: regions that move them, what codes mean."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cortexicon.cohorts import Cohort
from cortexicon.evaluation.rendering_interpretation import write_interpretation
from cortexicon.evaluation.scan_images import networks_of
from cortexicon.inference import Checkpoint
from cortexicon.inference.interpret import attribute, code_networks
from cortexicon.inference.predict import encode_prompts

#: People whose codes are hidden one at a time, and the commonest codes that are looked up.
MAX_PEOPLE, MAX_CODES = 12, 48


def interpret(
    checkpoint: Checkpoint, cohort: Cohort, subject_ids: Sequence[str], path: Path
) -> None:
    """Write what the report's pictures of answers are drawn from.

    Parameters
    ----------
    checkpoint : Checkpoint
        A language model that reads codes.
    cohort : Cohort
        Of the checkpoint's regions; other ones are left out, and nothing is written.
    subject_ids : sequence of str
        Held-out people.
    path : pathlib.Path
    """
    model, processor = checkpoint.model, checkpoint.processor
    config, regions = model.config, cohort.regions
    own = model.avq.config
    same = list(map(str, own.region_labels or ())) == list(map(str, cohort.labels))
    if own.region_coordinates is None or not same or not config.targets:
        return
    subjects = list(subject_ids)[:: max(1, len(subject_ids) // MAX_PEOPLE)][:MAX_PEOPLE]
    prompts = encode_prompts(
        model,
        processor.feature_extractor,
        cohort,
        subjects,
        config.prompts_per_scan,
        config.windows_per_prompt,
        quiet=True,
    )
    if not prompts.subject_ids:
        return
    moved = np.zeros((len(config.targets), len(regions)))
    for scan in tqdm(range(len(prompts.subject_ids)), "what moves answers", mininterval=2.0):
        more = None if prompts.connectivity is None else prompts.connectivity[scan]
        for row, target in enumerate(config.targets):
            moved[row] += attribute(model, processor, prompts.codes[scan, 0], target, more).regions
    named = networks_of(regions)
    networks = ["" if pd.isna(name) else str(name) for name in named or ["brain"] * len(regions)]
    codes, shares, names = np.zeros(0, np.int64), np.zeros((0, 0)), list[str]()
    if prompts.codes.size and named is not None:
        codes = np.bincount(prompts.codes.ravel()).argsort()[::-1][:MAX_CODES]
        shares, names = code_networks(model, codes.tolist(), networks)
    write_interpretation(
        path,
        targets=np.array([str(target["name"]) for target in config.targets]),
        people=np.array(len(prompts.subject_ids)),
        regions=moved / len(prompts.subject_ids),
        coordinates=np.asarray(own.region_coordinates, np.float32),
        networks=np.array(networks),
        codes=codes,
        shares=shares,
        names=np.array(names, dtype=str),
    )
