"""What the codec costs, beside a plain transformer over all region x patch tokens, in one run.

Both have the same hidden size, intermediate size, heads, number of blocks (encoder and decoder),
codebook and lookup, and read the same batch with the same attention (sdpa), threads and warm-up.
The systems take turns, and a median over the turns is reported; with one thread on CPU the clock
counts the seconds that this process computed, so that other work on the machine weighs little. A
training step is forward, backward and AdamW; the codec's holds its
domain classifier, which the rival has not. Peak memory is that of a training step in a process of
its own, above what the process held before the model was built.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.modeling.components_avq import RegionMaps
from cortexicon.modeling.layers_avq import AVQBlock
from cortexicon.modeling.losses_avq import reconstruction_loss
from cortexicon.modeling.quantization_avq import AVQCodebook

from .errors import EvaluationError

CODEC = "AVQ"
#: The marks of the codec against the rival of its own patch length.
MARKS = {"encode": "at least 5", "train": "at least 4", "memory": "at most 0.5"}
#: Seconds that one turn of one system fills at least.
TURN_SECONDS = 0.5
#: Tokens of the largest rival in one batch, where no batch size is given.
RIVAL_TOKENS = 25600
#: A model of a few hundred weights.
TINY = {
    "region_coordinates": [[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]],
    "region_labels": None,
    "window_length": 4,
    "patch_length": 2,
    "num_latents": 1,
    "num_codes": 4,
    "code_branches": 1,
    "code_dim": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_components": 2,
    "position_features": 2,
    "text_width": 4,
    "projection_hidden_size": 4,
    "classifier_hidden_size": 4,
}


class PlainTransformer(nn.Module):
    """The rival: every region's patch is one token, and all blocks run over all of them.

    A patch of one region is embedded linearly, with its region's coordinates and its place in the
    window added; each token is quantised by itself; blocks and a linear map decode the samples.
    """

    def __init__(self, config: AVQConfig):
        super().__init__()
        width, self.patch_length = config.hidden_size, config.patch_length
        self.commitment_weight = float(config.commitment_weight)
        self.embed = nn.Linear(self.patch_length, width)
        self.positions = RegionMaps(config.position_features, config.position_wavelength, width)
        nn.init.normal_(self.positions.frequencies)
        nn.init.normal_(self.positions.weight)
        self.patch_embedding = nn.Parameter(0.5 * torch.randn(config.num_patches, 1, width))
        self.encoder = nn.ModuleList(AVQBlock(config) for _ in range(config.encoder_layers))
        self.to_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.code_dim))
        self.quantizer = AVQCodebook(
            config.num_codes,
            config.code_dim,
            config.ema_decay,
            config.revival_threshold,
            config.revival_interval,
            branches=config.code_branches,
        )
        self.from_code = nn.Linear(config.code_dim, width)
        self.decoder = nn.ModuleList(AVQBlock(config) for _ in range(config.decoder_layers))
        self.to_patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.patch_length))

    def _latents(self, values: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Code vectors (batch, patches x regions, code_dim) of series (batch, time, regions)."""
        batch, _, regions = values.shape
        patches = values.view(batch, -1, self.patch_length, regions).transpose(2, 3)
        # (batch, patches, regions, hidden)
        x = self.embed(patches) + self.positions(coordinates) + self.patch_embedding
        x = x.flatten(1, 2)
        for block in self.encoder:
            x = block(x, None)
        return self.to_code(x)

    def encode(self, values: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Codes int64 (batch, patches x regions) of series (batch, time, regions)."""
        return self.quantizer.encode(self._latents(values, coordinates))

    def forward(self, values: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Loss of reconstructing series (batch, time, regions)."""
        batch, _, regions = values.shape
        output = self.quantizer(self._latents(values, coordinates))
        x = self.from_code(output.quantized)
        for block in self.decoder:
            x = block(x, None)
        patches = self.to_patch(x).view(batch, -1, regions, self.patch_length)
        decoded = patches.transpose(2, 3).flatten(1, 2)
        everywhere = torch.ones_like(values, dtype=torch.bool)
        loss = reconstruction_loss(decoded, values, everywhere)
        return loss + self.commitment_weight * output.commitment_loss


class System(NamedTuple):
    """A model on its device, and the two things that are timed."""

    model: nn.Module
    encode: Callable[[], Any]
    train: Callable[[], Any]


def compare_speed(
    config: AVQConfig,
    *,
    regions: int = 200,
    batch_size: int | None = None,
    repeats: int = 3,
    threads: int = 1,
    rival_patches: Sequence[int] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Ratios of speed and memory between the codec of `config` and plain transformers.

    Parameters
    ----------
    config : AVQConfig
        Its own regions are used when it stores their coordinates.
    regions : int
        Number of regions where it stores none.
    batch_size : int, optional
        Windows per step. Default: as many as make `RIVAL_TOKENS` tokens of the largest rival, so
        that a run takes a minute or two on one core.
    repeats : int
        Turns of each system.
    threads : int
        Threads of PyTorch on CPU.
    rival_patches : sequence of int, optional
        Patch lengths of the rivals in samples. Default: the codec's own, and a quarter of the
        window, which makes fewer tokens and so a faster rival.
    device : str, optional
        Default: ``cuda`` when there is one, else ``cpu``.

    Returns
    -------
    dict
        ``systems``: by name, tokens a window, parameters, windows encoded per second, seconds of a
        training step, bytes of peak memory. ``ratios``: by rival, ``encode`` and ``train`` (how
        many times faster the codec is) and ``memory`` (the codec's peak over the rival's). Beside
        them what was measured: sizes, batch, threads, device kind, version of PyTorch.

    Raises
    ------
    EvaluationError
        A number below 1.
    ConfigurationError
        A rival's patch length that does not divide the window.
    """
    numbers = {"regions": regions, "batch_size": batch_size, "repeats": repeats, "threads": threads}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise EvaluationError(f"{name} must be at least 1, found {number}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = _with_regions(config, regions)
    patches = rival_patches or (config.patch_length, max(1, config.window_length // 4))
    configs = {CODEC: config}
    for patch in dict.fromkeys(patches):
        name = f"plain transformer, patch {patch}"
        configs[name] = _copy_config(config, patch_length=patch)
    if batch_size is None:
        most = max(_tokens(name, sizes) for name, sizes in configs.items())
        batch_size = max(1, RIVAL_TOKENS // most)

    own_time = threads == 1 and torch.device(device).type == "cpu"
    clock = time.process_time if own_time else time.perf_counter
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    bar = tqdm(total=len(configs) * (2 + repeats), desc="speed", mininterval=1.0)
    try:
        peaks = {}
        for name, sizes in configs.items():  # first: this process is still small
            peaks[name] = _in_fresh_process(_peak_memory, name, sizes, batch_size, threads, device)
            bar.update()
        systems = {}
        for name, sizes in configs.items():
            systems[name] = system = build_system(name, sizes, batch_size, device)
            system.encode()
            system.train()
            bar.update()
        encode: dict[str, list[float]] = {name: [] for name in systems}
        train: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(repeats):
            for name, system in systems.items():
                encode[name].append(_seconds(system.encode, clock, device))
                train[name].append(_seconds(system.train, clock, device))
                bar.update()
    finally:
        bar.close()
        torch.set_num_threads(threads_before)

    measured = {
        name: {
            "tokens_per_window": _tokens(name, configs[name]),
            "parameters": sum(p.numel() for p in system.model.parameters()),
            "encode_windows_per_second": batch_size / statistics.median(encode[name]),
            "train_step_seconds": statistics.median(train[name]),
            "peak_bytes": peaks[name],
        }
        for name, system in systems.items()
    }
    return {
        "token_layout": config.token_layout,
        "patch_length": config.patch_length,
        "window_length": config.window_length,
        "num_codes": config.num_codes,
        "hidden_size": config.hidden_size,
        "blocks": [config.encoder_layers, config.decoder_layers],
        "regions": len(config.region_coordinates or ()),
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": threads,
        "device": torch.device(device).type,
        "clock": "CPU seconds" if own_time else "wall seconds",
        "torch": torch.__version__,
        "systems": measured,
        "ratios": {
            name: _ratios(measured[CODEC], figures)
            for name, figures in measured.items()
            if name != CODEC
        },
        "marks": MARKS,
    }


def render_speed(results: dict[str, Any]) -> str:
    """The table of `compare_speed`'s results, as Markdown."""
    lines = [
        f"{results['token_layout']} layout, {results['regions']} regions x "
        f"{results['window_length']} samples, K = {results['num_codes']}, batch "
        f"{results['batch_size']}, {results['threads']} thread(s), {results['device']}, "
        f"{results['clock']}, medians of {results['repeats']}",
        "",
        "| system | tokens | parameters | encode, windows/s | training step, s | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in results["systems"].items():
        lines.append(
            f"| {name} | {one['tokens_per_window']} | {one['parameters']:,} "
            f"| {one['encode_windows_per_second']:.2f} | {one['train_step_seconds']:.3f} "
            f"| {one['peak_bytes'] / 2**20:.0f} |"
        )
    lines += [
        "",
        "| AVQ against | encode, times faster | training step, times faster | peak memory, share |",
        "|---|---|---|---|",
    ]
    for name, ratio in results["ratios"].items():
        lines.append(
            f"| {name} | {ratio['encode']:.1f} | {ratio['train']:.1f} | {ratio['memory']:.2f} |"
        )
    marks = results["marks"]
    lines.append(
        f"| mark, own patch length | {marks['encode']} | {marks['train']} | {marks['memory']} |"
    )
    return "\n".join(lines)


def build_system(name: str, config: AVQConfig, batch_size: int, device: str) -> System:
    """The codec (`CODEC`) or a plain transformer, with a started codebook, a batch and AdamW."""
    torch.manual_seed(0)
    coordinates = torch.tensor(config.region_coordinates, dtype=torch.float32, device=device)[None]
    values = torch.randn(batch_size, config.window_length, coordinates.shape[1], device=device)
    if name == CODEC:
        model: nn.Module = AVQModel._from_config(config, attn_implementation="sdpa")
        text = torch.randn(1024, config.text_width, device=device)
    else:
        model = PlainTransformer(config)
        text = None
    model.to(device)
    # From the batch's own latents, so that its tokens spread over the codes as they do in use.
    with torch.no_grad():
        if name == CODEC:
            model.start_codebook([{"input_values": values}])
        else:
            model.quantizer.start(model._latents(values, coordinates).flatten(0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    @torch.no_grad()
    def encode() -> Any:
        model.eval()
        if name == CODEC:
            return model.encode(values, coordinates, codes_only=True)
        return model.encode(values, coordinates)

    def train() -> float:
        model.train()
        if text is None:
            loss = model(values, coordinates)
        else:
            loss = model(values, coordinates, text_embeddings=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return System(model, encode, train)


def _with_regions(config: AVQConfig, regions: int) -> AVQConfig:
    """A copy of `config` that has coordinates: its own, or `regions` random ones."""
    if config.region_coordinates is not None:
        return _copy_config(config)
    box = np.random.default_rng(0).uniform(-60, 60, (regions, 3)).round(1)
    return _copy_config(config, region_coordinates=box.tolist(), region_labels=None)


def _copy_config(config: AVQConfig, **changes: Any) -> AVQConfig:
    """`config` with `changes`; every system attends by sdpa."""
    copy = AVQConfig.from_dict({**config.to_dict(), **changes})
    copy._attn_implementation = "sdpa"
    return copy


def _tokens(name: str, config: AVQConfig) -> int:
    if name == CODEC:
        return config.tokens_per_window
    return config.num_patches * len(config.region_coordinates or ())


def _ratios(codec: dict[str, float], rival: dict[str, float]) -> dict[str, float]:
    for figures in (codec, rival):
        for name, value in figures.items():
            if not 0 < value < math.inf:
                raise EvaluationError(f"{name} was measured as {value}; run it again, alone.")
    return {
        "encode": codec["encode_windows_per_second"] / rival["encode_windows_per_second"],
        "train": rival["train_step_seconds"] / codec["train_step_seconds"],
        "memory": codec["peak_bytes"] / rival["peak_bytes"],
    }


def _seconds(call: Callable[[], Any], clock: Callable[[], float], device: str) -> float:
    """Mean seconds of `call`, over as many calls as fill a turn."""
    calls, begun = 0, clock()
    while True:
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
        passed = clock() - begun
        if passed >= TURN_SECONDS:
            return passed / calls


# ---------------------------------------------------------------------- memory


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """What `function` returns in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_memory(name: str, config: AVQConfig, batch_size: int, threads: int, device: str) -> int:
    """Peak bytes of two training steps: the first makes the optimiser's state.

    NOTE: a step of a tiny model comes before, because the code of the libraries counts as memory
    once it has run, and is no model's cost.
    """
    torch.set_num_threads(threads)
    build_system(name, _copy_config(config, **TINY), 1, device).train()
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else _resident_bytes()
    system = build_system(name, config, batch_size, device)
    for _ in range(2):
        system.train()
    return (torch.cuda.max_memory_allocated(device) if cuda else _peak_resident_bytes()) - before


def _resident_bytes() -> int:
    """Bytes that this process holds now (where the system does not say: its peak so far)."""
    return _status_bytes("VmRSS") or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    """The most bytes that this process has held.

    NOTE: on Linux the usual ru_maxrss is inherited from the process that started this one, however
    large it was; VmHWM is not.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int | None:
    """A field of Linux's /proc/self/status in bytes; None elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
