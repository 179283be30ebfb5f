"""Loads a staged checkpoint where this package is not, and compares what it computes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from .errors import PublishError

# NOTE: an editable install is found through a hook of its own, hence the refusal.
_SCRIPT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cortexicon":
            raise ModuleNotFoundError("cortexicon is kept out of this process")
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
folder, subfolder, given, out, with_processor = sys.argv[1:]
model, loading = AutoModel.from_pretrained(
    folder, subfolder=subfolder, trust_remote_code=True, output_loading_info=True
)
assert not loading["missing_keys"], f"weights are missing: {loading['missing_keys']}"
model.eval()
found = {f"weight {name}": value.clone() for name, value in model.state_dict().items()}
codecs = {"model": model}
if model.config.model_type == "avq_lm":
    codecs = {"avq": model.avq, "connectome": model.connectome}
with torch.no_grad():
    for name, values in load_file(given).items():
        codes = codecs[name].encode(values).codes
        found |= {f"codes {name}": codes}
        found |= {f"decoded {name}": codecs[name].decode(codes)[0].contiguous()}
if with_processor == "yes":
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
save_file(found, out)
"""


def check_clean_load(
    folder: Path, model: PreTrainedModel, subfolder: str = "", timeout: float = 600.0
) -> None:
    """Load a folder by `AutoModel` in a process without cortexicon; weights and codes must agree.

    Parameters
    ----------
    folder : pathlib.Path
        Staged checkpoint, with its code files.
    model : AVQModel, AVQLMForConditionalGeneration or AVQConnectomeModel
        The same checkpoint, loaded by this package, on CPU.
    subfolder : str
        Where in the folder it lies; what `AutoModel` is given by that name.
    timeout : float
        Seconds.

    Raises
    ------
    PublishError
        It does not load there, a weight has other bits, or it encodes or decodes otherwise.
    """
    codecs: dict[str, PreTrainedModel] = {"model": model}
    if model.config.model_type == "avq_lm":
        streams = {"avq": model.avq, "connectome": model.connectome}
        codecs = {name: codec for name, codec in streams.items() if codec is not None}
    inputs = {name: _sample(codec.config) for name, codec in codecs.items()}
    expected = {}
    with torch.no_grad():
        for name, codec in codecs.items():
            codes = codec.encode(inputs[name]).codes
            expected[name] = codes, codec.decode(codes)[0]
    with tempfile.TemporaryDirectory() as work:
        given, out = Path(work) / "inputs.safetensors", Path(work) / "out.safetensors"
        save_file(inputs, given)
        # Nothing of the user's environment that could bring the package in, and no network.
        keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "TMPDIR")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        environment |= {
            "HF_HOME": work,
            "HOME": work,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        processor = (folder / "processor_config.json").is_file() and not subfolder
        command = [sys.executable, "-P", "-c", _SCRIPT]
        try:
            done = subprocess.run(
                [
                    *command,
                    str(folder.resolve()),
                    subfolder,
                    str(given),
                    str(out),
                    "yes" if processor else "no",
                ],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PublishError(
                f"{folder}: a process without cortexicon did not load it in {timeout:g} s."
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise PublishError(f"{folder}: a process without cortexicon cannot load it: {last}")
        found = load_file(out)
    for name, value in model.state_dict().items():
        if not torch.equal(found[f"weight {name}"], value):
            raise PublishError(f"{folder}: {name} has other bits when loaded without cortexicon.")
    for name, (codes, decoded) in expected.items():
        if not torch.equal(found[f"codes {name}"], codes):
            raise PublishError(f"{folder}: encodes otherwise when loaded without cortexicon.")
        if not torch.allclose(found[f"decoded {name}"], decoded, atol=1e-5):
            raise PublishError(f"{folder}: decodes otherwise when loaded without cortexicon.")


def _sample(config: PretrainedConfig) -> torch.Tensor:
    """Noise of the shape that the codec reads: windows of series, or matrices."""
    values = json.loads(config.to_json_string(use_diff=False))
    regions = len(values["region_coordinates"])
    generator = torch.Generator().manual_seed(0)
    if "window_length" in values:
        return torch.randn(2, values["window_length"], regions, generator=generator)
    noise = 0.2 * torch.randn(2, regions, regions, generator=generator)
    return noise + noise.transpose(1, 2)
