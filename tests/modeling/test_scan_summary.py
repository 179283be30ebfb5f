"""The summary of a scan's connectivity, and the heads on the last state."""

import pytest
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration, ConfigurationError
from cortexicon.modeling.answer_heads_avq_lm import AnswerHeads
from cortexicon.modeling.scan_summary_avq import ScanSummary

QUESTION = "How old is this person?"
TARGETS = [
    {"name": "age", "kind": "number", "minimum": 5, "maximum": 90, "question": "Age?"},
    {"name": "sex", "kind": "class", "classes": ["F", "M"], "question": "Sex?"},
]


def started(model, seed=0):
    """The model with a summary that says something."""
    generator = torch.Generator().manual_seed(seed)
    tokens, codes = model.connectome.config.num_tokens, model.connectome.config.num_codes
    people = torch.randint(codes, (20, tokens), generator=generator)
    model.summary.start(model.connectome.quantizer.codebook[people], 0.05)
    with torch.no_grad():
        model.summary.map.weight.normal_(generator=generator)
    return model.eval()


def test_a_fresh_summary_changes_nothing(make_avq_lm, two_streams, scan):
    plain, summed = make_avq_lm(streams=2), make_avq_lm(streams=2, scan_summary=True)
    summed.language_model.load_state_dict(plain.language_model.state_dict())
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    arguments = {"max_new_tokens": 2, "do_sample": False}
    torch.testing.assert_close(
        plain.generate(**inputs, **arguments), summed.generate(**inputs, **arguments)
    )


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_the_summary_is_a_linear_map_added_to_the_closing_marker(
    make_avq_lm, two_streams, scan, mode
):
    model = started(make_avq_lm(streams=2, scan_summary=True, fmri_input=mode))
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        weight = model.summary.map.weight.clone()
        model.summary.map.weight.zero_()
        model(**inputs)
    hook.remove()
    added = seen[0] - seen[1]
    where = inputs["input_ids"] == model.config.eofc_token_id
    assert where.sum() == 1
    assert not added[~where].any()
    out = model.connectome.encode(inputs["connectivity"])
    vectors = out.quantized if mode == "codes" else out.latents
    values = vectors[..., :-1] / vectors[..., -1:]
    summary = model.summary
    wanted = ((values - summary.mean) / summary.scale).flatten(1) @ weight.T * summary.gain
    torch.testing.assert_close(added[where], wanted, rtol=1e-3, atol=1e-5)


def test_ids_of_codes_and_placeholders_give_the_same_answer(make_avq_lm, two_streams, scan):
    model = started(make_avq_lm(streams=2, scan_summary=True))
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0, streams=("fc",))
    codes = model.connectome.encode(inputs["connectivity"]).codes
    ids = torch.tensor([two_streams.prompt_ids(None, QUESTION, codes[0])])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(input_ids=ids).logits)
        # A hidden code counts as the mean; another code in its place does not.
        hidden = ids.clone()
        hidden[0, 1] = model.config.fmri_token_id
        tokens = model.connectome.config.num_tokens
        known = torch.ones(1, tokens, dtype=torch.bool)
        known[0, 0] = False
        vectors = model.connectome.quantizer.codebook[codes]
        embeds = model._embed_with_summaries(hidden)
        marker = embeds[hidden == model.config.eofc_token_id]
        row = model.get_input_embeddings().weight[model.config.eofc_token_id]
        torch.testing.assert_close(marker - row, model.summary(vectors, known))
        assert (model.summary(vectors, known) - model.summary(vectors)).abs().max() > 1e-4


def test_the_summary_is_read_row_by_row_and_once(make_avq_lm, two_streams, scan):
    model = started(make_avq_lm(streams=2, scan_summary=True))
    scans = [scan, scan[::-1].copy()]
    inputs = two_streams(text=QUESTION, fmri=scans, tr=2.0, streams=("fc",))
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    both = model.generate(**inputs, **arguments)
    for row, one in enumerate(scans):
        alone = two_streams(text=QUESTION, fmri=one, tr=2.0, streams=("fc",))
        assert torch.equal(model.generate(**alone, **arguments)[0], both[row])


def test_noise_is_for_training_and_only_where_there_are_values(make_avq_lm):
    model = started(make_avq_lm(streams=2, scan_summary=True, summary_noise=0.5))
    codebook = model.connectome.quantizer.codebook
    vectors = codebook[: model.connectome.config.num_tokens][None]
    assert torch.equal(model.summary(vectors), model.summary(vectors))
    model.summary.train()
    first, second = model.summary(vectors), model.summary(vectors)
    assert (first - second).abs().max() > 1e-4
    model.summary.used.zero_()
    assert torch.equal(model.summary(vectors), model.summary(vectors))


def test_summary_and_heads_are_saved_and_loaded(make_avq_lm, two_streams, scan, tmp_path):
    model = make_avq_lm(streams=2, scan_summary=True, answer_heads=True, targets=TARGETS)
    started(model)
    model.heads.start({"age": torch.tensor([20.0, 30.0, 40.0])})
    model.save_pretrained(tmp_path)
    again = AVQLMForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    torch.testing.assert_close(model(**inputs).logits, again(**inputs).logits)


def test_heads_answer_the_mean_before_training_and_stay_in_range():
    heads = AnswerHeads(TARGETS, 4)
    heads.reset()
    heads.start({"age": torch.tensor([20.0, 30.0, 40.0])})
    states = torch.randn(5, 4)
    assert heads.read(states, "age").tolist() == [30.0] * 5
    torch.testing.assert_close(heads.read(states, "sex"), torch.full((5, 2), 0.5))
    # Half the squared error in standard deviations: (20 - 30) / 10 = -1.
    loss = heads.loss(states[:1], "age", torch.tensor([20.0]))
    torch.testing.assert_close(loss, torch.tensor([0.5]))
    torch.testing.assert_close(
        heads.loss(states[:1], "sex", torch.tensor([1])), torch.tensor([2.0]).log()
    )
    torch.nn.init.constant_(heads.out.bias, 100.0)
    assert heads.read(states, "age").tolist() == [90.0] * 5


def test_the_mean_of_training_people_is_summed_up_as_nothing(make_avq_lm):
    config = make_avq_lm(streams=2).config.connectome_config
    summary = ScanSummary(config, 8)
    summary.reset()
    vectors = torch.rand(30, config.num_tokens, config.code_dim) + 0.5
    summary.start(vectors, 1.0)
    torch.nn.init.normal_(summary.map.weight)
    values = ScanSummary.values(vectors)
    mean = torch.cat([values.mean(0), torch.ones_like(values[0, :, :1])], -1)[None]
    torch.testing.assert_close(summary(mean), torch.zeros(1, 8), rtol=0, atol=1e-4)
    spread = ((values - summary.mean) / summary.scale).square().sum((1, 2)).mean()
    torch.testing.assert_close(spread, torch.tensor(100.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"summary_noise": -1.0}, "summary_noise must be at least 0"),
        ({"answer_heads": True}, "answer_heads needs targets"),
        ({"streams": 1, "scan_summary": True}, "scan_summary needs a connectome_config"),
    ],
)
def test_configurations_that_cannot_be(make_avq_lm, values, message):
    with pytest.raises(ConfigurationError, match=message):
        make_avq_lm(**{"streams": 2, **values})


def test_latents_for_a_model_of_codes_are_refused(make_avq_lm, two_streams, scan):
    model = make_avq_lm(streams=2)
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0, streams=("fc",))
    latents = model.get_fmri_latents(inputs["connectivity"], stream="fc")
    with pytest.raises(ConfigurationError, match="Latents were given to a model that reads codes"):
        model(input_ids=inputs["input_ids"], connectivity_latents=latents)
