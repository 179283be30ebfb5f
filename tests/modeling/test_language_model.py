"""The language model of codes: rows, placeholders, generation, padding, the frozen codec."""

import pytest
import torch
import torch.nn.functional as F

from cortexicon.modeling import AVQLMForConditionalGeneration, ConfigurationError
from cortexicon.tokenization import AVQTokenizer

QUESTION = "How old is this person?"


def tables(model):
    """Input table and, where it is another tensor, output table."""
    found = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not found[0]:
        found.append(model.get_output_embeddings().weight)
    return found


@pytest.mark.parametrize("tie", [True, False])
def test_the_rows_of_codes_are_the_projected_codebook(make_avq_lm, make_lm, tokenizer, tie):
    model, lm = make_avq_lm(tie=tie), make_lm(tie_word_embeddings=tie)
    first = tokenizer.fmri_offset
    projected = model.avq.project_codebook()
    assert len(tables(model)) == (1 if tie else 2)
    for table, text_table in zip(tables(model), tables(lm), strict=True):
        assert torch.equal(table[first : first + 32], projected)
        assert torch.equal(table[: len(text_table)], text_table)
        assert table.shape[0] == len(tokenizer)
        new = table[len(text_table) :]  # no row is a copy of another, none is far from text
        assert torch.pdist(new).min() > 1e-3
        others = torch.cat([new[:6], table[tokenizer.connectivity_offset :]])
        assert 0.5 < others.std() / text_table.std() < 2
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.fmri_offset == first


@pytest.mark.parametrize("tie", [True, False])
def test_saving_and_loading_is_bit_exact(make_avq_lm, tmp_path, tie):
    model = make_avq_lm(tie=tie, windows_per_prompt=2)
    model.save_pretrained(tmp_path)
    loaded = AVQLMForConditionalGeneration.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert len(tables(loaded)) == (1 if tie else 2)
    assert loaded.config.windows_per_prompt == 2
    assert loaded.avq.codebook_fingerprint() == model.avq.codebook_fingerprint()
    end = model.generation_config.eos_token_id
    assert end is not None
    assert loaded.generation_config.eos_token_id == end
    # Still tied as a whole: one optimiser step moves both.
    if tie:
        with torch.no_grad():
            loaded.get_input_embeddings().weight[5] += 1.0
        assert torch.equal(
            loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
        )


def test_half_precision_keeps_the_codec_whole(make_avq_lm, processor, scan, tmp_path):
    model = make_avq_lm()
    model.save_pretrained(tmp_path)
    loaded = AVQLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert loaded.avq.codebook_fingerprint() == model.avq.codebook_fingerprint()
    assert loaded.avq.quantizer.codebook.dtype == torch.float32
    for mode in ("codes", "features"):
        loaded.config.fmri_input = mode
        inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
        found = loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert found.shape[1] > inputs["input_ids"].shape[1]


def other_codes(lm, avq, tokenizer, text_tokenizer):
    return lm, AVQTokenizer.from_text_tokenizer(text_tokenizer, 16)


def other_width(lm, avq, tokenizer, text_tokenizer):
    avq.config.text_width = 32
    return lm, tokenizer


def other_table(lm, avq, tokenizer, text_tokenizer):
    with torch.no_grad():
        lm.get_input_embeddings().weight[7, 3] += 1e-3
    return lm, tokenizer


def other_vocabulary(lm, avq, tokenizer, text_tokenizer):
    lm.resize_token_embeddings(200)
    avq.config.text_table_sha256 = None
    return lm, tokenizer


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_codes, r"holds 16 codes, the codec 32\. Build the tokenizer with AVQTokenizer"),
        (other_width, "embeddings are 24 wide, the codec projects to 32"),
        (other_table, r"table of 'tiny' \(sha256 \w{12}\.\.\.\), found another table"),
        (other_vocabulary, r"text vocabulary has \d+ tokens, the language model's table 200 rows"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    make_codec, make_lm, tokenizer, text_tokenizer, fault, message
):
    lm, avq = make_lm(), make_codec()
    avq.set_text_space(lm.get_input_embeddings().weight, "tiny")
    lm, tokenizer = fault(lm, avq, tokenizer, text_tokenizer)
    rows = lm.get_input_embeddings().weight.clone()
    with pytest.raises(ConfigurationError, match=message):
        AVQLMForConditionalGeneration.from_avq_and_lm(avq, lm, tokenizer)
    assert torch.equal(lm.get_input_embeddings().weight, rows)  # untouched


def test_a_table_padded_beyond_its_vocabulary_is_used(make_codec, make_lm, tokenizer):
    lm, avq = make_lm(), make_codec()
    text = lm.get_input_embeddings().weight.clone()
    lm.resize_token_embeddings(len(tokenizer) + 50)
    avq.set_text_space(lm.get_input_embeddings().weight)
    model = AVQLMForConditionalGeneration.from_avq_and_lm(avq, lm, tokenizer)
    table, first = model.get_input_embeddings().weight, tokenizer.fmri_offset
    assert table.shape[0] == len(tokenizer) + 50
    assert torch.equal(table[: len(text)], text)
    assert torch.equal(table[first : first + 32], avq.project_codebook())


def answers(model, inputs, tokens=6):
    """New ids, and the logits of the first of them."""
    found = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    return found.sequences[:, length:], found.logits[0], found.sequences[:, :length]


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_generate_takes_the_output_of_the_processor(make_avq_lm, processor, scan, mode):
    model = make_avq_lm(fmri_input=mode)
    inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
    new, logits, _ = answers(model, inputs)
    assert new.shape == (1, 6)
    # The scan matters: another one gives other logits.
    _, other, _ = answers(model, processor(text=QUESTION, fmri=scan[::-1].copy(), tr=2.0))
    assert (other - logits).abs().max() > 1e-3
    # And forward agrees with generation.
    with torch.no_grad():
        again = model(**inputs).logits[:, -1]
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)


def test_a_scan_is_the_same_as_its_codes_placed_by_hand(make_avq_lm, processor, scan):
    model = make_avq_lm()
    inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
    values = processor.feature_extractor(scan, tr=2.0)["input_values"]
    codes = model.avq.encode(values).codes
    assert torch.equal(model.get_fmri_tokens(values), codes + model.config.fmri_offset)
    by_hand = torch.tensor([processor.prompt_ids(codes.numpy(), QUESTION)])
    new, logits, prompt = answers(model, inputs)
    expected, expected_logits, _ = answers(model, {"input_ids": by_hand})
    assert torch.equal(new, expected)
    assert torch.equal(prompt, by_hand)  # what comes back holds the codes, not placeholders
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    decoded = model.decode_fmri_tokens(prompt[:, 1:7])
    torch.testing.assert_close(decoded, model.avq.decode(codes[:1]).reconstruction)


def test_continuous_features_are_p_of_the_unquantised_latents(make_avq_lm, processor, scan):
    model = make_avq_lm(fmri_input="features")
    values = processor.feature_extractor(scan, tr=2.0)["input_values"]
    features = model.get_fmri_features(values)
    assert features.shape == (2, 6, 24)
    with torch.no_grad():
        latents, _ = model.avq._encode(*model.avq._prepare(values))
        expected = model.avq.projection(F.normalize(latents, dim=-1))
        codes = model.get_input_embeddings()(model.get_fmri_tokens(values))
    torch.testing.assert_close(features, expected)
    assert (features - codes).abs().max() > 1e-2
    model.config.fmri_input = "codes"
    assert torch.equal(model.get_fmri_features(values), codes)


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_left_padding_changes_nothing(make_avq_lm, processor, scan, mode):
    model = make_avq_lm(fmri_input=mode)
    questions = [QUESTION, "Age?"]
    scans = [scan, scan[::-1][:20].copy()]  # two windows and one
    both = processor(text=questions, fmri=scans, tr=2.0)
    assert int((both["attention_mask"] == 0).sum()) > 5
    new, logits, _ = answers(model, both)
    for row, (question, one) in enumerate(zip(questions, scans, strict=True)):
        alone, alone_logits, _ = answers(model, processor(text=question, fmri=one, tr=2.0))
        torch.testing.assert_close(logits[[row]], alone_logits, rtol=0, atol=1e-4)
        assert torch.equal(new[[row]], alone)


def test_text_alone_is_answered_as_by_the_language_model(make_avq_lm, processor):
    model = make_avq_lm()
    inputs = processor(text=QUESTION)
    new, _, _ = answers(model, inputs)
    expected, _, _ = answers(model.language_model, inputs)
    assert torch.equal(new, expected)


def test_a_loss_comes_with_labels(make_avq_lm, processor, scan):
    model = make_avq_lm().train()
    inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    output = model(**inputs, labels=labels)
    output.loss.backward()
    expected = F.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
    torch.testing.assert_close(output.loss, expected)
    # Codes are tokens: their rows learn.
    rows = model.get_input_embeddings().weight.grad[model.get_fmri_tokens(inputs["input_values"])]
    assert rows.abs().sum() > 0


def test_prompts_and_windows_that_do_not_match_are_refused(make_avq_lm, processor, scan):
    model = make_avq_lm()
    inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
    for name in ("input_values", "region_mask", "time_mask"):
        inputs[name] = inputs[name][:1]
    with pytest.raises(ConfigurationError, match="hold 12 placeholders, the windows give 6 codes"):
        model.generate(**inputs, max_new_tokens=1)


def test_the_codec_stays_frozen_and_in_evaluation_mode(make_avq_lm, processor, scan, tmp_path):
    model = make_avq_lm()
    model.save_pretrained(tmp_path)
    for one in (model, AVQLMForConditionalGeneration.from_pretrained(tmp_path)):
        one.train()
        assert one.language_model.training
        assert not any(module.training for module in one.avq.modules())
        assert not any(parameter.requires_grad for parameter in one.avq.parameters())
        assert all(parameter.requires_grad for parameter in one.language_model.parameters())
        before = {name: value.clone() for name, value in one.avq.state_dict().items()}
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1)
        inputs = processor(text=QUESTION, fmri=scan, tr=2.0)
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        for name, value in one.avq.state_dict().items():
            assert torch.equal(value, before[name]), name
