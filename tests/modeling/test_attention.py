"""Attention by sdpa and written out agree; half precision moves codes at small margins only."""

import pytest
import torch
import torch.nn.functional as F

from cortexicon.modeling import AVQModel
from cortexicon.modeling.layers_avq import eager_attention

# bfloat16 keeps 8 bits: a relative error of 2^-9 an operation. Unit vectors of these codecs stray
# by at most DRIFT; codes can then change only where two are less than twice that apart in cosine.
DRIFT = 0.02
SIZES = {
    "num_codes": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_latents": 6,
    "code_dim": 8,
}


@pytest.fixture(params=["latent", "grid"])
def codec(request, make_codec):
    return make_codec(token_layout=request.param, **SIZES)


@pytest.fixture
def windows():
    """Float32 (24, 20, 10): oscillations that neighbouring regions share, and noise."""
    generator = torch.Generator().manual_seed(11)
    time = torch.arange(20.0)[None, :, None]
    phase = 6.3 * torch.rand(24, 1, 10, generator=generator)
    rate = 0.2 + torch.rand(24, 1, 1, generator=generator)
    noise = torch.randn(24, 20, 10, generator=generator)
    return (rate * time + phase).sin() + 0.5 * noise


def masks_of(windows, masked):
    """Masks of regions and of time, or none. One window keeps a single patch, one few regions."""
    if not masked:
        return {}
    region_mask = torch.ones(len(windows), windows.shape[2], dtype=torch.bool)
    region_mask[::3, 4], region_mask[5, 3:] = False, False
    time_mask = torch.ones(windows.shape[:2], dtype=torch.bool)
    time_mask[1::2, 10:] = False
    return {"region_mask": region_mask, "time_mask": time_mask}


def unit_vectors(model, windows, **masks):
    """What the codebook is asked for, float32 (tokens, code_dim), and which tokens hold data."""
    with torch.no_grad():
        vectors, present = model._encode(*model._prepare(windows, **masks))
    return F.normalize(vectors.float(), dim=-1).flatten(0, 1), present.flatten()


@pytest.fixture
def sdpa_calls(monkeypatch):
    """A list that grows with every call of PyTorch's attention."""
    calls, real = [], F.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_give_the_same_codes_and_outputs(codec, windows, masked, sdpa_calls):
    masks, outputs, made = masks_of(windows, masked), {}, {}
    for way in ("sdpa", "eager"):
        codec.set_attn_implementation(way)
        before = len(sdpa_calls)
        with torch.no_grad():
            outputs[way] = codec(windows, **masks)
            made[way] = codec.encode(windows, **masks)
        assert (len(sdpa_calls) > before) == (way == "sdpa")
    assert any(call["attn_mask"] is not None for call in sdpa_calls) == masked
    assert torch.equal(made["sdpa"].codes, made["eager"].codes)
    assert torch.equal(outputs["sdpa"].codes, outputs["eager"].codes)
    assert len(made["sdpa"].codes.unique()) > 20  # not all tokens alike
    for name in ("reconstruction", "text_embeds", "loss", "commitment_loss"):
        torch.testing.assert_close(
            outputs["sdpa"][name], outputs["eager"][name], rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_give_the_same_gradients(codec, windows, masked):
    gradients = []
    for way in ("sdpa", "eager"):
        codec.set_attn_implementation(way)
        codec.zero_grad()
        codec(windows, **masks_of(windows, masked)).loss.backward()
        gradients.append({n: p.grad for n, p in codec.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["encoder.blocks.0.qkv.weight"].abs().max() > 0
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_way_is_chosen_when_loading(codec, windows, tmp_path):
    codec.save_pretrained(tmp_path)
    expected = codec.encode(windows).codes
    for way in ("sdpa", "eager"):
        loaded = AVQModel.from_pretrained(tmp_path, attn_implementation=way)
        assert loaded.encoder.blocks[0].config._attn_implementation == way
        assert torch.equal(loaded.encode(windows).codes, expected)


def test_attention_written_out_has_its_known_answer():
    query = torch.tensor([[[[2.0, 0.0]]]])  # (batch, heads, tokens, head_dim)
    key = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])
    value = torch.tensor([[[[1.0], [2.0], [7.0]]]])
    share = torch.tensor([2.0, 0.0]).div(2**0.5).softmax(0)
    masked = eager_attention(query, key, value, torch.tensor([True, True, False]))
    torch.testing.assert_close(masked, (share @ value[0, 0, :2]).view(1, 1, 1, 1))
    assert eager_attention(query, key, value, None).item() > masked.item()


def half_precision(codec, how, folder):
    """(model, context) that encode in bfloat16, by autocast or by loading."""
    if how == "autocast":
        return codec, torch.autocast("cpu", torch.bfloat16)
    codec.save_pretrained(folder)
    loaded = AVQModel.from_pretrained(folder, dtype=torch.bfloat16)
    return loaded, torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["autocast", "loaded"])
def test_half_precision_flips_codes_at_small_margins_only(codec, windows, how, masked, tmp_path):
    with torch.no_grad():
        codec.encoder_out.weight *= 30  # blocks that have learned something
    masks = masks_of(windows, masked)
    exact, present = unit_vectors(codec, windows, **masks)
    codes = codec.encode(windows, **masks).codes.flatten()
    model, context = half_precision(codec, how, tmp_path)
    with context:
        rough, _ = unit_vectors(model, windows, **masks)
        flipped = model.encode(windows, **masks).codes.flatten()
    exact, rough, codes, flipped = (x[present] for x in (exact, rough, codes, flipped))
    drift = (rough - exact).norm(dim=-1)
    assert 0 < drift.max() < DRIFT  # half precision was at work

    book = codec.quantizer.codebook
    best, other = (exact * book[codes]).sum(-1), (exact * book[flipped]).sum(-1)
    # By how much the vector moved times how far the codes lie apart: more no lookup in full
    # precision can lose.
    bound = drift * (book[codes] - book[flipped]).norm(dim=-1)
    assert (best - other <= bound + 1e-6).all()
    assert (best - other).max() < 2 * DRIFT
    assert (codes != flipped).float().mean() < 0.1
    cosines = exact @ book.T
    second = cosines.topk(2, dim=-1).values
    clear = second[:, 0] - second[:, 1] > 2 * drift
    assert clear.float().mean() > 0.1  # the next line speaks of many tokens
    assert torch.equal(codes[clear], flipped[clear])


def test_autocast_leaves_quantiser_projection_and_positions_in_float32(codec, windows):
    seen = {}

    def watch(name):
        def hook(_, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            kinds = {t.dtype for t in tensors if torch.is_tensor(t) and t.is_floating_point()}
            seen.setdefault(name, set()).update(kinds)

        return hook

    names = ("components", "quantizer", "projection", "encoder.blocks.0.qkv", "decoder_in")
    for name in names:
        codec.get_submodule(name).register_forward_hook(watch(name))
    before = {name: value.dtype for name, value in codec.quantizer.state_dict().items()}
    codec.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = codec(windows, text_embeddings=torch.randn(64, codec.config.text_width))
        encoded = codec.eval().encode(windows)
        table = codec.project_codebook()
    assert seen["encoder.blocks.0.qkv"] == seen["decoder_in"] == {torch.bfloat16}
    for name in ("components", "quantizer", "projection"):
        assert seen[name] == {torch.float32}, name
    for value in (
        output.loss,
        output.reconstruction,
        encoded.quantized,
        encoded.text_embeds,
        table,
    ):
        assert value.dtype == torch.float32
    # The update of the codebook in that step, too, and the bits that the language model takes over.
    assert {name: v.dtype for name, v in codec.quantizer.state_dict().items()} == before
    assert torch.equal(table, codec.project_codebook())
    torch.testing.assert_close(encoded.quantized, codec.quantizer.lookup(encoded.codes))
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in codec.parameters() if p.grad is not None)


def test_the_codebook_moves_the_same_way_under_autocast(codec):
    latents = torch.randn(12, 40, codec.config.code_dim)
    states = []
    for enabled in (False, True):
        twin = AVQModel(codec.config)
        twin.load_state_dict(codec.state_dict())
        twin.quantizer.revival_interval = 1
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            twin.quantizer.train()(latents)
        states.append(twin.quantizer.state_dict())
    assert not torch.equal(states[0]["codebook"], codec.quantizer.codebook)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
