"""The linear path: how components are dealt, fitted and masked, and how well it starts."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cortexicon.evaluation.rate_distortion import rate_distortion_r2
from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.modeling.components_avq import RegionMaps, deal_components, rate_level

REGIONS, WINDOW, PATCH = 10, 20, 10
SPACE = 2.0 ** -torch.arange(REGIONS).double()
ORDER = torch.randperm(REGIONS, generator=torch.Generator().manual_seed(5))


def toeplitz(rate=0.8):
    """Covariance of the samples of a patch, float64 (PATCH, PATCH)."""
    time = torch.arange(PATCH).double()
    return rate ** (time[:, None] - time).abs()


def axes_of_regions():
    """Orthogonal float64 (REGIONS, REGIONS), the principal components in columns."""
    generator = torch.Generator().manual_seed(8)
    return torch.linalg.qr(torch.randn(REGIONS, REGIONS, generator=generator).double())[0]


def gaussian_windows(count, seed):
    """Float32 (count, WINDOW, REGIONS): patches of one separable law, each drawn by itself."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, WINDOW // PATCH, PATCH, REGIONS, generator=generator).double()
    patches = torch.linalg.cholesky(toeplitz()) @ white @ (SPACE.sqrt() * axes_of_regions()).T
    return patches.flatten(1, 2).float()


def spectrum():
    """Variances of the components of a patch, largest first, float64 (PATCH * REGIONS,)."""
    product = torch.outer(torch.linalg.eigvalsh(toeplitz()), SPACE)
    return product.flatten().sort(descending=True).values


def text_space(codec, types=400):
    """Give `codec` a text space whose tokens are not all equally frequent."""
    generator = torch.Generator().manual_seed(6)
    width = codec.config.text_width
    turn = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.5, width)
    table = 0.1 * torch.randn(types, width, generator=generator) @ turn + 0.3
    share = torch.rand(types, generator=generator)
    codec.set_text_space(table, share=share / share.sum())


@pytest.fixture
def make_started(make_codec):
    """`make_started(**fields)`: a codec of all components, started on Gaussian data."""

    def make(windows=None, **fields):
        fields = {"num_components": REGIONS, "position_features": 64, **fields}
        codec = make_codec(start=False, **fields)
        text_space(codec)
        windows = gaussian_windows(1000, 0) if windows is None else windows
        codec.start_components([{"input_values": windows}])
        return codec

    return make


def patches_of(codec, windows, mask=None):
    """What `PatchComponents` is given."""
    values, coordinates, region_mask, _ = codec._prepare(windows, region_mask=mask)
    return values.unflatten(1, (-1, PATCH)), coordinates, region_mask


# ------------------------------------------------------------------ rates


def rates(variances, bits):
    """Bits of each component, float64 (components,)."""
    return (0.5 * (variances / rate_level(variances, bits)).log2()).clamp(min=0)


@pytest.mark.parametrize("bits", [3.0, 40.0, 400.0])
def test_the_water_level_is_that_of_the_gaussian_reference(bits):
    variances = spectrum()[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    assert float(rates(variances, bits).sum()) == pytest.approx(bits)
    distortion = variances.clamp(max=rate_level(variances, bits)).sum()
    expected = rate_distortion_r2(spectrum().numpy(), bits)
    assert float(1 - distortion / variances.sum()) == pytest.approx(expected)


def test_every_component_is_dealt_once_and_every_hand_needs_the_same_bits():
    variances, bits, hands = spectrum(), 120.0, 7
    dealt = deal_components(variances, bits, hands, cards=15)
    assert dealt.shape == (hands, 15)
    assert sorted(dealt.flatten().tolist()) == [*range(100), *[100] * 5]
    of_hands = F.pad(rates(variances, bits), (0, 1))[dealt].sum(1)
    assert float(of_hands.sum()) == pytest.approx(bits)
    # The last component above the level is what they may differ by.
    assert float(of_hands.max() - of_hands.min()) < 0.05 * float(of_hands.mean())
    in_turn = F.pad(rates(variances, bits), (0, 1))[torch.arange(105).clamp(max=100).view(15, 7)]
    assert float(in_turn.sum(0).max() - in_turn.sum(0).min()) > 0.2 * float(of_hands.mean())


def test_where_places_are_few_the_largest_components_have_them():
    variances = spectrum()[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    dealt = deal_components(variances, 60.0, 4, cards=6)
    expected = variances.argsort(descending=True)[:24]
    assert sorted(dealt.flatten().tolist()) == sorted(expected.tolist())


# ------------------------------------------------------------------ maps over the brain


def maps_of(features, wavelength, maps):
    torch.manual_seed(0)
    found = RegionMaps(features, wavelength, maps)
    found.frequencies.normal_()
    return found


def test_a_fitted_map_has_its_values_and_is_smooth_between():
    rng = np.random.default_rng(0)
    known, between = (
        torch.tensor(rng.uniform(-60, 60, (count, 3)), dtype=torch.float32) for count in (400, 200)
    )

    def wanted(where):
        return torch.stack([(where[:, 0] / 40).sin(), where[:, 1] * where[:, 2] / 3600], 1)

    maps = maps_of(512, 150.0, 2)
    maps.fit(known, wanted(known))
    torch.testing.assert_close(maps(known), wanted(known), rtol=0, atol=0.03)
    errors = (maps(between) - wanted(between)).square().mean(0)
    assert (errors < 0.03 * wanted(between).var(0)).all()
    # A millimetre is far less than the wavelength.
    step = maps(between + torch.tensor([1.0, 0.0, 0.0])) - maps(between)
    assert step.abs().max() < 0.1
    assert step.abs().max() > 1e-3


def test_two_values_at_one_place_become_their_mean():
    maps = maps_of(64, 100.0, 1)
    where = torch.tensor([[0.0, 0, 0], [0, 0, 0], [60, 0, 0]])
    maps.fit(where, torch.tensor([[1.0], [3.0], [5.0]]))
    torch.testing.assert_close(maps(where)[:, 0], torch.tensor([2.0, 2.0, 5.0]), rtol=0, atol=0.01)
    assert maps.weight.norm() < 30


# ------------------------------------------------------------------ patches to components and back


@torch.no_grad()
def test_components_of_all_regions_lose_nothing(make_started):
    codec = make_started()
    patches, coordinates, mask = patches_of(codec, gaussian_windows(20, 1))
    components = codec.components(patches, coordinates, mask)
    assert components.shape == (20, 2, PATCH * REGIONS)
    back = codec.components.inverse(components, coordinates)
    torch.testing.assert_close(back, patches, rtol=0, atol=0.02)
    # Components of a patch are all there is to it, so they also come back.
    noise = torch.randn(5, 2, PATCH * REGIONS, generator=torch.Generator().manual_seed(2))
    again = codec.components(codec.components.inverse(noise, coordinates), coordinates, mask[:5])
    torch.testing.assert_close(again, noise, rtol=0, atol=0.02)


@torch.no_grad()
def test_fewer_maps_than_regions_keep_the_leading_principal_components(make_started):
    codec = make_started(num_components=3)
    patches, coordinates, mask = patches_of(codec, gaussian_windows(200, 1))
    kept = codec.components.inverse(codec.components(patches, coordinates, mask), coordinates)
    leading = axes_of_regions()[:, :3].float()
    error = (kept - patches @ leading @ leading.T).square().mean()
    assert error < 0.01 * patches.square().mean()
    lost = (kept - patches).square().mean() / patches.square().mean()
    assert float(lost) == pytest.approx(float(SPACE[3:].sum() / SPACE.sum()), rel=0.1)


@pytest.mark.parametrize("layout", ["latent", "grid"])
def test_more_maps_than_regions_lose_nothing_either(make_started, layout):
    few, many = (
        make_started(
            num_components=count, token_layout=layout, code_dim=11, encoder_layers=0, num_latents=4
        )
        for count in (REGIONS, REGIONS + 8)
    )
    windows = gaussian_windows(200, 1)
    lost = []
    with torch.no_grad():
        for codec in (few, many):  # nothing is quantised yet
            lost.append(float((codec(windows).reconstruction - windows).square().mean()))
    assert lost[1] == pytest.approx(lost[0], rel=0.2, abs=0.02 * float(windows.var()))


@torch.no_grad()
def test_regions_that_are_masked_do_not_leak(make_started):
    codec = make_started()
    mask = torch.ones(20, REGIONS, dtype=torch.bool)
    mask[:, [2, 7]] = False
    patches, coordinates, _ = patches_of(codec, gaussian_windows(20, 1))
    clean = codec.components(patches, coordinates, mask)
    dirty = codec.components(patches.masked_fill(~mask[:, None, None], 1e6), coordinates, mask)
    assert torch.equal(clean, dirty)
    # Those that are left stand for the whole brain.
    kept = mask[0].nonzero()[:, 0]
    without = codec.components(patches[..., kept], coordinates[:, kept], mask[:, kept])
    torch.testing.assert_close(clean, without, rtol=1e-4, atol=1e-5)
    share = REGIONS / len(kept)
    zeros = patches.masked_fill(~mask[:, None, None], 0.0)
    whole = codec.components(zeros, coordinates, torch.ones_like(mask))
    torch.testing.assert_close(clean, share * whole, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the start


def cosines(found, expected):
    """Absolute cosines of columns."""
    found, expected = found.double(), expected.double()
    return (F.normalize(found, dim=0) * F.normalize(expected, dim=0)).sum(0).abs()


def assert_principal(codec, least=0.98, leading=5):
    """The maps and shapes of `codec` are the principal components of the Gaussian law."""
    where = codec._coordinates(None, None)
    for maps in (codec.components.analysis, codec.components.synthesis):
        assert (cosines(maps(where)[0], axes_of_regions())[:leading] > least).all()
    shapes = torch.linalg.eigh(toeplitz())[1].flip(1)
    for found in (codec.components.shapes, codec.components.shapes_back):
        assert (cosines(found, shapes)[:leading] > least).all()


@torch.no_grad()
def test_the_start_finds_the_principal_components(make_started, make_codec):
    codec = make_started()
    assert_principal(codec)
    with pytest.raises(AssertionError):
        assert_principal(make_codec(start=False, num_components=REGIONS))
    # At their scale: a token's components have length one on average.
    vectors = codec._encode(*codec._prepare(gaussian_windows(500, 1)))[0][..., :-1]
    assert float(vectors.square().sum(-1).mean()) == pytest.approx(1.0, rel=0.1)
    # As many bits for each: components deal out the rate, not the variance.
    tokens = codec.deal.chosen
    assert tokens.unique().numel() == tokens.numel()


@torch.no_grad()
def test_missing_regions_and_padding_do_not_bend_the_start(make_started, make_codec):
    windows = gaussian_windows(2000, 0)
    generator = torch.Generator().manual_seed(3)
    region_mask = torch.rand(len(windows), REGIONS, generator=generator) > 0.2
    time_mask = torch.ones(len(windows), WINDOW, dtype=torch.bool)
    time_mask[::2, 14:] = False
    hidden = ~(region_mask[:, None] & time_mask[:, :, None])
    codec = make_codec(start=False, num_components=REGIONS, position_features=64)
    batch = {"region_mask": region_mask, "time_mask": time_mask}
    codec.start_components([{"input_values": windows.masked_fill(hidden, math.nan)} | batch])
    assert_principal(codec, leading=4)
    whole = make_started(windows)
    torch.testing.assert_close(
        codec.components.shapes.abs(), whole.components.shapes.abs(), rtol=0.05, atol=0.05
    )
    assert (codec.deal.chosen == whole.deal.chosen).float().mean() > 0.8


@pytest.mark.parametrize(("layout", "share"), [("latent", 0.92), ("grid", 0.96)])
@torch.no_grad()
def test_the_untrained_codec_is_near_the_rate_distortion_limit(make_started, layout, share):
    codec = make_started(token_layout=layout, num_codes=1024, num_latents=4, code_dim=11)
    codec.start_codebook([{"input_values": gaussian_windows(2000, 1)}])
    fresh = gaussian_windows(300, 2)
    error = (codec(fresh).reconstruction - fresh).square().sum() / fresh.square().sum()
    tokens = codec.config.tokens_per_window / 2  # of a patch
    limit = rate_distortion_r2(spectrum().numpy(), 10.0 * tokens)
    assert share * limit < float(1 - error) < limit


def linear_path(codec, windows):
    """Components of `windows`, free of the signs of maps and shapes: what they say of the series.

    Float32 (windows, patches, num_latents, PATCH, REGIONS): the share of each token.
    """
    patches, coordinates, mask = patches_of(codec, windows)
    dealt = codec.deal(codec.components(patches, coordinates, mask))
    said = []
    for token in range(dealt.shape[2]):
        alone = torch.zeros_like(dealt)
        alone[:, :, token] = dealt[:, :, token]
        said.append(codec.components.inverse(codec.deal.inverse(alone), coordinates))
    return torch.stack(said, 2)


@torch.no_grad()
def test_the_start_does_not_depend_on_the_order_of_windows_or_regions(make_started, make_codec):
    windows, fresh = gaussian_windows(600, 0), gaussian_windows(20, 1)
    expected = linear_path(make_started(windows), fresh)
    for batches in ([windows[400:], windows[:100], windows[100:400]], list(windows.split(50))):
        codec = make_codec(start=False, num_components=REGIONS, position_features=64)
        text_space(codec)
        codec.start_components([{"input_values": batch} for batch in batches])
        torch.testing.assert_close(linear_path(codec, fresh), expected, rtol=0, atol=1e-3)
    where = [codec.config.region_coordinates[region] for region in ORDER.tolist()]
    moved = make_started(windows[..., ORDER], region_coordinates=where)
    found = linear_path(moved, fresh[..., ORDER])
    torch.testing.assert_close(found, expected[..., ORDER], rtol=0, atol=1e-3)
    assert not torch.allclose(linear_path(make_started(windows[:50]), fresh), expected, atol=0.01)


@torch.no_grad()
def test_p_of_codes_begins_with_mean_and_covariance_of_text(make_started):
    windows = gaussian_windows(1500, 0)
    # Text has more directions than codes have: the MLP fills the others.
    codec = make_started(windows, code_dim=6, projection_hidden_size=96, num_latents=4)
    moments, projection = codec.text_moments, codec.projection
    axes = moments.axes()
    covariance = axes @ axes.T

    def distances(windows):
        codes = F.normalize(codec._encode(*codec._prepare(windows))[0].flatten(0, 1), dim=-1)
        rows = projection.standardize(projection(codes))
        off = (rows.T.cov() - covariance).norm() / covariance.norm()
        return float((rows.mean(0) - moments.mean).norm() / axes.norm()), float(off)

    of_mean, of_covariance = distances(windows)
    assert of_mean < 1e-3
    assert of_covariance < 0.02
    of_mean, of_covariance = distances(gaussian_windows(1500, 1))  # of the same law
    assert of_mean < 0.1
    assert of_covariance < 0.15
    # What `set_text_space` alone begins with is not that.
    text_space(codec)
    assert distances(windows)[1] > 0.5


@pytest.mark.parametrize("layout", ["latent", "grid"])
@torch.no_grad()
def test_the_decoder_begins_at_reading_components_back(make_started, layout):
    codec = make_started(token_layout=layout)
    vectors = codec._encode(*codec._prepare(gaussian_windows(300, 1)))[0]
    rows = codec.projection.standardize(codec.projection(F.normalize(vectors, dim=-1)))
    wanted = vectors[..., :-1].flatten(0, 1)
    error = (codec.read_code(codec.text_moments(rows)).flatten(0, 1) - wanted).square().mean(0)
    assert (error < 0.1 * wanted.var(0)).all()


def test_the_first_training_forward_starts_the_components(make_codec):
    windows, others = gaussian_windows(40, 0), gaussian_windows(40, 1)
    codec = make_codec(start=False, num_components=REGIONS, codebook_start_step=3)
    codec.train()
    before = {name: value.clone() for name, value in codec.components.state_dict().items()}
    codec.eval()(windows)
    assert not codec.components.started
    by_hand = make_codec(start=False, num_components=REGIONS, codebook_start_step=None).train()
    by_hand(windows)
    assert not by_hand.components.started  # nothing by itself
    by_hand.start_components([{"input_values": windows}])
    codec.train()(windows)
    assert codec.components.started
    assert not torch.equal(codec.components.shapes, before["shapes"])
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, codec.state_dict()[name]) or name.startswith("quantizer."), name
    codec(others)
    assert torch.equal(codec.components.shapes, by_hand.components.shapes)  # once


def test_the_start_in_half_precision_is_that_in_full(make_codec):
    windows = gaussian_windows(40, 0)
    states = []
    for enabled in (False, True):
        codec = make_codec(start=False, num_components=REGIONS, codebook_start_step=3).train()
        text_space(codec)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            codec(windows)
        states.append(codec.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ------------------------------------------------------------------ another parcellation


def field_at(where, count, seed):
    """A smooth random field at `where` (regions, 3): float32 (count, WINDOW, regions)."""
    generator = torch.Generator().manual_seed(99)
    waves = torch.randn(3, 12, generator=generator) * (2 * math.pi / 300)
    phases = 2 * math.pi * torch.rand(12, generator=generator)
    strengths = 2.0 ** -torch.arange(12)
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, WINDOW // PATCH, PATCH, 12, generator=generator).double()
    time = (torch.linalg.cholesky(toeplitz()) @ white).flatten(1, 2).float()
    return (time * strengths) @ (where @ waves + phases).cos().T * 2


@pytest.mark.parametrize("layout", ["latent", "grid"])
@torch.no_grad()
def test_codes_of_one_parcellation_decode_in_another(make_started, layout):
    generator = torch.Generator().manual_seed(4)
    here, there = (120 * torch.rand(count, 3, generator=generator) - 60 for count in (80, 45))
    fields = {"code_dim": 9, "num_codes": 512, "num_latents": 4, "position_features": 256}
    fields |= {"region_coordinates": here.tolist(), "region_labels": None}
    fields |= {"token_layout": layout, "position_wavelength": 200.0}
    codec = make_started(field_at(here, 400, 0), **fields)
    codec.start_codebook([{"input_values": field_at(here, 400, 1)}])

    def r2(found, expected):
        return float(1 - (found - expected).square().sum() / expected.square().sum())

    source, wanted = field_at(here, 60, 2), field_at(there, 60, 2)
    codes = codec.encode(source).codes
    at_home = r2(codec.decode(codes).reconstruction, source)
    elsewhere = codec.decode(codes, there, code_coordinates=here).reconstruction
    assert elsewhere.shape == wanted.shape
    assert r2(elsewhere, wanted) > at_home - 0.1 > 0.5
    # And the other way: scans of another parcellation, which the codec was not started with.
    codes = codec.encode(wanted, there).codes
    assert codes.shape[1] == (90 if layout == "grid" else 8)
    back = codec.decode(codes, here, code_coordinates=there).reconstruction
    # NOTE: sums over 45 random places stand for those over 80; in the grid they do so twice.
    assert r2(back, source) > {"latent": at_home - 0.1, "grid": 0.3}[layout]
    turned = codec.decode(codes, here.flip(0), code_coordinates=there).reconstruction
    assert r2(turned, source) < r2(back, source) - 0.2


# ------------------------------------------------------------------ two processes


def worker(rank, folder, sizes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    codec = two_process_codec(sizes)
    # Each its own windows, and not the same number of them.
    batches = [{"input_values": windows} for windows in windows_of(rank)]
    codec.start_components(batches)
    torch.save(codec.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def windows_of(rank):
    return gaussian_windows(300 + 100 * rank, rank).split(100)


def two_process_codec(sizes):
    torch.manual_seed(0)
    codec = AVQModel(AVQConfig(**sizes)).eval()
    text_space(codec)
    return codec


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["latent", "grid"])
@torch.no_grad()
def test_two_processes_start_alike_from_the_windows_of_both(sizes, layout, tmp_path):
    sizes |= {"token_layout": layout, "num_components": REGIONS, "position_features": 64}
    mp.spawn(worker, (str(tmp_path), sizes), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["components.started"]
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    # As one process with all windows would have done; P and the decoder's reading are of some.
    together = two_process_codec(sizes)
    together.start_components([{"input_values": torch.cat([*windows_of(0), *windows_of(1)])}])
    alone = two_process_codec(sizes)
    alone.start_components([{"input_values": torch.cat(windows_of(0))}])
    found = two_process_codec(sizes)
    found.load_state_dict(one)
    fresh = gaussian_windows(20, 5)
    expected = linear_path(together, fresh)
    torch.testing.assert_close(linear_path(found, fresh), expected, rtol=0, atol=1e-3)
    assert (linear_path(alone, fresh) - expected).abs().max() > 1e-2
