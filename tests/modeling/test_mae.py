"""The masked autoencoder: what it hides, what it scores, and that it travels."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

import cortexicon  # noqa: F401  registers the Auto classes
from cortexicon.modeling import ConfigurationError, FMRIMAEConfig, FMRIMAEModel

SIZES = {
    "window_length": 20,
    "patch_length": 5,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_intermediate_size": 16,
    "decoder_num_attention_heads": 2,
    "position_features": 8,
}
REGIONS = 10


def make(**values) -> FMRIMAEModel:
    torch.manual_seed(0)
    model = FMRIMAEModel(FMRIMAEConfig(**{**SIZES, **values})).eval()
    for name, parameter in model.named_parameters():  # far from a start that hides faults
        if name.endswith("weight") and parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_values": torch.randn(3, 20, REGIONS, generator=generator),
        "region_coordinates": 40 * torch.randn(1, REGIONS, 3, generator=generator),
    }


@pytest.fixture
def noise():
    return torch.rand(3, REGIONS * 4, generator=torch.Generator().manual_seed(2))


def patches_of(series):
    """(batch, time, regions) -> (batch, regions, patches, length)."""
    return series.transpose(1, 2).unflatten(2, (-1, 5))


@pytest.mark.parametrize("block", ["transformer", "nystrom"])
def test_three_quarters_are_hidden_and_only_they_are_scored(inputs, noise, block):
    out = make(block=block)(**inputs, noise=noise)
    assert out.mask.shape == (3, REGIONS, 4)
    assert out.mask.flatten(1).sum(1).tolist() == [30, 30, 30]
    error = (patches_of(out.reconstruction) - patches_of(inputs["input_values"])).square()
    torch.testing.assert_close(out.loss, error[out.mask].mean())


@pytest.mark.parametrize("block", ["transformer", "nystrom"])
def test_what_is_hidden_does_not_reach_the_output(inputs, noise, block):
    model = make(block=block)
    with torch.no_grad():
        before = model(**inputs, noise=noise)
        changed = patches_of(inputs["input_values"]).clone()
        changed[before.mask] += 7.0
        changed = changed.flatten(2).transpose(1, 2)
        after = model(changed, inputs["region_coordinates"], noise=noise)
        assert torch.equal(before.reconstruction, after.reconstruction)
        seen = patches_of(inputs["input_values"]).clone()
        seen[~before.mask] += 7.0
        seen = seen.flatten(2).transpose(1, 2)
        moved = model(seen, inputs["region_coordinates"], noise=noise)
    assert not torch.allclose(before.reconstruction, moved.reconstruction)


@pytest.mark.parametrize("pooling", ["mean", "regions"])
def test_a_missing_region_is_as_good_as_absent(inputs, pooling):
    coordinates = inputs["region_coordinates"]
    model = make(pooling=pooling)
    mask = torch.ones(3, REGIONS, dtype=torch.bool)
    mask[:, 4] = False
    wild = inputs["input_values"].clone()
    wild[:, :, 4] = torch.nan
    kept = [k for k in range(REGIONS) if k != 4]
    with torch.no_grad():
        masked = model.encode(wild, coordinates, region_mask=mask)
        without = model.encode(inputs["input_values"][:, :, kept], coordinates[:, kept])
    torch.testing.assert_close(masked.last_hidden_state[:, kept], without.last_hidden_state)
    assert float(masked.last_hidden_state[:, 4].abs().max()) == 0.0
    if pooling == "mean":
        torch.testing.assert_close(masked.pooled, without.pooled)


def test_missing_tokens_are_never_scored(inputs):
    mask = torch.ones(3, REGIONS, dtype=torch.bool)
    mask[0, :9] = False  # four tokens left, and ten are kept
    wild = inputs["input_values"].masked_fill(~mask[:, None], torch.nan)
    out = make()(wild, inputs["region_coordinates"], region_mask=mask)
    assert torch.isfinite(out.loss)
    assert int(out.mask[0].sum()) == 0
    assert not bool(out.mask[1:].logical_not()[:, 9].all())


def test_every_weight_is_trained(inputs, noise):
    model = make().train()
    model(**inputs, noise=noise).loss.backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or float(parameter.grad.abs().max()) == 0.0
    ]
    assert idle == []


def test_coordinates_matter_and_their_order_does_not(inputs):
    model = make()
    turned = torch.arange(REGIONS).flip(0)
    values, coordinates = inputs["input_values"], inputs["region_coordinates"]
    with torch.no_grad():
        one = model.encode(values, coordinates).pooled
        same = model.encode(values[:, :, turned], coordinates[:, turned]).pooled
        other = model.encode(values[:, :, turned], coordinates).pooled
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other)


def test_heads_read_numbers_in_their_range_and_scores_of_classes():
    targets = [
        {"name": "age", "kind": "number", "minimum": 6, "maximum": 65},
        {"name": "sex", "kind": "class", "classes": ["F", "M"]},
    ]
    model = make(targets=targets)
    with torch.no_grad():
        model.heads[0].bias.fill_(3.0)
        model.heads[0].weight.zero_()
        found = model.read_out(torch.randn(5, 16) * 10)
    torch.testing.assert_close(found["age"], torch.full((5,), 3.0).exp())
    assert found["sex"].shape == (5, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_length": 7}, "multiple of patch_length"),
        ({"hidden_size": 15}, "multiple of num_attention_heads"),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"block": "lstm"}, "one of transformer, nystrom"),
        ({"hiden_size": 16}, "hidden_size"),
    ],
)
def test_a_wrong_configuration_is_named(values, message):
    with pytest.raises(ConfigurationError, match=message):
        FMRIMAEConfig(**{**SIZES, **values})


def test_a_window_without_any_region_is_refused(inputs):
    mask = torch.zeros(3, REGIONS, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="no region"):
        make().encode(**inputs, region_mask=mask)


LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
wanted = load_file(sys.argv[2])
with torch.no_grad():
    found = model.encode(wanted["values"], wanted["coordinates"]).last_hidden_state
print(type(model).__module__.partition(".")[0], torch.equal(found, wanted["features"]))
"""


@pytest.mark.parametrize("block", ["transformer", "nystrom"])
def test_it_loads_with_and_without_the_package(inputs, block, tmp_path, run_without_package):
    model = make(block=block)
    model.save_pretrained(tmp_path / "mae")
    assert type(AutoModel.from_pretrained(tmp_path / "mae")) is FMRIMAEModel
    with torch.no_grad():
        features = model.encode(**inputs).last_hidden_state
    tensors = {
        "values": inputs["input_values"],
        "coordinates": inputs["region_coordinates"],
        "features": features,
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    found = run_without_package(LOAD, tmp_path / "mae", tmp_path / "x.safetensors")
    assert found.split("\n")[0] == "transformers_modules True"


def test_similarity_is_the_cosine_of_what_the_signal_changes():
    torch.manual_seed(0)
    config = FMRIMAEConfig(
        window_length=20, patch_length=10, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, decoder_hidden_size=8,
        decoder_intermediate_size=8, decoder_num_attention_heads=2, position_features=8,
        region_coordinates=torch.randn(5, 3).mul(40).tolist(), pooling="similarity",
    )  # fmt: skip
    model = FMRIMAEModel(config).eval()
    values = torch.randn(3, 20, 5)
    values[:, :, 1] = values[:, :, 0]
    with torch.no_grad():
        found = model.encode(values)
        silent = model.encode(torch.zeros(1, 20, 5)).last_hidden_state
    assert found.pooled.shape == (3, 10) == (3, config.feature_width)
    changed = found.last_hidden_state - silent
    wanted = torch.cosine_similarity(changed[:, 0], changed[:, 3], dim=-1).mean(1)
    torch.testing.assert_close(found.pooled[:, 2], wanted)  # pairs 01, 02, 03, ...
    assert (found.pooled[:, 0] > found.pooled[:, 1:].max(1).values).all()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 4] = False
    with torch.no_grad():
        pooled = model.encode(values, region_mask=mask).pooled
    assert (pooled[:, [3, 6, 8, 9]] == 0).all()
