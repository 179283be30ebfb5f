"""`cortexicon info`: what a checkpoint folder holds, in a few lines."""

import argparse
from pathlib import Path

from cortexicon.inference import load_checkpoint
from cortexicon.inference.connectome import is_connectome, load_connectome
from cortexicon.modeling import AVQConnectomeModel


def run(arguments: argparse.Namespace) -> None:
    """Print the facts of a codec of either stream, of both, or of a language model."""
    folder: Path = arguments.checkpoint
    facts = _connectome(load_connectome(folder)) if is_connectome(folder) else _checkpoint(folder)
    for name, fact in facts.items():
        print(f"{name:<13}{fact}")


def _checkpoint(folder: Path) -> dict[str, str]:
    checkpoint = load_checkpoint(folder)
    codec, config = checkpoint.codec, checkpoint.codec.config
    connectome = getattr(checkpoint.model, "connectome", None)
    if is_connectome(folder / "connectome"):
        connectome = load_connectome(folder / "connectome")
    facts = {
        "model": f"{checkpoint.model_type}, {checkpoint.model.num_parameters():,} parameters",
        "atlas": _atlas(config),
        "sampling": f"every {config.sampling_interval} s, {config.window_length} samples a window",
        "tokens": f"{config.tokens_per_window} per window ({config.token_layout} layout)",
        "codebook": f"{config.num_codes} codes, fingerprint {codec.codebook_fingerprint()[:12]}",
        "vocabulary": f"{len(checkpoint.processor.tokenizer)} ids",
    }
    if connectome is not None:
        found = _connectome(connectome)
        facts["connectivity"] = f"{found['tokens']}, {found['codebook']}"
    return facts


def _connectome(model: AVQConnectomeModel) -> dict[str, str]:
    config, fingerprint = model.config, model.codebook_fingerprint()[:12]
    return {
        "model": f"{config.model_type}, {model.num_parameters():,} parameters",
        "atlas": _atlas(config),
        "tokens": f"{config.num_tokens} per scan",
        "codebook": f"{config.num_codes} codes, fingerprint {fingerprint}",
    }


def _atlas(config) -> str:
    regions = len(config.region_labels) if config.region_labels else "any number of"
    return f"{config.atlas or 'not stored'}, {regions} regions"
