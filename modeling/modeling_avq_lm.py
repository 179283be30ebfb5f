"""A causal language model whose vocabulary holds fMRI codes: it reads, answers and writes them."""

import inspect
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .answer_heads_avq_lm import AnswerHeads
from .configuration_avq import ConfigurationError
from .configuration_avq_lm import AVQLMConfig
from .generation_avq_lm import ConstrainedGeneration
from .modeling_avq import AVQModel, tensor_sha256
from .modeling_avq_connectome import AVQConnectomeModel
from .scan_inputs_avq_lm import SCAN_INPUTS, ScanInputs
from .scan_summary_avq import ScanSummary


class AVQLMForConditionalGeneration(
    ScanInputs, ConstrainedGeneration, PreTrainedModel, GenerationMixin
):
    """An `AVQModel` and any causal language model over one vocabulary of text and codes.

    Tricks used, one line each:

    * codes are ordinary tokens: id = block offset + code, so every generation tool of the
      language model works on them;
    * two streams: "fmri", the dynamics of windows, and "fc", the connectivity of a scan (an
      `AVQConnectomeModel`, optional), each with its own block of ids and its own markers;
    * the rows of codes start as P(codebook), bit for bit: where the codec's domain classifier put
      them;
    * the codecs are frozen and always in evaluation mode, so a scan's codes never depend on
      training the language model;
    * `fmri_input="features"` feeds continuous projected features at the same places instead, for
      comparison;
    * `summary_patterns` adds to the tokens of a scan's connectivity what fitted patterns read in
      all of them (`ScanSummary`): a small language model could not learn it from few scans.

    Method names follow the multimodal models of transformers (Chameleon, Emu3, Janus).
    """

    config: AVQLMConfig
    config_class = AVQLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    # NOTE: none of its own, but a mapping: only then does peft look for those of the language
    # model, and an adapter that trains single rows keeps input and output tied.
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: AVQLMConfig):
        super().__init__(config)
        self.avq = AVQModel._from_config(config.avq_config)
        self.connectome = None
        if config.connectome_config is not None:
            self.connectome = AVQConnectomeModel._from_config(config.connectome_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.summary, self.heads = None, None
        width = self.language_model.get_input_embeddings().weight.shape[1]
        if config.answer_heads:
            self.heads = AnswerHeads(config.targets, width)
        if config.summary_patterns:
            self.summary = ScanSummary(config.connectome_config, width, config.summary_patterns)
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (AnswerHeads, ScanSummary)):
            module.reset()
            return
        # Both halves initialise themselves; this is reached only for modules of a foreign language
        # model.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    # ------------------------------------------------------------------ making one of two

    @classmethod
    @torch.no_grad()
    def from_avq_and_lm(cls, avq, lm, tokenizer, connectome=None, **config_values):
        """Join trained codecs and a causal language model over the vocabulary of `tokenizer`.

        Parameters
        ----------
        avq : AVQModel
            Its text space must be `lm`'s embedding table (`AVQModel.set_text_space`).
        lm : PreTrainedModel
            Any causal language model with the text vocabulary that `tokenizer` was made from. It is
            resized in place.
        tokenizer : AVQTokenizer
        connectome : AVQConnectomeModel, optional
            The connectivity stream, in the same text space.
        **config_values
            Further fields of `AVQLMConfig`.

        Returns
        -------
        AVQLMForConditionalGeneration
            Text rows unchanged, ties kept, rows of codes bit-equal to each codec's
            `project_codebook()`.

        Raises
        ------
        ConfigurationError
            Another number of codes, another width, another text vocabulary, or another text table
            than a codec was aligned with.
        """
        table = lm.get_input_embeddings().weight
        blocks = [(avq, tokenizer.num_codes, tokenizer.fmri_offset)]
        if connectome is not None:
            offset = tokenizer.connectivity_offset
            blocks.append((connectome, tokenizer.num_connectivity_codes, offset))
        for codec, held, _ in blocks:
            _check_codec(codec, held, table)
        text_rows = tokenizer.bof_token_id  # the first marker follows the text vocabulary
        if text_rows > table.shape[0]:
            raise ConfigurationError(
                f"The tokenizer's text vocabulary has {text_rows} tokens, the language model's "
                f"table {table.shape[0]} rows. Build the tokenizer from this language model's own."
            )
        mean, scale = table.mean(0), (table - table.mean(0)).std()
        # Tables are often padded beyond their vocabulary: new tokens take those rows first.
        size = max(len(tokenizer), table.shape[0])
        # NOTE: the default mean_resizing makes all new rows alike; they are all written below.
        lm.resize_token_embeddings(size, mean_resizing=False)
        generator = torch.Generator().manual_seed(0)
        fresh = torch.randn(size - text_rows, table.shape[1], generator=generator).to(mean)
        rows = [lm.get_input_embeddings().weight]
        output = lm.get_output_embeddings()
        if output is not None and output.weight is not rows[0]:
            rows.append(output.weight)
        for weight in rows:
            weight[text_rows:] = mean + scale * fresh
            for codec, held, offset in blocks:
                weight[offset : offset + held] = codec.project_codebook().to(weight)
        config = AVQLMConfig(
            avq_config=avq.config.to_dict(),
            text_config=lm.config.to_dict(),
            connectome_config=None if connectome is None else connectome.config.to_dict(),
            fmri_offset=tokenizer.fmri_offset,
            connectivity_offset=tokenizer.connectivity_offset,
            fmri_token_id=tokenizer.fmri_token_id,
            bof_token_id=tokenizer.bof_token_id,
            eof_token_id=tokenizer.eof_token_id,
            sep_token_id=tokenizer.fmri_sep_token_id,
            bofc_token_id=tokenizer.bofc_token_id,
            eofc_token_id=tokenizer.eofc_token_id,
            **config_values,
        )
        model = cls(config)
        model.avq.load_state_dict(avq.state_dict())
        if connectome is not None:
            model.connectome.load_state_dict(connectome.state_dict())
        model.language_model.load_state_dict(lm.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    # ------------------------------------------------------------------ the language model

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        input_values=None,
        region_coordinates=None,
        region_mask=None,
        time_mask=None,
        num_windows=None,
        connectivity=None,
        connectivity_mask=None,
        fmri_latents=None,
        connectivity_latents=None,
        connectivity_scores=None,
        inputs_embeds=None,
        position_ids=None,
        labels=None,
        **kwargs,
    ):
        """The language model's forward pass; what is given of a scan fills the placeholders.

        Parameters
        ----------
        input_ids : int64, shape (batch, sequence)
        attention_mask : bool or int, shape (batch, sequence)
        input_values : float32, shape (windows, time, regions), optional
            All windows of the batch, in the order of the placeholders.
        num_windows : int64, shape (scans,), optional
            Comes with the output of an `AVQProcessor`; the placeholders already say as much.
        connectivity : float32, shape (scans, regions, regions), optional
            Fisher z, for the placeholders between `<fc>` and `</fc>`.
        connectivity_mask : bool, shape (scans, regions), optional
            False for regions without a signal in the scan.
        fmri_latents : float32, shape (windows, tokens, code_dim), optional
        connectivity_latents : float32, shape (scans, tokens, code_dim), optional
            In place of `input_values` and `connectivity`, with `fmri_input` "features": what
            `get_fmri_latents` gave.
        connectivity_scores : float32, shape (scans, patterns), optional
            In place of what the summary's patterns read: in training, from patterns that were
            fitted without the person. Zeros, shape (1, patterns), say nothing: where codes are
            to be predicted, for a summary of all of them would tell the next one.
        position_ids : int64, shape (batch, sequence), optional
            `generate` makes them from the attention mask, so that padding shifts no position.
        labels : int64, shape (batch, sequence), optional

        Returns
        -------
        CausalLMOutputWithPast or the language model's own output
        """
        scan = {
            "input_values": input_values,
            "region_coordinates": region_coordinates,
            "region_mask": region_mask,
            "time_mask": time_mask,
            "connectivity": connectivity,
            "connectivity_mask": connectivity_mask,
            "fmri_latents": fmri_latents,
            "connectivity_latents": connectivity_latents,
        }
        if input_ids is not None and self._scan_given(scan):
            placed = self._place(input_ids, scan, connectivity_scores)
            input_ids, inputs_embeds = placed.get("input_ids"), placed.get("inputs_embeds")
        if inputs_embeds is None and self.summary is not None:
            inputs_embeds = self._embed_with_summaries(input_ids, connectivity_scores)
        if inputs_embeds is not None:
            input_ids = None
        takes = inspect.signature(self.language_model.forward).parameters
        if position_ids is not None and "position_ids" in takes:  # not every model has positions
            kwargs["position_ids"] = position_ids
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            **kwargs,
        )

    def generate(self, inputs=None, **kwargs):
        """`GenerationMixin.generate`; takes the output of an `AVQProcessor` as it is."""
        scan = {key: kwargs.pop(key, None) for key in SCAN_INPUTS}
        if self._scan_given(scan):
            input_ids = inputs if inputs is not None else kwargs.pop("input_ids")
            placed = self._place(input_ids, scan)
            # With features the ids stay beside the embeddings, so that what is returned holds the
            # prompt either way.
            inputs, kwargs = None, {"input_ids": input_ids, **kwargs, **placed}
        return super().generate(inputs, **kwargs)

    def lora_arguments(self, rank: int = 8, dropout: float = 0.0) -> dict:
        """Arguments of a `peft.LoraConfig`: all linear layers of the LLM and the markers' rows.

        The markers are the only new tokens whose rows begin at random; rows of codes stay
        P(codebook). `peft` trains single rows (`trainable_token_indices`), so that the adapter
        stays small and a merged model keeps its ties. Save it with
        ``save_pretrained(folder, save_embedding_layers=False)``.
        """
        config = self.config
        linear = tuple(
            name
            for name, module in self.language_model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and module is not self.language_model.get_output_embeddings()
        )
        table = self.language_model.get_input_embeddings()
        (path,) = (name for name, module in self.named_modules() if module is table)
        markers = {
            config.bof_token_id,
            config.eof_token_id,
            config.sep_token_id,
            config.bofc_token_id,
            config.eofc_token_id,
        }
        first = next(iter(self.language_model.get_submodule(name) for name in linear))
        return {
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": dropout,
            "target_modules": [f"language_model.{name}" for name in linear],
            "trainable_token_indices": {path: sorted(markers)},
            "fan_in_fan_out": isinstance(first, Conv1D),
        }

    def train(self, mode: bool = True):
        """Training mode for the language model only: the codecs must not move."""
        super().train(mode)
        # Not in __init__ alone: loading a checkpoint makes new, trainable parameters, and then
        # calls this.
        for codec in (self.avq, self.connectome):
            if codec is not None:
                codec.requires_grad_(False)
                codec.eval()
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def get_decoder(self):
        return self.language_model.get_decoder()


def _check_codec(codec, held, table):
    """Refuse a codec of another size, width or text table than the vocabulary's."""
    config, what = codec.config, "codec"
    if isinstance(codec, AVQConnectomeModel):
        what = "connectivity codec"
    if held != config.num_codes:
        raise ConfigurationError(
            f"The tokenizer holds {held} codes, the {what} {config.num_codes}. Build the tokenizer "
            "with AVQTokenizer.from_text_tokenizer(text_tokenizer, num_codes, "
            "num_connectivity_codes), each as in the codec's config."
        )
    if table.shape[1] != config.text_width:
        raise ConfigurationError(
            f"The language model's embeddings are {table.shape[1]} wide, the {what} projects to "
            f"{config.text_width}. Train the codec for this language model."
        )
    if config.text_table_sha256 not in (None, tensor_sha256(table)):
        raise ConfigurationError(
            f"The {what} was aligned with the embedding table of {config.text_model_id!r} "
            f"(sha256 {config.text_table_sha256[:12]}...), found another table (sha256 "
            f"{tensor_sha256(table)[:12]}...). Pass the language model that it was trained with."
        )


AVQLMConfig.register_for_auto_class()
AVQLMForConditionalGeneration.register_for_auto_class("AutoModel")
