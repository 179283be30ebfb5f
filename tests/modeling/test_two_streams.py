"""Dynamics and connectivity in one prompt: placeholders, rows, features, saving, refusals."""

import pytest
import torch

from cortexicon.modeling import (
    AVQLMConfig,
    AVQLMForConditionalGeneration,
    ConfigurationError,
    fisher_z_matrices,
)

QUESTION = "How old is this person?"


def logits(model, inputs):
    """Of the first new token; `generate` takes care of padding."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, max_new_tokens=1, **options).logits[0]


@pytest.mark.parametrize("tie", [True, False])
def test_the_rows_of_both_blocks_are_the_projected_codebooks(make_avq_lm, tokenizer, tie):
    model = make_avq_lm(tie=tie, streams=2)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        for stream, codec in (("fmri", model.avq), ("fc", model.connectome)):
            first, count = model.block(stream)
            assert torch.equal(table[first : first + count], codec.project_codebook())
            assert first == tokenizer.codes_to_ids([0], stream)[0]


def test_a_prompt_of_two_streams_is_its_codes_placed_by_hand(make_avq_lm, two_streams, scan):
    model = make_avq_lm(streams=2)
    scans = [scan, scan[::-1][:20].copy()]  # two windows and one
    inputs = two_streams(text=QUESTION, fmri=scans, tr=2.0)
    dynamics = model.avq.encode(inputs["input_values"]).codes
    matrices = torch.cat([fisher_z_matrices(torch.tensor(s)[None])[0] for s in scans])
    connectivity = model.connectome.encode(matrices).codes
    rows = [
        two_streams.prompt_ids(codes, QUESTION, code)
        for codes, code in zip((dynamics[:2], dynamics[2:]), connectivity, strict=True)
    ]
    found = model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None)
    for row, (ids, one) in enumerate(zip(rows, scans, strict=True)):
        assert found[row, :-1].tolist()[-len(ids) :] == ids
        alone = logits(model, two_streams(text=QUESTION, fmri=one, tr=2.0))
        torch.testing.assert_close(logits(model, inputs)[[row]], alone, rtol=0, atol=1e-4)
    # What stands between <fc> and </fc> matters, and comes back as a matrix.
    first = model.block("fc")[0]
    torch.testing.assert_close(
        model.decode_fmri_tokens(connectivity + first, stream="fc"),
        model.connectome.decode(connectivity).matrices,
    )
    assert torch.equal(model.get_fmri_tokens(matrices, stream="fc"), connectivity + first)


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_each_stream_moves_the_answer_and_can_be_left_out(make_avq_lm, two_streams, scan, mode):
    model = make_avq_lm(streams=2, fmri_input=mode)
    both = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    regions = scan.shape[1]
    changed = dict(both)
    changed["connectivity"] = -both["connectivity"]
    assert (logits(model, changed) - logits(model, both)).abs().max() > 1e-4
    changed = {**both, "input_values": -both["input_values"]}
    assert (logits(model, changed) - logits(model, both)).abs().max() > 1e-4
    lengths = {}
    for streams in (("fmri",), ("fc",), ("fmri", "fc")):
        inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0, streams=streams)
        assert ("input_values" in inputs) == ("fmri" in streams)
        assert ("connectivity" in inputs) == ("fc" in streams)
        assert inputs["region_coordinates"].shape == (1, regions, 3)
        assert torch.isfinite(logits(model, inputs)).all()
        lengths[streams] = inputs["input_ids"].shape[1]
    text = two_streams(text=QUESTION)["input_ids"].shape[1]
    assert lengths["fmri",] == text + 2 * 6 + 1 + 2
    assert lengths["fc",] == text + 3 + 2
    assert lengths["fmri", "fc"] == lengths["fmri",] + lengths["fc",] - text


def test_features_of_connectivity_are_p_of_the_unquantised_vectors(make_avq_lm, two_streams, scan):
    model = make_avq_lm(streams=2, fmri_input="features")
    matrices = two_streams(fmri=scan, tr=2.0)["connectivity"]
    features = model.get_fmri_features(matrices, stream="fc")
    assert features.shape == (1, 3, 24)
    codes = model.get_input_embeddings()(model.get_fmri_tokens(matrices, stream="fc"))
    # Codes are the nearest of eight unit vectors: near, not equal.
    table = model.connectome.project_codebook()
    nearest = torch.cdist(features[0], table).argmin(1)
    assert (features - codes).abs().max() > 1e-3
    wanted = model.get_fmri_tokens(matrices, stream="fc")[0] - model.block("fc")[0]
    assert (nearest == wanted).float().mean() > 0.6
    model.config.fmri_input = "codes"
    assert torch.equal(model.get_fmri_features(matrices, stream="fc"), codes)


def test_both_streams_survive_saving_and_half_precision(make_avq_lm, two_streams, scan, tmp_path):
    model = make_avq_lm(streams=2, windows_per_prompt=0)
    model.save_pretrained(tmp_path)
    loaded = AVQLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.config.windows_per_prompt == 0
    assert loaded.connectome.codebook_fingerprint() == model.connectome.codebook_fingerprint()
    half = AVQLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    assert half.connectome.quantizer.codebook.dtype == torch.float32
    for values, stream in ((inputs["input_values"], "fmri"), (inputs["connectivity"], "fc")):
        wanted = model.get_fmri_tokens(values, stream=stream)
        assert torch.equal(half.get_fmri_tokens(values, stream=stream), wanted)
    assert half.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_both_codecs_stay_frozen_in_training(make_avq_lm, two_streams, scan):
    model = make_avq_lm(streams=2).train()
    assert not any(parameter.requires_grad for parameter in model.connectome.parameters())
    assert not any(module.training for module in model.connectome.modules())
    before = {name: value.clone() for name, value in model.connectome.state_dict().items()}
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 300, -100))
    loss.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    for name, value in model.connectome.state_dict().items():
        assert torch.equal(value, before[name]), name
    rows = model.get_input_embeddings().weight.grad
    first, count = model.block("fc")
    assert rows[first : first + count].abs().sum() > 0


def test_a_model_without_the_stream_refuses_it(make_avq_lm, two_streams, processor, scan):
    model = make_avq_lm()
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    with pytest.raises(ConfigurationError, match="built without the connectivity stream"):
        model(**inputs)
    with pytest.raises(ConfigurationError, match="must be 'fmri' or 'fc', found 'dti'"):
        model.block("dti")
    with pytest.raises(ConfigurationError, match="windows_per_prompt must be at least 1"):
        AVQLMConfig(windows_per_prompt=0)
    # A prompt made without the stream, and a matrix for it.
    model = make_avq_lm(streams=2)
    inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
    inputs["connectivity"] = torch.zeros(1, scan.shape[1], scan.shape[1])
    with pytest.raises(ConfigurationError, match="hold 0 placeholders, the matrices give 3 codes"):
        model(**inputs)


def test_a_connectivity_codec_of_another_vocabulary_is_refused(
    make_codec, make_connectome, make_lm, tokenizer
):
    lm, avq = make_lm(), make_codec()
    table = lm.get_input_embeddings().weight
    avq.set_text_space(table)
    join = AVQLMForConditionalGeneration.from_avq_and_lm
    with pytest.raises(ConfigurationError, match="holds 8 codes, the connectivity codec 4"):
        join(avq, lm, tokenizer, make_connectome(table, num_codes=4))
    other = make_connectome(table + 1e-3)
    with pytest.raises(ConfigurationError, match="connectivity codec was aligned with the embed"):
        join(avq, lm, tokenizer, other)
