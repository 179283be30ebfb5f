"""The domain classifier's gradient: reversed for P and the encoder, not for itself; the losses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from cortexicon.modeling import alignment_avq, losses_avq
from cortexicon.modeling.losses_avq import (
    connectivity_loss,
    domain_loss,
    reconstruction_loss,
    reversal_strength,
    reverse_gradient,
    spectrum_loss,
    window_correlation,
)

# Every part that the reversed gradient must reach, and none that lies behind the code.
REACHED = {"components", "encoder_in", "encoder", "encoder_out", "projection"}
GRID = {"token_maps"}


@pytest.fixture
def text():
    return torch.randn(60, 24, generator=torch.Generator().manual_seed(8))


def domain_gradients(codec, windows, text, reversal):
    """Gradients of the domain loss alone, by parameter name, from a fresh copy in training mode."""
    model = copy.deepcopy(codec).train()
    model(windows, text_embeddings=text, reversal=reversal).domain_loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_domain_loss_reaches_p_and_the_encoder_with_reversed_sign(
    codec, windows, text, monkeypatch, strength
):
    reversed_ = domain_gradients(codec, windows, text, strength)
    monkeypatch.setattr(alignment_avq, "reverse_gradient", lambda x, strength: x)
    plain = domain_gradients(codec, windows, text, strength)
    assert reversed_.keys() == plain.keys()
    for name in plain:
        sign = 1.0 if name.startswith("classifier.") else -strength
        torch.testing.assert_close(
            reversed_[name], sign * plain[name], rtol=1e-4, atol=1e-9, msg=name
        )
    reached = {name.partition(".")[0] for name, grad in plain.items() if grad.abs().max() > 1e-7}
    grid = GRID if codec.config.token_layout == "grid" else set()
    assert reached == REACHED | grid | {"classifier"}
    for name in ("projection.linear.weight", "projection.up.weight", "encoder.blocks.0.qkv.weight"):
        assert reversed_[name].norm() > 1e-6, name


def test_reversal_zero_cuts_the_branch_but_not_the_classifier(codec, windows, text):
    cut = domain_gradients(codec, windows, text, 0.0)
    for name, gradient in cut.items():
        if name.startswith("classifier."):
            continue
        assert gradient.abs().max() == 0, name
    assert cut["classifier.layers.0.weight"].norm() > 1e-6


@pytest.mark.parametrize(("part", "direction"), [("classifier", -1), ("projection", 1)])
def test_descent_teaches_the_classifier_and_lets_p_fool_it(codec, text, part, direction):
    """A step of gradient descent lowers the domain loss in one part and raises it in the other."""

    def loss():
        return codec.alignment_losses(codec.project_codebook(), text)["domain_loss"]

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in getattr(codec, part).parameters():
            parameter -= 0.1 * parameter.grad
        assert direction * (loss() - before) > 1e-4


def test_text_embeddings_are_the_targets_and_get_no_gradient(codec, windows, text):
    text.requires_grad_(True)
    codec.train()(windows, text_embeddings=text).loss.backward()
    assert text.grad is None


def test_without_text_there_is_no_domain_loss(codec, windows):
    output = codec(windows)
    assert output.domain_loss is None
    assert output.domain_accuracy is None


def test_the_loss_is_the_weighted_sum_of_its_parts(make_codec, windows, text):
    weights = {"commitment": 0.2, "spectrum": 0.3, "connectivity": 0.4, "domain": 0.5}
    codec = make_codec(**{f"{name}_weight": weight for name, weight in weights.items()})
    with torch.no_grad():
        output = codec(windows, text_embeddings=text)
    expected = output.reconstruction_loss + sum(
        weight * output[f"{name}_loss"] for name, weight in weights.items()
    )
    torch.testing.assert_close(output.loss, expected)
    assert all(output[f"{name}_loss"] > 0 for name in weights)
    error = (output.reconstruction - windows).square().mean()
    torch.testing.assert_close(output.reconstruction_loss, error)


def test_reverse_gradient_is_the_identity_forward():
    x = torch.randn(5, requires_grad=True)
    y = reverse_gradient(x, 0.7)
    assert torch.equal(y, x)
    y.backward(torch.arange(5.0))
    torch.testing.assert_close(x.grad, -0.7 * torch.arange(5.0))


@pytest.mark.parametrize(
    ("progress", "strength"),
    [(0.0, 0.0), (0.1, math.tanh(0.5)), (0.5, math.tanh(2.5)), (1.0, 0.9999092)],
)
def test_reversal_strength_known_values(progress, strength):
    # 2 / (1 + exp(-10 p)) - 1 is tanh(5 p).
    assert reversal_strength(progress) == pytest.approx(strength, abs=1e-6)


def test_reconstruction_loss_known_answer():
    target = torch.zeros(1, 2, 2)
    found = torch.tensor([[[1.0, 2.0], [3.0, 100.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    assert reconstruction_loss(found, target, mask).item() == pytest.approx(14 / 3)
    assert reconstruction_loss(found, target, torch.zeros_like(mask)).item() == 0


def test_spectrum_loss_known_answer():
    time = torch.arange(16.0)
    wave = torch.cos(2 * math.pi * 3 * time / 16)[None, :, None]  # amplitude 16 / 2 / sqrt(16) = 2
    mask = torch.ones(1, 16, 1, dtype=torch.bool)
    assert spectrum_loss(wave, wave, mask).item() == 0
    # One of nine frequencies differs, by 2; a shift in time changes nothing.
    assert spectrum_loss(wave, 0 * wave, mask).item() == pytest.approx(2 / 9, abs=1e-5)
    assert spectrum_loss(wave, wave.roll(5, 1), mask).item() == pytest.approx(0, abs=1e-5)
    two = wave.expand(1, 16, 2)
    half = mask.repeat(1, 1, 2)
    half[..., 1] = False
    assert spectrum_loss(two, 0 * two, half).item() == pytest.approx(2 / 9, abs=1e-5)


def test_connectivity_loss_known_answer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 400, 4, generator=generator)
    mask = torch.ones_like(x, dtype=torch.bool)
    found = window_correlation(x, mask)[0]
    # The floor of the variance takes about 1 % off.
    torch.testing.assert_close(found, torch.corrcoef(x[0].T), rtol=0, atol=0.02)
    assert connectivity_loss(x, x, mask).item() == 0
    assert connectivity_loss(3 * x + 1, x, mask).item() < 1e-3  # neither scale nor offset counts
    # Two regions that agree against two that are opposite: off-diagonal -1 and 1.
    one = torch.randn(1, 400, 1, generator=generator)
    same, opposite = torch.cat([one, one], 2), torch.cat([one, -one], 2)
    loss = connectivity_loss(opposite, same, mask[:1, :, :2]).item()
    assert loss == pytest.approx(2**2 / 2, rel=0.05)
    masked = mask[:1, :, :2].clone()
    masked[..., 1] = False
    assert connectivity_loss(opposite, same, masked).item() < 1e-6


@pytest.mark.parametrize(
    ("code", "text", "loss", "accuracy"),
    [
        ([0.0, 0.0], [0.0], math.log(2), 0.5),
        ([-50.0], [50.0, 50.0], 0.0, 1.0),
        ([3.0], [-3.0], math.log1p(math.exp(3)), 0.0),
        # Sides weigh one half each, whatever their sizes.
        ([-50.0], [50.0, 50.0, -50.0, -50.0], 0.25 * 50, 0.75),
    ],
)
def test_domain_loss_known_answers(code, text, loss, accuracy):
    found, right = domain_loss(torch.tensor(code), torch.tensor(text))
    assert found.item() == pytest.approx(loss, abs=1e-5)
    assert right.item() == accuracy


def test_the_larger_side_is_thinned_evenly(make_codec):
    codec = make_codec()
    text = torch.randn(5, 24)
    codes = torch.randn(5, 24).repeat_interleave(11, 0)  # 55 rows that thin to its five kinds
    thinned = codec.alignment_losses(codes, text)["domain_loss"]
    whole = codec.alignment_losses(codes[::11], text)["domain_loss"]
    torch.testing.assert_close(thinned, whole)
    assert F.mse_loss(codes[0], codes[-1]) > 0


@pytest.fixture
def table() -> torch.Tensor:
    """Embeddings (600, 24) of a text side that is neither centred nor round."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(600, 24, generator=generator) @ torch.diag(torch.linspace(3, 0.3, 24)) + 1.0


def test_the_closed_form_critics_are_zero_for_text_itself_and_not_elsewhere(make_codec, table):
    codec = make_codec(moment_weight=1.0, energy_weight=1.0)
    codec.set_text_space(table, share=torch.full((600,), 1 / 600))
    same = codec.alignment_losses(table, table)
    assert same["moment_loss"] < 1e-6
    assert same["energy_loss"].abs() < 1e-6
    moved = codec.alignment_losses(table + table.std(), table)
    assert moved["moment_loss"] > 0.1
    assert moved["energy_loss"] > 0.1
    wider = codec.alignment_losses(table.mean(0) + 2 * (table - table.mean(0)), table)
    assert wider["moment_loss"] > 1.0


def test_the_energy_distance_of_known_points():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    # E|x - y| = 1, E|x - x'| = 1, E|y - y'| = 0
    assert float(losses_avq.energy_loss(first, second)) == pytest.approx(1.0, abs=1e-5)


def test_p_starts_at_mean_and_leading_directions_of_the_text(make_codec, table):
    share = torch.full((600,), 1 / 600)
    codec = make_codec(start=False)
    codec.set_text_space(table, share=share)
    codes = torch.randn(20000, codec.config.code_dim, generator=torch.Generator().manual_seed(0))
    codec.projection.down.weight.data.zero_()
    with torch.no_grad():
        rows = codec.projection(torch.nn.functional.normalize(codes, dim=-1))
    assert (rows.mean(0) - table.mean(0)).norm() < 0.05 * table.std()
    expected = torch.linalg.eigvalsh(torch.cov(table.T)).flip(0)[: codec.config.code_dim]
    found = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)[: codec.config.code_dim]
    assert torch.allclose(found, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("reached", "projection", "encoder"),
    [
        ("both", True, True),
        ("projection", True, False),
        ("encoder", False, True),
        ("none", False, False),
    ],
)
def test_the_alignment_reaches_what_the_configuration_names(
    make_codec, windows, text, reached, projection, encoder
):
    codec = make_codec(domain_gradient=reached, moment_weight=1.0, energy_weight=1.0).train()
    output = codec(windows, text_embeddings=text)
    (output.domain_loss + output.moment_loss + output.energy_loss).backward()

    def norm(part):
        return sum(float(p.grad.norm()) for p in part.parameters() if p.grad is not None)

    assert (norm(codec.projection) > 1e-6) is projection
    assert (norm(codec.encoder) > 1e-6) is encoder
    assert norm(codec.classifier) > 1e-6
