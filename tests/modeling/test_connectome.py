"""The connectivity stream: what its closed-form start knows, masks, gradients, save and load."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

import cortexicon  # noqa: F401  registers the Auto classes
from cortexicon.evaluation.scores import fisher_z
from cortexicon.modeling import (
    AVQConnectomeConfig,
    AVQConnectomeModel,
    ConfigurationError,
    fisher_z_matrices,
)
from cortexicon.modeling.components_avq_connectome import flipped_kmeans

REGIONS, SCANS = 10, 300
POSITIONS = np.random.default_rng(4).uniform(-70, 70, (REGIONS, 3)).round(1)
SIZES = {
    "num_tokens": 3,
    "num_codes": 64,
    "code_dim": 4,
    "num_maps": REGIONS,
    "num_coordinates": 55,
    "position_features": 64,
    "position_wavelength": 60.0,
    "text_width": 16,
    "projection_hidden_size": 8,
    "classifier_hidden_size": 8,
    "atlas": "toy",
    "region_coordinates": POSITIONS.tolist(),
}
UPPER = np.triu_indices(REGIONS, 1)


def people(count=SCANS, seed=0, factors=3):
    """Matrices (count, regions, regions) around a mean, with a few patterns of falling size."""
    patterns = np.random.default_rng(9).normal(size=(factors + 1, REGIONS, REGIONS))
    patterns = patterns + patterns.transpose(0, 2, 1)
    scores = np.random.default_rng(seed).normal(size=(count, factors)) * 2.0 ** (
        1 - np.arange(factors)
    )
    rows = 0.2 * patterns[-1] + 0.1 * np.einsum("sf,fij->sij", scores, patterns[:-1])
    rows[:, range(REGIONS), range(REGIONS)] = 0
    return torch.tensor(rows, dtype=torch.float32)


def start(matrices, table=None, **fields):
    torch.manual_seed(0)
    model = AVQConnectomeModel(AVQConnectomeConfig(**{**SIZES, **fields})).eval()
    if table is not None:
        model.set_text_space(table, "tiny", share=torch.full((len(table),), 1 / len(table)))
    dealt = model.start_components(matrices, shrinkage=0.01)
    model.start_codebook(dealt, iterations=8, draws=4000)
    return model


@pytest.fixture(scope="module")
def model():
    return start(people())


def explained(model, matrices, **given):
    """1 - error / deviation from the mean, over pairs of the matrices decoded from codes."""
    with torch.no_grad():
        decoded = model.decode(model.encode(matrices, **given).codes).matrices
    centre = people().mean(0)
    return float(1 - (decoded - matrices).square().sum() / (matrices - centre).square().sum())


def test_the_components_are_those_of_the_covariance(model):
    """Three patterns of people are three components, with their variances; no other is dealt."""
    rows = people().numpy()[:, *UPPER]
    expected = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    with torch.no_grad():
        matrices = people()
        centre = model.components.mean_at(model._coordinates(None, None))
        there = torch.ones(1, REGIONS, dtype=torch.bool)
        found = model.components(
            (matrices - centre) * (1 - torch.eye(REGIONS)), model._coordinates(None, None), there
        )
    # Shrinkage by 1 % leaves the first three far above the rest, and nearly where they were.
    np.testing.assert_allclose(found.var(0, correction=0)[:3], expected[:3], rtol=0.03)
    first = model.deal.chosen[:, 0].sort().values
    assert first.tolist() == [0, 1, 2]  # one loud component for each token


def test_what_is_not_quantised_comes_back(model):
    """The linear path alone loses nothing of patterns that it has room for."""
    matrices = people(5, seed=1)
    with torch.no_grad():
        values, coordinates, present = model._prepare(matrices, None, None)
        centre = model._mean(None, coordinates)
        latents = model._encode(values, coordinates, present, centre)
        unit = torch.nn.functional.normalize(latents, dim=-1)
        decoded = model._decode(model.projection(unit), coordinates, centre)
    error = (decoded - matrices).square().sum() / (matrices - people().mean(0)).square().sum()
    assert error < 0.02  # the ridge of the maps, and what shrinkage has put on other axes
    assert torch.equal(decoded, decoded.transpose(1, 2))
    assert decoded.diagonal(dim1=1, dim2=2).abs().max() == 0


def test_codes_keep_new_people(model):
    assert explained(model, people(40, seed=2)) > 0.9
    fewer = start(people(), num_codes=4)
    assert explained(fewer, people(40, seed=2)) < explained(model, people(40, seed=2)) - 0.05


def test_a_pattern_is_heard_better_the_louder_it_is_made():
    """A weak pattern that few codes have no room for comes through where it was asked for."""
    matrices, fresh = people(factors=6), people(200, seed=2, factors=6)
    patterns = np.random.default_rng(9).normal(size=(7, REGIONS, REGIONS))
    weak = torch.tensor(patterns[4] + patterns[4].T, dtype=torch.float32)
    heard = []
    for emphasis in (1.0, 20.0):
        model = AVQConnectomeModel(AVQConnectomeConfig(**SIZES, emphasis=emphasis)).eval()
        dealt = model.start_components(matrices, patterns=weak[None], shrinkage=0.01)
        model.start_codebook(dealt, iterations=8, draws=4000)
        with torch.no_grad():
            decoded = model.decode(model.encode(fresh).codes).matrices
        sums = torch.stack([(part * weak)[:, *UPPER].sum(1) for part in (fresh, decoded)])
        heard.append(float(torch.corrcoef(sums)[0, 1]))
    assert heard[1] > 0.9
    assert 1 - heard[1] < 0.2 * (1 - heard[0])


def test_what_a_pattern_weighs_outside_the_kept_pairs_is_a_coordinate_of_its_own():
    """Few pairs are kept; what they do not hold of a pattern comes back all the same."""
    matrices = people(factors=6)
    weights = np.random.default_rng(9).normal(size=(7, REGIONS, REGIONS))
    pattern = torch.tensor(weights[2] + weights[2].T, dtype=torch.float32)
    pattern.fill_diagonal_(0.0)
    lost = []
    for count in (0, 1, 2):  # with the second there is room for a pattern that nobody gives
        sizes = SIZES | {"num_coordinates": 6, "num_directions": 2, "emphasis": 20.0}
        config = AVQConnectomeConfig(**sizes, num_pattern_coordinates=count)
        model = AVQConnectomeModel(config).eval()
        model.start_components(matrices, patterns=pattern[None], shrinkage=0.01)
        values, coordinates, present = model._prepare(matrices, None, None)
        centre = model._mean(None, coordinates)
        parts = model.components
        with torch.no_grad():
            there = torch.ones(1, REGIONS, dtype=torch.bool)
            moved = (values - centre) * present
            back = parts.inverse(parts(moved, coordinates, there), coordinates)
        wanted, found = ((rows * pattern).sum((1, 2)) for rows in (moved, back))
        lost.append(float((wanted - found).var() / wanted.var()))
    assert lost[0] > 0.2
    assert max(lost[1:]) < 0.02
    # A pattern that is all within the kept pairs has no rest, and QR must not invent one.
    sizes = SIZES | {"num_coordinates": 55, "num_pattern_coordinates": 1}
    model = AVQConnectomeModel(AVQConnectomeConfig(**sizes)).eval()
    model.start_components(matrices, patterns=pattern[None], shrinkage=0.01)
    assert model.components.mixtures.abs().max() == 0


def test_patterns_are_checked():
    model = AVQConnectomeModel(AVQConnectomeConfig(**SIZES))
    for patterns, message in (
        (torch.ones(9, REGIONS, REGIONS), "num_directions = 8"),
        (torch.ones(1, 3, 3), "num_directions"),
        (torch.zeros(1, REGIONS, REGIONS), "0 everywhere"),
        (torch.full((1, REGIONS, REGIONS), torch.nan), "finite"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            model.start_components(people(), patterns=patterns)


def test_forward_encode_and_decode_agree(model):
    matrices = people(7, seed=3)
    with torch.no_grad():
        encoded, out = model.encode(matrices), model(matrices)
        decoded = model.decode(encoded.codes).matrices
        alone = model.encode(matrices[2:3]).codes
    assert encoded.codes.shape == (7, 3)
    assert encoded.codes.dtype == torch.int64
    assert torch.equal(encoded.codes, out.codes)
    # A latent's code is the one nearest to it.
    nearest = (encoded.latents @ model.quantizer.codebook.T).argmax(-1)
    assert torch.equal(nearest, encoded.codes)
    assert torch.equal(decoded, out.matrices)
    assert torch.equal(alone[0], encoded.codes[2])
    pairs = (decoded - matrices)[:, *UPPER]
    assert torch.allclose(out.reconstruction_loss, pairs.square().mean(), rtol=1e-5)


def test_what_is_masked_is_not_seen(model):
    matrices = people(4, seed=5)
    mask = torch.ones(4, REGIONS, dtype=torch.bool)
    mask[1, 3] = False
    wild, gaps = matrices.clone(), matrices.clone()
    wild[1, 3], wild[1, :, 3] = 1e6, 1e6
    gaps[1, 3], gaps[1, :, 3] = torch.nan, torch.nan
    with torch.no_grad():
        codes = [
            model.encode(matrices, region_mask=mask).codes,
            model.encode(wild, region_mask=mask).codes,
            model.encode(gaps).codes,
        ]
        loss = [model(part, region_mask=mask).loss for part in (matrices, wild)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(*loss)
    whole = model.encode(matrices).codes
    assert torch.equal(whole[[0, 2, 3]], codes[0][[0, 2, 3]])
    with pytest.raises(ConfigurationError, match="infinite"):
        model.encode(wild * torch.inf)


def test_padded_regions_change_nothing(model):
    """A smaller parcellation in a larger batch: rows of padding at any position."""
    matrices = people(3, seed=6)
    padded = torch.nn.functional.pad(matrices, (0, 2, 0, 2), value=5.0)
    positions = torch.tensor(
        np.concatenate([POSITIONS, [[0, 0, 0], [9, 9, 9]]]), dtype=torch.float32
    )
    mask = torch.ones(3, REGIONS + 2, dtype=torch.bool)
    mask[:, REGIONS:] = False
    with torch.no_grad():
        found = model.encode(padded, positions, mask).codes
        assert torch.equal(found, model.encode(matrices).codes)


def test_another_order_of_regions_is_the_same_person(model):
    order = torch.tensor(np.random.default_rng(0).permutation(REGIONS))
    positions = torch.tensor(POSITIONS, dtype=torch.float32)[order]
    matrices = people(6, seed=7)
    with torch.no_grad():
        codes = model.encode(matrices).codes
        turned = model.encode(matrices[:, order][:, :, order], positions).codes
        assert torch.equal(codes, turned)
        here, there = model.decode(codes).matrices, model.decode(codes, positions).matrices
    assert torch.allclose(here[:, order][:, :, order], there, atol=1e-5)


def test_a_given_mean_stands_for_the_positions_own(model):
    matrices = people(6, seed=8)
    centre = people().mean(0)
    with torch.no_grad():
        own = model.encode(matrices).codes
        assert torch.equal(model.encode(matrices + 3.0, mean=centre + 3.0).codes, own) or (
            (model.encode(matrices + 3.0, mean=centre + 3.0).codes == own).float().mean() > 0.9
        )
        shift = (
            model.decode(own, mean=centre + 3.0).matrices - model.decode(own, mean=centre).matrices
        )
    assert torch.allclose(shift[:, *UPPER], torch.tensor(3.0), atol=1e-5)
    with pytest.raises(ConfigurationError, match="mean must be finite"):
        model.decode(own, mean=centre[:4])


def test_gradients_pass_the_codebook_straight_through():
    model = start(people()).train()
    out = model(people(16, seed=9))
    out.reconstruction_loss.backward()
    assert model.components.axes.grad.abs().sum() > 0
    assert model.components.maps.weight.grad.abs().sum() > 0
    assert model.quantizer.codebook.grad is None
    assert float(model.quantizer.updates) == 1


def test_the_reversed_gradient_reaches_projection_and_encoder():
    table = torch.randn(60, 16, generator=torch.Generator().manual_seed(2))
    model = start(people(), table, domain_weight=1.0).train()
    model.quantizer.ema_decay = 1.0  # the same codebook three times
    parts = {"encoder": model.components.axes, "P": model.projection.linear.weight}
    gradients = {}
    for strength in (1.0, -1.0, 0.0):
        out = model(people(16, seed=9), text_embeddings=table, reversal=strength)
        gradients[strength] = torch.autograd.grad(out.domain_loss, list(parts.values()))
    for number, name in enumerate(parts):
        forward, backward = gradients[-1.0][number], gradients[1.0][number]
        assert forward.abs().sum() > 0, name
        assert torch.allclose(forward, -backward, atol=1e-3 * float(forward.abs().max())), name
        assert gradients[0.0][number].abs().sum() == 0, name


def test_with_text_p_starts_where_text_lies_and_is_read_back():
    table = 2.0 + torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    model = start(people(), table)
    rows = model.project_codebook()
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.05)
    assert explained(model, people(40, seed=2)) > 0.9


def test_the_checkpoint_is_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is AVQConnectomeModel
    matrices = people(5, seed=4)
    with torch.no_grad():
        codes = model.encode(matrices).codes
        assert torch.equal(again.encode(matrices).codes, codes)
        assert torch.equal(again.decode(codes).matrices, model.decode(codes).matrices)
    assert again.codebook_fingerprint() == model.codebook_fingerprint()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_checkpoint_loads_without_the_package(model, tmp_path, run_without_package):
    from safetensors.torch import save_file

    model.save_pretrained(tmp_path / "m")
    matrices = people(5, seed=4)
    with torch.no_grad():
        codes = model.encode(matrices).codes
    save_file({"matrices": matrices, "codes": codes}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "wanted = load_file(sys.argv[2])\n"
        "print(type(model).__module__.partition('.')[0])\n"
        "print(torch.equal(model.encode(wanted['matrices']).codes, wanted['codes']))\n"
    )
    found = run_without_package(code, tmp_path / "m", tmp_path / "expected.safetensors")
    assert found.split() == ["transformers_modules", "True"]


def test_mirror_images_have_codes_of_their_own():
    """Half of the sphere's data, one sign only, still fills both signs."""
    rows = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) + 0.1
    rows = torch.nn.functional.normalize(torch.cat([rows, torch.full((500, 1), 2.0)], 1), dim=-1)
    centres = flipped_kmeans(rows, 32, 8, 4000, seed=0)
    assert torch.allclose(centres.norm(dim=-1), torch.ones(32))
    assert (centres[:, -1] > 0).all()
    signs = (centres[:, :3] > 0).all(-1), (centres[:, :3] < 0).all(-1)
    assert all(bool(one.any()) for one in signs)


def test_fisher_z_is_that_of_the_evaluation():
    series = np.random.default_rng(0).normal(size=(2, 50, REGIONS))
    series[1, :, 4] = 3.0
    matrices, mask = fisher_z_matrices(torch.tensor(series))
    assert mask[0].all()
    assert mask[1].tolist() == [column != 4 for column in range(REGIONS)]
    np.testing.assert_allclose(matrices[0].numpy()[UPPER], fisher_z(series[0]), atol=1e-6)
    assert (matrices[1, 4] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokenz": 3}, "num_tokens"),
        ({"code_dim": 1}, "code_dim must be an integer >= 2"),
        ({"num_coordinates": 56}, "55 pairs"),
        ({"code_anchor": 0.0}, "code_anchor"),
        ({"region_coordinates": [[0, 0]]}, "finite"),
    ],
)
def test_a_configuration_that_cannot_work_says_why(change, message):
    with pytest.raises(ConfigurationError, match=message):
        AVQConnectomeConfig(**{**SIZES, **change})


def test_codes_before_the_start_are_refused():
    model = AVQConnectomeModel(AVQConnectomeConfig(**SIZES))
    with pytest.raises(ConfigurationError, match="never started"):
        model.encode(people(2))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \(batch, 3\)"),
        (torch.full((2, 3), 64), "must lie in 0..63"),
        (torch.zeros(2, 3), "integers"),
    ],
)
def test_codes_that_do_not_fit_are_refused(model, codes, message):
    with pytest.raises(ConfigurationError, match=message):
        model.decode(codes)
