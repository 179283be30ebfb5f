"""AVQModel: both halves agree, batches do not matter, masks hold, other parcellations, files."""

import math

import pytest
import torch
import torch.nn.functional as F

from cortexicon.modeling import AVQModel, ConfigurationError

WINDOW, REGIONS = 20, 10


@pytest.fixture
def many():
    """Float32 (200, WINDOW, REGIONS)."""
    return torch.randn(200, WINDOW, REGIONS, generator=torch.Generator().manual_seed(11))


def gap_of_the_two_best(codec, windows):
    """Difference of the distances to the two nearest codes, float64 (windows, tokens).

    Or to the two nearest branches, where that is smaller.
    """
    with torch.no_grad():
        latents, _ = codec._encode(*codec._prepare(windows))
    latents = F.normalize(latents.double(), dim=-1)
    book = codec.quantizer.codebook.double().unflatten(0, (codec.config.code_branches, -1))
    middles = torch.cdist(latents, F.normalize(book.mean(1), dim=-1))
    own = book[middles.argmin(-1)]  # (windows, tokens, codes of a branch, code_dim)
    choices = [middles, torch.cdist(latents[:, :, None], own)[:, :, 0]]
    best = [one.topk(2, largest=False).values for one in choices if one.shape[-1] > 1]
    return torch.stack([two[..., 1] - two[..., 0] for two in best]).amin(0)


def assert_same_codes_but_for_ties(codec, windows, found, expected):
    """Codes differ only where two codes are equally near; their number is printed."""
    different = found != expected
    assert (gap_of_the_two_best(codec, windows)[different] < 1e-5).all()
    print(
        f"{codec.config.token_layout}: {int(different.sum())} of {different.numel()} codes differ"
    )
    assert different.float().mean() < 1e-3


@torch.no_grad()
def test_decoding_the_codes_is_what_forward_reconstructs(codec, windows):
    output, encoded = codec(windows), codec.encode(windows)
    decoded = codec.decode(encoded.codes).reconstruction
    assert torch.equal(encoded.codes, output.codes)
    assert decoded.shape == windows.shape
    assert len(encoded.codes.unique()) > 3  # a constant code would agree with anything
    torch.testing.assert_close(decoded, output.reconstruction, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.text_embeds, output.text_embeds, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_codes_alone_are_the_codes_and_cost_no_projection(codec, windows, masked, monkeypatch):
    mask = torch.ones(len(windows), REGIONS, dtype=torch.bool)
    mask[:, 3] = not masked
    whole = codec.encode(windows, region_mask=mask)
    monkeypatch.setattr(codec, "_project", lambda _: pytest.fail("P was computed"))
    alone = codec.encode(windows, region_mask=mask, codes_only=True)
    assert list(alone) == ["codes", "token_mask"]
    assert torch.equal(alone.codes, whole.codes)
    assert torch.equal(alone.token_mask, whole.token_mask)
    assert alone.quantized is None
    assert alone.text_embeds is None
    assert {"quantized", "text_embeds"} < set(whole)


@torch.no_grad()
def test_large_finite_values_are_read(codec, windows):
    # Their sum overflows float32; each of them, and every component, does not.
    large = 1e35 * windows.abs().clamp(min=0.1)
    large = large.repeat_interleave(max(1, 4000 // len(windows)), 0)
    assert torch.isfinite(large).all()
    assert not torch.isfinite(large.sum())
    codec._prepare(large)


@torch.no_grad()
def test_one_row_of_a_batch_is_the_scan_alone(codec, many):
    alone = torch.cat([codec.encode(row[None]).codes for row in many])
    together = codec.encode(many)
    assert_same_codes_but_for_ties(codec, many, together.codes, alone)
    rows = [0, 57, 199]
    decoded = codec.decode(together.codes).reconstruction[rows]
    one_by_one = [codec.decode(together.codes[[row]]).reconstruction for row in rows]
    torch.testing.assert_close(decoded, torch.cat(one_by_one), rtol=0, atol=1e-5)
    assert torch.equal(
        together.text_embeds, F.embedding(together.codes, codec.project_codebook())
    )  # bit for bit


@torch.no_grad()
def test_tokens_have_the_documented_number_and_order(codec, windows):
    config = codec.config
    codes = codec.encode(windows).codes
    assert codes.dtype == torch.int64
    assert codes.shape == (len(windows), config.tokens_per_window)
    assert config.tokens_per_window == (6 if config.token_layout == "latent" else 20)
    # Patch by patch: a shorter window gives the codes of its patches.
    first = codec.encode(windows[:, :10]).codes
    assert first.shape == (len(windows), config.tokens_per_window // 2)
    decoded = codec.decode(first).reconstruction
    assert decoded.shape == (len(windows), 10, REGIONS)


@torch.no_grad()
def test_grid_tokens_follow_the_regions(make_codec, many):
    codec = make_codec(token_layout="grid")
    order = torch.randperm(REGIONS, generator=torch.Generator().manual_seed(2))
    where = torch.tensor(codec.config.region_coordinates)
    codes = codec.encode(many).codes.view(-1, 2, REGIONS)
    moved = codec.encode(many[..., order], where[order]).codes
    expected = codes[:, :, order].flatten(1)
    different = moved != expected
    assert different.float().mean() < 1e-3
    assert not torch.equal(codes.flatten(1), expected)


@torch.no_grad()
def test_latent_codes_do_not_depend_on_the_order_of_regions(make_codec, many):
    codec = make_codec()
    order = torch.randperm(REGIONS, generator=torch.Generator().manual_seed(2))
    where = torch.tensor(codec.config.region_coordinates)
    codes = codec.encode(many).codes
    moved = codec.encode(many[..., order], where[order]).codes
    assert_same_codes_but_for_ties(codec, many, moved, codes)
    # Regions moved without their coordinates are another scan.
    assert (codec.encode(many[..., order]).codes != codes).float().mean() > 0.2


@pytest.mark.parametrize("garbage", [1e6, math.nan, math.inf])
@torch.no_grad()
def test_what_is_masked_has_no_influence(codec, windows, garbage):
    region_mask = torch.ones(len(windows), REGIONS, dtype=torch.bool)
    region_mask[:, [2, 7]] = False
    time_mask = torch.ones(len(windows), WINDOW, dtype=torch.bool)
    time_mask[:4, 10:] = False
    masks = {"region_mask": region_mask, "time_mask": time_mask}
    hidden = ~(region_mask[:, None] & time_mask[:, :, None])
    clean, dirty = codec(windows, **masks), codec(windows.masked_fill(hidden, garbage), **masks)
    assert torch.equal(clean.codes, dirty.codes)
    assert torch.equal(clean.reconstruction, dirty.reconstruction)
    assert clean.loss == dirty.loss
    assert torch.isfinite(clean.loss)
    # And the mask does something: the same values unmasked give other codes.
    assert not torch.equal(clean.codes, codec.encode(windows).codes)


@torch.no_grad()
def test_a_masked_region_is_as_if_it_were_not_in_the_parcellation(make_codec, many):
    codec, kept = make_codec(), [0, 1, 3, 4, 5, 6, 8, 9]
    mask = torch.zeros(1, REGIONS, dtype=torch.bool)
    mask[:, kept] = True
    masked = codec.encode(many, region_mask=mask).codes
    without = codec.encode(many[..., kept], torch.tensor(codec.config.region_coordinates)[kept])
    assert (masked != without.codes).float().mean() < 1e-3
    assert (masked != codec.encode(many).codes).float().mean() > 0.1


@torch.no_grad()
def test_padded_patches_leave_the_others_alone(make_codec, windows):
    codec = make_codec()
    time_mask = torch.ones(len(windows), WINDOW, dtype=torch.bool)
    time_mask[:, 10:] = False
    padded = codec.encode(windows, time_mask=time_mask)
    assert torch.equal(padded.codes[:, :3], codec.encode(windows[:, :10]).codes)
    assert padded.token_mask[:, :3].all()
    assert not padded.token_mask[:, 3:].any()


@torch.no_grad()
def test_codes_decode_into_another_parcellation(codec, windows):
    codes = codec.encode(windows).codes
    where = torch.tensor(codec.config.region_coordinates)
    elsewhere = torch.cat([where[:3] + 5.0, where[[4]]])[None]  # four regions
    sources = None if codec.config.token_layout == "latent" else where[None]
    decoded = codec.decode(codes, elsewhere, code_coordinates=sources).reconstruction
    assert decoded.shape == (len(windows), WINDOW, 4)
    assert torch.isfinite(decoded).all()
    if sources is None:  # by position alone: a region that is in both is the same in both
        same = codec.decode(codes).reconstruction[..., 4]
        torch.testing.assert_close(decoded[..., 3], same, rtol=0, atol=1e-5)


@torch.no_grad()
def test_encode_never_moves_the_codebook(codec, windows):
    before = {name: value.clone() for name, value in codec.quantizer.state_dict().items()}
    expected = codec.encode(windows).codes
    codec.train()
    assert torch.equal(codec.encode(windows).codes, expected)
    for name, value in codec.quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    codec(windows)  # training does move it
    assert not torch.equal(codec.quantizer.code_count, before["code_count"])


def bad_shape(codec, windows):
    codec.encode(windows[0])


def bad_length(codec, windows):
    codec.encode(windows[:, :15])


def too_long(codec, windows):
    codec.encode(torch.cat([windows, windows], dim=1))


def other_atlas(codec, windows):
    codec.encode(windows[..., :7])


def bad_coordinates(codec, windows):
    codec.encode(windows, torch.zeros(1, REGIONS, 2))


def nan_coordinates(codec, windows):
    codec.encode(windows, torch.full((1, REGIONS, 3), math.nan))


def coordinates_of_other_rows(codec, windows):
    codec.encode(windows, torch.zeros(2, REGIONS, 3))


def region_mask_of_other_rows(codec, windows):
    codec.encode(windows[:1], region_mask=torch.ones(2, REGIONS))


def time_mask_of_another_length(codec, windows):
    codec.encode(windows, time_mask=torch.ones(len(windows), 10))


def nan_value(codec, windows):
    codec.encode(windows.index_fill(0, torch.tensor([3, 5]), math.nan))


def infinite_value(codec, windows):
    codec.train()
    codec(windows.index_fill(0, torch.tensor([2]), math.inf))


def never_started(codec, windows):
    AVQModel(codec.config).encode(windows)


def decode_never_started(codec, windows):
    AVQModel(codec.config).decode(codec.encode(windows).codes)


def code_too_large(codec, windows):
    codec.decode(codec.encode(windows).codes + 32)


def negative_code(codec, windows):
    codec.decode(codec.encode(windows).codes * 0 - 1)


def float_codes(codec, windows):
    codec.decode(codec.encode(windows).codes.float())


def flat_codes(codec, windows):
    codec.decode(codec.encode(windows).codes[0])


def part_of_a_patch(codec, windows):
    codec.decode(codec.encode(windows).codes[:, :-1])


def too_many_patches(codec, windows):
    codec.decode(codec.encode(windows).codes.repeat(1, 2))


def wrong_text_table(codec, windows):
    codec.set_text_space(torch.randn(50, 23))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (bad_shape, r"shape \(batch, time, regions\), found \(20, 10\)"),
        (bad_length, "hold 15 samples a window; expected a multiple of patch_length = 10"),
        (too_long, "at most window_length = 20"),
        (other_atlas, "7 regions, the checkpoint's atlas 'toy' has 10"),
        (bad_coordinates, r"shape \(batch or 1, 10, 3\) in mm, found \(1, 10, 2\)"),
        (nan_coordinates, "region_coordinates hold NaN or infinite values"),
        (coordinates_of_other_rows, "region_coordinates hold 2 rows for 9 windows"),
        (region_mask_of_other_rows, r"region_mask must have shape \(1, 10\) .* found \(2, 10\)"),
        (time_mask_of_another_length, r"time_mask must have shape \(9, 20\) .* found \(9, 10\)"),
        (nan_value, r"NaN or infinite values in rows \[3, 5\]"),
        (infinite_value, r"NaN or infinite values in rows \[2\]"),
        (never_started, "never started"),
        (decode_never_started, "never started"),
        (code_too_large, r"codes must lie in 0\.\.31, found 3\d\.\."),
        (negative_code, r"codes must lie in 0\.\.31, found -1\.\.-1"),
        (float_codes, "codes must be integers .* found torch.float32"),
        (flat_codes, r"shape \(batch, tokens\), found torch.int64"),
        (part_of_a_patch, "tokens a window do not fit"),
        (too_many_patches, "at most 2 patches"),
        (wrong_text_table, r"text_width = 24 columns, found shape \(50, 23\)"),
    ],
)
def test_bad_input_is_refused_by_name(codec, windows, fault, message):
    before = {name: value.clone() for name, value in codec.quantizer.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        fault(codec, windows)
    for name, value in codec.quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name  # a refused batch leaves no trace


def test_region_coordinates_are_asked_for_when_none_are_stored(make_codec, windows):
    codec = make_codec(start=False, region_coordinates=None, region_labels=None)
    with pytest.raises(ConfigurationError, match="region_coordinates are needed"):
        codec(windows)


def test_saving_and_loading_is_bit_exact(codec, windows, tmp_path):
    codec.train()
    codec(windows)  # counts, sums and clock away from their start
    codec.eval().set_text_space(torch.randn(40, 24), "some/model")
    codec.save_pretrained(tmp_path)
    loaded = AVQModel.from_pretrained(tmp_path)
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == codec.state_dict().keys()
    for name, value in codec.state_dict().items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert loaded.quantizer.updates == 1
    assert loaded.config.text_model_id == "some/model"
    assert loaded.codebook_fingerprint() == codec.codebook_fingerprint()
    with torch.no_grad():
        assert torch.equal(loaded(windows).reconstruction, codec(windows).reconstruction)


def test_the_fingerprint_names_the_stored_numbers_and_nothing_else(codec, monkeypatch):
    expected = codec.codebook_fingerprint()
    # Another machine computes P(codebook) with other last bits; the codes are the same.
    exact = codec.projection.forward
    monkeypatch.setattr(codec.projection, "forward", lambda codes: exact(codes) * (1 + 1e-6))
    assert codec.codebook_fingerprint() == expected
    with torch.no_grad():
        codec.quantizer.codebook[3, 0] += 1e-6
        other = codec.codebook_fingerprint()
        codec.projection.down.bias[0] += 1e-6
    assert len({expected, other, codec.codebook_fingerprint()}) == 3


FLOAT32 = (
    "quantizer.",
    "projection.",
    "components.",
    "deal.",
    "ranks.",
    "token_maps",
    "read_code.",
    "text_moments.",
)


def test_half_precision_keeps_codebook_projection_and_positions_whole(codec, windows, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = AVQModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        if name.startswith(FLOAT32):
            assert value.dtype == codec.state_dict()[name].dtype, name
            assert torch.equal(value, codec.state_dict()[name]), name
        else:
            assert value.dtype == torch.bfloat16, name
    assert loaded.codebook_fingerprint() == codec.codebook_fingerprint()
    output = loaded(windows, text_embeddings=torch.randn(40, 24))
    assert output.reconstruction.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert (output.codes == codec.encode(windows).codes).float().mean() > 0.8
