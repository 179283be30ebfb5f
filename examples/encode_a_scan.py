"""A scan to codes and back, in twelve lines; any checkpoint that holds a codec.

python examples/encode_a_scan.py runs/demo/avq runs/demo/cohort
"""

import sys

from transformers import AutoModel, AutoProcessor

import cortexicon  # noqa: F401  (AutoModel learns of the codec)
from cortexicon.cohorts import load_cohort

checkpoint, cohort = sys.argv[1:3]
model = AutoModel.from_pretrained(checkpoint).requires_grad_(False)
processor = AutoProcessor.from_pretrained(checkpoint)
scan = next(iter(load_cohort(cohort)))
inputs = processor(fmri=scan.values, tr=scan.tr, region_labels=scan.labels)
inputs.pop("num_windows")
output = model(**inputs)
codes, series = output.codes, output.reconstruction  # (windows, tokens), (windows, time, regions)
used = inputs["region_mask"][:, None].expand_as(series)
error = (series - inputs["input_values"])[used].square().sum()
r2 = 1 - float(error / inputs["input_values"][used].square().sum())
print(f"{scan.subject_id}: {codes.numel()} codes, R2 {r2:.2f}; the first: {codes[0, :8].tolist()}")
