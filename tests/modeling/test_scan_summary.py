"""The summary of a scan's connectivity, and the heads on the last state."""

import pytest
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration, ConfigurationError
from cortexicon.modeling.answer_heads_avq_lm import AnswerHeads
from cortexicon.modeling.scan_summary_avq import FURTHEST, LOUDNESS

QUESTION = "How old is this person?"
TARGETS = [
    {"name": "age", "kind": "number", "minimum": 5, "maximum": 90, "question": "Age?"},
    {"name": "sex", "kind": "class", "classes": ["F", "M"], "question": "Sex?"},
]


def started(model, seed=0):
    """The model with a summary that says something."""
    summary = model.summary
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        torch.randn(part.shape, generator=generator)
        for part in (summary.mean, summary.patterns, summary.offset)
    )
    summary.start(0.05, seed)
    summary.take(*drawn)
    return model.eval()


def test_a_fresh_summary_changes_nothing(make_avq_lm, two_streams, scan):
    plain, summed = make_avq_lm(streams=2), make_avq_lm(streams=2, summary_patterns=3)
    summed.language_model.load_state_dict(plain.language_model.state_dict())
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    arguments = {"max_new_tokens": 2, "do_sample": False}
    torch.testing.assert_close(
        plain.generate(**inputs, **arguments), summed.generate(**inputs, **arguments)
    )


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_scores_are_told_to_every_token_of_the_scan(make_avq_lm, two_streams, scan, mode):
    model = started(make_avq_lm(streams=2, summary_patterns=3, fmri_input=mode))
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
    ids, config = inputs["input_ids"][0].tolist(), model.config
    first, last = ids.index(config.bofc_token_id), ids.index(config.eofc_token_id)
    assert last - first == config.connectome_config.num_tokens + 1
    assert not added[0, :first].any()
    assert not added[0, last + 1 :].any()
    out = model.connectome.encode(inputs["connectivity"])
    vectors = out.quantized if mode == "codes" else out.latents
    values = vectors[..., :-1] / vectors[..., -1:]
    summary = model.summary
    scores = ((values - summary.mean) * summary.patterns).sum((1, 2)) + summary.offset
    wanted = LOUDNESS * scores.clamp(-FURTHEST, FURTHEST) @ weight.T * summary.gain
    torch.testing.assert_close(
        added[0, first : last + 1], wanted.expand(last - first + 1, -1), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_scores_that_are_given_take_the_place_of_those_that_are_read(
    make_avq_lm, two_streams, scan, mode
):
    model = started(make_avq_lm(streams=2, summary_patterns=3, fmri_input=mode))
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0)
    out = model.connectome.encode(inputs["connectivity"])
    own = model.summary.scores(out.quantized if mode == "codes" else out.latents)
    with torch.no_grad():
        plain = model(**inputs).logits
        torch.testing.assert_close(plain, model(**inputs, connectivity_scores=own).logits)
        other = model(**inputs, connectivity_scores=own + 1.0).logits
        assert (plain - other).abs().max() > 1e-4
        silent = model(**inputs, connectivity_scores=torch.zeros(1, 3)).logits
        model.summary.map.weight.zero_()
        torch.testing.assert_close(silent, model(**inputs).logits)


def test_a_silent_summary_tells_no_code_of_those_that_follow(make_avq_lm, two_streams, scan):
    model = started(make_avq_lm(streams=2, summary_patterns=3))
    inputs = two_streams(text=QUESTION, fmri=scan, tr=2.0, streams=("fc",))
    codes = model.connectome.encode(inputs["connectivity"]).codes[0]
    other = codes.clone()
    other[-1] = (other[-1] + 1) % model.connectome.config.num_codes
    rows = torch.tensor([two_streams.scan_ids(None, row) for row in (codes, other)])
    upto = rows.shape[1] - 2  # the last code, then the marker
    with torch.no_grad():
        silent = model(rows, connectivity_scores=torch.zeros(1, 3)).logits[:, :upto]
        telling = model(rows).logits[:, :upto]
    torch.testing.assert_close(silent[0], silent[1])
    assert (telling[0] - telling[1]).abs().max() > 1e-5


def test_ids_of_codes_and_placeholders_give_the_same_answer(make_avq_lm, two_streams, scan):
    model = started(make_avq_lm(streams=2, summary_patterns=3))
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
    model = started(make_avq_lm(streams=2, summary_patterns=3))
    scans = [scan, scan[::-1].copy()]
    inputs = two_streams(text=QUESTION, fmri=scans, tr=2.0, streams=("fc",))
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    both = model.generate(**inputs, **arguments)
    for row, one in enumerate(scans):
        alone = two_streams(text=QUESTION, fmri=one, tr=2.0, streams=("fc",))
        assert torch.equal(model.generate(**alone, **arguments)[0], both[row])


def test_summary_and_heads_are_saved_and_loaded(make_avq_lm, two_streams, scan, tmp_path):
    model = make_avq_lm(streams=2, summary_patterns=3, answer_heads=True, targets=TARGETS)
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
        heads.loss(states[:1], "sex", torch.tensor([[0.0, 1.0]])), torch.tensor([2.0]).log()
    )
    torch.nn.init.constant_(heads.out.bias, 100.0)
    assert heads.read(states, "age").tolist() == [90.0] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"summary_patterns": -1}, "summary_patterns must be an integer >= 0"),
        ({"answer_heads": True}, "answer_heads needs targets"),
        ({"streams": 1, "summary_patterns": 3}, "summary_patterns needs a connectome_config"),
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
