"""The comparison of costs: it runs, its rival is a fair one, and its numbers are where they belong.

Nothing here depends on how long anything takes.
"""

import json
import math

import pytest
import torch

from cortexicon import cli
from cortexicon.evaluation import EvaluationError, speed
from cortexicon.modeling import AVQConfig, ConfigurationError
from cortexicon.modeling.layers_avq import AVQBlock

SIZES = {
    "window_length": 8,
    "patch_length": 2,
    "num_latents": 2,
    "num_codes": 16,
    "code_dim": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "num_components": 6,
    "position_features": 4,
    "text_width": 8,
    "projection_hidden_size": 8,
    "classifier_hidden_size": 8,
}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """Every turn is one call."""
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.0)


@pytest.fixture
def config():
    return AVQConfig(**SIZES)


def started(name, config, batch_size=3):
    config = speed._with_regions(config, 6)
    return speed.build_system(name, config, batch_size, "cpu"), config


@pytest.mark.parametrize(
    ("layout", "patches", "tokens"), [("latent", (4,), [8, 12]), ("grid", (2, 4), [24, 24, 12])]
)
def test_the_comparison_returns_finite_ratios(config, layout, patches, tokens, monkeypatch):
    if layout == "grid":  # one test starts processes; this one need not
        monkeypatch.setattr(speed, "_in_fresh_process", lambda *_: 2**20)
    config.token_layout = layout
    threads = torch.get_num_threads()
    results = speed.compare_speed(
        config, regions=6, batch_size=2, repeats=2, rival_patches=patches, device="cpu"
    )
    assert torch.get_num_threads() == threads
    rivals = [f"plain transformer, patch {patch}" for patch in patches]
    assert list(results["systems"]) == [speed.CODEC, *rivals]
    assert [one["tokens_per_window"] for one in results["systems"].values()] == tokens
    assert list(results["ratios"]) == rivals
    for ratio in results["ratios"].values():
        assert ratio.keys() == {"encode", "train", "memory"}
        assert all(math.isfinite(value) and value > 0 for value in ratio.values())
    assert all(one["peak_bytes"] > 0 for one in results["systems"].values())
    table = speed.render_speed(results)
    assert all(f"| {name} |" in table for name in (*results["systems"], *rivals))


def test_ratios_are_above_one_where_the_codec_is_better():
    codec = {"encode_windows_per_second": 30.0, "train_step_seconds": 2.0, "peak_bytes": 10}
    rival = {"encode_windows_per_second": 5.0, "train_step_seconds": 8.0, "peak_bytes": 40}
    assert speed._ratios(codec, rival) == {"encode": 6.0, "train": 4.0, "memory": 0.25}
    for wrong in (0, math.nan, math.inf):
        with pytest.raises(EvaluationError, match="peak_bytes was measured as"):
            speed._ratios(codec, rival | {"peak_bytes": wrong})


def test_the_rival_has_the_codecs_blocks_and_codebook(config):
    codec, rival = (started(name, config)[0].model for name in (speed.CODEC, "plain"))

    def shapes(model):
        return [
            [tuple(p.shape) for p in part.parameters()]
            for part in model.modules()
            if isinstance(part, AVQBlock)
        ]

    assert shapes(codec) == shapes(rival)
    assert len(shapes(rival)) == 3
    assert codec.quantizer.codebook.shape == rival.quantizer.codebook.shape
    kinds = {m.config._attn_implementation for m in rival.modules() if isinstance(m, AVQBlock)}
    kinds |= {m.config._attn_implementation for m in codec.modules() if isinstance(m, AVQBlock)}
    assert kinds == {"sdpa"}


def test_the_rival_reads_every_region_and_patch(config):
    system, config = started("plain", config)
    model = system.model.eval()
    coordinates = torch.tensor(config.region_coordinates)[None]
    values = torch.randn(2, 8, 6)
    with torch.no_grad():
        before, _ = tokens_of(model, values, coordinates)
        values[0, 4:6, 3] += 5.0  # patch 2 of region 3
        after, codes = tokens_of(model, values, coordinates)
    assert codes.shape == (2, 24)
    changed = (before - after).abs().amax(-1)  # (batch, tokens)
    assert (changed[0] > 0).all()  # attention takes it everywhere,
    assert changed[0].argmax() == 2 * 6 + 3  # most of all to its own token,
    assert (changed[1] == 0).all()  # and to no other window


def test_both_are_timed_for_their_codes_alone(config):
    # Neither looks its codes up or projects them, and both take the codes that training would.
    (codec, _), (rival, _) = started(speed.CODEC, config), started("plain", config)
    assert list(codec.encode()) == ["codes", "token_mask"]
    codes = rival.encode()
    assert codes.dtype == torch.int64
    asked = []
    hook = rival.model.to_code.register_forward_hook(lambda *call: asked.append(call[2]))
    rival.encode()
    hook.remove()
    with torch.no_grad():
        assert torch.equal(rival.model.quantizer(asked[0]).codes, codes)


def tokens_of(model, values, coordinates):
    """What the rival's codebook is asked for, and its codes."""
    seen = []
    hook = model.to_code.register_forward_hook(lambda *call: seen.append(call[2]))
    codes = model.encode(values, coordinates)
    hook.remove()
    return seen[0], codes


@pytest.mark.parametrize("name", [speed.CODEC, "plain"])
def test_a_training_step_trains(config, name):
    system, _ = started(name, config)
    weights = {n: p.detach().clone() for n, p in system.model.named_parameters()}
    codebook = system.model.quantizer.codebook.clone()
    for group in (losses := [system.train() for _ in range(150)], losses[:1]):
        assert all(math.isfinite(loss) for loss in group)
    if name == "plain":  # the codec's loss holds an adversary's
        assert sum(losses[-5:]) < sum(losses[:5])
    still = [n for n, p in system.model.named_parameters() if torch.equal(p, weights[n])]
    assert still == []
    assert not torch.equal(system.model.quantizer.codebook, codebook)
    assert all(p.grad is None for p in system.model.parameters())


def test_encoding_changes_nothing(config):
    for name in (speed.CODEC, "plain"):
        system, _ = started(name, config)
        before = {n: v.clone() for n, v in system.model.state_dict().items()}
        system.encode()
        for n, value in system.model.state_dict().items():
            assert torch.equal(value, before[n]), (name, n)


def test_own_regions_are_kept_and_the_given_configuration_too(config):
    assert len(speed._with_regions(config, 6).region_coordinates) == 6
    assert config.region_coordinates is None
    own = AVQConfig(**SIZES, region_coordinates=[[1.0, 2.0, 3.0]], region_labels=["a"])
    assert speed._with_regions(own, 6).region_coordinates == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("number", ["regions", "batch_size", "repeats", "threads"])
def test_numbers_below_one_are_refused(config, number):
    with pytest.raises(EvaluationError, match=f"{number} must be at least 1, found 0"):
        speed.compare_speed(config, **{number: 0})


def test_a_patch_that_does_not_divide_the_window_is_refused(config):
    with pytest.raises(ConfigurationError, match="multiple of patch_length, found 8 and 3"):
        speed.compare_speed(config, rival_patches=(3,))


def test_memory_is_measured_above_what_was_there():
    held = speed._resident_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert speed._peak_resident_bytes() >= held
    assert speed._resident_bytes() - held > 0.9 * block.numel()


def test_the_command_takes_a_training_configuration(repository, tmp_path, capsys, monkeypatch):
    seen = {}

    def measured(config, **numbers):
        seen.update(config=config, **numbers)
        return {"ratios": {}}

    from cortexicon import _speed

    monkeypatch.setattr(_speed, "compare_speed", measured)
    monkeypatch.setattr(_speed, "render_speed", lambda results: "TABLE")
    file = repository / "training" / "configs" / "demo_avq.yaml"
    out = tmp_path / "new" / "speed.json"
    assert cli.main(["speed", str(file), "--json", str(out), "--regions", "7"]) == 0
    assert capsys.readouterr().out.startswith("TABLE\nfigures -> ")
    assert seen["config"].num_latents == 1
    assert (seen["regions"], seen["batch_size"], seen["repeats"], seen["threads"]) == (
        7,
        None,
        3,
        1,
    )
    assert json.loads(out.read_text(encoding="utf-8"))["ratios"] == {}
    assert cli.main(["speed", str(tmp_path / "absent.yaml")]) == 2
