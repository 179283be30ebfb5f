"""What a checkpoint makes of a scan, in one picture: the scan, its codes, and what they give back.

python examples/picture_of_a_scan.py CHECKPOINT picture.png            # a simulated person
python examples/picture_of_a_scan.py CHECKPOINT picture.png SCAN TR    # .tsv, .npy, .npz, ...
"""

import sys

import numpy as np
from PIL import Image

from cortexicon.inference import load_checkpoint
from cortexicon.model_cards.space import read_upload, simulate_reading
from cortexicon.model_cards.space_connectivity import (
    connectome_of,
    draw_connectivity,
    read_connectivity,
)
from cortexicon.model_cards.space_pictures import draw_carpets, draw_codes

folder, out, *scan = sys.argv[1:]
checkpoint = load_checkpoint(folder)
if scan:
    reading = read_upload(scan[0], checkpoint, float(scan[1]))
else:
    reading = simulate_reading(41, checkpoint)
parts = [draw_carpets(reading), draw_codes(reading)]
connectome = connectome_of(checkpoint)
if connectome is not None:
    parts.append(draw_connectivity(reading, read_connectivity(reading, connectome)))
Image.fromarray(np.concatenate(parts)).quantize(256, kmeans=1).save(out, optimize=True)
print(f"R2 {reading.r2:.2f} -> {out}")
