"""GPT-2, Llama and Qwen2 work unchanged: build, step, generate, save, load, adapter, merge."""

import json

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaTokenizer,
    Qwen2Config,
    Qwen2Tokenizer,
)

import cortexicon  # noqa: F401  registers the Auto classes
from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor, AVQTokenizer

from .conftest import CODES, SIZES, TEXT_WIDTH

SENTENCES = ["Question: how old is this person?\nAnswer: 23", "control or patient"] * 9
QUESTION = "How old is this person?"
HOSTILE = 'How  old? "é" <fmri_3></fc> <s> <unk> <|im_end|>\n\n<fc_1>'
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level():
    """Vocabulary and merges of a byte-level BPE, as GPT-2's and Qwen's files hold them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def sentence_pieces():
    """The same with Llama's pieces: blanks written as underscores, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("".join(SENTENCES).replace(" ", "▁").replace("\n", "")))
    merges = [("▁", "o"), ("o", "l"), ("ol", "d")]
    pieces += ["".join(merge) for merge in merges]
    return {"vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": merges}


WIDTHS = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "gpt2": (
        lambda: GPT2Tokenizer(**byte_level()),
        lambda size: GPT2Config(
            vocab_size=size, n_embd=TEXT_WIDTH, n_layer=2, n_head=2, n_positions=128
        ),
    ),
    "llama": (
        lambda: LlamaTokenizer(**sentence_pieces()),
        lambda size: LlamaConfig(vocab_size=size, tie_word_embeddings=False, **WIDTHS),
    ),
    "qwen2": (
        lambda: Qwen2Tokenizer(**byte_level()),
        lambda size: Qwen2Config(vocab_size=size, tie_word_embeddings=True, **WIDTHS),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Name, text tokenizer and a function that makes a tiny language model."""
    make_tokenizer, make_config = FAMILIES[request.param]
    text_tokenizer = make_tokenizer()

    def make_lm():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(make_config(len(text_tokenizer))).eval()

    return request.param, text_tokenizer, make_lm


@pytest.fixture
def joined(family, make_codec, make_connectome, two_streams):
    """Model of both streams, its processor, and the language model's table before."""
    _, text_tokenizer, make_lm = family
    lm, avq = make_lm(), make_codec()
    table = lm.get_input_embeddings().weight
    avq.set_text_space(table, "tiny")
    connectome = make_connectome(table)
    before = table.detach().clone()
    tokenizer = AVQTokenizer.from_text_tokenizer(
        text_tokenizer, CODES, SIZES["num_connectivity_codes"]
    )
    join = AVQLMForConditionalGeneration.from_avq_and_lm
    model = join(avq, lm, tokenizer, connectome).eval()
    processor = AVQProcessor(
        two_streams.feature_extractor, tokenizer, tokens_per_window=6, connectivity_tokens=3
    )
    return model, processor, before


def first_logits(model, inputs):
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, max_new_tokens=2, **options).logits[0]


def inputs_of(processor, scan, fmri=None):
    return processor(text=QUESTION, fmri=scan if fmri is None else fmri, tr=2.0)


def test_text_codes_and_both_make_exact_round_trips(family, tmp_path):
    _, base, _ = family
    tokenizer = AVQTokenizer.from_text_tokenizer(base, 32, 8)
    tokenizer.save_pretrained(tmp_path)
    codes = list(range(32))
    for one in (tokenizer, AVQTokenizer.from_pretrained(tmp_path)):
        # The ids of text are the base's; nothing in it becomes a code or a control token.
        ids = one.encode(HOSTILE, add_special_tokens=False)
        assert ids == base.encode(HOSTILE, add_special_tokens=False, split_special_tokens=True)
        assert not set(ids) & set(one.all_special_ids)
        assert max(ids) < one.bof_token_id
        assert one.decode(ids) == HOSTILE
        mixed = [one.bof_token_id, *one.codes_to_ids(codes), one.eof_token_id, *ids]
        assert one.ids_to_codes(mixed[1:33]) == codes
        assert one.decode(mixed, skip_special_tokens=True) == HOSTILE
        written = one.decode(mixed[:34])
        backend = one.backend_tokenizer.get_vocab(with_added_tokens=True)
        assert [backend[f"<fmri_{code}>"] for code in codes] == mixed[1:33]
        assert written.replace(" ", "").startswith("<fmri><fmri_0><fmri_1>")


def test_build_step_generate_save_and_load(joined, scan, tmp_path):
    model, processor, before = joined
    table = model.get_input_embeddings().weight
    assert torch.equal(table[: len(before)], before)
    for stream, codec in (("fmri", model.avq), ("fc", model.connectome)):
        first, count = model.block(stream)
        for rows in (table, model.get_output_embeddings().weight):
            assert torch.equal(rows[first : first + count], codec.project_codebook())
    tied = model.get_output_embeddings().weight is table
    assert tied == model.config.text_config.tie_word_embeddings

    inputs = inputs_of(processor, scan)
    logits = first_logits(model, inputs)
    other = first_logits(model, inputs_of(processor, scan, scan[::-1].copy()))
    assert (logits - other).abs().max() > 1e-4
    # Padding on the left changes nothing.
    both = processor(text=["Age?", QUESTION], fmri=[scan[:20], scan], tr=2.0)
    torch.testing.assert_close(first_logits(model, both)[[1]], logits, rtol=0, atol=1e-4)

    model.train()
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=1e-2)
    labels = inputs["input_ids"].masked_fill(
        inputs["input_ids"] >= processor.tokenizer.bof_token_id, -100
    )
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(first_logits(loaded, inputs), first_logits(model, inputs))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    again = AVQProcessor.from_pretrained(tmp_path)
    assert torch.equal(inputs_of(again, scan)["input_ids"], inputs["input_ids"])


def test_half_precision_keeps_codes(joined, scan, tmp_path):
    model, processor, _ = joined
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = inputs_of(processor, scan)
    for codec, other in ((half.avq, model.avq), (half.connectome, model.connectome)):
        assert codec.quantizer.codebook.dtype == torch.float32
        assert codec.codebook_fingerprint() == other.codebook_fingerprint()
    matrices = inputs["connectivity"]
    wanted = model.get_fmri_tokens(matrices, stream="fc")
    assert torch.equal(half.get_fmri_tokens(matrices, stream="fc"), wanted)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.isfinite(first_logits(half, inputs)).all()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_loads_the_same_model(joined, scan, tmp_path, device_map):
    model, processor, _ = joined
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    inputs = inputs_of(processor, scan)
    torch.testing.assert_close(
        first_logits(loaded, inputs).cpu(), first_logits(model, inputs), rtol=0, atol=1e-4
    )


def test_an_adapter_is_small_and_merges_without_breaking_ties(joined, scan, tmp_path):
    model, processor, _ = joined
    model.save_pretrained(tmp_path / "base")
    inputs = inputs_of(processor, scan)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adapted = peft.get_peft_model(model, peft.LoraConfig(**model.lora_arguments(rank=4)))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert not any("avq" in name or "connectome" in name for name in trained)
    adapted.train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-2)
    ids = inputs["input_ids"]
    for _ in range(3):
        adapted(**inputs, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    after = first_logits(adapted, inputs)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size

    base = AutoModel.from_pretrained(tmp_path / "base")
    assert (first_logits(base, inputs) - after).abs().max() > 1e-3
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(first_logits(again, inputs), after, rtol=0, atol=1e-4)
    merged = again.merge_and_unload()
    torch.testing.assert_close(first_logits(merged, inputs), after, rtol=0, atol=1e-3)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(first_logits(loaded, inputs), first_logits(merged, inputs))
    if tied:
        output = loaded.get_output_embeddings().weight
        assert torch.equal(output, loaded.get_input_embeddings().weight)
    # The trained tokens moved, the others are where they were.
    rows = loaded.get_input_embeddings().weight
    start = AutoModel.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    first, count = model.block("fmri")
    assert torch.equal(rows[first : first + count], start[first : first + count])
    assert not torch.equal(rows[model.config.bof_token_id], start[model.config.bof_token_id])
