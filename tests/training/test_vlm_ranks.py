"""Two processes train one adapter: the frozen model on each whole, or shared between them."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def start(folder, run, name, processes, **changes):
    values = {
        "output": str(folder / name),
        "cohort": str(run / "cohort"),
        "split": str(run / "split.json"),
        "family": "qwen2_vl",
        "tiny": True,
        "targets": [{"name": "sex", "kind": "class", "question": "Sex?"}],
        "image_size": [56, 56],
        "window_length": 40,
        "prompts_per_scan": 1,
        "lora": {"r": 2},
        "max_steps": 3,
        "batch_size": 4 // processes,
        "warmup_steps": 1,
        "log_steps": 1,
        "learning_rate": 1e-2,
        "cpu": True,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "cortexicon.training.vlm", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name


def test_whole_shared_and_alone_train_the_same_adapter(run, tmp_path):
    alone = start(tmp_path, run, "alone", 1)
    folders = {
        "whole": start(tmp_path, run, "whole", 2),
        "shared": start(tmp_path, run, "shared", 2, shard=True),
    }
    wanted = load_file(alone / "adapter_model.safetensors")
    for name, folder in folders.items():
        assert json.loads((folder / "run.json").read_text())["processes"] == 2
        found = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == wanted.keys(), name
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)
        first, second = (pd.read_csv(f / "predictions.csv") for f in (alone, folder))
        assert list(first["subject_id"]) == list(second["subject_id"])
        pd.testing.assert_series_equal(first["score"], second["score"], rtol=1e-3, atol=1e-5)
